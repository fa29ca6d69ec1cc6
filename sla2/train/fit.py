"""Stage 1: the router and alpha of every layer, fitted to full attention on recorded samples.

Source: "SLA2: Sparse-Linear Attention with Learnable Routing and QAT", arXiv 2602.12675, stage 1 of
its training: minimise MSE(full attention, SLA2 under SoftTop-k, eq. 14-15), without quantisation.
The optimiser, its rate, the schedules and what follows the steps of a run are choices of this
package; the paper names none for this stage. docs/training.md tells what each is for.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import load_router, save_router
from ..checks import check_choice, check_flag
from ..env import why_not
from ..module import SLA2Attention
from ..optim import param_groups
from .calibrate import set_mean_alpha
from .fit_arguments import check_layer_options, check_topk_fractions, pick_device
from .fit_data import Problem, ProblemLoader, RecordedLayer, draw_batch, scan_layers
from .fit_folder import FitFolder, FitReport, Run
from .fit_log import FitLog, Row
from .hard_mode import HardMode
from .schedule import SCHEDULES, Schedule, check_tau_range

# The gradient of alpha is of one query block in a mean over all: near 1e-8 at 75600 tokens and 40
# heads, where AdamW's usual 1e-8 would stop it from moving.
_ADAM_EPS = 1e-15

_LOGGER = logging.getLogger("sla2")


def fit_router(
    samples: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    topk: Sequence[float] = (0.05, 0.04, 0.03),
    steps: int = 500,
    lr: float = 1e-3,
    schedule: str = "cosine",
    warmup: int = 10,
    tau: tuple[float, float] | None = (0.1, 0.01),
    decay: float = 0.01,
    batch: int = 1,
    layers: Iterable[str] | None = None,
    layer_options: Mapping[str, Any] | None = None,
    calibrate: bool = True,
    refit_alpha: bool = True,
    keep_better: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    cache_bytes: int = 8 << 30,
    checkpoint_every: int = 50,
    resume: bool = False,
    progress: bool = True,
) -> dict[float, Path]:
    """Fits one router and one alpha per layer and topk, and writes a router file per topk.

    Layer after layer, and for each the fractions of `topk` from the first to the last: the first
    starts from the identity and a calibrated alpha (eq. 7), the others from the one before. The
    loss is the mean squared error between full attention and SLA2 in soft mode, both computed from
    the samples of that layer in their own 16-bit dtype; AdamW minimises it. After the steps of a
    layer and topk the fitted router is compared to the one it started from in hard mode.

    Args:
        samples: folder of a `QKVRecorder`: q, k, v (B, N, H, D) of any number of layers. Read one
            sample at a time.
        output: folder for everything that is written.
        topk: fractions of the key blocks kept, floats in (0, 1], descending.
        steps: updates per layer and topk.
        lr: AdamW's rate for router and alpha, at its highest.
        schedule: "cosine" lets the rate fall towards 0 over the steps of a layer and topk: AdamW
            moves every entry by about `lr` a step whatever its gradient, and at a constant rate the
            router ends in that noise. "constant" does not.
        warmup: steps in which the rate grows to `lr`.
        tau: SoftTop-k's temperature at the first and the last step of a layer and topk, geometric
            in between; None: the layer's own (0.1). A low one keeps the soft map near the hard one:
            at 0.1 more blocks than topk share the weight, which hard mode cannot do. A low one from
            the start would not find the blocks that the start is far from.
        decay: share of their distance to the identity that the projections lose in a step at the
            highest rate (AdamW's weight_decay is decay / lr); alpha has none.
        batch: samples per step, at most those a layer has. They are computed one after the other,
            so it costs time and no memory.
        layers: names of the layers to fit; None: all that are recorded.
        layer_options: further arguments of `SLA2Attention`, such as {"per_head_router": True}, but
            not what samples and call decide: sizes, grid, topk, layout and device. "quant" is only
            noted in the router files: this stage is unquantised.
        calibrate: False starts alpha at alpha_init (0.85).
        refit_alpha: after the steps, alpha becomes the one with the least error in hard mode, for
            the fitted router and for the one it started from. False: as trained in soft mode.
        keep_better: of the fitted router and the one it started from, the one with the smaller
            error in hard mode is written. False: always the fitted one.
        device: "cpu" or a CUDA device; None: the current GPU if there is one, else the CPU.
        dtype: what samples are cast to; None: as recorded. CUDA takes bfloat16 and float16 alone.
        seed: of the order of the samples, the only random choice.
        cache_bytes: of samples and targets kept on `device`; the rest is read, and full attention
            computed, every time anew. Changes no bit of the result.
        checkpoint_every: steps between checkpoints, the most that an interruption loses.
        resume: continue the fit in `output`, or start it where there is none. On the same machine
            it gives the same bits as a fit that was not interrupted.
        progress: a bar on stderr, where rich is installed.

    Returns the router file of each topk, for `sla2.load_router` into a model whose SLA2Attention
    modules have the names of the recorded layers. log.csv in `output` has a row per step,
    report.csv one per layer and topk with the errors in hard mode before and after. The logger
    `sla2` warns where the fitted router is worse than the one it started from.

    Raises before anything is computed: TypeError / ValueError for arguments, samples that do not
    fit each other or the device, and a resumed fit with other settings, naming the first;
    FileExistsError for an output folder in use; OSError. During the fit: RuntimeError naming layer,
    topk and step where a loss or gradient is not finite; the state before that step is kept.
    """
    for name, value, least in (
        ("steps", steps, 1),
        ("batch", batch, 1),
        ("warmup", warmup, 0),
        ("checkpoint_every", checkpoint_every, 1),
        ("cache_bytes", cache_bytes, 0),
        ("seed", seed, None),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int; got {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{name}={value} is less than {least}")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise TypeError(f"lr must be a float; got {lr!r}")
    if not 0.0 < lr < math.inf:
        raise ValueError(f"lr={lr} is out of range: it must be positive and finite")
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"decay must be a float; got {decay!r}")
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay={decay} is out of range: allowed is [0, 1)")
    check_choice("schedule", schedule, SCHEDULES)
    for name, flag in (
        ("calibrate", calibrate),
        ("refit_alpha", refit_alpha),
        ("keep_better", keep_better),
        ("resume", resume),
        ("progress", progress),
    ):
        check_flag(name, flag)
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise TypeError(f"dtype must be a torch.dtype or None; got {dtype!r}")
    fractions = check_topk_fractions(topk)
    place = pick_device(device)
    options = check_layer_options(layer_options)
    recorded = scan_layers(samples, layers)
    fit = _Fit(
        folder=FitFolder(output),
        fractions=fractions,
        steps=steps,
        lr=float(lr),
        schedule=schedule,
        warmup=warmup,
        tau=check_tau_range(tau),
        decay=float(decay),
        batch=batch,
        options=options,
        calibrate=calibrate,
        refit_alpha=refit_alpha,
        keep_better=keep_better,
        device=place,
        dtype=dtype,
        seed=seed,
        cache_bytes=cache_bytes,
        checkpoint_every=checkpoint_every,
    )
    fit.check(recorded)
    fit.folder.begin(fit.settings(recorded), resume=resume)
    # Whatever the caller's modes are: this needs gradients, and the dtype of the samples.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(place.type, enabled=False),
    ):
        fit.run(recorded, progress=progress)
        return fit.collect(recorded)


class _Fit(NamedTuple):
    """The arguments of `fit_router`, and its steps."""

    folder: FitFolder
    fractions: tuple[float, ...]
    steps: int
    lr: float
    schedule: str
    warmup: int
    tau: tuple[float, float] | None
    decay: float
    batch: int
    options: dict[str, Any]
    calibrate: bool
    refit_alpha: bool
    keep_better: bool
    device: torch.device
    dtype: torch.dtype | None
    seed: int
    cache_bytes: int
    checkpoint_every: int

    # ---- before the start ---------------------------------------------------------------------

    def check(self, recorded: list[RecordedLayer]) -> None:
        """Raises TypeError / ValueError where a layer cannot be fitted or saved."""
        modules = {}
        for layer in recorded:
            for fraction in self.fractions:
                modules[layer.name] = self._make_module(layer, fraction, "meta")
            dtype = self.dtype or layer.dtype
            reason = why_not(self.device, dtype=dtype, head_dim=layer.head_dim)
            if reason is not None:
                raise ValueError(f"layer {layer.name!r} ({dtype}) on {self.device}: {reason}")
            if self.batch > len(layer.files):
                raise ValueError(
                    f"batch={self.batch} is more than the {len(layer.files)} samples of layer "
                    f"{layer.name!r}: lower it, or record more"
                )
        _assemble(modules)

    def settings(self, recorded: list[RecordedLayer]) -> dict[str, Any]:
        """Everything that the result depends on; the device and its libraries apart."""
        return {
            "topk": self.fractions,
            "steps": self.steps,
            "lr": self.lr,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "tau": self.tau,
            "decay": self.decay,
            "batch": self.batch,
            "layer_options": self.options,
            "calibrate": self.calibrate,
            "refit_alpha": self.refit_alpha,
            "keep_better": self.keep_better,
            "dtype": None if self.dtype is None else str(self.dtype),
            "seed": self.seed,
            "layers": {
                layer.name: {
                    "dtype": str(layer.dtype),
                    "N, H, D": (layer.tokens, layer.heads, layer.head_dim),
                    "grid": layer.grid,
                    "samples": layer.fingerprints(),
                }
                for layer in recorded
            },
        }

    def _make_module(
        self, layer: RecordedLayer, fraction: float, device: torch.device | str
    ) -> SLA2Attention:
        return SLA2Attention(
            layer.heads,
            layer.head_dim,
            seq_len=layer.tokens,
            grid=layer.grid,
            topk=fraction,
            layout="BNHD",
            device=device,
            **self.options,
        )

    # ---- the fit ------------------------------------------------------------------------------

    def run(self, recorded: list[RecordedLayer], *, progress: bool) -> None:
        """Every run that is not finished: layer after layer, topk after topk."""
        runs = [Run(layer.name, fraction) for layer in recorded for fraction in self.fractions]
        starts = {run: index * self.steps for index, run in enumerate(runs)}
        total = len(runs) * self.steps
        done = self.folder.steps_done(runs, self.steps)
        if done == total:
            return
        with FitLog(self.folder.path, rows_done=done, rows_total=total, progress=progress) as log:
            for layer in recorded:
                loader = ProblemLoader(layer, self.device, self.dtype, self.cache_bytes)
                previous = None
                for fraction in self.fractions:
                    run = Run(layer.name, fraction)
                    own_done = max(0, done - starts[run])
                    if own_done < self.steps:
                        module = self._make_module(layer, fraction, self.device)
                        self._train(run, previous, module, loader, own_done, log)
                    previous = run

    def _train(
        self,
        run: Run,
        previous: Run | None,
        module: SLA2Attention,
        loader: ProblemLoader,
        done: int,
        log: FitLog,
    ) -> None:
        """The steps of `run` after the `done` ones, whose state the checkpoint has."""
        module.set_stage(1)
        own_tau = module.tau
        schedule = Schedule(
            self.steps, self.lr, self.warmup, self.schedule, self.tau or (own_tau, own_tau)
        )
        groups = param_groups(module, lr_router=self.lr)
        assert groups[0]["name"] == "router"
        groups[0]["weight_decay"] = self.decay / self.lr
        optimizer = torch.optim.AdamW(groups, eps=_ADAM_EPS)
        if done > 0:
            self.folder.load_checkpoint(module, optimizer)
        else:
            self._set_start(run, previous, module, loader)
        for step in range(done, self.steps):
            began = time.perf_counter()
            order = f"{self.seed}/{run.layer}/{run.topk}"
            chosen = draw_batch(order, step, self.batch, len(loader))
            rate, module.tau = schedule.lr_at(step), schedule.tau_at(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss, relative_error = _backward(module, loader, chosen)
            bad = _what_is_not_finite(module, loss)
            if bad is not None:
                log.sync()
                self.folder.save_checkpoint(run, module, optimizer, step)
                raise RuntimeError(
                    f"layer {run.layer!r}, topk={run.topk}, step {step + 1}: {bad} is not finite "
                    f"(loss {loss}), on samples {', '.join(loader.name(i) for i in chosen)}. "
                    f"{self.folder.path} keeps the state before this step and the layers before. "
                    "Look for NaN and infinity in these samples, or lower lr; either is another "
                    "fit, which needs another folder and may leave the finished layers out"
                )
            optimizer.step()
            seconds = time.perf_counter() - began
            log.add(Row(*run, step + 1, loss, relative_error, rate, module.tau, seconds))
            if (step + 1) % self.checkpoint_every == 0 and step + 1 < self.steps:
                log.sync()
                self.folder.save_checkpoint(run, module, optimizer, step + 1)
        log.sync()
        module.tau = own_tau
        self._judge(run, previous, module, loader)

    def _set_start(
        self, run: Run, previous: Run | None, module: SLA2Attention, loader: ProblemLoader
    ) -> None:
        """What `module` is before its first step, from a new one."""
        if previous is not None:
            # strict=False: the two differ in topk.
            load_router(module, self.folder.trained(previous), strict=False)
        elif self.calibrate:
            try:
                set_mean_alpha(module, ((problem.q, problem.k) for problem in loader))
            except ValueError as error:
                raise RuntimeError(f"layer {run.layer!r}, before step 1: {error}") from error

    def _judge(
        self, run: Run, previous: Run | None, fitted: SLA2Attention, loader: ProblemLoader
    ) -> None:
        """Ends a run: writes the router to keep, and how the two compare in hard mode.

        The start is made anew, so that a resumed run needs no more than its checkpoint.
        """
        start = copy.deepcopy(fitted)
        start.reset_parameters()
        self._set_start(run, previous, start, loader)
        trained = {"start": copy.deepcopy(start), "fitted": copy.deepcopy(fitted)}
        errors = []
        for module in (start, fitted):
            hard = HardMode(module, loader)
            if self.refit_alpha:
                hard.set_best_alpha()
            errors.append(hard.error())
        before, after = errors
        if not (math.isfinite(before) and math.isfinite(after)):
            raise RuntimeError(
                f"layer {run.layer!r}, topk={run.topk}, after the last step: the error in hard "
                "mode is not finite. Look for NaN and infinity in the samples"
            )
        worse = after > before
        kept = "start" if worse and self.keep_better else "fitted"
        if worse:
            _LOGGER.warning(
                "stage 1, layer %r, topk=%s: in hard mode the fitted router's relative error is "
                "%.4f, that of the router it started from %.4f; %s is kept. More samples, more "
                "steps or a lower lr may help",
                *run, after, before, "the start" if kept == "start" else "the fitted one",
            )  # fmt: skip
        router = start if kept == "start" else fitted
        self.folder.finish(run, router, trained[kept], FitReport(*run, before, after, kept))

    def collect(self, recorded: list[RecordedLayer]) -> dict[float, Path]:
        """Writes a router file of all layers for each topk."""
        paths = {}
        for fraction in self.fractions:
            modules = {}
            for layer in recorded:
                modules[layer.name] = self._make_module(layer, fraction, "cpu")
                load_router(modules[layer.name], self.folder.part(Run(layer.name, fraction)))
            paths[fraction] = self.folder.router(fraction)
            save_router(_assemble(modules), paths[fraction])
        self.folder.write_report(
            [Run(layer.name, fraction) for layer in recorded for fraction in self.fractions]
        )
        return paths


def _backward(
    module: SLA2Attention, loader: ProblemLoader, chosen: list[int]
) -> tuple[float, float]:
    """The gradient of the mean squared error over the chosen samples into module's `.grad`.

    Returns that loss, and the relative L2 error. One sample is in memory at a time.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=module.alpha_offset.device)
    count = 0
    for index in chosen:
        elements, error_and_energy = _backward_of_sum(module, loader[index])
        sums += error_and_energy
        count += elements
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad *= 2.0 / count
    error, energy = sums.tolist()
    return error / count, math.sqrt(error / energy) if energy else math.nan


def _backward_of_sum(module: SLA2Attention, problem: Problem) -> tuple[int, Tensor]:
    """Adds the gradient of sum((out - target)^2) / 2 to `.grad`.

    Not of the mean: the gradient of each element, in the dtype of out, would underflow in float16.
    Returns the number of elements, and the sums of squares of out - target and of target.
    """
    out = module(problem.q, problem.k, problem.v)
    wide = torch.promote_types(out.dtype, torch.float32)
    target = problem.target.to(wide)
    difference = out.detach().to(wide) - target
    out.backward(difference.to(out.dtype))
    sums = [x.square().sum(dtype=torch.float64) for x in (difference, target)]
    return out.numel(), torch.stack(sums)


def _what_is_not_finite(module: SLA2Attention, loss: float) -> str | None:
    """The loss, or the gradient of a parameter; None where all are finite."""
    if not math.isfinite(loss):
        return "the loss"
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the gradient of {name}"
    return None


def _assemble(modules: Mapping[str, SLA2Attention]) -> nn.Module:
    """A module in which each layer has its recorded name, as in the model it came from."""
    root = nn.Module()
    for name, module in modules.items():
        parent = root
        *path, last = name.split(".")
        try:
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, module)
        except KeyError as error:
            raise ValueError(
                f"layer {name!r} is not named like a module of a model ({error.args[0]}), which a "
                "router file needs: record it under the name of its SLA2Attention"
            ) from error
    return root
