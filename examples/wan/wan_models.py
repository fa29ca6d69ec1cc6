"""What the scripts of this folder share: Wan2.1's sizes, its weights (real or random), arguments.

Sizes are those of transformer/config.json in the hub's repositories; what is not named there is the
default of diffusers' class.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

import sla2

TEXT_TOKENS = 512  # to which the pipeline pads every prompt
FPS = 16  # of Wan's training videos
EMPTY_PROMPT = "empty_prompt.safetensors"  # beside the encoded videos


@dataclasses.dataclass(frozen=True)
class Size:
    """One model and the video it is used for."""

    hub: str | None
    transformer: dict[str, Any]
    vae: dict[str, Any]
    video: tuple[int, int, int]
    """num_frames, height, width."""
    flow_shift: float
    """Of the noise schedule: the model card's, larger for larger videos."""


_WAN21 = {
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
}
SIZES = {
    "1.3b": Size(
        hub="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        transformer={**_WAN21, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        vae={},
        video=(81, 480, 832),
        flow_shift=3.0,
    ),
    "14b": Size(
        hub="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        transformer={**_WAN21, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        vae={},
        video=(81, 720, 1280),
        flow_shift=5.0,
    ),
    # For trying the scripts in seconds, on a CPU too. 360 tokens: the last blocks are partial.
    "tiny": Size(
        hub=None,
        transformer={
            **_WAN21,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_dim": 256,
            "text_dim": 32,
            "freq_dim": 32,
        },
        vae={"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        video=(9, 160, 192),
        flow_shift=3.0,
    ),
}


# ---- arguments ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and video")
    model.add_argument("--size", choices=SIZES, default="1.3b", help="tiny: random weights alone")
    model.add_argument("--model", help="hub id or folder of the pipeline (default: by size)")
    model.add_argument(
        "--random-weights", action="store_true", help="the whole architecture without its weights"
    )
    model.add_argument("--num-frames", type=int, help="(default: 81)")
    model.add_argument("--height", type=int, help="(default: 480 for 1.3b, 720 for 14b)")
    model.add_argument("--width", type=int, help="(default: 832 for 1.3b, 1280 for 14b)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if sla2.is_available("cuda") else "cpu")


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in what follows from the size."""
    size = SIZES[options.size]
    for name, value in zip(("num_frames", "height", "width"), size.video, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.model = options.model or size.hub
    if options.model is not None and Path(options.model).is_dir():
        options.model = Path(options.model)
    options.random_weights = options.random_weights or options.model is None
    return options


def video_size(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the pipeline and `sla2.apply` have in common."""
    return {name: getattr(options, name) for name in ("num_frames", "height", "width")}


def latent_shape(options: argparse.Namespace) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of one video, by the autoencoder's compression."""
    frames = (options.num_frames - 1) // 4 + 1
    return 16, frames, options.height // 8, options.width // 8


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---- models -------------------------------------------------------------------------------------


def random_transformer(
    size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> WanTransformer3DModel:
    """Initial weights; the parameters that `from_pretrained` keeps in float32 are in float32."""
    torch.manual_seed(seed)
    with torch.device(device):  # 14B parameters take minutes on a CPU
        model = WanTransformer3DModel(**size.transformer)
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def load_transformer(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> WanTransformer3DModel:
    if options.random_weights:
        return random_transformer(SIZES[options.size], device, dtype, options.seed)
    return WanTransformer3DModel.from_pretrained(
        options.model, subfolder="transformer", torch_dtype=dtype
    ).to(device)


def load_pipeline(
    options: argparse.Namespace,
    device: torch.device,
    transformer: Any = None,
    *,
    encoders_only: bool = False,
) -> WanPipeline:
    """On the CPU, to be moved or offloaded; with random weights it has no text encoder.

    transformer: what to use instead of the pipeline's own, which then is not loaded.
    encoders_only: without any transformer.
    """
    size, dtype = SIZES[options.size], compute_dtype(device)
    if options.random_weights:
        if transformer is None and not encoders_only:
            transformer = load_transformer(options, device, dtype)
        torch.manual_seed(options.seed)
        pipe = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=AutoencoderKLWan(**size.vae).eval(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True
            ),
            transformer=transformer,
        )
    else:
        given = encoders_only or transformer is not None
        replaced = {"transformer": transformer} if given else {}
        # In 16 bit the autoencoder leaves visible artefacts.
        vae = AutoencoderKLWan.from_pretrained(
            options.model, subfolder="vae", torch_dtype=torch.float32
        )
        pipe = WanPipeline.from_pretrained(options.model, vae=vae, torch_dtype=dtype, **replaced)
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, flow_shift=size.flow_shift
    )
    return pipe


def random_text(text_dim: int, seed: int, length: int = 60) -> Tensor:
    """(1, 512, text_dim): embeddings of `length` tokens, then zeros, as the pipeline pads them."""
    text = torch.zeros(1, TEXT_TOKENS, text_dim)
    generator = torch.Generator().manual_seed(seed)
    text[:, :length] = torch.randn(1, length, text_dim, generator=generator)
    return text


def prompt_inputs(
    pipe: WanPipeline, prompt: str, negative_prompt: str, seed: int
) -> dict[str, Any]:
    """Arguments of the pipeline; without a text encoder, random embeddings for both prompts."""
    if pipe.text_encoder is not None:
        return {"prompt": prompt, "negative_prompt": negative_prompt}
    width, device = pipe.transformer.config.text_dim, pipe.transformer.device
    return {
        "prompt_embeds": random_text(width, 2 * seed).to(device),
        "negative_prompt_embeds": random_text(width, 2 * seed + 1).to(device),
    }
