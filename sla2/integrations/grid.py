"""Token grids (frames, rows, columns), and alpha carried from one to another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Grid, num_tokens
from ..constants import BLOCK_Q


def latent_grid(
    video: tuple[int, int, int], compression: tuple[int, int, int], patch: tuple[int, int, int]
) -> Grid:
    """Tokens of a video of (frames, height, width) pixels, for a causal video autoencoder.

    It keeps the first frame and compresses the others; raises ValueError for sizes that it or the
    patches do not divide, where a pipeline would round and so use another grid than meant.
    """
    for name, size in zip(("num_frames", "height", "width"), video, strict=True):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int; got {size!r}")
    frames, *pixels = video
    if frames < 1 or (frames - 1) % compression[0]:
        raise ValueError(
            f"num_frames={frames}: num_frames - 1 must be a multiple of {compression[0]}, the "
            "autoencoder's compression in time"
        )
    latent_frames = (frames - 1) // compression[0] + 1
    if latent_frames % patch[0]:
        raise ValueError(
            f"num_frames={frames} gives {latent_frames} latent frames, which patches of {patch[0]} "
            "frames do not divide"
        )
    sides = []
    for name, size, scale, side in zip(
        ("height", "width"), pixels, compression[1:], patch[1:], strict=True
    ):
        if size < 1 or size % (scale * side):
            raise ValueError(
                f"{name}={size} must be a multiple of {scale * side}: {scale} pixels to a latent, "
                f"{side} latents to a token"
            )
        sides.append(size // (scale * side))
    return latent_frames // patch[0], sides[0], sides[1]


def resize_alpha(alpha_logit: Tensor, old: Grid, new: Grid) -> Tensor:
    """alpha's logits of grid `old`, linearly interpolated in time and space to grid `new`.

    alpha_logit: (T_m,), (H, T_m) or per token (H, N) float32, of `old`; the result has that form
    for `new`. A query block is 128 tokens in raster order, no box of the video, so its logit is
    first given to its tokens, and the mean over a new block's tokens is the new logit.
    """
    tokens, resized = num_tokens(old), num_tokens(new)
    rows = alpha_logit if alpha_logit.dim() == 2 else alpha_logit[None]
    per_token = rows.shape[1] == tokens
    if not per_token:
        rows = rows.repeat_interleave(BLOCK_Q, 1)[:, :tokens]
    with torch.autocast(alpha_logit.device.type, enabled=False):
        # Three products instead of torch's interpolation, whose gradient on CUDA sums by atomics.
        volume = rows.reshape(-1, *old)
        for axis in (1, 2, 3):
            weights = _interpolation(old[axis - 1], new[axis - 1], rows.device)
            volume = torch.tensordot(volume, weights, dims=([1], [1]))  # the new axis comes last
        rows = volume.reshape(-1, resized)
    if not per_token:
        rows = torch.stack([block.mean(1) for block in rows.split(BLOCK_Q, 1)], 1)
    return rows if alpha_logit.dim() == 2 else rows[0]


def _interpolation(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old): each row holds the weights of the two old cells nearest to a new one's centre."""
    centres = (torch.arange(new, device=device) + 0.5) * (old / new) - 0.5
    distance = centres.clamp(0, old - 1)[:, None] - torch.arange(old, device=device)
    return (1 - distance.abs()).clamp_min(0)
