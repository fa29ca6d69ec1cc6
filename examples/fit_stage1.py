"""Stage 1: records the q, k, v of a video diffusion transformer and fits its routers.

    python examples/train_stage2.py --output base --steps 3000    # a model to begin with
    python examples/fit_stage1.py --model base/model.safetensors --output stage1
    python examples/train_stage2.py --model base/model.safetensors \\
        --router stage1/fit/router_0.03.safetensors --output stage2

The model is the small one of bench/quality, on clips made from photographs. With a model of your
own the steps are the same: run it on its own data at timesteps from all over the schedule, with a
`QKVRecorder` around; then call `fit_router`.

The same command goes on where it was interrupted: a recording begins anew, a fit continues. With
other options --output is refused; to fit other routers to its samples, delete its folder fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from quality.clips import TRAIN, Clips
from quality.flow import autocast, draw_batch
from quality.model import attention_names, load_model
from run_folder import FIT_OPTIONS, add_stage1_arguments, print_errors, record_once, settings_of

import sla2
from sla2.train import QKVRecorder, fit_router


@torch.no_grad()
def record(options: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """One forward pass per sample, each of another clip at another timestep."""
    model = load_model(options.model, device).eval()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    clips = Clips(TRAIN, model.clip_size, device)
    # Full attention is hooked under the names that SLA2Attention will have.
    names = attention_names(model)
    with (
        QKVRecorder(model, folder, layers=names, max_samples_per_layer=options.samples) as recorder,
        autocast(device, dtype),
    ):
        # The timesteps of one batch are spread evenly over the schedule.
        noised, timesteps, _ = draw_batch(clips, options.samples, "stage 1")
        for clip, t in zip(noised.split(1), timesteps.split(1), strict=True):
            recorder.step(t)
            model(clip, t)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage 1 of SLA2: record, then fit the routers")
    parser.add_argument("--model", type=Path, required=True, help="model.safetensors, as trained")
    parser.add_argument("--output", type=Path, required=True, help="folder for samples and fit")
    add_stage1_arguments(parser, samples=12)
    parser.add_argument("--device", default="cuda" if sla2.is_available("cuda") else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    settings = settings_of(options, free=("output", *FIT_OPTIONS)) | {"device": device.type}
    samples = record_once(options.output, settings, lambda folder: record(options, folder, device))
    fit = options.output / "fit"
    routers = fit_router(
        samples,
        fit,
        topk=options.topk,
        steps=options.steps,
        layer_options={"quant": options.quant},
        device=device,
        resume=True,
    )
    print_errors(fit, routers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
