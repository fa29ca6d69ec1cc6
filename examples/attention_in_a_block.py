"""Replace the full attention of a video transformer block by SLA2 attention.

    python examples/attention_in_a_block.py                # the GPU where the kernels run, else CPU
    python examples/attention_in_a_block.py --grid 21x30x52 --topk 0.03

Three steps: make a `SLA2Attention` for the layer's heads and token count, calibrate its alpha on
the layer's own q and k, call it where `scaled_dot_product_attention` was. The block is a toy with
random weights and its input a smooth random field, so the errors say nothing about a trained model;
the steps are the same there.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla2

Grid = tuple[int, int, int]


def rotary_angles(grid: Grid, head_dim: int) -> Tensor:
    """(N, 1, D / 2): angles of the channel pairs, a position along t, h or w times a frequency.

    Tokens are in raster order, w running fastest.
    """
    pairs = head_dim // 2
    sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    positions = torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij")
    parts = [
        p.flatten()[:, None] * 10000.0 ** -(torch.arange(n) / n)
        for p, n in zip(positions, sizes, strict=True)
    ]
    return torch.cat(parts, dim=1)[:, None]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates neighbouring channels of x (B, N, H, D) as pairs."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class VideoBlock(nn.Module):
    """x (B, N, C) -> (B, N, C): self-attention with rotary positions, then an MLP, both residual.

    `sparse` is None for full attention, or the SLA2Attention that replaces it.
    """

    def __init__(self, heads: int, head_dim: int, grid: Grid) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(head_dim)
        self.norm_k = nn.RMSNorm(head_dim)
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.register_buffer("angles", rotary_angles(grid, head_dim), persistent=False)
        self.sparse: sla2.SLA2Attention | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, N, H, D) as attention sees them. v stays a view: any strides will do."""
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return rotate(self.norm_q(q), self.angles), rotate(self.norm_k(k), self.angles), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.sparse is not None:
            return self.sparse(q, k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.to_out(self.attend(*self.project(x)).flatten(2))
        return x + self.mlp(x)


def smooth_field(grid: Grid, width: int) -> Tensor:
    """(1, N, C): features that change slowly over the grid, with some noise, as a video's do."""
    coarse = torch.randn(1, width, *(max(2, n // 4) for n in grid))
    field = F.interpolate(coarse, size=grid, mode="trilinear", align_corners=True)
    return (field + 0.3 * torch.randn_like(field)).flatten(2).transpose(1, 2).contiguous()


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


def parse(argv: list[str] | None) -> argparse.Namespace:
    def grid(text: str) -> Grid:
        frames, height, width = (int(part) for part in text.split("x"))
        return frames, height, width

    parser = argparse.ArgumentParser(description="SLA2 attention inside a video transformer block")
    parser.add_argument("--grid", type=grid, default=(8, 16, 16), help="token grid TxHxW")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=64)
    parser.add_argument("--topk", type=float, default=0.1, help="fraction of key blocks kept")
    parser.add_argument("--quant", default="none", help="none, int8_fp16 or int8_fp8")
    parser.add_argument("--device", default="cuda" if sla2.is_available("cuda") else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    reason = sla2.why_not(device, quant=options.quant, head_dim=options.head_dim)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    block = VideoBlock(options.heads, options.head_dim, options.grid).to(device)
    x = smooth_field(options.grid, options.heads * options.head_dim).to(device)
    tokens = x.shape[1]
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16)
    with torch.no_grad(), autocast:
        q, k, v = block.project(x)
        full = block.attend(q, k, v)

    # 1. The module. Its parameters are float32 and stay so when the model is cast to 16 bit.
    sparse = sla2.SLA2Attention(
        options.heads,
        options.head_dim,
        seq_len=tokens,
        topk=options.topk,
        quant=options.quant,
        device=device,
    )
    with torch.no_grad(), autocast:
        before = relative_error(sparse(q, k, v), full)
        # 2. alpha: the share of full attention that falls on the selected blocks, on samples.
        sparse.calibrate_alpha(*(t.to(dtype) for t in (q, k)))
        after = relative_error(sparse(q, k, v), full)
    # 3. From here on the block calls it.
    block.sparse = sparse

    kept = max(1, int(options.topk * -(-tokens // 64)))
    print(f"{tokens} tokens, {options.heads} heads of {options.head_dim}, {dtype}, on {device}")
    print(f"{kept} of {-(-tokens // 64)} key blocks per query block")
    print(f"relative L2 error of attention, alpha {sparse.alpha_init}: {before:.3f}")
    alpha = sparse.alpha_logit.sigmoid().mean().item()
    print(f"relative L2 error of attention, alpha calibrated (mean {alpha:.2f}): {after:.3f}")

    # A training step reaches the block's weights and alpha; the router is frozen in stage 2.
    with autocast:
        loss = block(x).float().square().mean()
    loss.backward()
    print(f"gradient norm of to_qkv.weight: {block.to_qkv.weight.grad.norm().item():.3e}")
    print(f"gradient norm of alpha_offset: {sparse.alpha_offset.grad.norm().item():.3e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
