"""A small program for compute-sanitizer: every kernel instance once, on short problems.

Inputs are made on the host and copied, so that initcheck knows their bytes as written and hardly a
kernel but this package's runs. Not a test itself: `test_gpu_sanitizer.py` starts it.

    compute-sanitizer --tool memcheck python sanitizer_target.py
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor

import sla2
from sla2 import ops
from sla2.rotary import rotate_pairs


def lists(q: Tensor, rows: list[int], count: int) -> sla2.BlockMap:
    """The same list for every query block."""
    batch, seqlen, heads, _ = q.shape
    shape = (batch, heads, -(-seqlen // 128))
    rows = rows[: -(-seqlen // 64)]
    lut = torch.tensor(rows).expand(*shape, -1).contiguous().to(torch.uint16)
    counts = torch.full(shape, count, dtype=torch.int32)
    return sla2.BlockMap(lut.cuda(), counts.cuda(), seqlen=seqlen)


def fill_outputs() -> None:
    """Attention's results and the gradients of q, k and v hold NaN before they are written."""

    def filled(x: Tensor) -> Tensor:
        return torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)

    ops.empty_like = filled


def run_case(
    dtype: torch.dtype, head_dim: int, quant: str, seqlen: int, heads: int, hostile: bool
) -> None:
    """The routed operation, and by map all branches and their gradients; `hostile`: maps with
    invalid entries."""
    generator = torch.Generator().manual_seed(seqlen)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (randn(heads, seqlen, heads, head_dim).to(dtype).cuda() for _ in range(3))
    cos, sin = (randn(1, seqlen, 1, head_dim).cuda() for _ in range(2))
    assert rotate_pairs(q, cos, sin).cpu().isfinite().all()
    proj = (torch.eye(head_dim) + 0.05 * randn(head_dim, head_dim)).cuda()
    alpha = randn(heads, -(-seqlen // 128)).cuda()
    t_n = -(-seqlen // 64)
    count = min((t_n + 1) // 2, 3)
    maps = []
    if hostile:
        for claimed in (t_n, -1, 2**31 - 1):
            maps.append(lists(q, [0, t_n, 0xFFFF, 40000, 1, 0], claimed))
    else:
        pinned = torch.tensor([t_n - 1], dtype=torch.int32).cuda()
        routed: Any = sla2.sla2_attention(
            q, k, v, proj_q=proj, proj_k=proj, alpha_logit=alpha, quant=quant, pinned_kv=pinned,
            num_kv_blocks=count, return_aux=True,
        )  # fmt: skip
        assert routed[0].cpu().isfinite().all()
        maps.append(sla2.route(q, k, proj_q=proj, proj_k=proj, num_kv_blocks=count))
    # The gradient's kernels do not know `quant`.
    leaves = [x.requires_grad_(quant == "none") for x in (q, k, v, alpha)]
    q, k, v, alpha = leaves
    ones = torch.ones(q.shape, dtype=dtype).cuda()
    for block_map in maps:
        out: Any = sla2.sla2_attention(
            q, k, v, proj_q=None, proj_k=None, alpha_logit=alpha, quant=quant, block_map=block_map
        )
        sparse: Any = sla2.block_sparse_attention(
            q, k, v, block_map, quant=quant, smooth_k=False, return_lse=True
        )
        linear = sla2.complement_linear_attention(q, k, v, block_map, phi_input="raw")
        for x in (out, sparse[0], linear):
            assert x.cpu().isfinite().all()
            if quant == "none":
                for grad in torch.autograd.grad(x, leaves, ones, allow_unused=True):
                    assert grad is None or grad.cpu().isfinite().all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[1, 65, 129, 193, 257])
    parser.add_argument("--heads", type=int, default=2, help="and batches (2)")
    parser.add_argument("--once", action="store_true", help="no second length, no invalid lists")
    parser.add_argument("--fill-outputs", action="store_true", help=fill_outputs.__doc__)
    options = parser.parse_args()
    if options.fill_outputs:
        fill_outputs()
    instances = itertools.product(
        (torch.bfloat16, torch.float16), (64, 128), ("none", "int8_fp16", "int8_fp8")
    )
    lengths = itertools.cycle(options.seqlens)
    count = 0
    for instance in instances:
        for hostile in (False,) if options.once else (False, False, True):
            seqlen = next(lengths)
            print(*instance, seqlen, "invalid lists" if hostile else "", flush=True)
            run_case(*instance, seqlen, options.heads, hostile)
            count += 1
    torch.cuda.synchronize()
    print(f"ran {count} cases")


if __name__ == "__main__":
    main()
