"""The built machine code holds the tensor-core instructions each precision claims.

Portable kernels: int8 products are IMMA and 16-bit products HMMA on every architecture here. The
e4m3 `mma.sync` is QMMA on sm_89 and sm_120; sm_90 and sm_100 have no such instruction (their fp8
products are those of a warpgroup or of tensor memory), so ptxas turns it into a conversion,
F2FP.F16.E4M3.UNPACK, and HMMA: that is what is looked for there.

Hopper kernels (sm_90a): the products of a warpgroup, IGMMA, QGMMA and HGMMA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from package_tools import REPOSITORY, Package, cuobjdump, find_package, missing

# Parts of the kernels' mangled names.
ATTENTION = "attn_fwd_kernel"
ATTENTION_SM90 = "attn_fwd_sm90_kernel"
# The other Hopper kernels: how many instances (by head_dim, or by dtype, head_dim and quant, `none`
# also for the backward pass, int8_fp8 also for long sequences), and how many accesses to local
# memory. Projection with head_dim 128 parks two registers while it splits the weight.
HELPERS_SM90 = {
    "SplitProjectParams": (2, 4),
    "route_kernel": (2, 0),
    "linear_kernel": (16, 0),
    "complement_sm90_kernel": (2, 0),
    "bwd_rows_sm90_kernel": (4, 0),
    "bwd_columns_sm90_kernel": (4, 0),
}
FP8 = {
    "89": r"QMMA\.\S*E4M3",
    "90": r"F2FP\.F16\.E4M3\.UNPACK",
    "100": r"F2FP\.F16\.E4M3\.UNPACK",
    "120": r"QMMA\.\S*E4M3",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return find_package(tmp_path_factory.mktemp("wheel"))


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        match = re.search(r"0x([0-9a-f]+)", self.operands) if self.name[:3] == "BRA" else None
        return None if match is None else int(match[1], 16)


Code = list[Instruction]


def parse_sass(text: str) -> dict[str, dict[str, Code]]:
    """architecture -> function -> its instructions, from the output of cuobjdump -sass."""
    code: dict[str, dict[str, Code]] = defaultdict(dict)
    arch = ""
    instructions: Code = []
    pattern = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
    for line in text.splitlines():
        if match := re.match(r"\s*code for sm_(\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            instructions = code[arch][match[1]] = []
        elif match := pattern.match(line):
            instructions.append(Instruction(int(match[1], 16), match[2], match[3]))
    return code


@pytest.fixture(scope="module")
def sass(package: Package) -> dict[str, dict[str, Code]]:
    return parse_sass(cuobjdump("-sass", str(package.library)))


def kernels_named(functions: dict[str, Code], part: str) -> dict[str, Code]:
    return {name: code for name, code in functions.items() if part in name}


@pytest.fixture(scope="module")
def hopper(sass: dict[str, dict[str, Code]]) -> dict[str, Code]:
    """The functions for sm_90a."""
    if "90a" not in sass:
        missing("this package holds no code for sm_90a; set SLA2_CUDA_ARCHS")
    return sass["90a"]


def has(code: Code, pattern: str) -> bool:
    return any(re.match(pattern, instruction.name) for instruction in code)


def local_memory(code: Code) -> int:
    return sum(instruction.name.startswith(("STL", "LDL")) for instruction in code)


def test_every_architecture_has_the_attention_kernels(
    package: Package, sass: dict[str, dict[str, Code]]
) -> None:
    archs = {arch for arch in package.info["ARCHS"].split(";") if not arch.endswith("-virtual")}
    assert set(sass) == archs
    counts = {arch: len(kernels_named(functions, ATTENTION)) for arch, functions in sass.items()}
    # dtype x head_dim x quant
    assert all(count >= 12 for count in counts.values()), counts


# ---- portable kernels ---------------------------------------------------------------------------


def test_tensor_core_instructions(sass: dict[str, dict[str, Code]]) -> None:
    assert sass
    for arch, functions in sass.items():
        kernels = list(kernels_named(functions, ATTENTION).values())
        unquantised = [code for code in kernels if has(code, "HMMA") and not has(code, "IMMA")]
        int8 = [code for code in kernels if has(code, r"IMMA\.\S*S8\.S8")]
        assert len(unquantised) >= 4, f"sm_{arch}: 16-bit kernels of 2 dtypes and 2 head_dims"
        assert [code for code in int8 if has(code, "HMMA")], f"sm_{arch}: no int8_fp16 kernel"
        pattern = FP8.get(arch.rstrip("af"))
        if pattern is not None:
            fp8 = [code for code in int8 if has(code, pattern)]
            assert len(fp8) >= 4, f"sm_{arch}: int8_fp8 kernels of 2 dtypes and 2 head_dims"


def main_loop(code: Code) -> Code:
    """From the first tensor-core instruction to the last one before the next barrier."""
    products = [i for i, x in enumerate(code) if re.match(r"(I|H|Q)MMA\.", x.name)]
    barriers = [i for i, x in enumerate(code) if x.name.startswith("BAR")]
    end = min((i for i in barriers if i > products[0]), default=len(code))
    return code[products[0] : max(i for i in products if i < end) + 1]


def test_no_register_spills(sass: dict[str, dict[str, Code]]) -> None:
    """None between the products of the main loop; around it a few that run once per CTA.

    The head_dim 128 kernels use all 255 registers, and ptxas parks some of the prologue's and
    epilogue's values: at most 40 accesses are allowed (24 seen).
    """
    spills = {}
    for arch, functions in sass.items():
        for name, code in kernels_named(functions, ATTENTION).items():
            inside, total = local_memory(main_loop(code)), local_memory(code)
            if inside > 0 or total > 40:
                spills[f"sm_{arch} {name}"] = (inside, total)
    assert spills == {}


# ---- Hopper kernels -----------------------------------------------------------------------------


def test_hopper_products(hopper: dict[str, Code]) -> None:
    """int8_fp8: Q K^T is IGMMA, P V QGMMA, e H HGMMA; none: all are HGMMA."""
    kernels = kernels_named(hopper, ATTENTION_SM90).values()
    int8 = [code for code in kernels if has(code, "IGMMA")]
    unquantised = [code for code in kernels if not has(code, "IGMMA")]
    assert len(int8) == len(unquantised) == 4  # dtype x head_dim
    for code in int8:
        assert has(code, r"IGMMA\.64x64x32\.S8\.S8") and has(code, r"QGMMA\.\S*E4M3\.E4M3")
        assert has(code, "HGMMA")
    for code in unquantised:
        assert has(code, "HGMMA") and not has(code, "QGMMA")
    linear = kernels_named(hopper, "linear_kernel")
    assert {name for name, code in linear.items() if has(code, r"QGMMA\.\S*E4M3\.E4M3")} == set(
        kernels_named(linear, "LinearE4m3")
    )
    for part, (count, _) in HELPERS_SM90.items():
        helpers = kernels_named(hopper, part)
        assert len(helpers) == count, part
        assert all(has(code, "HGMMA") for code in helpers.values()), part


def product_loops(code: Code) -> list[Code]:
    """The loops around products of a warpgroup.

    A failed wait for an mbarrier is retried behind the function's last EXIT, which then branches
    back: no loop.
    """
    spans = [
        [x for x in code if branch.target <= x.address <= branch.address]
        for branch in code
        if branch.target is not None
    ]
    return [span for span in spans if has(span, r"\wGMMA") and not has(span, "EXIT")]


def test_hopper_loops_stay_in_registers(hopper: dict[str, Code]) -> None:
    """The 128 registers of int8_fp8 are all in use: its prologue and epilogue may spill. In "none"
    the loop over query blocks is one of the loops around products."""
    for name, code in kernels_named(hopper, ATTENTION_SM90).items():
        loops = product_loops(code)  # over key blocks; over the parts of H if there are several
        assert 1 <= len(loops) <= 2, name
        assert [local_memory(loop) for loop in loops] == [0] * len(loops), name
    for part, (_, allowed) in HELPERS_SM90.items():
        for name, code in kernels_named(hopper, part).items():
            assert local_memory(code) <= allowed, name


def hopper_sources() -> list[str]:
    """The sources of sm_90a code, and the variants of the attention kernel of int8_fp8."""
    text = (REPOSITORY / "CMakeLists.txt").read_text()
    (sources,) = re.findall(r"set\(SLA2_SM90_SOURCES\s([^)]*)\)", text)
    (variants,) = re.findall(r"set\(SLA2_ATTN_FWD_SM90_VARIANTS\s([^)]*)\)", text)
    return [*sources.split(), *re.findall(r'"([^"]+)"', variants)]


def test_hopper_sources_are_found() -> None:
    assert len(hopper_sources()) >= 8 + 4


@pytest.mark.parametrize("source", hopper_sources())
def test_ptxas_does_not_serialise_products(source: str, tmp_path: Path) -> None:
    """ptxas tells of products that it makes wait for each other, C7510 and its neighbours, and does
    not fail. C7519, a fence of its own before a product, makes that product wait as well.
    """
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        missing("nvcc is not on PATH")
    path = REPOSITORY / source
    if "|" in source:
        dtype, head_dim, _ = source.split("|")
        template = REPOSITORY / "csrc/kernels/sm90/attn_fwd_instance.cu.in"
        text = template.read_text().replace("@SLA2_HEAD_DIM@", head_dim)
        text = text.replace("@SLA2_DTYPE_CPP@", {"bf16": "__nv_bfloat16", "fp16": "__half"}[dtype])
        path = tmp_path / "instance.cu"
        path.write_text(text)
    csrc = REPOSITORY / "csrc"
    command = [nvcc, "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-Xptxas=-v", "-cubin"]
    command += [f"-I{csrc}", f"-I{csrc / 'include'}", "-o", str(tmp_path / "code"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert "ptxas info" in output, "ptxas is silent"
    warnings = re.findall(r".*\(C75\d\d\).*", output)
    assert warnings == []
