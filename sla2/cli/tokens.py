"""Queries, keys and values of a clip by a small fixed patch embedding, for the demo.

It stands in for a video model's layer, whose weights would have to be downloaded, and shares its
structure: one token per 16 x 16 pixels and 4 frames, projections with bias, RMS-normalised q and k
per head with a gain per channel, 3D rotary positions, raster order (t, h, w). As in heads of
trained video models, a token attends most to tokens near it in time and space and to those that
look alike, and thinly to all others: q and k of a head share their bias (after the rotation:
closeness) and most of their projection (likeness). Nothing is trained.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sla2.cli.clip import Clip

PATCH = 16  # pixels per token and axis
FRAMES_PER_TOKEN = 4
FEATURES = 256
CONTEXT = 3  # a token sees its neighbours in the frame: 3 x 3 tokens
SHARED = 0.9  # weight of the projection that q and k of a head have in common
BIAS = 0.97  # weight of the bias in q and k before the norm; the rest is content
PEAK_LOGITS = (14.0, 22.0)  # of q and k that are alike and at one place, first to last head
# Gains on the channels of t, h and w, by head in turn: near in space, near in both, near in time.
AXIS_GAINS = ((0.8, 1.4, 0.8), (1.0, 1.0, 1.0), (1.2, 1.0, 0.8))
FAST_CHANNELS = 0.6  # gain ~ (rotary frequency)^0.6: attention falls off fast, then stays flat


class Qkv(NamedTuple):
    """q, k, v (1, N, H, D), contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor


def pixel_frames(token_frames: int) -> int:
    """Video frames behind so many token frames: the first stands alone, the others cover four."""
    return FRAMES_PER_TOKEN * (token_frames - 1) + 1


def embed(
    clip: Clip,
    grid: tuple[int, int, int],
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Qkv:
    """q, k, v of the clip (frames, 16 H, 16 W, 3) on the token grid (T, H, W)."""
    generator = torch.Generator().manual_seed(20260212)

    def weights(*shape: int) -> Tensor:
        """Entries of variance 1 / fan-in, the same on every device."""
        return (torch.randn(*shape, generator=generator) / math.sqrt(shape[-2])).to(device)

    patches = _standardise(_patches(clip, grid).to(device))
    hidden = torch.tanh(patches @ weights(patches.shape[1], FEATURES))
    hidden = _rms_norm(_average_in_frame(hidden, grid))
    shared = weights(heads, FEATURES, head_dim)
    bias = weights(heads, 1, head_dim)
    gains = _gains(heads, head_dim).to(device)
    peaks = torch.linspace(*PEAK_LOGITS, heads, device=device)[:, None, None]
    length = (peaks / math.sqrt(head_dim)).sqrt()
    cos, sin = rotary_3d(grid, head_dim, device)
    rotated = []
    for _ in ("q", "k"):
        own = weights(heads, FEATURES, head_dim)
        content = hidden @ (SHARED * shared + math.sqrt(1.0 - SHARED**2) * own)
        mixed = math.sqrt(1.0 - BIAS**2) * content + BIAS * bias
        rotated.append(_rotate(_rms_norm(mixed * gains) * length, cos, sin))
    v = hidden @ weights(heads, FEATURES, head_dim) + weights(heads, 1, head_dim)
    q, k, v = (x.transpose(0, 1)[None].to(dtype).contiguous() for x in (*rotated, v))
    return Qkv(q, k, v)


def rotary_3d(
    grid: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (N, D / 2) of the rotary angles; the channel pairs are shared out to t, h and w.

    A third of them (rounded down) goes to h and to w each, the rest to t, as in Wan2.1: 44, 42, 42
    of 128.
    """
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    angles = []
    for positions, frequencies in zip(axes, _frequencies(head_dim), strict=True):
        angles.append(positions.reshape(-1, 1).float() * frequencies.to(device))
    angle = torch.cat(angles, dim=1)
    return angle.cos(), angle.sin()


def _frequencies(head_dim: int) -> list[Tensor]:
    """Rotary frequencies of the channel pairs of t, h and w."""
    spatial = 2 * (head_dim // 6)
    sizes = (head_dim - 2 * spatial, spatial, spatial)
    return [10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float32) / size) for size in sizes]


def _gains(heads: int, head_dim: int) -> Tensor:
    """(H, 1, D): the gain of each channel in q and k."""
    profiles = []
    for head in range(heads):
        by_axis = zip(AXIS_GAINS[head % len(AXIS_GAINS)], _frequencies(head_dim), strict=True)
        parts = [
            gain * frequencies.clamp_min(0.01) ** FAST_CHANNELS for gain, frequencies in by_axis
        ]
        profiles.append(torch.cat(parts).repeat_interleave(2))
    return torch.stack(profiles)[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of neighbouring channels of x (H, N, D) by its angle."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def _standardise(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) / (x.std() + 1e-6)


def _average_in_frame(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """x (N, F) averaged over CONTEXT x CONTEXT tokens of its frame, the border repeated."""
    frames, height, width = grid
    images = x.reshape(frames, height, width, -1).permute(0, 3, 1, 2)
    margin = CONTEXT // 2
    padded = torch.nn.functional.pad(images, (margin,) * 4, mode="replicate")
    averaged = torch.nn.functional.avg_pool2d(padded, CONTEXT, stride=1)
    return averaged.permute(0, 2, 3, 1).reshape(x.shape)


def _patches(clip: Clip, grid: tuple[int, int, int]) -> Tensor:
    """(N, features) float32: a token's pixels at half resolution, its four frames in turn."""
    frames, height, width = grid
    pixels = torch.from_numpy(clip)
    tokens = []
    for t in range(frames):
        last = FRAMES_PER_TOKEN * t
        # The first token frame holds one video frame, repeated.
        indices = [max(0, last - back) for back in range(FRAMES_PER_TOKEN - 1, -1, -1)]
        part = pixels[indices].permute(0, 3, 1, 2).float() / 255.0
        small = torch.nn.functional.avg_pool2d(part, 2)  # (4, 3, 8 H, 8 W)
        side = PATCH // 2
        cells = small.reshape(FRAMES_PER_TOKEN, 3, height, side, width, side)
        tokens.append(cells.permute(2, 4, 0, 1, 3, 5).reshape(height * width, -1))
    return torch.cat(tokens)
