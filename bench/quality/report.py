"""docs/quality.md, written from quality.json; without one it says that nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quality.clips import HELD_OUT, TRAIN
from quality.results import Results, Spread, differences, layer_fits, still_identity, values
from quality.study import QUANT, VARIANTS, LayerFit, Settings, Variant

WIDTH = 120  # columns of the documents

TITLE = """# Does it learn?

<!-- Written by `python bench/quality/run.py --report`; do not edit. -->
"""

PURPOSE = """
A small video diffusion transformer is trained from scratch with full attention; then it is
fine-tuned, once with full attention and once with each form of sparse attention, from the same
weights, on the same batches, for the same number of steps. What is compared is the denoising loss
on photographs that no training has seen.
"""

NOT_MEASURED = """## Results

Not measured. On a GPU, in parts that can be interrupted and go on with the same command:

```bash
python bench/quality/run.py --output quality
```

`--smoke` runs the whole chain at toy size on a CPU; its numbers mean nothing. `quality.json` in
that folder, kept as `bench/results/h200_quality.json`, becomes this section with
`python bench/quality/run.py --report`.
"""

READING = """
The base model has a held-out loss of {base:.5f}. Mean ± standard deviation over {seeds} seeds; the
difference is that of the loss to full attention fine-tuned on the same batches, seed by seed. The
error is the relative L2 error of attention's output against full attention on the same q, k, v, the
mean over the layers.
"""

COLUMNS = (
    "attention", "sparsity", "trained in", "evaluated in", "loss before", "loss after",
    "difference", "error before", "error after",
)  # fmt: skip

# (claim, first, second): shown where the first has the lower held-out loss. (variant, precision).
CLAIMS = (
    ("quantisation in training beats quantising afterwards", ("sla2", QUANT), ("no-qat", QUANT)),
    ("the learned router beats plain top-k", ("sla2", QUANT), ("topk-router", QUANT)),
    ("SLA2 in low bit beats SLA in 16 bit", ("sla2", QUANT), ("sla", "none")),
    ("learned alpha beats one alpha for all", ("sla2", QUANT), ("fixed-alpha", QUANT)),
    ("keeping more blocks helps (most against fewest)", ("sla2-low", QUANT), ("sla2", QUANT)),
    ("SLA2 with the most blocks beats full attention", ("sla2-low", QUANT), ("full", "none")),
)

CLAIMS_READING = """
What the paper reports of large models, or its design implies, and what is seen here. The number is
the difference of the held-out losses: "seen" is below zero for every seed, "opposite" above zero
for every seed, "undecided" neither.
"""

STAGE1_COLUMNS = ("layer", "sparsity", "identity", "start", "fitted", "kept")

STAGE1_READING = """
The relative error of SLA2 in hard mode against full attention, unquantised, over the samples of the
fit. Each router has the alpha with the smallest error. Identity: the router that is not learned.
Start: what the fit started from, at first the identity, then the router of the sparsity before.
Kept: the one of start and fitted with the smaller error; it is the learned router of stage 2.
{still}
"""

METHOD = (
    """
    **Data.** Clips of {frames} frames of {width} x {height} pixels, made from photographs that
    scikit-image ships: a camera that pans and zooms, and in half of the clips an ellipse cut out of
    another photograph that moves over it. Training sees {train}; the held-out loss is on
    {held_out}.
    """,
    """
    **Model.** {depth} blocks of {heads} heads of {head_dim}, patches of {patch} x {patch} pixels,
    so {tokens} tokens and {blocks} key blocks, of which {kept} sparsity are kept; rotary positions
    in t, h and w, AdaLN, rectified flow. Trained for {base_steps} steps of {batch} clips with full
    attention.
    """,
    """
    **Stage 1.** q, k, v of {samples} calls of every layer at as many timesteps, on training clips,
    and `fit_router` at {shares}, {stage1_steps} steps each ([training.md](training.md)). Rate and
    temperature fall over the steps; then alpha is refitted in hard mode, and of the fitted router
    and the one it started from the one with the smaller error in hard mode is kept. One fit serves
    all seeds.
    """,
    """
    **Stage 2.** {steps} steps of {batch} clips, all weights, AdamW at {lr:g} (alpha, and SLA's
    projection, at {lr_extra:g}), warm-up and cosine, gradients clipped at 1. A seed decides clips,
    noise and timesteps, and is the same for all variants; base model and routers are the same for
    all seeds, so the spread is that of fine-tuning alone.
    """,
    """
    **Evaluation.** Mean squared error of the predicted velocity on {eval_clips} clips of the
    held-out photographs at {eval_timesteps} timesteps each, with fixed noise.
    """,
    """
    **Variants**, at {fewest} sparsity. Without QAT: fine-tuned in 16 bit, then evaluated in {quant}
    and, for comparison, as it was trained. Top-k router: identity projections, alpha refitted in
    hard mode on the samples of stage 1, as it is for the learned router. Alpha fixed: 0.85 for all
    heads and query blocks, neither fitted nor trained, beside the learned router. SLA: the identity
    router; the output of linear attention over all tokens goes through a projection that is zero at
    the start and is added to the sparse branch. It stays in 16 bit, for it has no low-bit form.
    """,
    """
    **Limits.** The model is small and has seen few photographs. Differences between variants say
    how attention adapts; they do not predict the quality of a large video model.
    """,
)


def document(results: Results | None, source: str = "") -> str:
    """The whole text of docs/quality.md. source: the file that `results` were read from."""
    settings, section = Settings(), NOT_MEASURED
    if results is not None:
        saved: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in results["settings"].items()
        }
        settings = Settings(**saved)
        section = _measured(results, settings, source)
    return "\n".join((TITLE, _wrap(PURPOSE), section, _method(settings)))


# ---- results ------------------------------------------------------------------------------------


def _measured(results: Results, settings: Settings, source: str) -> str:
    base = results["base"]
    commits = sorted({str(piece["commit"])[:12] for piece in (base, *results["pieces"])})
    named = (("torch", "torch"), ("CUDA", "cuda"), ("driver", "driver"))
    versions = ", ".join(f"{name} {results[key]}" for name, key in named if results[key])
    rows = [
        _row(results, settings, variant, quant)
        for variant in VARIANTS
        for quant in variant.evaluated_in
    ]
    claims = []
    for claim, first, second in CLAIMS:
        found = differences(results, first, second)
        claims.append((claim, _signed(found), _verdict(found)))
    return "\n".join(
        (
            "## Results",
            "",
            f"**{results['gpu']}**, {str(results['date'])[:10]}, commit {', '.join(commits)},",
            f"{versions}; `{results['command']}`, `{source}`.",
            "",
            _wrap(READING.format(base=base["loss"], seeds=settings.seeds)),
            _table(COLUMNS, rows, left=(0, 2, 3)),
            _wrap(CLAIMS_READING),
            _table(("claim", "difference", ""), claims, left=(0, 2)),
            *_stage1(layer_fits(results), settings),
        )
    )


def _stage1(fits: list[LayerFit], settings: Settings) -> list[str]:
    fewest = settings.topk[-1]
    count = len(still_identity(fits, fewest))
    still = f"At {_sparsity(fewest)} sparsity the learned router is the identity in "
    still += f"{count or 'none'} of the {settings.depth} layers."
    rows = [
        (
            f"`{fit.layer}`",
            _sparsity(fit.topk),
            *(f"{x:.4f}" for x in (fit.error_identity, fit.error_start, fit.error_fitted)),
            fit.kept,
        )
        for fit in fits
    ]
    return [
        "### Stage 1 by layer",
        "",
        _wrap(STAGE1_READING.format(still=still)),
        _table(STAGE1_COLUMNS, rows, left=(0, 5)),
    ]


def _row(results: Results, settings: Settings, variant: Variant, quant: str) -> tuple[str, ...]:
    def cell(when: str, key: str, digits: int) -> str:
        spread = Spread.of(values(results, variant.name, quant, when, key))
        if when == "before":  # the same for every seed
            return f"{spread.mean:.{digits}f}"
        return f"{spread.mean:.{digits}f} ± {spread.deviation:.{digits}f}"

    losses = cell("before", "loss", 5), cell("after", "loss", 5)
    precisions = _precision(variant.trained_in), _precision(quant)
    if variant.topk is None:
        return (variant.title, "0 %", *precisions, *losses, "", "", "")
    return (
        variant.title,
        _sparsity(settings.topk[variant.topk]),
        *precisions,
        *losses,
        _signed(differences(results, (variant.name, quant), ("full", "none"))),
        cell("before", "attention_error", 3),
        cell("after", "attention_error", 3),
    )


def _table(
    columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, left: tuple[int, ...]
) -> str:
    marks = tuple("---" if index in left else "---:" for index in range(len(columns)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows)) + "\n"


def _precision(quant: str) -> str:
    return "16 bit" if quant == "none" else quant


def _sparsity(topk: float) -> str:
    return f"{100 * (1 - topk):g} %"


def _signed(found: list[float]) -> str:
    spread = Spread.of(found)
    return f"{spread.mean:+.5f} ± {spread.deviation:.5f}"


def _verdict(found: list[float]) -> str:
    if all(value < 0 for value in found):
        return "seen"
    return "opposite" if all(value > 0 for value in found) else "undecided"


# ---- method -------------------------------------------------------------------------------------


def _method(s: Settings) -> str:
    frames, height, width = s.grid
    tokens = frames * height * width
    blocks = -(-tokens // 64)
    values = {
        **vars(s),
        "frames": frames,
        "height": height * s.patch,
        "width": width * s.patch,
        "tokens": tokens,
        "blocks": blocks,
        "kept": _listed([f"{max(1, int(x * blocks))} at {_sparsity(x)}" for x in s.topk]),
        "shares": _listed([f"{x:g}" for x in s.topk]),
        "fewest": _sparsity(s.topk[-1]),
        "quant": QUANT,
        "train": _photographs(TRAIN),
        "held_out": _photographs(HELD_OUT),
    }
    texts = (_wrap(text.format(**values)) for text in METHOD)
    return "\n".join(("## Method", "", *texts)).rstrip("\n") + "\n"


def _photographs(files: tuple[str, ...]) -> str:
    return _listed([name.partition(".")[0].replace("_", " ") for name in files])


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _wrap(text: str) -> str:
    """One paragraph, ending in an empty line. Not textwrap: it would split at hyphens."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines) + "\n"
