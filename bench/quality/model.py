"""A small video diffusion transformer: pixels in patches, rotary positions in t, h, w, AdaLN.

Attention itself is a module of its own, `blocks.<i>.attn`, which takes q, k, v: `FullAttention`, or
what replaces it. Its name is the same in every variant, so recordings and router files fit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import sla2
from sla2.files import write_atomically

Grid = tuple[int, int, int]

CHANNELS = 3
TIME_FEATURES = 256
_METADATA_KEY = "video_dit"


class FullAttention(nn.Module):
    """q, k, v (B, N, H, D) -> (B, N, H, D)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rotary_angles(grid: Grid, head_dim: int) -> Tensor:
    """(N, 1, D / 2): a third of the pairs of channels for each axis, the rest for time.

    Wavelengths from 2 pi to 2 pi times the longest axis: no position comes back within a clip.
    """
    pairs = head_dim // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    positions = torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij")
    slowest = float(max(grid))
    parts = [
        position.flatten()[:, None] * slowest ** -(torch.arange(count) / max(1, count))
        for position, count in zip(positions, counts, strict=True)
    ]
    return torch.cat(parts, dim=1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel i with channel i + D / 2 of x (B, N, H, D)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def normalize(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`norm` in float32, whatever the dtypes of x and its weight."""
    assert norm.weight is not None
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)


def time_features(t: Tensor) -> Tensor:
    """(B,) in [0, 1] -> (B, TIME_FEATURES)."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, device=t.device) / half)
    angles = 1e3 * t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Block(nn.Module):
    """Self-attention and an MLP, both shifted, scaled and gated by the timestep."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(head_dim)
        self.norm_k = nn.RMSNorm(head_dim)
        self.attn: nn.Module = FullAttention()
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        for parameter in self.modulation.parameters():  # at the start a block is the identity
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, C), condition (B, C)."""
        parts = self.modulation(condition).float()[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = self.to_qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = rotate(normalize(q, self.norm_q), cos, sin).to(v.dtype)
        k = rotate(normalize(k, self.norm_k), cos, sin).to(v.dtype)
        x = torch.addcmul(x, gate1, self.to_out(self.attn(q, k, v).flatten(2)))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class VideoDiT(nn.Module):
    """Predicts the velocity of rectified flow: (B, 3, T, H, W) and t (B,) -> (B, 3, T, H, W).

    grid: tokens along t, h, w; a token is a patch of `patch` x `patch` pixels of one frame.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: Grid, *, patch: int, heads: int, head_dim: int, depth: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            **{"grid": list(grid), "patch": patch},
            **{"heads": heads, "head_dim": head_dim, "depth": depth},
        }
        width, pixels = heads * head_dim, CHANNELS * patch * patch
        self.grid, self.patch = grid, patch
        self.embed = nn.Linear(pixels, width)
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.blocks = nn.ModuleList(Block(heads, head_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, pixels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        angles = rotary_angles(grid, head_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def clip_size(self) -> tuple[int, int, int]:
        """frames, height, width in pixels."""
        frames, height, width = self.grid
        return frames, height * self.patch, width * self.patch

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def forward(self, clip: Tensor, t: Tensor) -> Tensor:
        frames, height, width = self.grid
        p = self.patch
        patches = clip.view(-1, CHANNELS, frames, height, p, width, p)
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(clip.shape[0], self.tokens, -1)
        x = self.embed(patches).float()  # the residual stream stays float32 under autocast
        condition = self.time(time_features(t))
        for block in self.blocks:
            x = block(x, condition, self.cos, self.sin)
        out = self.head(self.norm(x)).view(-1, frames, height, width, CHANNELS, p, p)
        return out.permute(0, 4, 1, 2, 5, 3, 6).reshape(clip.shape).float()


# ---- attention --------------------------------------------------------------------------------


def attention_names(model: VideoDiT) -> list[str]:
    """Names of the modules that take q, k, v."""
    return [f"blocks.{index}.attn" for index in range(len(model.blocks))]


def replace_attention(model: VideoDiT, make: Callable[[], nn.Module]) -> None:
    """Puts a new module in the place of every block's attention."""
    for block in model.blocks:
        cast(Block, block).attn = make()


def use_sla2(model: VideoDiT, **options: Any) -> None:
    """SLA2 instead of full attention, with the options of `SLA2Attention` besides its sizes."""
    device = model.head.weight.device
    heads, head_dim = model.config["heads"], model.config["head_dim"]

    def make() -> nn.Module:
        return sla2.SLA2Attention(heads, head_dim, seq_len=model.tokens, device=device, **options)

    replace_attention(model, make)


# ---- files ------------------------------------------------------------------------------------


def write_model(
    path: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Config and weights, without those of attention: router and alpha have files of their own."""
    tensors = {
        name: x.detach().to("cpu").contiguous() for name, x in state.items() if ".attn." not in name
    }
    data = safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(dict(config))})
    write_atomically(path, lambda temporary: temporary.write_bytes(data), suffix=".tmp")


def load_model(path: str | os.PathLike[str], device: torch.device) -> VideoDiT:
    """The model of `write_model`, with full attention."""
    with safe_open(os.fspath(path), framework="pt", device="cpu") as content:
        metadata = content.metadata() or {}
        if _METADATA_KEY not in metadata:
            raise ValueError(f"{path} is no model of this example: it lacks {_METADATA_KEY!r}")
        config = json.loads(metadata[_METADATA_KEY])
        state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    config["grid"] = tuple(config["grid"])
    model = VideoDiT(**config)
    model.load_state_dict(state)
    return model.to(device)
