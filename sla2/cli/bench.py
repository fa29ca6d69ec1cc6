"""`sla2 bench`: times the operation, its stages and other attention on the same inputs."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

import sla2
from sla2 import reference
from sla2.cli import accuracy, bench_page, bench_peers, bench_report, bench_work
from sla2.cli.bench_timing import Timing, kernel_times, peak_extra_bytes, time_call
from sla2.cli.bench_work import Shape
from sla2.cli.device import (
    clear_tf32,
    clocks_mhz,
    path_in_use,
    pick_device,
    provenance,
    require_served,
    use_path,
)
from sla2.cli.errors import CliError
from sla2.cli.files import output_folder, write_json
from sla2.cli.parser import PEERS, SHAPES

PEER_BUDGET_S = 3.0  # a dense call may take a second: a few of them tell enough


class Problem(NamedTuple):
    """One shape's tensors: q, k, v (B, N, H, D), router (D, D), alpha_logit (H, T_m)."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    router: dict[str, Any]
    alpha_logit: Tensor


def run(options: argparse.Namespace) -> int:
    """0, or 1 when --refcheck found a difference or --check another page."""
    if options.report:
        return bench_page.run(options)
    if options.check or options.results is not None:
        raise CliError("--check and --results belong to --report")
    device = pick_device(options.device)
    dtype = getattr(torch, options.dtype)
    for shape, quant in itertools.product(_shapes(options), options.quant):
        longest = shape.kept_blocks(max(options.topk))
        require_served(device, options.path, options.dtype, shape.head_dim, quant, longest)
    folder = None if options.output is None else output_folder(options.output)
    clear_tf32()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress,
        use_path(device, options.path),
    ):
        task = progress.add_task("")
        bench = Bench(options, device, dtype, lambda text: progress.update(task, description=text))
        for shape in _shapes(options):
            bench.run_shape(shape)
    bench_report.print_table(bench.rows, bench.verdicts)
    console = Console()
    for note in bench.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    if folder is not None:
        paths = bench_report.write_report(bench.rows, folder)
        if bench.kernels:
            paths.append(folder / "kernels.json")
            write_json(paths[-1], bench.kernels)
        console.print(
            "wrote " + ", ".join(escape(str(path)) for path in paths),
            highlight=False,
            soft_wrap=True,
        )
    return 0 if bench.passed else 1


def _shapes(options: argparse.Namespace) -> list[Shape]:
    own = (options.batch, options.heads, options.seqlen, options.head_dim)
    given = options.shape or []
    if any(value is not None for value in own):
        if options.seqlen is None:
            raise CliError(
                "--batch, --heads and --head-dim describe a shape of your own: give --seqlen too"
            )
        batch, heads, seqlen, head_dim = own
        custom = [Shape(batch or 1, heads or 12, seqlen, head_dim or 128)]
    else:
        custom = []
        given = given or [SHAPES["wan1.3b-480p"]]
    return [Shape(*sizes) for sizes in given] + custom


class Bench:
    """Collects the rows of all shapes."""

    def __init__(
        self,
        options: argparse.Namespace,
        device: torch.device,
        dtype: torch.dtype,
        show: Callable[[str], None],
    ) -> None:
        self.options, self.device, self.dtype, self.show = options, device, dtype, show
        self.rows: list[dict[str, Any]] = []
        self.verdicts: dict[int, str] = {}
        self.notes: list[str] = []
        self.kernels: list[dict[str, Any]] = []
        self.passed = True
        self.source = provenance(device, options.commit)
        named = options.peers if options.peers else PEERS
        self.peers = [] if options.peers is None else list(named)

    def run_shape(self, shape: Shape) -> None:
        """Peers that do not depend on the map first, then every share of blocks and precision."""
        problem = make_problem(shape, self.dtype, self.device, self.options.seed)
        modes = (False, True) if self.options.backward else (False,)
        dense = {backward: self._time_dense_peers(problem, backward) for backward in modes}
        for topk in self.options.topk:
            kept = shape.kept_blocks(topk)
            block_map = sla2.route(problem.q, problem.k, num_kv_blocks=kept, **problem.router)
            for backward in modes:
                peers = dict(dense[backward])
                if "flex" in self.peers:
                    peers |= self._time_flex(problem, block_map, topk, backward)
                for quant in self.options.quant:
                    self._time_sla2(problem, topk, quant, backward, peers)
            if self.options.stages:
                for quant in self.options.quant:
                    self._time_stages(problem, block_map, topk, quant)

    # ---- what is timed ----

    def _time_sla2(
        self, problem: Problem, topk: float, quant: str, backward: bool, peers: dict[str, float]
    ) -> None:
        shape, kept = problem.shape, problem.shape.kept_blocks(topk)
        op = "sla2_attention_fwd_bwd" if backward else "sla2_attention"
        leaves = [problem.q, problem.k, problem.v, problem.alpha_logit]
        if backward:
            leaves = [x.detach().clone().requires_grad_() for x in leaves]

        def forward() -> Tensor:
            out: Any = sla2.sla2_attention(
                *leaves[:3],
                alpha_logit=leaves[3],
                num_kv_blocks=kept,
                quant=quant,
                **problem.router,
            )
            return cast(Tensor, out)

        call: Callable[[], object] = forward
        if backward:
            call = bench_peers.with_backward(forward, leaves)
        self._add(
            shape,
            op,
            call,
            flop=bench_work.sla2_flop(shape, kept, backward=backward),
            equivalent=bench_work.dense_flop(shape, backward=backward),
            kept=topk,
            quant=quant,
            peers=peers,
        )
        if self.options.refcheck and not backward:
            self.verdicts[len(self.rows) - 1] = self._compare(problem, kept, quant)
        if self.options.stages and self.device.type == "cuda":
            self._profile(shape, op, call, topk, quant)

    def _time_stages(
        self, problem: Problem, block_map: sla2.BlockMap, topk: float, quant: str
    ) -> None:
        shape, kept = problem.shape, problem.shape.kept_blocks(topk)
        q, k, v = problem.q, problem.k, problem.v
        stages: list[tuple[str, Callable[[], object], float, str]] = [
            (
                "block_sparse_attention",
                lambda: sla2.block_sparse_attention(q, k, v, block_map, quant=quant),
                bench_work.sparse_flop(shape, kept),
                quant,
            )
        ]
        if quant == self.options.quant[0]:  # the other two do not depend on the precision
            stages += [
                (
                    "route",
                    lambda: sla2.route(q, k, num_kv_blocks=kept, **problem.router),
                    bench_work.route_flop(shape),
                    "none",
                ),
                (
                    "complement_linear_attention",
                    lambda: sla2.complement_linear_attention(q, k, v, block_map),
                    bench_work.linear_flop(shape),
                    "none",
                ),
            ]
        for op, call, flop, precision in stages:
            self._add(shape, op, call, flop=flop, equivalent=None, kept=topk, quant=precision)

    def _time_dense_peers(self, problem: Problem, backward: bool) -> dict[str, float]:
        times = {}
        for name in (peer for peer in self.peers if peer in bench_peers.SDPA_BACKENDS):
            leaves = _leaves(problem, backward)
            try:
                call: Callable[[], Tensor] = bench_peers.sdpa(name, *leaves)
                times[name] = self._add_peer(name, problem, call, leaves, backward, kept=1.0)
            except bench_peers.PeerUnavailable as error:
                self._note(f"not run: {error}")
        return times

    def _time_flex(
        self, problem: Problem, block_map: sla2.BlockMap, topk: float, backward: bool
    ) -> dict[str, float]:
        if backward:
            # Its backward pass needs blocks of 128 x 128; the map has 128 x 64.
            return {}
        leaves = _leaves(problem, backward=False)
        try:
            call = bench_peers.flex(block_map, *leaves)
            return {"flex": self._add_peer("flex", problem, call, leaves, False, kept=topk)}
        except bench_peers.PeerUnavailable as error:
            self._note(f"not run: {error}")
            return {}

    def _add_peer(
        self,
        name: str,
        problem: Problem,
        forward: Callable[[], Tensor],
        leaves: list[Tensor],
        backward: bool,
        kept: float,
    ) -> float:
        shape = problem.shape
        flop = bench_work.dense_flop(shape, backward=backward)
        if kept < 1.0:
            flop = bench_work.sparse_flop(shape, shape.kept_blocks(kept), backward=backward)
        timing = self._add(
            shape,
            f"{name}_fwd_bwd" if backward else name,
            bench_peers.with_backward(forward, leaves) if backward else forward,
            flop=flop,
            equivalent=bench_work.dense_flop(shape, backward=backward),
            kept=kept,
            quant="none",
            budget_s=PEER_BUDGET_S,
        )
        return timing.median

    # ---- rows ----

    def _add(
        self,
        shape: Shape,
        op: str,
        call: Callable[[], object],
        *,
        flop: float,
        equivalent: float | None,
        kept: float,
        quant: str,
        peers: dict[str, float] | None = None,
        budget_s: float | None = None,
    ) -> Timing:
        """Times the call and appends its row."""
        self.show(f"{op}, N {shape.seqlen}, {kept:.0%} kept, {quant}")
        call()
        extra = peak_extra_bytes(call, self.device)
        timing = time_call(
            call,
            self.device,
            iters=self.options.iters,
            warmup=self.options.warmup,
            budget_s=budget_s,
        )
        clocks = clocks_mhz(self.device)
        per_ms = 1e-9 / timing.median  # FLOP per call -> TFLOP/s
        path = path_in_use(
            self.device,
            self.options.path,
            quant,
            shape.kept_blocks(kept),
            routed=op.startswith("sla2_attention"),
        )
        row = {
            **self.source,
            "op": op,
            "B": shape.batch,
            "H": shape.heads,
            "N": shape.seqlen,
            "D": shape.head_dim,
            "kept": kept,
            "quant": quant,
            "path": path,
            "ms_median": timing.median,
            "ms_min": timing.min,
            "ms_max": timing.max,
            "peers": peers or {},
            "clocks": clocks,
            "dtype": self.options.dtype,
            "executed_tflops": flop * per_ms,
            "dense_equivalent_tflops": None if equivalent is None else equivalent * per_ms,
            "peak_extra_bytes": extra,
            "command": self.options.command_line,
        }
        self.rows.append({name: row[name] for name in bench_report.COLUMNS})
        return timing

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _profile(
        self, shape: Shape, op: str, call: Callable[[], object], topk: float, quant: str
    ) -> None:
        """Time of every kernel of the call, as a note and for kernels.json."""
        times = kernel_times(call, self.device, 10)
        self._note(
            f"kernels of {op}, N {shape.seqlen}, {topk:.0%} kept, {quant} (mean ms, warm cache):"
        )
        for name, milliseconds in times:
            self.notes.append(f"  {milliseconds:9.4f}  {name[:120]}")
            self.kernels.append(
                {
                    "op": op,
                    "N": shape.seqlen,
                    "kept": topk,
                    "quant": quant,
                    "kernel": name,
                    "ms_mean": milliseconds,
                }
            )

    def _compare(self, problem: Problem, kept: int, quant: str) -> str:
        """Sampled rows against the reference: "ok", or the figures that failed."""
        self.show(f"reference, N {problem.shape.seqlen}, {quant}")
        q, k, v = problem.q, problem.k, problem.v
        result: Any = sla2.sla2_attention(
            q,
            k,
            v,
            alpha_logit=problem.alpha_logit,
            num_kv_blocks=kept,
            quant=quant,
            return_aux=True,
            **problem.router,
        )
        out, aux = result
        out_sparse: Any = sla2.block_sparse_attention(q, k, v, aux.block_map, quant=quant)
        out_linear = sla2.complement_linear_attention(q, k, v, aux.block_map)
        blocks = accuracy.sampled_query_blocks(problem.shape.seqlen, self.device)
        rows = reference.rows_of_blocks(blocks, problem.shape.seqlen)
        got = accuracy.Rows(
            out[:, rows], out_sparse[:, rows], out_linear[:, rows], aux.lse[..., rows]
        )
        checks = accuracy.check_forward(
            got,
            q,
            k,
            v,
            quant=quant,
            query_blocks=blocks,
            block_map=aux.block_map.to_dense(),
            alpha_logit=problem.alpha_logit,
        )
        failed = [check.name for check in checks if not check.passed]
        self.passed = self.passed and not failed
        return "FAILED: " + ", ".join(failed) if failed else "ok"


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """Gaussian q, k, v; the identity router; alpha about 0.85."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    q, k, v = (
        randn(shape.batch, shape.seqlen, shape.heads, shape.head_dim) for _ in ("q", "k", "v")
    )
    identity = torch.eye(shape.head_dim, device=device)
    alpha_logit = torch.full((shape.heads, shape.q_blocks), 1.75, device=device)
    return Problem(shape, q, k, v, {"proj_q": identity, "proj_k": identity}, alpha_logit)


def _leaves(problem: Problem, backward: bool) -> list[Tensor]:
    tensors = [problem.q, problem.k, problem.v]
    return [x.detach().clone().requires_grad_() for x in tensors] if backward else tensors
