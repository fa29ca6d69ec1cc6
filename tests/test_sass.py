"""The built machine code holds the tensor-core instructions each precision claims.

int8 products are IMMA and 16-bit products HMMA on every architecture here. The e4m3 `mma.sync` is
QMMA on sm_89 and sm_120; sm_90 and sm_100 have no such instruction (their fp8 products are those of
a warpgroup or of tensor memory), so ptxas turns it into a conversion, F2FP.F16.E4M3.UNPACK, and
HMMA: that is what is looked for there.
"""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
from package_tools import Package, cuobjdump, find_package

ATTENTION = "attn_fwd"
FP8 = {
    "89": r"QMMA\.\S*E4M3",
    "90": r"F2FP\.F16\.E4M3\.UNPACK",
    "100": r"F2FP\.F16\.E4M3\.UNPACK",
    "120": r"QMMA\.\S*E4M3",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return find_package(tmp_path_factory.mktemp("wheel"))


def parse_sass(text: str) -> dict[str, dict[str, list[str]]]:
    """architecture -> function -> its instructions, from the output of cuobjdump -sass."""
    code: dict[str, dict[str, list[str]]] = defaultdict(dict)
    arch = ""
    instructions: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"\s*code for sm_(\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            instructions = code[arch][match[1]] = []
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            instructions.append(match[1])
    return code


@pytest.fixture(scope="module")
def sass(package: Package) -> dict[str, dict[str, list[str]]]:
    return parse_sass(cuobjdump("-sass", str(package.library)))


def attention_kernels(functions: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: code for name, code in functions.items() if ATTENTION in name}


def has(code: list[str], pattern: str) -> bool:
    return any(re.match(pattern, instruction) for instruction in code)


def test_every_architecture_has_the_attention_kernels(
    package: Package, sass: dict[str, dict[str, list[str]]]
) -> None:
    archs = {arch for arch in package.info["ARCHS"].split(";") if not arch.endswith("-virtual")}
    assert set(sass) == archs
    counts = {arch: len(attention_kernels(functions)) for arch, functions in sass.items()}
    # dtype x head_dim x quant
    assert all(count >= 12 for count in counts.values()), counts


def test_tensor_core_instructions(sass: dict[str, dict[str, list[str]]]) -> None:
    assert sass
    for arch, functions in sass.items():
        kernels = list(attention_kernels(functions).values())
        unquantised = [code for code in kernels if has(code, "HMMA") and not has(code, "IMMA")]
        int8 = [code for code in kernels if has(code, r"IMMA\.\S*S8\.S8")]
        assert len(unquantised) >= 4, f"sm_{arch}: 16-bit kernels of 2 dtypes and 2 head_dims"
        assert [code for code in int8 if has(code, "HMMA")], f"sm_{arch}: no int8_fp16 kernel"
        pattern = FP8.get(arch.rstrip("af"))
        if pattern is not None:
            fp8 = [code for code in int8 if has(code, pattern)]
            assert len(fp8) >= 4, f"sm_{arch}: int8_fp8 kernels of 2 dtypes and 2 head_dims"


def main_loop(code: list[str]) -> list[str]:
    """From the first tensor-core instruction to the last one before the next barrier."""
    products = [i for i, instruction in enumerate(code) if re.match(r"(I|H|Q)MMA\.", instruction)]
    barriers = [i for i, instruction in enumerate(code) if instruction.startswith("BAR")]
    end = min((i for i in barriers if i > products[0]), default=len(code))
    return code[products[0] : max(i for i in products if i < end) + 1]


def local_memory(code: list[str]) -> int:
    return sum(instruction.startswith(("STL", "LDL")) for instruction in code)


def test_no_register_spills(sass: dict[str, dict[str, list[str]]]) -> None:
    """None between the products of the main loop; around it a few that run once per CTA.

    The head_dim 128 kernels use all 255 registers, and ptxas parks some of the prologue's and
    epilogue's values: at most 40 accesses are allowed (24 seen).
    """
    spills = {}
    for arch, functions in sass.items():
        for name, code in attention_kernels(functions).items():
            inside, total = local_memory(main_loop(code)), local_memory(code)
            if inside > 0 or total > 40:
                spills[f"sm_{arch} {name}"] = (inside, total)
    assert spills == {}
