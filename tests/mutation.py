"""Do the tests notice? Seeds faults into a copy of the kernels, one at a time, and runs the tests.

    python tests/mutation.py --output mutation.json            # all of them
    python tests/mutation.py --only "tail mask dropped"        # --list: their names
    python tests/mutation.py --part 1/3                        # a third, for a time limit

Needs an NVIDIA GPU, nvcc, cmake, ninja, pybind11 and the test requirements. The tree itself is not
touched. For each fault the tests that should notice run first; if they pass, the fault's fallback.
The exit code is 1 where a fault survives, or where a test fails without any fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
KERNELS = "csrc/kernels"
FORWARD, BACKWARD, SOFT, MEMORY, VALUES, RUNTIME, SANITIZER = (
    f"tests/gpu/test_gpu_{name}.py"
    for name in ("forward", "backward", "soft", "memory", "values", "runtime", "sanitizer")
)
INSTANCES = f"{FORWARD}::test_instance"
RACES = (f"{SANITIZER}::test_tool_reports_nothing[portable-racecheck]",)


@dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in `file`, becomes `new`; `tests` should notice, or `fallback`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = (INSTANCES,)
    fallback: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """SLA2_PATH of the tests: the kernels that hold the fault must run for it to show. The
        Hopper kernels are what auto takes, and they cannot serve every test alone."""
        return "auto" if "kernels/sm90/" in self.file else "portable"


OUTPUT, SOFTMAX, CONVERT, LAYOUT = (
    f"{KERNELS}/common/{name}.cuh" for name in ("attn_output", "softmax", "convert", "layout")
)
POOL, ROUTER, STATE, BWD_FINISH = (
    f"{KERNELS}/portable/{name}.cu" for name in ("pool", "router", "linear_state", "bwd_finish")
)
ATTENTION, QUERY, BWD_KEYS = (
    f"{KERNELS}/sm80/{name}.cuh" for name in ("attn_fwd", "attn_query", "bwd_columns_linear")
)
COMPLEMENT = f"{KERNELS}/sm80/complement.cu"
SOFT_PRODUCTS = f"{KERNELS}/sm80/soft_products.cu"
BWD_ROWS, BWD_COLUMNS, BWD_ROWS_SM90, BWD_COLUMNS_SM90 = (
    f"{KERNELS}/sm{arch}/bwd_{name}.cu" for arch in (80, 90) for name in ("rows", "columns")
)
ATTENTION_SM90, INPUTS_SM90, STORE_SM90 = (
    f"{KERNELS}/sm90/{name}.cuh" for name in ("attn_fwd", "attn_inputs", "row_store")
)
ROUTE_SM90 = f"{KERNELS}/sm90/router.cu"
SELECT_SM90, SPLIT_SM90, LINEAR_SM90, STATE_SM90 = (
    f"{KERNELS}/sm90/{name}.cuh"
    for name in ("router_select", "router_split", "linear_e4m3", "linear_e4m3_state")
)

FAULTS = (
    Fault(
        "tail mask dropped", ATTENTION,
        "if (is_short) mask_columns(s, p.shape.seqlen % kBlockK);", "",
    ),
    Fault(
        "one listed block too few", ATTENTION,
        "const int listed = p.counts[list];", "const int listed = p.counts[list] - 1;",
    ),
    Fault(
        "32-bit batch offset", CONVERT,
        "(bh / num_heads) * view.stride_batch",
        "static_cast<int>((bh / num_heads) * view.stride_batch)",
        (f"{MEMORY}::test_strides_beyond_2_to_31",),
    ),
    Fault(
        "barrier of the ring skipped", ATTENTION,
        "cp_async_wait<C::kStages - 2>();\n    __syncthreads();",
        "cp_async_wait<C::kStages - 2>();",
        (INSTANCES, f"{RUNTIME}::test_the_same_bits_50_times"), RACES,
    ),
    Fault(
        "wait for the ring's copies too short", ATTENTION,
        "cp_async_wait<C::kStages - 2>();", "cp_async_wait<C::kStages - 1>();",
        (INSTANCES, f"{RUNTIME}::test_the_same_bits_50_times"), RACES,
    ),
    Fault(
        "barrier of the pooling skipped", POOL,
        "__syncthreads();  // the previous reduction has been read", "",
        (f"{FORWARD}::test_router_scores", f"{RUNTIME}::test_the_same_bits_50_times"), RACES,
    ),
    Fault(
        "last row not written", QUERY,
        "if (row < rows) {", "if (row < rows - 1) {",
        (f"{MEMORY}::test_what_memory_held_does_not_matter",),
    ),
    Fault(
        "scale of V inverted", POOL,
        "scales[0] = is_e4m3 ? amax / kE4m3Max : power;",
        "scales[0] = is_e4m3 ? kE4m3Max / amax : 1.f / power;",
    ),
    Fault(
        "scale of another key block", ATTENTION,
        "scale = p.k_scale[static_cast<int64_t>(bh) * num_k_blocks + j];",
        "scale = p.k_scale[static_cast<int64_t>(bh) * num_k_blocks];",
    ),
    Fault(
        "eps of V's scale missing", POOL,
        "amax = fmaxf(amax, kQuantEps);", "",
        (f"{VALUES}::test_constant_channel", f"{VALUES}::test_zero_values"),
    ),
    Fault(
        "floor of the score scale missing", ATTENTION,
        "max_nan(block_scale * fabsf(factor), 1e-37f)", "block_scale * fabsf(factor)",
        (f"{VALUES}::test_equal_logits",),
    ),
    Fault(
        "row sums not rescaled", SOFTMAX,
        "row_sum[m][half] *= rescale;", "",
        (f"{VALUES}::test_saturated_softmax",),
    ),
    Fault(
        "maximum that loses NaN", CONVERT,
        'asm("max.NaN.f32 %0, %1, %2;"', 'asm("max.f32 %0, %1, %2;"',
        (f"{VALUES}::test_not_finite",),
    ),
    Fault(
        "ties to the highest index", ROUTER,
        "(equal && __popc(equal_mask & lanes_below) < equal_left)",
        "(equal && __popc(equal_mask & ~lanes_below) <= equal_left)",
        (f"{FORWARD}::test_ties_go_to_the_lowest_index",),
    ),
    Fault(
        "mean of a short query block", POOL,
        "sum / tokens;", "sum / kBlockQ;",
        (f"{FORWARD}::test_router_scores",),
    ),
    Fault(
        "mean of a short key block", ROUTER,
        "x = x / min(kBlockK, p.shape.seqlen - (first + r) * kBlockK) - mean;",
        "x = x / kBlockK - mean;",
        (f"{FORWARD}::test_router_scores",),
    ),
    Fault(
        "list entries followed blindly", ROUTER,
        "if (j < p.shape.num_k_blocks) atomicOr(", "atomicOr(",
        (f"{VALUES}::test_hostile_block_map",),
        (f"{SANITIZER}::test_tool_reports_nothing[portable-memcheck]",),
    ),
    Fault(
        "lse not corrected for smoothing", OUTPUT,
        "value - correction[m][half] * p.softmax_scale", "value",
    ),
    Fault(
        "block left in the complement", COMPLEMENT,
        "atomicAnd(&words[j / 32], ~(1u << mask_bit(j)));",
        "if (j % 8 != 5) atomicAnd(&words[j / 32], ~(1u << mask_bit(j)));",
        (f"{FORWARD}::test_given_map",),
    ),
    Fault(
        "states of another group of heads", COMPLEMENT,
        "const int64_t first = static_cast<int64_t>(p.bh_begin + local_bh)",
        "const int64_t first = static_cast<int64_t>(local_bh)",
        (f"{FORWARD}::test_states_in_groups_of_heads",),
    ),
    Fault(
        "phi of tokens past the end", STATE,
        "feature_map<kLanesPerRow>(x, r < tokens);", "feature_map<kLanesPerRow>(x, true);",
    ),
    Fault(
        "phi_input ignored", STATE,
        "if (p.phi_raw_k) unpack8<Element>(key_bits[i], x);", "",
        (f"{FORWARD}::test_options",),
    ),
    Fault(
        "states not rounded to e4m3", STATE,
        "round_state(acc[m][n], scale, inverse);", "(void)scale, (void)inverse;",
        (f"{FORWARD}::test_states_in_e4m3",),
    ),
    Fault(
        "alpha of the block for every token", OUTPUT,
        "(p.alpha_per_token ? row : block)", "block",
        (f"{FORWARD}::test_given_map",),
    ),
    Fault(
        "short block not masked, Hopper", ATTENTION_SM90,
        "if (valid < kBlockK) {", "if (valid < 0) {",
    ),
    Fault(
        "scale of another slot of the ring, Hopper", ATTENTION_SM90,
        "(smem + C::kScales)[entry % C::kStages]", "(smem + C::kScales)[0]",
    ),
    Fault(
        "high part of Z counted twice, Hopper", INPUTS_SM90,
        "P::from_floats(sum.x - first.x, sum.y - first.y)", "high.x",
    ),
    Fault(
        "second half of a warp's rows staged over the first, Hopper", STORE_SM90,
        "row = C::tile_row(0) + lane % 16;", "row = C::tile_row(0) + lane % 8;",
    ),
    Fault(
        "features of H in another order", LAYOUT,
        "f / 4 % 2 * 16 + f / 2 % 2 * 8", "f / 4 % 2 * 8 + f / 2 % 2 * 16",
    ),
    Fault(
        "listed blocks left in the complement, Hopper", ROUTE_SM90,
        "atomicAnd(&bits[column / 32 * kRows + row], ~(1u << mask_bit(column)));", "",
    ),
    Fault(
        "ties to the highest index, Hopper", SELECT_SM90,
        "__popc(equal & lanes_below) < equal_left", "__popc(equal & ~lanes_below) <= equal_left",
        (f"{FORWARD}::test_ties_go_to_the_lowest_index",),
    ),
    Fault(
        "low part of the router's rows lost", SPLIT_SM90,
        "Pair<__half>::from_floats(x0 - high.x, x1 - high.y);",
        "Pair<__half>::from_floats(0.f, 0.f);",
        (f"{FORWARD}::test_router_scores",),
    ),
    Fault(
        "key blocks of a product in another order, Hopper", LINEAR_SM90,
        "__byte_perm(pairs[i], pairs[i + 2], 0x6240)",
        "__byte_perm(pairs[i], pairs[i + 2], 0x6420)",
        (f"{FORWARD}::test_states_in_e4m3",),
    ),
    Fault(
        "columns of e4m3 states in another order, Hopper", STATE_SM90,
        "within % 8 / 2 * 4 +", "within / 8 * 4 +",
        (f"{FORWARD}::test_states_in_e4m3",),
    ),
    Fault(
        "a kernel on the legacy stream", COMPLEMENT,
        "<<<grid, kMaskThreads, bytes, p.stream>>>", "<<<grid, kMaskThreads, bytes, 0>>>",
        (
            f"{RUNTIME}::test_every_kernel_is_on_the_current_stream",
            f"{RUNTIME}::test_side_stream_waits_for_its_producer",
            f"{RUNTIME}::test_graph_replays_with_other_inputs",
        ),
    ),
    Fault(
        "scale missing in dQ", BWD_ROWS,
        "[&](int, int) { return p.softmax_scale; }", "[](int, int) { return 1.f; }",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "tail mask of dQ dropped", BWD_ROWS,
        "if (valid < C::kStepKeys) mask_columns(s, valid);", "",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "mean of K left in dQ", BWD_ROWS,
        "dq[m][n][i] -= row_sums[m][i / 2 * 2] * (i % 2 == 0 ? x.x : x.y);", "(void)x;",
        (f"{BACKWARD}::test_after_a_low_bit_forward_pass",),
    ),
    Fault(
        "gradient of a full row's states not zeroed", BWD_ROWS,
        "reinterpret_cast<uint4*>(dstate)[i] = make_uint4(0, 0, 0, 0);", "",
        (f"{BACKWARD}::test_poisoned_buffers",),
    ),
    Fault(
        "barrier before the next dO skipped", BWD_COLUMNS,
        "__syncthreads();  // Q may be overwritten", "",
        (f"{BACKWARD}::test_lengths", f"{BACKWARD}::test_a_column_in_parts"),
    ),
    Fault(
        "last part of a column lost", BWD_COLUMNS,
        "for (int i = 0; i < parts; ++i) {", "for (int i = 0; i < parts - 1; ++i) {",
        (f"{BACKWARD}::test_a_column_in_parts",),
    ),
    Fault(
        "dV = for dV +=", BWD_COLUMNS,
        "add_value_gradient<C>(dv, p_tile, dh_tile);",
        "for_each_vector<C>([&](int m, int n, int) { dv[m][n][0] = 0.f; });\n"
        "    add_value_gradient<C>(dv, p_tile, dh_tile);",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "scale missing in dQ, Hopper", BWD_ROWS_SM90,
        "[&](int, int, int) { return p.softmax_scale; }", "[](int, int, int) { return 1.f; }",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "tail mask of dQ dropped, Hopper", BWD_ROWS_SM90,
        "score_gradients<C, true>(", "score_gradients<C, false>(",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "mean of K left in dQ, Hopper", BWD_ROWS_SM90,
        "dq[n][i] -= row_sums[i / 2] * (i % 2 == 0 ? x.x : x.y);", "(void)x;",
        (f"{BACKWARD}::test_after_a_low_bit_forward_pass",),
    ),
    Fault(
        "last part of a column lost, Hopper", BWD_COLUMNS_SM90,
        "for (int j = 0; j < parts; ++j) {", "for (int j = 0; j < parts - 1; ++j) {",
        (f"{BACKWARD}::test_a_column_in_parts",),
    ),
    Fault(
        "statistics of another step of the ring, Hopper", BWD_COLUMNS_SM90,
        "weigh<C>(s, smem.shift[ring.stage],", "weigh<C>(s, smem.shift[0],",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "keys past the end in dK's mean", BWD_KEYS,
        "if (place.row(m, 2 * half) >= valid) continue;", "",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "gradient of alpha not summed over the batch", BWD_FINISH,
        "bh += shared ? 1 : p.shape.num_heads", "bh += p.shape.num_bh",
        (f"{BACKWARD}::test_options",),
    ),
    Fault(
        "log m missing in the forward pass", ATTENTION,
        "kSoft ? log2_approx(fabsf(factor)) : shift", "shift",
        (f"{SOFT}::test_lengths",),
    ),
    Fault(
        "log m missing in dQ", BWD_ROWS,
        "shift -= log2_weight;", ";",
        (f"{SOFT}::test_lengths",),
    ),
    Fault(
        "sums of dS over half a block", BWD_ROWS,
        "block_sum += x + y;", "block_sum += x;",
        (f"{SOFT}::test_the_gradient_of_log_m",),
    ),
    Fault(
        "linear share of the gradient of log m missing", SOFT_PRODUCTS,
        "fmaf(-weight, acc[m][n][i], sparse)", "sparse",
        (f"{SOFT}::test_the_gradient_of_log_m",),
    ),
    Fault(
        "a block at the threshold left out", LAYOUT,
        "return !(m < SLA2_SOFT_MAP_MIN);", "return m > SLA2_SOFT_MAP_MIN;",
        (f"{SOFT}::test_the_threshold",),
    ),
)  # fmt: skip


def patched(fault: Fault, text: str) -> str:
    """The file's text with the fault; ValueError unless `old` occurs exactly once."""
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name!r}: its text occurs {text.count(fault.old)} times in {fault.file}; "
            "adapt the fault to the changed source"
        )
    return text.replace(fault.old, fault.new)


class Copy:
    """A copy of the tree with a build of its own."""

    def __init__(self, folder: Path, archs: str) -> None:
        self.root = folder / "sla2"
        self.log = folder / "log.txt"
        skipped = (".*", "build", "dist", "__pycache__", "_C*.so", "_build_info.py")
        shutil.copytree(REPOSITORY, self.root, ignore=shutil.ignore_patterns(*skipped))
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "SLA2_BUILD_PYTHON": "ON",
            "SLA2_CUDA_ARCHS": archs,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": self._output(sys.executable, "-m", "pybind11", "--cmakedir"),
        }
        command = ["cmake", "-S", ".", "-B", "build", "-G", "Ninja"]
        self._run(*command, *(f"-D{name}={value}" for name, value in options.items()))

    def _output(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.log.write_text(done.stdout)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout[-3000:]}")

    def build(self) -> None:
        """Compiles what changed; the module lands beside the copied Python files."""
        self._run("cmake", "--build", "build")
        self._run("cmake", "--install", "build", "--prefix", str(self.root))

    def failures(
        self, tests: Sequence[str], timeout: int, *, path: str, all_of_them: bool
    ) -> list[str]:
        """Names of the tests that failed; by default the first one is enough."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "SLA2_PATH": path}
        options = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        if not all_of_them:
            options.append("--maxfail=1")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *tests], cwd=self.root, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [f"{tests[0]}: no end within {timeout} s"]
        self.log.write_text(done.stdout)
        names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode == 0:
            if not re.search(r"\d+ passed", done.stdout):
                raise RuntimeError(f"no test ran; is there a GPU?\n{done.stdout[-2000:]}")
            return []
        if done.returncode == 1 or done.returncode < 0:  # failed tests, or the process died
            return names or [f"{tests[0]}: exit code {done.returncode}"]
        raise RuntimeError(f"pytest could not run:\n{done.stdout[-3000:]}")


def try_fault(copy: Copy, fault: Fault, timeout: int) -> dict[str, Any]:
    """Seeds one fault, builds, runs its tests, and takes it out again."""
    started = time.perf_counter()
    path = copy.root / fault.file
    original = path.read_text()
    caught: list[str] = []
    try:
        path.write_text(patched(fault, original))
        copy.build()
        for tests in (fault.tests, fault.fallback):
            if tests and not caught:
                caught = copy.failures(tests, timeout, path=fault.path, all_of_them=False)
    finally:
        path.write_text(original)
    return {
        "fault": fault.name,
        "file": fault.file,
        "caught": bool(caught),
        "caught_by": caught,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the results here, as JSON")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts")
    parser.add_argument("--archs", default="", help="SLA2_CUDA_ARCHS (default: the local GPU)")
    parser.add_argument("--timeout", type=int, default=580, help="seconds for a run of tests (580)")
    parser.add_argument("--skip-baseline", action="store_true", help="do not run without a fault")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no fault is named {sorted(unknown)}; --list shows the names")
    chosen = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    part = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        parser.error(f"--part is {options.part!r}; allowed are 1/N to N/N")
    chosen = chosen[int(part[1]) - 1 :: int(part[2])]
    if options.list:
        for fault in chosen:
            print(f"{fault.name}: {fault.file}")
        return 0

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sla2-mutation-") as folder:
        copy = Copy(Path(folder), options.archs)
        if not options.skip_baseline:
            copy.build()
            failed = []
            for path in sorted({fault.path for fault in chosen}):
                tests = sorted({t for fault in chosen if fault.path == path for t in fault.tests})
                failed += copy.failures(tests, options.timeout, path=path, all_of_them=True)
            if failed:
                print("these tests fail without any fault:", *failed, sep="\n  ")
                return 1
        for fault in chosen:
            results.append(try_fault(copy, fault, options.timeout))
            verdict = results[-1]["caught_by"][:1] or "SURVIVED"
            print(f"{results[-1]['seconds']:7.1f} s  {fault.name}: {verdict}", flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    survived = [result["fault"] for result in results if not result["caught"]]
    print(f"{len(results) - len(survived)} of {len(results)} faults were caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
