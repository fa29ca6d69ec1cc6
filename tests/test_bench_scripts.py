"""The scripts of bench/ and the shapes of `sla2 bench`: counts, names, files; nothing is timed."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from package_tools import REPOSITORY

from sla2.cli import main
from sla2.cli.bench_work import Shape
from sla2.cli.device import ROUTED_BY_SM90
from sla2.cli.errors import CliError
from sla2.cli.parser import SHAPES, build_parser, parse_shape

CSRC = REPOSITORY / "csrc"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench_stages = load("bench_stages")
plot_scaling = load("plot_scaling")

# ---- sla2 bench --shape -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("wan1.3b-480p", (1, 12, 32760, 128)),
        ("wan14b-720p", (1, 40, 75600, 128)),
        ("2x3x300x64", (2, 3, 300, 64)),
        ("2X3X300X64", (2, 3, 300, 64)),
    ],
)
def test_shape_is_a_model_or_four_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_shape(text) == sizes


@pytest.mark.parametrize(
    "text",
    [
        *("", "wan", "wan1.3b", "300", "2x300x64", "1x2x3x300x64", "2x3x300x", "2,3,300,64"),
        *("0x3x300x64", "2x3x0x64", "2x-3x300x64", "2x3x3e2x64", "2x3x300.0x64", "\u00b2x1x1x64"),
    ],
)
def test_other_shapes_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse_shape(text)
    message = str(caught.value)
    assert message.startswith(f"{text} is neither a model (wan1.3b-480p, wan14b-720p) ")
    assert message.endswith("nor BxHxNxD such as 1x12x32760x128")


def test_bad_shape_gives_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--shape", "1x1x65x64", "2x300x64"]) == 2
    assert "--shape: 2x300x64 is neither a model" in capsys.readouterr().err


def test_shapes_add_up() -> None:
    parse = build_parser().parse_args
    assert parse(["bench"]).shape is None
    given = ["--shape", "wan14b-720p", "2x3x300x64", "--shape", "1x1x65x64", "--topk", "0.1"]
    assert parse(["bench", *given]).shape == [(1, 40, 75600, 128), (2, 3, 300, 64), (1, 1, 65, 64)]


def test_bench_takes_every_shape(tmp_path: Path) -> None:
    shapes = ["--shape", "1x1x65x64", "2x1x130x64", "--seqlen", "70", "--heads", "3"]
    options = ["--head-dim", "64", "--iters", "1", "--warmup", "0", "--output", str(tmp_path)]
    assert main(["bench", "--device", "cpu", *shapes, *options]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())
    sizes = [tuple(row[name] for name in "BHND") for row in rows]
    assert sizes == [(1, 1, 65, 64), (2, 1, 130, 64), (1, 3, 70, 64)]


# ---- bench_stages: counts -----------------------------------------------------------------------

# T_m = 3, T_n = 5, with a tail in both; a share of 0.5 keeps K = 2.
SMALL = Shape(batch=1, heads=2, seqlen=300, head_dim=64)

TENSOR = 2 * 300 * 64 * 2
Q_MEAN, K_SUM, V_AMAX = 2 * 3 * 64 * 4, 2 * 5 * 64 * 4, 2 * 3 * 64 * 4
K_RANGE = 2 * 5 * 2 * 64 * 2  # largest and smallest, 16 bits each
STATISTICS = 2 * 64 * 4 + 2 * 2 * 64 * 4  # K's mean; V's scale and its inverse
LISTS = 2 * 3 * 2 * 2 + 2 * 3 * 4  # uint16 indices; counts
MASK = 2 * 2 * 128 * 4  # words of 32 key blocks, an even number; rows padded to 128
SPLIT = 2 * (64 + 64) * (2 * 64 * 2 + 4)  # rows of both padded to 64; two fp16 parts, a scale
SCORES = 2 * 3 * 5 * 4
RECORDS_FP8 = 2 * 5 * (64 * 64 * (1 + 1) + 4)  # K, V, K's scale
RECORDS_FP16 = 2 * 5 * (64 * 64 * (1 + 2) + 4)
STATES = 2 * 5 * (64 * 64 + 2 * 64) * 2
SUMS = 2 * 3 * (64 * 64 * 2 + 2 * 64 * 4)  # H in bf16; Z in two float32
SUMS_FP8 = 2 * 3 * (64 * 64 * 2 + 4 * 64 * 4)  # Z in four

# (read, written) with int8_fp8
COMMON = {
    "pool_kernel": (3 * TENSOR, Q_MEAN + K_SUM + V_AMAX),
    "reduce_kernel": (K_SUM + V_AMAX, STATISTICS),
    "complement_mask_kernel": (LISTS, MASK),
}
ATTENTION = (TENSOR + RECORDS_FP8 + LISTS + SUMS, TENSOR)
PORTABLE_ATTENTION = {
    "linear_state_kernel": (2 * TENSOR + STATISTICS, RECORDS_FP8 + STATES),
    "complement_kernel": (STATES + MASK, SUMS),
    "attn_fwd_kernel": ATTENTION,
}
BYTES = {
    "sm90": {
        **COMMON,
        "pool_kernel": (3 * TENSOR, Q_MEAN + K_SUM + V_AMAX + K_RANGE),
        "project_kernel": (Q_MEAN + K_SUM, SPLIT),
        "route_kernel": (SPLIT, LISTS + MASK),
        "linear_kernel": (2 * TENSOR + K_RANGE + STATISTICS + MASK, RECORDS_FP8 + SUMS_FP8),
        "attn_fwd_sm90_kernel": (TENSOR + RECORDS_FP8 + LISTS + SUMS_FP8, TENSOR),
    },
    "portable": {
        **COMMON,
        "project_kernel": (Q_MEAN + K_SUM, Q_MEAN + K_SUM),
        "score_kernel": (Q_MEAN + K_SUM, SCORES),
        "select_kernel": (SCORES, LISTS),
        **PORTABLE_ATTENTION,
    },
    ROUTED_BY_SM90: {
        **COMMON,
        "project_kernel": (Q_MEAN + K_SUM, SPLIT),
        "route_kernel": (SPLIT, LISTS),
        **PORTABLE_ATTENTION,
    },
}


def work_of(path: str, quant: str = "int8_fp8", shape: Shape = SMALL) -> dict[str, Any]:
    work: dict[str, Any] = bench_stages.kernel_work(bench_stages.Case(shape, 0.5, quant, path))
    return work


@pytest.mark.parametrize("path", BYTES)
def test_bytes_of_every_kernel(path: str) -> None:
    counted = {name: (work.read, work.written) for name, work in work_of(path).items()}
    assert counted == BYTES[path]


def test_bytes_follow_the_precision() -> None:
    wide, fp16 = work_of("sm90", "none"), work_of("portable", "int8_fp16")
    assert wide["pool_kernel"][1:3] == (2 * TENSOR, Q_MEAN + K_SUM)
    assert wide["reduce_kernel"][1:3] == (K_SUM, 2 * 64 * 4)
    assert wide["linear_kernel"][1:3] == (2 * TENSOR + 2 * 64 * 4 + MASK, SUMS)
    assert wide["attn_fwd_sm90_kernel"].read == 3 * TENSOR + LISTS + SUMS
    assert fp16["linear_state_kernel"].written == RECORDS_FP16 + STATES
    assert fp16["attn_fwd_kernel"].read == TENSOR + RECORDS_FP16 + LISTS + SUMS


def test_states_that_do_not_fit_l2_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of 26, 34, 40 and 79 MB, and the bytes that count of a key block's state."""
    assert "kStateRingBytes = 40 << 20;" in (CSRC / "core" / "pipeline.h").read_text()
    cases = [("int8_fp8", 32760, 0), ("none", 32760, 0)]
    cases += [("int8_fp8", 75600, 128 * 128 + 4 * 128), ("none", 75600, 2 * 128 * (128 + 2))]
    for quant, seqlen, block in cases:
        shape, states = Shape(1, 12, seqlen, 128), 12 * 1182 * block
        counted = work_of("sm90", quant, shape)["linear_kernel"]
        with monkeypatch.context() as patch:
            patch.setattr(bench_stages, "RING_BYTES", float("inf"))
            inside = work_of("sm90", quant, shape)["linear_kernel"]
        assert counted[1:3] == (inside.read + states, inside.written + states)


@pytest.mark.parametrize("path", BYTES)
@pytest.mark.parametrize(("quant", "wide"), [("none", 2), ("int8_fp16", 1), ("int8_fp8", 0)])
def test_operations_are_those_of_the_method(path: str, quant: str, wide: int) -> None:
    work = work_of(path, quant).values()
    router = 6 * 2 * ((3 + 5) * 64 * 64 + 3 * 5 * 64)
    states8 = path == "sm90" and quant == "int8_fp8"  # z in four parts then
    complement = 2 * 2 * 3 * 5 * (64 * 64 + (4 if states8 else 2) * 64)
    linear = 2 * 2 * 2 * 300 * 64 * 64 + (0 if states8 else complement)
    product = 2 * 2 * 300 * (2 * 64) * 64  # Q K^T, or P V
    assert sum(kernel.flop16 for kernel in work) == router + linear + wide * product
    flop8 = (2 - wide) * product + (complement if states8 else 0)
    assert sum(kernel.flop8 for kernel in work) == flop8


def test_floor_is_the_larger_of_bytes_and_operations() -> None:
    def floor(*numbers: float) -> float:
        return float(bench_stages.Work("linear", *numbers).floor_ms)

    assert floor(3.26e9, 1e9) == pytest.approx(1.0)
    assert floor(3.26e9, 1e9, 751e9 / 4, 1300e9 / 2) == pytest.approx(1.0)
    assert floor(3.26e9, 1e9, 751e9, 1300e9) == pytest.approx(2.0)  # one after the other


def test_every_kernel_of_the_sources_is_counted() -> None:
    sources = [
        path
        for pattern in ("*.cu", "*.cuh")
        for path in CSRC.rglob(pattern)
        if not path.name.startswith("bwd_")  # the script times forward calls
    ]
    text = "\n".join(path.read_text() for path in sources)
    kernels = set(re.findall(r"__global__[^;{]*?\b(\w+)\(const __grid_constant__", text))
    assert len(kernels) == len(set(re.findall(r"\b(\w+_kernel)\(\s*const __grid", text)))
    caller_lists = {"compact_kernel"}  # launched where no router runs
    backward = {"complement_sm90_kernel"}
    stage1 = {"soft_top_k_kernel", "soft_top_k_bwd_kernel"}
    stage1 |= {"soft_lists_kernel", "weighted_sum_kernel", "map_grad_kernel"}
    counted = {*BYTES["sm90"], *BYTES["portable"]}
    models = {"rotary_kernel"}  # beside attention
    assert kernels == counted | caller_lists | backward | stage1 | models


# ---- bench_stages: the router's limit -----------------------------------------------------------


def translated(paths: list[Path], **names: Any) -> dict[str, Any]:
    """`names` and the integer constants and one-line functions of C++ sources."""
    function = re.compile(r"constexpr int (\w+)\(int (\w+)\) \{\s*return ([^;]+);\s*\}")
    for text in (path.read_text().replace("/", "//") for path in paths):
        for name, argument, result in function.findall(text):
            names[name] = eval(f"lambda {argument}: {result}", names)
        for line in re.findall(r"(?m)^(?:  static )?constexpr int (k\w+ = [^;]+);", text):
            for name, value in re.findall(r"(k\w+) = (.+?)(?=, k\w+ = |$)", line):
                names[name] = eval(value, names)
    return names


def route_fits(names: dict[str, Any]) -> Callable[[int], bool]:
    """route_sm90_fits, from the sums in route_smem."""
    text = (CSRC / "kernels" / "sm90" / "router.cu").read_text()
    sums = re.findall(r"^  s\.(\w+) = ([^;]+);", text, re.MULTILINE)
    assert [name for name, _ in sums] == ["stages", "ring", "bits", "barriers", "bytes"]
    (conditions,) = re.findall(r"bool route_sm90_fits\(.*?return ([^;]+);", text, re.DOTALL)
    assert re.sub(r"\s+", " ", conditions) == (
        "lane_pairs(shape.num_k_blocks) <= kMaxLanePairs && "
        "route_smem(shape.num_k_blocks, kTileBytes, 2).bytes <= kSmemOfOne"
    )

    def fits(num_k_blocks: int) -> bool:
        known = {**names, "num_k_blocks": num_k_blocks, "tile_bytes": names["kKeyBytes"]}
        known["stages"] = 2
        for name, value in sums:
            known[f"s_{name}"] = eval(value.replace("s.", "s_"), known)
        pairs = names["lane_pairs"](num_k_blocks)
        return bool(pairs <= names["kMaxLanePairs"] and known["s_bytes"] <= names["kSmemOfOne"])

    return fits


def test_route_key_blocks_is_the_limit_of_the_kernel() -> None:
    sm90, common = CSRC / "kernels" / "sm90", CSRC / "kernels" / "common"
    split = sm90 / "router_split.cuh"
    sources = [common / "params.h", split, sm90 / "router_select.cuh", sm90 / "router.cu"]
    fits = route_fits(translated(sources, kHeadDim=128))
    limit = next(n for n in itertools.count(1) if not fits(n)) - 1
    assert limit == bench_stages.ROUTE_KEY_BLOCKS


@pytest.mark.parametrize("document", ["csrc/kernels/common/params.h", "docs/kernels.md"])
def test_route_key_blocks_is_the_limit_that_is_written_down(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    assert re.findall(r"(\d{4,}) key blocks", text) == [str(bench_stages.ROUTE_KEY_BLOCKS)]


def test_more_key_blocks_are_routed_by_the_portable_kernels() -> None:
    longest = 64 * bench_stages.ROUTE_KEY_BLOCKS
    fused = work_of("sm90", shape=Shape(1, 1, longest, 64))
    split = work_of("sm90", shape=Shape(1, 1, longest + 1, 64))
    assert "route_kernel" in fused and "score_kernel" not in fused
    assert "route_kernel" not in split and {"score_kernel", "select_kernel"} <= set(split)
    assert "linear_kernel" in split and "attn_fwd_sm90_kernel" in split


# ---- bench_stages: profilers' names and files ---------------------------------------------------

POOL = "void sla2::(anonymous namespace)::pool_kernel<__nv_bfloat16, 128>(sla2::PoolParams)"
POOL_OF_NCU = POOL.replace("(anonymous namespace)", "<unnamed>")
ATTN = "void sla2::attn_fwd_sm90_kernel<__nv_bfloat16, 128, 2>(sla2::AttnParams, sla2::AttnMaps)"
FOREIGN = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float> >(float)"


def test_own_kernels_takes_both_spellings_and_no_others() -> None:
    times = [(POOL, 0.25), (POOL_OF_NCU, 0.5), (ATTN, 2.0), (FOREIGN, 8.0), ("Memset", 16.0)]
    times += [("void not_sla2::reduce_kernel(int)", 32.0), ("void sla2::helper(int)", 64.0)]
    assert bench_stages.own_kernels(times) == {"pool_kernel": 0.75, "attn_fwd_sm90_kernel": 2.0}


READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
NCU_HEADER = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def ncu_row(kernel: str, metric: str, unit: str, value: str) -> str:
    return f'"0","4321","{kernel}","{metric}","{unit}","{value}"'


def ncu_file(folder: Path, *rows: str, header: str = NCU_HEADER) -> Path:
    before = ["==PROF== Connected to process 4321", '==PROF== Profiling "pool_kernel" - 0: 100%']
    after = "==PROF== Disconnected from process 4321"
    path = folder / "ncu.csv"
    path.write_text("\n".join([*before, header, *rows, after]) + "\n")
    return path


def test_read_ncu_sums_bytes_in_all_units(tmp_path: Path) -> None:
    path = ncu_file(
        tmp_path,
        ncu_row(POOL_OF_NCU, READ, "Mbyte", "1,234.50"),
        ncu_row(POOL_OF_NCU, WRITTEN, "byte", "3,072"),
        ncu_row(POOL_OF_NCU, "gpu__time_duration.sum", "us", "12.5"),
        ncu_row(FOREIGN, READ, "Gbyte", "7"),
        ncu_row(ATTN, READ, "Gbyte", "1.5"),
        ncu_row(ATTN, WRITTEN, "Kbyte", "2.25"),
        ncu_row(POOL_OF_NCU, READ, "Mbyte", "0.50"),
    )
    found = bench_stages.read_ncu(path)
    assert set(found) == {"pool_kernel", "attn_fwd_sm90_kernel"}
    assert found["pool_kernel"] == pytest.approx([1.235e9, 3072.0])
    assert found["attn_fwd_sm90_kernel"] == pytest.approx([1.5e9, 2250.0])


def test_read_ncu_knows_kernels_without_namespaces(tmp_path: Path) -> None:
    cut = "void unnamed>::pool_kernel<__nv_bfloat16, 128>(PoolParams)"  # ncu 2025.3
    for kernel in ("pool_kernel(PoolParams)", cut):
        path = ncu_file(tmp_path, ncu_row(kernel, READ, "byte", "8"))
        assert bench_stages.read_ncu(path) == {"pool_kernel": [8.0, 0.0]}


def test_read_ncu_refuses_other_files(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(CliError) as caught:
            bench_stages.read_ncu(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "No such file" in refusal(tmp_path / "absent.csv")
    raw_page = f'"ID","Kernel Name","{READ}"'
    assert "use ncu --csv" in refusal(ncu_file(tmp_path, header=raw_page))
    assert "use ncu --csv" in refusal(ncu_file(tmp_path, header="No kernels were profiled."))
    assert "'%'" in refusal(ncu_file(tmp_path, ncu_row(POOL, READ, "%", "3.0")))
    assert "'n/a', not a number" in refusal(
        ncu_file(tmp_path, ncu_row(POOL_OF_NCU, READ, "byte", "n/a"))
    )
    wide = tmp_path / "utf16.csv"
    wide.write_text(NCU_HEADER, encoding="utf-16")
    assert "not UTF-8" in refusal(wide)
    for rows in ([], [ncu_row(FOREIGN, READ, "byte", "1")], [ncu_row(POOL, "smsp", "byte", "1")]):
        assert "none of dram__bytes_read.sum" in refusal(ncu_file(tmp_path, *rows))


# ---- bench_stages: sums and options -------------------------------------------------------------


def test_sums_are_those_of_the_measured_kernels() -> None:
    case = bench_stages.Case(Shape(*SHAPES["wan1.3b-480p"]), 0.03, "int8_fp8", "sm90")
    times = {"route_kernel": 0.5, "project_kernel": 0.25, "pool_kernel": 1.0, "linear_kernel": 4.0}
    ncu = {"route_kernel": [1.0, 2.0], "project_kernel": [4.0, 8.0], "pool_kernel": [16.0, 32.0]}
    result = bench_stages.summarise(case, times, ncu)
    names = [kernel["kernel"] for kernel in result["kernels"]]
    assert names == ["pool_kernel", "route_kernel", "project_kernel", "linear_kernel"]
    sums = {entry["group"]: entry for entry in result["sums"]}
    assert sums["router"]["ms"] == 0.75 and sums["router"]["ncu_bytes"] == [5.0, 10.0]
    assert sums["pool + reduce + linear"]["ms"] == 5.0 and sums["all"]["ms"] == 5.75
    assert sums["linear"]["ncu_bytes"] is None and sums["all"]["ncu_bytes"] is None
    work = bench_stages.kernel_work(case)
    assert sums["all"]["read"] == sum(work[name].read for name in names)
    assert sums["all"]["budget_ms"] == pytest.approx(0.12 + 0.09 + 0.02 + 0.22)
    for change in ({"topk": 0.05}, {"quant": "none"}, {"shape": SMALL}):
        entries = bench_stages.summarise(case._replace(**change), times, None)["sums"]
        assert all(entry["budget_ms"] is None for entry in entries)


def test_kernel_without_a_count_is_refused() -> None:
    case = bench_stages.Case(SMALL, 0.5, "int8_fp8", "portable")
    with pytest.raises(CliError, match="no work is counted for route_kernel on path portable"):
        bench_stages.summarise(case, {"pool_kernel": 1.0, "route_kernel": 1.0}, None)


def test_stages_refuse_counters_of_several_cases() -> None:
    parsed = bench_stages.parse(["--ncu-bytes", "ncu.csv"])
    with pytest.raises(CliError, match="belongs to one case; these options make 2"):
        bench_stages.make_cases(parsed, torch.device("cpu"))


def test_stages_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_stages.main(["--device", "cpu"]) == 2
    assert "bench_stages: the kernels run on a GPU alone" in capsys.readouterr().err


# ---- plot_scaling -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "peer", "words"),
    [
        ({8: 1.0, 16: 2.0}, {8: 1.5, 16: 9.0}, "faster at every length from N 8 on (1.50x there)"),
        ({8: 2.0, 16: 4.0}, {8: 1.0, 16: 3.0}, "slower at N 16, the longest"),
        ({8: 1.0, 16: 3.0}, {8: 2.0, 16: 3.0}, "slower at N 16, the longest"),
        # Ratios 1/2 and 2: the middle in logarithms. Ratios 1/2 and 8: a quarter of the way.
        ({1024: 2.0, 4096: 4.0}, {1024: 1.0, 4096: 8.0}, "faster from N 2048 on"),
        ({1000: 2.0, 16000: 1.0}, {1000: 1.0, 16000: 8.0}, "faster from N 2000 on"),
        ({8: 1.0, 16: 2.0}, {8: 1.0, 16: 4.0}, "faster from N 8 on"),
        # The last of several; lengths of one side alone do not count.
        (
            {8: 1.0, 1024: 2.0, 4096: 4.0, 8192: 1.0},
            {8: 3.0, 1024: 1.0, 2048: 0.1, 4096: 8.0},
            "faster from N 2048 on",
        ),
        ({8: 1.0}, {16: 1.0}, "no common length"),
    ],
)
def test_crossover(own: dict[int, float], peer: dict[int, float], words: str) -> None:
    assert plot_scaling.crossover(own, peer) == words


def scaling_row(op: str, n: int, ms: float, **changes: Any) -> dict[str, Any]:
    right = {"gpu": "NVIDIA H200", "B": 1, "H": 12, "N": n, "D": 128, "dtype": "bfloat16"}
    measured = {"op": op, "quant": "none", "kept": 0.03, "ms_median": ms}
    return {**right, **measured, **changes}


OWN, PEER = "sla2_attention", "sdpa-cudnn"


def test_plot_is_drawn_and_the_crossover_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, image = tmp_path / "bench.json", tmp_path / "new" / "scaling.png"
    peers = [scaling_row(PEER, 4096, 8.0, kept=1.0), scaling_row(PEER, 1024, 1.0, kept=1.0)]
    own = [scaling_row(OWN, 1024, 2.0), scaling_row(OWN, 4096, 4.0)]
    others = [scaling_row(OWN, 1024, 0.5, kept=0.1), scaling_row("route", 1024, 0.01)]
    rows.write_text(json.dumps(peers + own + others))
    assert plot_scaling.main([str(rows), str(image), "--kept", "0.03"]) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "SLA2, 16 bit against cuDNN: faster from N 2048 on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read"),
        ('{"op": "sla2_attention"}', "is no list of rows"),
        ([], "has no such rows of sla2_attention"),
        ([scaling_row(PEER, 1024, 1.0)], "has no such rows of sla2_attention"),
        ([scaling_row(OWN, 8, 1.0), scaling_row(OWN, 8, 1.0, kept=0.1)], "rows of kept 0.03, 0.1"),
        ([scaling_row(OWN, 8, 1.0), scaling_row(PEER, 8, 1.0, H=40)], "rows of H 12, 40"),
        ([{"op": OWN, "quant": "none", "kept": 0.03}], "rows without B, D, H, N, dtype, gpu"),
    ],
)
def test_plot_refuses_rows(
    content: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, image = tmp_path / "bench.json", tmp_path / "scaling.png"
    rows.write_text(content if isinstance(content, str) else json.dumps(content))
    assert plot_scaling.main([str(rows), str(image)]) == 2
    assert words in capsys.readouterr().err and not image.exists()


# ---- profile.sh ---------------------------------------------------------------------------------


def test_profile_says_what_it_needs(tmp_path: Path) -> None:
    script = REPOSITORY / "bench" / "profile.sh"
    tools = tmp_path / "bin"  # without nsys and ncu
    tools.mkdir()
    for name in ("bash", "env", "dirname", "mkdir", "sed"):
        (tools / name).symlink_to(str(shutil.which(name)))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, *arguments],
            env={"PATH": str(tools)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    usage = run()
    assert usage.returncode == 2 and "profile.sh OUTPUT" in usage.stderr
    assert run("--shape", "wan14b-720p").returncode == 2
    nothing = run(str(tmp_path / "profile"))
    assert nothing.returncode == 1
    assert "nsys is not on PATH" in nothing.stderr and "ncu is not on PATH" in nothing.stderr
