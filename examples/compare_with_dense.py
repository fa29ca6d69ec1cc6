"""Error and time of SLA2 attention next to dense attention, over the share of key blocks kept.

    python examples/compare_with_dense.py
    python examples/compare_with_dense.py --tokens 32760 --heads 12 --head-dim 128 --quant int8_fp8

q and k are made from a slowly changing random sequence, so that attention has near and far parts;
the router is the identity and alpha is calibrated on the same q and k. Nothing is trained: the
linear branch, which training adapts, can lose against the sparse branch alone here. With every
block kept, SLA2 is dense attention. Times are of one call after a warm-up; `sla2 bench` measures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import sla2


def make_qkv(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, N, H, D) of features that drift along the sequence."""
    knots = torch.randn(1, heads * head_dim, max(2, tokens // 128))
    drift = F.interpolate(knots, size=tokens, mode="linear", align_corners=True)
    drift = drift.transpose(1, 2).unflatten(-1, (heads, head_dim))
    q, k = (1.5 * (drift + 0.5 * torch.randn_like(drift)) for _ in range(2))
    v = drift + torch.randn_like(drift)
    return tuple(x.to(device=device, dtype=dtype).contiguous() for x in (q, k, v))


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The result and the milliseconds of the second call."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    start = time.perf_counter()
    out = call()
    wait()
    return out, (time.perf_counter() - start) * 1e3


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="SLA2 attention next to dense attention")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=64)
    parser.add_argument("--topk", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--quant", default="none", help="none, int8_fp16 or int8_fp8")
    parser.add_argument("--device", default="cuda" if sla2.is_available("cuda") else "cpu")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    reason = sla2.why_not(device, quant=options.quant, head_dim=options.head_dim)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, head_dim = options.heads, options.head_dim
    q, k, v = make_qkv(options.tokens, heads, head_dim, dtype, device)
    dense, dense_ms = timed(lambda: dense_attention(q, k, v), device)
    print(f"N={options.tokens} H={heads} D={head_dim} {dtype} on {device}, quant {options.quant}")
    print(f"dense attention: {dense_ms:.1f} ms")
    print(f"{'topk':>6} {'blocks':>9} {'alpha':>6} {'error':>9} {'sparse alone':>13} {'ms':>8}")
    for topk in options.topk:
        attention = sla2.SLA2Attention(
            heads, head_dim, seq_len=options.tokens, topk=topk, quant=options.quant, device=device
        )
        attention.calibrate_alpha(q, k)
        out, ms = timed(lambda module=attention: module(q, k, v), device)
        block_map = sla2.route(q, k, proj_q=attention.proj_q, proj_k=attention.proj_k, topk=topk)
        sparse = sla2.block_sparse_attention(q, k, v, block_map, quant=options.quant)
        alpha = attention.alpha_logit.sigmoid().mean().item()
        blocks = f"{block_map.num_kv_blocks}/{-(-options.tokens // 64)}"
        print(
            f"{topk:>6g} {blocks:>9} {alpha:>6.2f} {relative_error(out, dense):>9.4f} "
            f"{relative_error(sparse, dense):>13.4f} {ms:>8.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
