"""Wan (`diffusers.WanTransformer3DModel`): text and image to video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..checks import Grid
from ..rotary import rotate_pairs
from .adapter import Adapter, argument, loaded_class, register_adapter
from .grid import latent_grid

# Compression (time, height, width) of the autoencoder by the latent channels it makes: that of
# Wan2.1, which most models use, and that of Wan2.2 TI2V-5B.
_COMPRESSION = {16: (4, 8, 8), 48: (4, 16, 16)}


@register_adapter
class WanAdapter(Adapter):
    """Self-attention of the blocks; cross-attention to text and image stays as it is."""

    name = "Wan"

    def handles(self, model: nn.Module) -> bool:
        known = loaded_class("WanTransformer3DModel")
        return known is not None and isinstance(model, known)

    def self_attention(self, model: nn.Module) -> dict[str, Any]:
        try:
            from diffusers.models.transformers.transformer_wan import WanAttention
        except ImportError as error:
            import diffusers

            raise ImportError(
                f"diffusers {diffusers.__version__} is too old: pip install 'diffusers>=0.35.2'"
            ) from error
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, WanAttention) and not module.is_cross_attention
        }

    def heads(self, attn: Any) -> tuple[int, int]:
        return attn.heads, attn.inner_dim // attn.heads

    def video_grid(self, model: Any, num_frames: int, height: int, width: int) -> Grid:
        channels = model.config.out_channels
        if channels not in _COMPRESSION:
            raise ValueError(
                f"no autoencoder with {channels} latent channels is known for Wan: pass grid= "
                "instead of num_frames, height and width"
            )
        video = (num_frames, height, width)
        return latent_grid(video, _COMPRESSION[channels], tuple(model.config.patch_size))

    def call_grid(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        patch = model.config.patch_size
        return (
            latents.shape[2] // patch[0],
            latents.shape[3] // patch[1],
            latents.shape[4] // patch[2],
        )

    def project(
        self, attn: Any, hidden_states: Tensor, rotary_emb: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        # The norms run over the channels of all heads, so they come before the split.
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = rotate_pairs(q, *rotary_emb), rotate_pairs(k, *rotary_emb)
        return q, k, v
