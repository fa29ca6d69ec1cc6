"""Stage 1: records the q, k, v of a video diffusion transformer and fits its routers.

    python examples/train_stage2.py --output base --steps 3000    # a model to begin with
    python examples/fit_stage1.py --model base/model.safetensors --output stage1
    python examples/train_stage2.py --model base/model.safetensors \\
        --router stage1/fit/router_0.03.safetensors --output stage2

The model is the small one of bench/quality, on clips made from photographs. With a model of your
own the steps are the same: run it on its own data at timesteps from all over the schedule, with a
`QKVRecorder` around; then call `fit_router`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from quality.clips import TRAIN, Clips
from quality.flow import autocast, draw_batch
from quality.model import VideoDiT, attention_names, load_model

import sla2
from sla2.train import QKVRecorder, fit_router, read_report


@torch.no_grad()
def record(model: VideoDiT, folder: Path, samples: int, dtype: torch.dtype) -> None:
    """One forward pass per sample, each of another clip at another timestep."""
    device = model.head.weight.device
    clips = Clips(TRAIN, model.clip_size, device)
    # Full attention is hooked under the names that SLA2Attention will have.
    names = attention_names(model)
    with (
        QKVRecorder(model, folder, layers=names, max_samples_per_layer=samples) as recorder,
        autocast(device, dtype),
    ):
        # The timesteps of one batch are spread evenly over the schedule.
        noised, timesteps, _ = draw_batch(clips, samples, "stage 1")
        for clip, t in zip(noised.split(1), timesteps.split(1), strict=True):
            recorder.step(t)
            model(clip, t)


def print_errors(fit: Path, routers: dict[float, Path]) -> None:
    """Relative errors in hard mode, over the recorded samples, in the mean over layers."""
    report = read_report(fit)
    for topk, path in routers.items():
        own = [row for row in report if row.topk == topk]
        start = statistics.fmean(row.error_start for row in own)
        fitted = statistics.fmean(row.error_fitted for row in own)
        kept = sum(row.kept == "start" for row in own)
        print(
            f"topk {topk:g}: relative error {start:.3f} at the start, {fitted:.3f} fitted; "
            f"{kept} of {len(own)} layers kept the start; {path}"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage 1 of SLA2: record, then fit the routers")
    parser.add_argument("--model", type=Path, required=True, help="model.safetensors, as trained")
    parser.add_argument("--output", type=Path, required=True, help="folder for samples and fit")
    parser.add_argument("--topk", type=float, nargs="+", default=[0.05, 0.04, 0.03])
    parser.add_argument("--samples", type=int, default=12, help="recorded calls of each layer")
    parser.add_argument("--steps", type=int, default=500, help="for each layer and topk")
    parser.add_argument("--quant", default="int8_fp8", help="of stage 2; noted in the router files")
    parser.add_argument("--device", default="cuda" if sla2.is_available("cuda") else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    samples, fit = options.output / "samples", options.output / "fit"
    if not fit.exists():  # else an interrupted fit goes on with the samples that are there
        record(load_model(options.model, device).eval(), samples, options.samples, dtype)
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
