"""SLA2 on the CPU against PyTorch's dense attention, in one run on the same fresh random inputs.

    python bench/bench_cpu.py                        # N 32760, 2 heads, head_dim 64, 97 % sparse
    python bench/bench_cpu.py --backward --output bench/results

Times the whole operation (routing included) through `sla2.sla2_attention`; the peer is
`scaled_dot_product_attention` of the same dtype. Every iteration draws new q, k, v outside the
clock and runs SLA2 and the peer in turn, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sla2
from sla2.constants import BLOCK_Q, QUANT_MODES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_NAME = "bench_cpu.json"


# ---- provenance -------------------------------------------------------------------------------


def cpu_name() -> str:
    """Model name and the threads PyTorch uses."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The checkout's commit, "+dirty" with local changes; the installed package's without git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # The results of earlier runs are no change of the code.
        changes = git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
        return git("rev-parse", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return sla2.__git_sha__


# ---- measuring --------------------------------------------------------------------------------


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # freeing the result is not part of the call
    return elapsed * 1e3


class Case:
    """One row: an operation, its inputs' shape and the two calls to compare."""

    def __init__(self, args: argparse.Namespace, dtype: str, quant: str, backward: bool) -> None:
        self.args, self.dtype, self.quant, self.backward = args, dtype, quant, backward
        heads, dim = args.heads, args.head_dim
        self.proj = torch.eye(dim)
        self.alpha_logit = torch.full((heads, -(-args.tokens // BLOCK_Q)), 1.7)

    def inputs(self) -> list[Tensor]:
        shape = (self.args.batch, self.args.tokens, self.args.heads, self.args.head_dim)
        tensors = [torch.randn(shape).to(DTYPES[self.dtype]) for _ in range(3)]
        return [x.requires_grad_() for x in tensors] if self.backward else tensors

    def sparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sla2.sla2_attention(
            q,
            k,
            v,
            proj_q=self.proj,
            proj_k=self.proj,
            alpha_logit=self.alpha_logit,
            topk=self.args.topk,
            quant=self.quant,
        )
        assert isinstance(out, Tensor)
        return out

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def _run(self, function: Callable[..., Tensor], tensors: list[Tensor]) -> object:
        if not self.backward:
            with torch.inference_mode():
                return function(*tensors)
        return torch.autograd.grad(function(*tensors).sum(), tensors)

    def measure(self) -> tuple[list[float], list[float]]:
        """Milliseconds per iteration of SLA2 and of dense attention."""
        ours: list[float] = []
        peer: list[float] = []
        for iteration in range(self.args.warmup + self.args.iters):
            tensors = self.inputs()
            times = [
                milliseconds(functools.partial(self._run, function, tensors))
                for function in (self.sparse, self.dense)
            ]
            if iteration >= self.args.warmup:
                ours.append(times[0])
                peer.append(times[1])
        return ours, peer


def row(case: Case, ours: list[float], peer: list[float], source: dict[str, Any]) -> dict[str, Any]:
    args = case.args
    return {
        **source,
        "op": "sla2_attention_fwd_bwd" if case.backward else "sla2_attention",
        "B": args.batch,
        "H": args.heads,
        "N": args.tokens,
        "D": args.head_dim,
        "dtype": case.dtype,
        "kept": args.topk,
        "quant": case.quant,
        "path": "cpu",
        "ms_median": statistics.median(ours),
        "ms_min": min(ours),
        "ms_max": max(ours),
        "peers": {"sdpa": statistics.median(peer)},
    }


def print_row(entry: dict[str, Any]) -> None:
    shape = " ".join(f"{name}{entry[name]}" for name in "BHND")
    dense = entry["peers"]["sdpa"]
    print(
        f"{entry['op']:<23} {shape:<20} {entry['dtype']:<9} {entry['kept']:<5g} "
        f"{entry['quant']:<10} {entry['ms_median']:>9.1f} {entry['ms_min']:>9.1f} "
        f"{entry['ms_max']:>9.1f} {dense:>10.1f} {dense / entry['ms_median']:>8.2f}x",
        flush=True,
    )


def write(rows: list[dict[str, Any]], target: Path) -> Path:
    """The rows as JSON into `target`, a .json file or a folder."""
    path = target if target.suffix == ".json" else target / DEFAULT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    part.replace(path)  # a broken run leaves the earlier file whole
    return path


# ---- command line -----------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; a positive number is needed")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="SLA2 against dense attention on the CPU: milliseconds, routing included",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--tokens", type=positive, default=32760)
    parser.add_argument("--heads", type=positive, default=2)
    parser.add_argument("--head-dim", type=positive, default=64)
    parser.add_argument("--topk", type=float, default=0.03, help="fraction of key blocks kept")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--quant", nargs="+", choices=QUANT_MODES, default=["none"])
    parser.add_argument("--backward", action="store_true", help="also time a training step")
    parser.add_argument("--iters", type=positive, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (default: its own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help=f"a .json file, or a folder for {DEFAULT_NAME}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    source = {
        "gpu": None,
        "cpu": cpu_name(),
        "driver": None,
        "torch": torch.__version__,
        "cuda": None,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    print(f"{source['cpu']}; torch {source['torch']}; commit {source['commit']}")
    print(
        f"{'operation':<23} {'shape':<20} {'dtype':<9} {'kept':<5} {'quant':<10} {'ms':>9} "
        f"{'min':>9} {'max':>9} {'SDPA ms':>10} {'speed-up':>9}"
    )
    cases = [Case(args, dtype, quant, False) for dtype in args.dtype for quant in args.quant]
    if args.backward:
        cases += [Case(args, dtype, "none", True) for dtype in args.dtype]
    rows = []
    for case in cases:
        rows.append(row(case, *case.measure(), source))
        print_row(rows[-1])
    if args.output is not None:
        print(f"wrote {write(rows, args.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
