"""Generates a video with Wan2.1 and SLA2, and writes it as mp4.

    python examples/wan/generate.py --transformer stage2/transformer \\
        --router stage2/router.safetensors --prompt "a cat on a beach" --output cat.mp4
    python examples/wan/generate.py --dense --prompt "a cat on a beach" --output dense.mp4
    python examples/wan/generate.py --size tiny --inference-steps 2 --output try.mp4

Without --transformer the pipeline's own weights run, without --router the router is untrained; with
--random-weights the video is noise. Needs `pip install imageio imageio-ffmpeg` for the mp4.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.utils import export_to_video
from wan_models import (
    FPS,
    add_arguments,
    complete,
    compute_dtype,
    load_pipeline,
    prompt_inputs,
    video_size,
)

import sla2


def generate(options: argparse.Namespace, device: torch.device) -> None:
    transformer = None
    if options.transformer is not None:
        transformer = WanTransformer3DModel.from_pretrained(
            options.transformer, torch_dtype=compute_dtype(device)
        )
    pipe = load_pipeline(options, device, transformer)
    if not options.dense:
        # Before offloading, which has to know every module.
        report = sla2.apply(
            pipe.transformer,
            topk=options.topk,
            quant=options.quant,
            router=options.router,
            **video_size(options),
        )
        print(report)
        if options.router is None:
            print("no --router: the router is untrained, and the video shows it", file=sys.stderr)
    if options.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    if options.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    began = time.perf_counter()
    frames = pipe(
        **prompt_inputs(pipe, options.prompt, options.negative_prompt, options.seed),
        **video_size(options),
        num_inference_steps=options.inference_steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
    ).frames[0]
    seconds = time.perf_counter() - began
    options.output.parent.mkdir(parents=True, exist_ok=True)
    export_to_video(frames, str(options.output), fps=FPS)
    print(f"{len(frames)} frames in {seconds:.1f} s, wrote {options.output}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Text to video with Wan2.1 and SLA2")
    parser.add_argument("--output", type=Path, required=True, help="the mp4 file")
    parser.add_argument("--prompt", default="a cat walks along a sandy beach at sunset")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--transformer", type=Path, help="folder that finetune.py wrote")
    parser.add_argument("--router", type=Path, help="router file (default: untrained)")
    parser.add_argument("--topk", type=float, default=0.03, help="that of the router file")
    parser.add_argument("--quant", default="int8_fp8", help="that of the router file")
    parser.add_argument("--dense", action="store_true", help="full attention, to compare with")
    parser.add_argument("--inference-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--offload", action="store_true", help="only the model in use on the GPU")
    add_arguments(parser)
    return complete(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None:
        print("an mp4 needs: pip install imageio imageio-ffmpeg", file=sys.stderr)
        return 2
    with torch.no_grad():
        generate(options, torch.device(options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
