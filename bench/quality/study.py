"""What is compared, and the parts of a run: base model, stage 1, and the fine-tunings.

Every part leaves its files in the output folder and is skipped where they are there already.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import sla2
from quality.clips import HELD_OUT, TRAIN, Clips
from quality.flow import HeldOut, autocast, draw_batch, evaluate, train
from quality.model import (
    Grid,
    VideoDiT,
    attention_names,
    load_model,
    replace_attention,
    use_sla2,
    write_model,
)
from quality.sla import SLAAttention
from sla2.cli.device import provenance
from sla2.cli.files import write_json
from sla2.train import QKVRecorder, fit_router, read_report
from sla2.train.fit_data import ProblemLoader, scan_layers
from sla2.train.hard_mode import HardMode

QUANT = "int8_fp8"
LOSS_TAIL = 50  # training losses that are averaged for the record


@dataclass(frozen=True)
class Settings:
    """Everything the numbers depend on; the defaults are for one H200."""

    grid: Grid = (9, 32, 32)
    patch: int = 4
    heads: int = 6
    head_dim: int = 64
    depth: int = 4
    batch: int = 8
    base_steps: int = 3000
    base_lr: float = 5e-4
    topk: tuple[float, ...] = (0.10, 0.05, 0.03)
    samples: int = 24
    stage1_steps: int = 300
    stage1_lr: float = 1e-3
    steps: int = 400
    lr: float = 1e-4
    lr_extra: float = 1e-3
    weight_decay: float = 0.01
    seeds: int = 3
    eval_clips: int = 24
    eval_timesteps: int = 8


# The whole chain in ten seconds of two CPU cores; 3, 2 and 1 of 24 key blocks are kept.
SMOKE = Settings(
    grid=(6, 16, 16), patch=2, heads=2, head_dim=16, depth=2, batch=2, base_steps=6,
    topk=(0.15, 0.10, 0.05), samples=2, stage1_steps=2, steps=2, seeds=2, eval_clips=2,
    eval_timesteps=2,
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune. topk: index into Settings.topk; None: full attention."""

    name: str
    title: str
    topk: int | None = 2
    method: str = "sla2"  # "full", "sla2" or "sla"
    learned_router: bool = True
    learned_alpha: bool = True
    trained_in: str = QUANT
    evaluated_in: tuple[str, ...] = (QUANT,)


VARIANTS = (
    Variant("full", "full attention", None, "full", trained_in="none", evaluated_in=("none",)),
    Variant("sla2-low", "SLA2", 0),
    Variant("sla2-mid", "SLA2", 1),
    Variant("sla2", "SLA2", 2),
    Variant("no-qat", "SLA2 without QAT", trained_in="none", evaluated_in=("none", QUANT)),
    Variant("topk-router", "SLA2, top-k router not learned", learned_router=False),
    Variant("fixed-alpha", "SLA2, alpha fixed", learned_alpha=False),
    Variant("sla", "SLA", method="sla", trained_in="none", evaluated_in=("none",)),
)


class LayerFit(NamedTuple):
    """Stage 1 of one layer at one topk: relative errors in hard mode over the fit's samples.

    Every router has the alpha with the least error.
    """

    layer: str
    topk: float
    error_identity: float  # of the router that is not learned
    error_start: float  # of the router that the fit started from
    error_fitted: float
    kept: str  # "start" or "fitted"


class Study:
    """One output folder: settings.json, base.*, stage1/, pieces/, quality.json."""

    def __init__(
        self, folder: Path, settings: Settings, device: torch.device, commit: str | None
    ) -> None:
        self.folder, self.settings, self.device = folder, settings, device
        # The CPU has no need of 16 bits, and emulates them slowly.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._commit = commit
        self._pieces = folder / "pieces"
        self._stage1 = folder / "stage1"
        self._base = folder / "base.safetensors"
        frames, height, width = settings.grid
        size = (frames, height * settings.patch, width * settings.patch)
        self._clips = Clips(TRAIN, size, device)
        self._held_out = HeldOut(
            Clips(HELD_OUT, size, device),
            count=settings.eval_clips,
            timesteps=settings.eval_timesteps,
            batch=settings.batch,
        )

    # ---- the base model -------------------------------------------------------------------------

    def train_base(self) -> None:
        """Full attention, from scratch."""
        report = self.folder / "base.json"
        if report.exists():
            return
        s = self.settings
        torch.manual_seed(0)  # of the weights
        model = VideoDiT(
            s.grid, patch=s.patch, heads=s.heads, head_dim=s.head_dim, depth=s.depth
        ).to(self.device)
        group = {"params": list(model.parameters()), "lr": s.base_lr}
        groups = [{**group, "weight_decay": s.weight_decay}]
        loss = self._train(model, groups, s.base_steps, "base", self.folder / "base.checkpoint")
        write_model(self._base, model.config, model.state_dict())
        self._keep(
            report,
            parameters=sum(p.numel() for p in model.parameters()),
            train_loss=loss,
            **evaluate(model, self._held_out, self.dtype),
        )

    # ---- stage 1 --------------------------------------------------------------------------------

    def fit_stage1(self) -> None:
        """Records q, k, v of the base model on training clips; fits a router for every topk.

        The learned routers are what `fit_router` gives by default: where its steps have not
        lowered the error in hard mode that is the router it started from, at worst the identity.
        """
        report = self.folder / "stage1.json"
        if report.exists():
            return
        s = self.settings
        samples, done = self._stage1 / "samples", self._stage1 / "recorded"
        fit = self._stage1 / "fit"
        if not done.exists():
            shutil.rmtree(self._stage1, ignore_errors=True)
            self._record(samples)
            done.touch()
        routers = fit_router(
            samples,
            fit,
            topk=s.topk,
            steps=s.stage1_steps,
            lr=s.stage1_lr,
            layer_options={"quant": QUANT},
            device=self.device,
            resume=True,
        )
        for topk, path in routers.items():
            shutil.copyfile(path, self.router_file(topk))
        identity = self._refit_identity(samples)
        layers = [
            LayerFit(error_identity=identity[row.layer, row.topk], **row._asdict())
            for row in read_report(fit)
        ]
        self._keep(report, layers=[layer._asdict() for layer in layers])
        shutil.rmtree(samples)  # 21 MB for each layer and sample at the default sizes

    def router_file(self, topk: float, *, learned: bool = True) -> Path:
        return self._stage1 / f"{'router' if learned else 'identity'}_{topk:g}.safetensors"

    @torch.no_grad()
    def _record(self, folder: Path) -> None:
        """One call per sample: another clip at another timestep."""
        model = load_model(self._base, self.device).eval()
        names = attention_names(model)
        count = self.settings.samples
        with (
            QKVRecorder(model, folder, layers=names, max_samples_per_layer=count) as recorder,
            autocast(self.device, self.dtype),
        ):
            # The timesteps of a batch are spread over [0, 1], and so are those of the samples.
            noised, timesteps, _ = draw_batch(self._clips, count, "stage 1")
            for clip, t in zip(noised.split(1), timesteps.split(1), strict=True):
                recorder.step(t)
                model(clip, t)

    def _refit_identity(self, samples: Path) -> dict[tuple[str, float], float]:
        """The router that is not learned, with alpha refitted as that of the learned ones is.

        Returns its error in hard mode for each layer and topk.
        """
        models = {topk: load_model(self._base, self.device) for topk in self.settings.topk}
        for topk, model in models.items():
            use_sla2(model, topk=topk, quant=QUANT)
        errors = {}
        for recorded in scan_layers(samples, attention_names(models[self.settings.topk[0]])):
            problems = list(ProblemLoader(recorded, self.device, None, 0))
            for topk, model in models.items():
                layer = model.get_submodule(recorded.name)
                assert isinstance(layer, sla2.SLA2Attention)
                hard = HardMode(layer, problems)
                hard.set_best_alpha()
                errors[recorded.name, topk] = hard.error()
        for topk, model in models.items():
            sla2.save_router(model, self.router_file(topk, learned=False))
        return errors

    # ---- stage 2 --------------------------------------------------------------------------------

    def fine_tune(self, variant: Variant, seed: int) -> None:
        """The same steps, batches and rates for every variant."""
        report = self.piece_file(variant, seed)
        if report.exists():
            return
        model = self.build(variant)
        before = self._evaluate(model, variant)
        set_quant(model, variant.trained_in)
        loss = self._train(
            model, self._groups(model), self.settings.steps, seed, report.with_suffix(".checkpoint")
        )
        self._keep(
            report,
            variant=variant.name,
            seed=seed,
            before=before,
            after=self._evaluate(model, variant),
            train_loss=loss,
        )

    def piece_file(self, variant: Variant, seed: int) -> Path:
        return self._pieces / f"{variant.name}-{seed}.json"

    def build(self, variant: Variant) -> VideoDiT:
        """The base model with the variant's attention, as stage 2 starts from it."""
        model = load_model(self._base, self.device)
        if variant.topk is None:
            return model
        topk = self.settings.topk[variant.topk]
        if variant.method == "sla":
            replace_attention(
                model,
                lambda: SLAAttention(self.settings.head_dim, topk=topk, device=self.device),
            )
            return model
        use_sla2(model, topk=topk, quant=QUANT)
        sla2.load_router(model, self.router_file(topk, learned=variant.learned_router))
        for layer in sla2_layers(model):
            layer.set_stage(2)
            if not variant.learned_alpha:
                nn.init.zeros_(layer.alpha_offset)  # alpha is alpha_init everywhere
                layer.alpha_offset.requires_grad_(False)
        return model

    def _groups(self, model: VideoDiT) -> list[dict[str, Any]]:
        """The model's weights; alpha or SLA's projection at a rate of their own."""
        s = self.settings
        if any(True for _ in sla2_layers(model)):
            return sla2.param_groups(
                model, lr_model=s.lr, lr_alpha=s.lr_extra, weight_decay=s.weight_decay
            )
        extra = [p for name, p in model.named_parameters() if ".attn." in name]
        rest = [p for name, p in model.named_parameters() if ".attn." not in name]
        groups = [{"params": rest, "lr": s.lr, "weight_decay": s.weight_decay}]
        if extra:
            groups.append({"params": extra, "lr": s.lr_extra, "weight_decay": 0.0})
        return groups

    def _evaluate(self, model: VideoDiT, variant: Variant) -> dict[str, Any]:
        """Results by the precision that they are evaluated in."""
        results = {}
        for quant in variant.evaluated_in:
            set_quant(model, quant)
            results[quant] = evaluate(model, self._held_out, self.dtype)
        return results

    # ---- shared ---------------------------------------------------------------------------------

    def _train(
        self,
        model: VideoDiT,
        groups: list[dict[str, Any]],
        steps: int,
        seed: int | str,
        checkpoint: Path,
    ) -> float:
        """Trains, and returns the mean of the last losses."""
        losses = train(
            model,
            groups,
            self._clips,
            steps=steps,
            batch=self.settings.batch,
            dtype=self.dtype,
            seed=seed,
            checkpoint=checkpoint,
            title=checkpoint.stem,
        )
        return statistics.fmean(losses[-LOSS_TAIL:])

    def _keep(self, path: Path, **values: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**provenance(self.device, self._commit), **values})


def sla2_layers(model: VideoDiT) -> Iterator[sla2.SLA2Attention]:
    return (m for m in model.modules() if isinstance(m, sla2.SLA2Attention))


def set_quant(model: VideoDiT, quant: str) -> None:
    for layer in sla2_layers(model):
        layer.quant = quant
