"""Stage 1 for Wan2.1: records q, k, v of real generations and fits a router to every layer.

    python examples/wan/record_and_fit.py --prompts prompts.txt --output stage1
    python examples/wan/record_and_fit.py --size 14b --samples 2 --output stage1-14b
    python examples/wan/record_and_fit.py --size tiny --steps 5 --inference-steps 2 --output try

The pipeline generates a video for each prompt (one a line), and a few calls of every layer, chosen
at random over prompts, timesteps and both halves of the guidance, go to --output/samples. The fit
in --output/fit ends in one router file for each share of blocks: what finetune.py starts from.

The same command goes on where it was interrupted: a recording begins anew, a fit continues. With
other options --output is refused; to fit other routers to its samples, delete its folder fit.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from wan_models import (
    SIZES,
    add_arguments,
    complete,
    latent_shape,
    load_pipeline,
    prompt_inputs,
    video_size,
)

import sla2
from sla2.train import QKVRecorder, fit_router

# The folder of a run is that of the example of stage 1 on a small model.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run_folder import (
    FIT_OPTIONS,
    add_stage1_arguments,
    positive,
    print_errors,
    record_once,
    settings_of,
)

PROMPTS = (
    "A cat walks along a sandy beach at sunset, waves rolling in behind it",
    "Aerial view of a train crossing a stone viaduct in a green valley",
    "Close-up of a potter's hands shaping a bowl on a spinning wheel",
    "A crowded night market in the rain, neon signs reflected in the puddles",
)


def read_prompts(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return PROMPTS
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompt: it needs one a line")
    return prompts


def record(options: argparse.Namespace, folder: Path, device: torch.device) -> None:
    prompts = read_prompts(options.prompts)
    gigabytes = bytes_on_disk(options, device) / 1e9
    print(f"the samples will take {gigabytes:.1f} GB in {folder.parent}", flush=True)
    pipe = load_pipeline(options, device).to(device)
    pipe.set_progress_bar_config(disable=not options.progress)
    # All blocks kept is full attention, in modules that have the names the router files need.
    print(sla2.apply(pipe.transformer, topk=1.0, **video_size(options)))
    with QKVRecorder(
        pipe.transformer, folder, max_samples_per_layer=options.samples, seed=options.seed
    ) as recorder:

        def note_timestep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.step(kwargs["timestep"].flatten()[0])

        handle = pipe.transformer.register_forward_pre_hook(note_timestep, with_kwargs=True)
        for index, prompt in enumerate(prompts):
            print(f"recording {index + 1}/{len(prompts)}: {prompt}", flush=True)
            pipe(
                **prompt_inputs(pipe, prompt, "", options.seed + index),
                **video_size(options),
                num_inference_steps=options.inference_steps,
                generator=torch.Generator().manual_seed(options.seed + index),
                output_type="latent",
            )
        handle.remove()


def bytes_on_disk(options: argparse.Namespace, device: torch.device) -> int:
    _, frames, height, width = latent_shape(options)
    config = SIZES[options.size].transformer
    features = config["num_attention_heads"] * config["attention_head_dim"]
    one = 3 * frames * (height // 2) * (width // 2) * features * (2 if device.type == "cuda" else 4)
    return one * options.samples * config["num_layers"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage 1 of SLA2 for Wan2.1")
    parser.add_argument("--output", type=Path, required=True, help="folder for samples and fit")
    parser.add_argument("--prompts", type=Path, help="text file, one a line (default: four)")
    parser.add_argument("--inference-steps", type=positive, default=30, help="of each generation")
    add_stage1_arguments(parser, samples=4)
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    add_arguments(parser)
    return complete(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    free = ("output", "progress", *FIT_OPTIONS)
    settings = settings_of(options, free) | {"device": device.type}
    samples = record_once(options.output, settings, lambda folder: record(options, folder, device))
    gc.collect()  # the pipeline
    if device.type == "cuda":
        torch.cuda.empty_cache()
    fit = options.output / "fit"
    routers = fit_router(
        samples,
        fit,
        topk=options.topk,
        steps=options.steps,
        layer_options={"quant": options.quant},
        device=device,
        seed=options.seed,
        resume=True,
        progress=options.progress,
    )
    print_errors(fit, routers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
