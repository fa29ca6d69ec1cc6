"""`sla2 selftest`: the installed operation against the reference, on the device at hand.

Every case checks the selected blocks, the output and each branch, lse, that memory the operation
gets from the allocator may hold anything (all of it is filled with NaN first), that a second call
gives the same bits, that the inputs are unchanged, and that NaN in one head does not reach another.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sla2
from sla2 import env, reference
from sla2.cli import accuracy
from sla2.cli.accuracy import Check, Rows
from sla2.cli.device import (
    clear_tf32,
    path_in_use,
    pick_device,
    provenance,
    use_path,
    why_not_path,
)
from sla2.cli.errors import CliError, explain_missing_packages
from sla2.cli.selftest_cases import Case, Inputs, cases, make_inputs

SEED = 20260212


class Outcome(NamedTuple):
    """The figures of a case, or why it was skipped."""

    case: Case
    path: str
    checks: list[Check]
    seconds: float
    skipped: str | None = None
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.case.name,
            "path": self.path,
            "passed": self.passed,
            "skipped": self.skipped,
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "checks": [check.as_dict() for check in self.checks],
        }


def run(options: argparse.Namespace) -> int:
    """0 when every case passed, 1 when one failed."""
    device = pick_device(options.device)
    clear_tf32()
    table = [case for case in cases(options.amount, device) if options.filter in case.name]
    if not table:
        raise CliError(f"no case has {options.filter!r} in its name")
    started = time.perf_counter()
    with use_path(device, options.path):
        if options.json:
            outcomes = [run_case(case, device) for case in table]
        else:
            outcomes = _run_with_progress(table, device)
    ran = [outcome for outcome in outcomes if outcome.skipped is None]
    failed = [outcome for outcome in ran if not outcome.passed]
    summary: dict[str, Any] = {
        **provenance(device, None),
        "device": str(device),
        "path": ", ".join(sorted({outcome.path for outcome in ran})),
        "amount": options.amount,
        "cases": len(ran),
        "skipped": len(outcomes) - len(ran),
        "failed": len(failed),
        "passed": bool(ran) and not failed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if options.json:
        print(json.dumps({**summary, "results": [o.as_dict() for o in outcomes]}, indent=1))
    else:
        _print_table(outcomes, summary)
    return 0 if summary["passed"] else 1


# ---- one case ---------------------------------------------------------------------------------


def run_case(case: Case, device: torch.device) -> Outcome:
    """Runs every check of the case; an exception is an outcome too, so that the table goes on."""
    started = time.perf_counter()
    path = path_in_use(device, "auto", case.quant, case.kept, routed=True)
    skipped = _why_skip(case, device)
    checks: list[Check] = []
    error = None
    if skipped is None:
        try:
            inputs = make_inputs(case, device, SEED)
            if case.gradient:
                checks = _check_gradient_case(case, inputs)
            else:
                checks = _check_forward_case(case, inputs)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
    return Outcome(case, path, checks, time.perf_counter() - started, skipped, error)


def _why_skip(case: Case, device: torch.device) -> str | None:
    properties: dict[str, Any] = {
        "dtype": case.dtype,
        "quant": case.quant,
        "head_dim": case.head_dim,
    }
    reason = env.why_not(device, **properties)
    return reason or why_not_path(device, "auto", **properties, num_kv_blocks=case.kept)


def _check_forward_case(case: Case, inputs: Inputs) -> list[Check]:
    q, k, v = inputs.q, inputs.k, inputs.v
    before = [(x.clone(), x._version) for x in (q, k, v)]
    attention = {
        "alpha_logit": inputs.alpha_logit,
        "quant": case.quant,
        "phi_input": case.phi_input,
        **inputs.router(case),
    }
    result: Any
    with poisoned_memory():
        result = sla2.sla2_attention(q, k, v, return_aux=True, **attention)
        out, aux = result
        block_map = sla2.route(q, k, **inputs.router(case))
        branch: dict[str, Any] = {"smooth_k": case.smooth_k, "layout": case.layout}
        result = sla2.block_sparse_attention(
            q, k, v, block_map, quant=case.quant, return_lse=True, **branch
        )
        out_sparse, lse = result
        out_linear = sla2.complement_linear_attention(
            q, k, v, block_map, phi_input=case.phi_input, **branch
        )
    block_map.validate()
    aux.block_map.validate()
    dense_map = block_map.to_dense()
    again: Any = sla2.sla2_attention(q, k, v, **attention)
    unchanged = all(
        torch.equal(x, copy) and x._version == version
        for x, (copy, version) in zip((q, k, v), before, strict=True)
    )

    def bnhd(x: Tensor) -> Tensor:
        return x if case.layout == "BNHD" else x.transpose(1, 2)

    blocks = accuracy.sampled_query_blocks(case.seqlen, q.device)
    rows = reference.rows_of_blocks(blocks, case.seqlen)
    got = Rows(
        bnhd(out)[:, rows], bnhd(out_sparse)[:, rows], bnhd(out_linear)[:, rows], lse[..., rows]
    )
    q, k, v = (bnhd(x) for x in (q, k, v))
    return [
        *accuracy.check_router(
            dense_map,
            q,
            k,
            proj_q=inputs.proj_q,
            proj_k=inputs.proj_k,
            num_kv_blocks=case.kept,
            pinned_kv=case.pinned_kv,
            smooth_k=case.smooth_k,
        ),
        *accuracy.check_forward(
            got,
            q,
            k,
            v,
            quant=case.quant,
            query_blocks=blocks,
            block_map=dense_map,
            alpha_logit=inputs.alpha_logit,
            smooth_k=case.smooth_k,
            phi_input=case.phi_input,
        ),
        _flag("fused routing differs", not torch.equal(aux.block_map.to_dense(), dense_map)),
        _flag("lse differs between calls", not torch.equal(aux.lse, lse)),
        _flag("repeat differs", not torch.equal(out, again)),
        _flag("inputs changed", not unchanged),
        *_check_nan_containment(case, inputs, attention, out),
    ]


def _check_nan_containment(
    case: Case, inputs: Inputs, attention: dict[str, Any], out: Tensor
) -> list[Check]:
    """NaN in one (batch, head): it shows there, and no bit of the others changes."""
    if case.heads < 2:
        return []
    by_head = (0, slice(None), 1) if case.layout == "BNHD" else (0, 1)
    leaked = hidden = 0
    for name in ("q", "k", "v"):
        poisoned = {n: getattr(inputs, n) for n in ("q", "k", "v")}
        poisoned[name] = poisoned[name].clone()
        poisoned[name][by_head][case.seqlen // 2, 3] = float("nan")
        got: Any = sla2.sla2_attention(**poisoned, **attention)
        hidden += not bool(got[by_head].isnan().any())
        got, expected = got.clone(), out.clone()
        got[by_head], expected[by_head] = 0.0, 0.0
        leaked += not torch.equal(got, expected)
    return [Check("NaN leaks", leaked, 0), Check("NaN hidden", hidden, 0)]


def _check_gradient_case(case: Case, inputs: Inputs) -> list[Check]:
    """dq, dk, dv and dalpha_logit for a given block map, against the reference's autograd."""
    block_map = sla2.route(inputs.q, inputs.k, **inputs.router(case))
    shared: dict[str, Any] = {
        "proj_q": inputs.proj_q,
        "proj_k": inputs.proj_k,
        "block_map": block_map,
        "quant": case.quant,
        "smooth_k": case.smooth_k,
        "phi_input": case.phi_input,
        "layout": case.layout,
    }
    generator = torch.Generator(inputs.q.device).manual_seed(SEED + 1)
    grad_out = torch.randn(
        inputs.q.shape, generator=generator, device=inputs.q.device, dtype=inputs.q.dtype
    )

    def gradients(function: Any, **options: Any) -> tuple[Tensor, ...]:
        leaves = [
            x.detach().clone().requires_grad_()
            for x in (inputs.q, inputs.k, inputs.v, inputs.alpha_logit)
        ]
        out = function(*leaves[:3], alpha_logit=leaves[3], **shared, **options)
        return torch.autograd.grad(out, leaves, grad_out)

    with poisoned_memory():
        got = gradients(sla2.sla2_attention)
    again = gradients(sla2.sla2_attention)
    exact = gradients(reference.sla2_attention, compute_dtype=accuracy.exact_dtype(inputs.q))
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    checks = [_flag("repeat differs", not same)]
    names = ("dq", "dk", "dv", "dalpha_logit")
    low = None
    if case.quant == "none" and case.dtype != "float32":
        low = gradients(reference.sla2_attention, compute_dtype=inputs.q.dtype)
    if case.quant != "none":
        shared["quant"] = "none"
        plain = gradients(reference.sla2_attention, compute_dtype=accuracy.exact_dtype(inputs.q))
        checks += accuracy.check_quantised_gradients(got, plain, names)
    return [*accuracy.check_gradients(got, exact, low, names), *checks]


def _flag(name: str, wrong: bool) -> Check:
    return Check(name, float(wrong), 0.0)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch allocates without initialising it is filled with NaN, or 0xFF bytes.

    Workspaces and outputs of the kernels are such tensors, so a read of memory that nothing wrote
    shows.
    """
    switch: Any = torch.utils.deterministic
    filled = switch.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # The switch also warns of operations with no deterministic form; they are not the question
        # here.
        warnings.simplefilter("ignore")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            switch.fill_uninitialized_memory = True
            yield
        finally:
            switch.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


# ---- the table --------------------------------------------------------------------------------


def _run_with_progress(table: list[Case], device: torch.device) -> list[Outcome]:
    with explain_missing_packages("the table (sla2 selftest --json does without)"):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    outcomes = []
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("", total=len(table))
        for case in table:
            progress.update(task, description=case.name)
            outcomes.append(run_case(case, device))
            progress.advance(task)
    return outcomes


def _print_table(outcomes: list[Outcome], summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"sla2 selftest on {summary['gpu']}, path {summary['path']}")
    table.add_column("case")
    for name in ("out rel L2", "sparse rel L2", "linear rel L2", "lse error"):
        table.add_column(name, justify="right")
    table.add_column("closest to its limit")
    table.add_column("result")
    for outcome in outcomes:
        figures = {check.name.replace(", emulation", ""): check for check in outcome.checks}
        cells = [
            f"{figures[name].value:.1e}" if name in figures else ""
            for name in ("out rel L2", "sparse rel L2", "linear rel L2", "lse max error")
        ]
        table.add_row(outcome.case.name, *cells, _tightest(outcome.checks), _verdict(outcome))
    console = Console()
    if not console.is_terminal:
        console = Console(
            width=200
        )  # a log file has no width of its own; keep every row on one line
    console.print(table)
    for outcome in outcomes:
        if outcome.skipped:
            console.print(
                escape(f"skipped: {outcome.case.name}: {outcome.skipped}"),
                highlight=False,
                soft_wrap=True,
            )
        if outcome.error:
            console.print(
                escape(f"error: {outcome.case.name}: {outcome.error}"),
                highlight=False,
                soft_wrap=True,
            )
        for check in outcome.checks:
            if not check.passed:
                side = "at least" if check.at_least else "at most"
                text = f"{check.name} is {check.value:.3e}, allowed is {side} {check.limit:.3e}"
                console.print(
                    escape(f"failed: {outcome.case.name}: {text}"), highlight=False, soft_wrap=True
                )
    verdict = "passed" if summary["passed"] else "FAILED"
    console.print(
        f"{verdict}: {summary['cases']} cases, {summary['failed']} failed, "
        f"{summary['skipped']} skipped, {summary['seconds']} s",
        highlight=False,
        soft_wrap=True,
    )


def _tightest(checks: list[Check]) -> str:
    """The figure that used the largest part of its limit."""
    shares = [
        (check.value / check.limit, check.name)
        for check in checks
        if not check.at_least and check.limit > 0
    ]
    return "" if not shares else "{1} {0:.0%}".format(*max(shares))


def _verdict(outcome: Outcome) -> str:
    if outcome.skipped is not None:
        return "[yellow]skipped[/]"
    return "[green]ok[/]" if outcome.passed else "[red]FAILED[/]"
