"""LTX-Video (`diffusers.LTXVideoTransformer3DModel`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..checks import Grid
from ..rotary import rotate_pairs
from .adapter import Adapter, argument, loaded_class, register_adapter
from .grid import latent_grid

# Compression (time, height, width) of LTX-Video's autoencoder.
_COMPRESSION = (8, 32, 32)


@register_adapter
class LTXAdapter(Adapter):
    """Self-attention of the blocks; cross-attention to the text stays as it is."""

    name = "LTX-Video"

    def handles(self, model: nn.Module) -> bool:
        known = loaded_class("LTXVideoTransformer3DModel")
        return known is not None and isinstance(model, known)

    def self_attention(self, model: Any) -> dict[str, Any]:
        # The two attentions of a block are of one class and may have the same sizes: the block's
        # attribute alone tells them apart.
        blocks = model.transformer_blocks
        return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in enumerate(blocks)}

    def heads(self, attn: Any) -> tuple[int, int]:
        return attn.heads, attn.head_dim

    def video_grid(self, model: Any, num_frames: int, height: int, width: int) -> Grid:
        side = model.config.patch_size
        patch = (model.config.patch_size_t, side, side)
        return latent_grid((num_frames, height, width), _COMPRESSION, patch)

    def call_grid(
        self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Grid | None:
        # The sequence comes packed; the sizes beside it count tokens.
        positions = {"num_frames": 4, "height": 5, "width": 6, "video_coords": 8}
        frames, rows, columns, coordinates = (
            argument(args, kwargs, position, name) for name, position in positions.items()
        )
        # Pipelines with conditioning frames add tokens and give coordinates for each.
        if coordinates is not None or None in (frames, rows, columns):
            return None
        return frames, rows, columns

    def project(
        self, attn: Any, hidden_states: Tensor, rotary_emb: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        heads = (attn.heads, -1)
        q, k, v = (x.unflatten(2, heads) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:  # every head has angles of its own
            angles = [angle.unflatten(2, heads) for angle in rotary_emb]
            q, k = rotate_pairs(q, *angles), rotate_pairs(k, *angles)
        return q, k, v
