"""Encodes videos and captions once, for finetune.py: no autoencoder or text encoder runs there.

    python examples/wan/encode_videos.py --videos clips --output latents
    python examples/wan/encode_videos.py --size 14b --videos clips --output latents-14b

--videos holds name.mp4 with its caption in name.txt. Frames are taken as they come, the first
--num-frames of each file, cropped to the aspect and scaled: make the files 16 frames a second, as
Wan was trained. --output gets name.safetensors with latents (16, frames, height / 8, width / 8),
normalised as the transformer takes them, and prompt_embeds (512, text_dim), both bfloat16; and
empty_prompt.safetensors, which finetune.py uses to train guidance. Files that exist are kept, so
the same command goes on. Needs `pip install imageio imageio-ffmpeg`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import load_video
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor
from wan_models import (
    EMPTY_PROMPT,
    SIZES,
    TEXT_TOKENS,
    add_arguments,
    complete,
    load_pipeline,
    random_text,
)

from sla2.files import write_atomically


def encode_video(pipe: WanPipeline, frames: list[Image.Image], height: int, width: int) -> Tensor:
    """(16, frames, height / 8, width / 8): the most likely latents, normalised."""
    fitted = [ImageOps.fit(frame.convert("RGB"), (width, height)) for frame in frames]
    video = pipe.video_processor.preprocess_video(fitted, height=height, width=width)
    latents = pipe.vae.encode(video.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return ((latents - mean) / std)[0]


def encode_text(pipe: WanPipeline, text: str, text_dim: int, seed: int) -> Tensor:
    """(512, text_dim), padded with zeros; random where there is no text encoder."""
    if pipe.text_encoder is None:
        return random_text(text_dim, seed)[0]
    embeddings, _ = pipe.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    return embeddings[0]


def write(path: Path, **tensors: Tensor) -> None:
    stored = {name: x.to("cpu", torch.bfloat16).contiguous() for name, x in tensors.items()}
    write_atomically(path, lambda temporary: save_file(stored, temporary))


@torch.no_grad()
def encode(options: argparse.Namespace, videos: list[Path], device: torch.device) -> None:
    pipe = load_pipeline(options, device, encoders_only=True).to(device)
    text_dim = SIZES[options.size].transformer["text_dim"]
    options.output.mkdir(parents=True, exist_ok=True)
    write(
        options.output / EMPTY_PROMPT, prompt_embeds=encode_text(pipe, "", text_dim, options.seed)
    )
    for index, path in enumerate(videos):
        target = options.output / f"{path.stem}.safetensors"
        if target.exists():
            continue
        frames = load_video(str(path))[: options.num_frames]
        if len(frames) < options.num_frames:
            print(f"left out {path}: {len(frames)} frames", file=sys.stderr)
            continue
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        write(
            target,
            latents=encode_video(pipe, frames, options.height, options.width),
            prompt_embeds=encode_text(pipe, caption, text_dim, options.seed + 1 + index),
        )
        print(f"{index + 1}/{len(videos)}: {target}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latents and prompt embeddings for finetune.py")
    parser.add_argument("--videos", type=Path, required=True, help="folder of .mp4 and .txt files")
    parser.add_argument("--output", type=Path, required=True, help="folder for .safetensors files")
    add_arguments(parser)
    return complete(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    videos = sorted(options.videos.glob("*.mp4"))
    uncaptioned = [path.name for path in videos if not path.with_suffix(".txt").is_file()]
    if not videos or uncaptioned:
        reason = f"no .txt beside {', '.join(uncaptioned)}" if videos else "no .mp4 files"
        print(f"{options.videos}: {reason}", file=sys.stderr)
        return 2
    encode(options, videos, torch.device(options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
