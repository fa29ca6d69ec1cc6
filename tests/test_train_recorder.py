"""Stage 1's recordings: what is kept, the files, and what recording leaves alone."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import sla2
from sla2.train import QKVRecorder, Sample, read_samples

SHAPE = (1, 130, 2, 16)


class Dense(nn.Module):
    """Attention with a forward that takes q, k, v, in any module's place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gain: float = 1.0) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return gain * nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, num_layers: int = 2, attention: Callable[[], nn.Module] = Dense) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(attention() for _ in range(num_layers))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for block in self.blocks:
            q = block(q, k=k, v=v)
        return q


def make_qkv(seed: int = 0, shape: tuple[int, ...] = SHAPE, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(**options) for _ in range(3)]


def number(value: float) -> list[Tensor]:
    """A sample that can be told by its value."""
    return [torch.full((1, 1, 1, 1), float(value))] * 3


def values(folder: Path, layer: str = "a") -> list[float]:
    return [sample.q.item() for sample in read_samples(folder, layer)]


def record_numbers(folder: Path, numbers: Any, layer: str = "a", **options: Any) -> list[float]:
    with QKVRecorder(nn.Identity(), folder, layers=(), **options) as recorder:
        for value in numbers:
            recorder.record(layer, *number(value))
    return values(folder, layer)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# ---- what arrives -------------------------------------------------------------------------------


def test_round_trip_by_hooks(tmp_path: Path) -> None:
    model, qkv = Model(11), make_qkv()
    expected = model(*qkv)
    with QKVRecorder(model, tmp_path / "new" / "folder", layers=["blocks.10", "blocks.2"]) as own:
        own.step(999)
        assert torch.equal(model(*qkv), expected)
        own.step(torch.tensor([41.5]))
        model(*qkv)
        assert own.counts == {"blocks.10": 2, "blocks.2": 2}
    samples = list(read_samples(tmp_path / "new" / "folder"))
    assert [(s.layer, s.timestep) for s in samples] == [
        ("blocks.2", 999.0), ("blocks.2", 41.5), ("blocks.10", 999.0), ("blocks.10", 41.5)
    ]  # fmt: skip
    for sample in samples:
        assert isinstance(sample, Sample) and sample.q.shape == SHAPE
        assert torch.equal(sample.k, qkv[1]) and torch.equal(sample.v, qkv[2])
    assert torch.equal(samples[0].q, Model(2)(*qkv))


def test_the_modules_of_the_library_are_found(tmp_path: Path) -> None:
    """Without `layers`; each with the layout of its own."""
    qkv = [x.transpose(1, 2) for x in make_qkv()]
    model = Model(2, lambda: sla2.SLA2Attention(2, 16, seq_len=130, topk=0.5, layout="BHND"))
    with QKVRecorder(model, tmp_path) as recorder:
        model(*qkv)
    assert recorder.counts == {"blocks.0": 1, "blocks.1": 1}
    (sample,) = read_samples(tmp_path, "blocks.0")
    assert sample.q.shape == SHAPE and sample.timestep is None
    for x, y in zip(sample[2:], qkv, strict=True):
        assert torch.equal(x, y.transpose(1, 2))
    with QKVRecorder(model.blocks[0], tmp_path / "alone") as recorder:
        model(*qkv)
    assert recorder.counts == {"SLA2Attention": 1}


def test_record_by_a_processor(tmp_path: Path) -> None:
    with QKVRecorder(nn.Identity(), tmp_path, layers=(), layout="BHND") as recorder:
        recorder.step(7)
        recorder.record("a/b@c 1", *(x.transpose(1, 2) for x in make_qkv()), step=3)
        recorder.record("a/b@c 1", *(x.transpose(1, 2) for x in make_qkv(1)))
        recorder.step(None)
        recorder.record("..", *(x.transpose(1, 2) for x in make_qkv(2)))
    samples = list(read_samples(tmp_path))
    assert [s[:2] for s in samples] == [("..", None), ("a/b@c 1", 3.0), ("a/b@c 1", 7.0)]
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*"))
    for seed, sample in zip((2, 0, 1), samples, strict=True):
        assert all(map(torch.equal, sample[2:], make_qkv(seed)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype | None) -> None:
    qkv = make_qkv(dtype=dtype)
    qkv[0][0, 0, 0, 0] = torch.nan
    with QKVRecorder(nn.Identity(), tmp_path, layers=(), dtype=stored) as recorder:
        recorder.record("a", *qkv)
    (sample,) = read_samples(tmp_path)
    for x, y in zip(sample[2:], qkv, strict=True):
        assert x.dtype == (stored or dtype)
        assert torch.equal(x.nan_to_num(9), y.to(stored or dtype).nan_to_num(9))
    assert sample.q.isnan().sum() == 1


def test_autocast(tmp_path: Path) -> None:
    """What the module was given is stored, unless `dtype` says otherwise; no cast of ours."""
    model, qkv = Model(), make_qkv()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        QKVRecorder(model, tmp_path / "given", layers=["blocks.0"]),
        QKVRecorder(model, tmp_path / "half", layers=["blocks.0"], dtype=torch.float16),
    ):
        model(*qkv)
    (given,), (half,) = read_samples(tmp_path / "given"), read_samples(tmp_path / "half")
    assert torch.equal(given.q, qkv[0]) and torch.equal(half.q, qkv[0].half())


def test_any_strides(tmp_path: Path) -> None:
    base = make_qkv()[0]
    batch, tokens, heads, dim = SHAPE
    fused = torch.randn(batch, tokens, 3 * heads, dim)
    reversed_memory = base.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    cases = [
        fused.split(heads, dim=2),
        (base, base, base),
        torch.randn(3, *SHAPE).unbind(),
        (reversed_memory, base[:, :1].expand(SHAPE), torch.randn(*SHAPE[:3], 2 * dim)[..., ::2]),
    ]
    with QKVRecorder(nn.Identity(), tmp_path, layers=()) as recorder:
        for qkv in cases:
            recorder.record("a", *qkv)
    for sample, qkv in zip(read_samples(tmp_path), cases, strict=True):
        assert all(map(torch.equal, sample[2:], qkv))
        assert all(x.is_contiguous() for x in sample[2:])


# ---- what is kept -------------------------------------------------------------------------------


def test_limit_and_determinism(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_samples_per_layer": 4}
    first = record_numbers(tmp_path / "1", range(50), seed=3, **options)
    assert len(first) == 4 and first == sorted(first) and first != [0, 1, 2, 3]
    assert record_numbers(tmp_path / "2", range(50), seed=3, **options) == first
    assert record_numbers(tmp_path / "3", range(50), seed=4, **options) != first
    assert record_numbers(tmp_path / "4", range(4), **options) == [0, 1, 2, 3]
    # Another layer in between changes nothing; layers choose differently.
    with QKVRecorder(nn.Identity(), tmp_path / "5", layers=(), seed=3, **options) as recorder:
        for value in range(50):
            recorder.record("b", *number(value))
            recorder.record("a", *number(value))
    assert values(tmp_path / "5") == first != values(tmp_path / "5", "b")
    assert recorder.counts == {"a": 4, "b": 4}
    assert len(list((tmp_path / "5").glob("*.safetensors"))) == 8


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    record_numbers(tmp_path, [1.0])
    model = Model()
    with pytest.raises(FileExistsError, match="a@000000.safetensors.*append=True"):
        QKVRecorder(model, tmp_path, layers=["blocks.0"]).__enter__()
    assert num_hooks(model) == 0 and values(tmp_path) == [1.0]
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is not named like a sample"):
        record_numbers(tmp_path, [2.0], append=True)


# ---- what is left alone -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_inputs_and_gradients_do_not_change(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model, qkv = Model(), [x.requires_grad_() for x in make_qkv()]
    expected = torch.autograd.grad(model(*qkv).square().sum(), qkv)
    before = [(x._version, x.detach().clone()) for x in qkv]
    with QKVRecorder(model, tmp_path, layers=["blocks.0", "blocks.1"], dtype=dtype):
        actual = torch.autograd.grad(model(*qkv).square().sum(), qkv)
    assert all(map(torch.equal, actual, expected))
    for x, (version, content) in zip(qkv, before, strict=True):
        assert x._version == version and torch.equal(x, content)
    assert not any(x.requires_grad for sample in read_samples(tmp_path) for x in sample[2:])


def test_nothing_is_kept_alive(tmp_path: Path) -> None:
    with QKVRecorder(nn.Identity(), tmp_path, layers=()) as recorder:
        leaf = torch.randn(SHAPE, requires_grad=True)
        q, k, v = leaf.sin(), leaf.cos(), leaf.exp()
        recorder.record("a", q, k, v)
        watched = [weakref.ref(x) for x in (leaf, q, k, v)]
        del leaf, q, k, v
        gc.collect()
        assert [ref() for ref in watched] == [None] * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(tmp_path: Path, mode: Any) -> None:
    model, qkv = Model(), make_qkv()
    with mode(), QKVRecorder(model, tmp_path, layers=["blocks.1"]):
        attended = model.blocks[0](*qkv)
        model.blocks[1](attended, *qkv[1:])
    (sample,) = read_samples(tmp_path)
    assert all(map(torch.equal, sample[2:], (attended, *qkv[1:])))


def test_hooks_are_removed_after_an_exception(tmp_path: Path) -> None:
    model, qkv = Model(), make_qkv()
    with (
        pytest.raises(RuntimeError, match="out of paper"),
        QKVRecorder(model, tmp_path, layers=["blocks.0"]) as recorder,
    ):
        assert num_hooks(model) == 1
        model(*qkv)
        raise RuntimeError("out of paper")
    assert num_hooks(model) == 0
    (sample,) = read_samples(tmp_path)
    assert torch.equal(sample.q, qkv[0])
    with pytest.raises(RuntimeError, match="with statement"):
        recorder.record("a", *qkv)


def test_two_recorders_at_once(tmp_path: Path) -> None:
    model, qkv = Model(), make_qkv()
    with QKVRecorder(model, tmp_path / "1", layers=["blocks.0"]) as first:
        first.step(1)
        with QKVRecorder(model, tmp_path / "2", layers={"x": model.blocks[0]}) as second:
            second.step(2)
            model(*qkv)
        assert num_hooks(model) == 1
        model(*qkv)
    assert num_hooks(model) == 0
    assert [s[:2] for s in read_samples(tmp_path / "1")] == [("blocks.0", 1.0)] * 2
    assert [s[:2] for s in read_samples(tmp_path / "2")] == [("x", 2.0)]


def test_two_recorders_in_one_folder(tmp_path: Path) -> None:
    """Neither overwrites what the other wrote."""
    first, second = (QKVRecorder(nn.Identity(), tmp_path, layers=()) for _ in range(2))
    with first, second:
        first.record("a", *number(1.0))
        with pytest.raises(OSError, match="a@000000.safetensors exists: two recorders"):
            second.record("a", *number(2.0))
    assert values(tmp_path) == [1.0] and len(list(tmp_path.iterdir())) == 1


def test_one_recorder_twice(tmp_path: Path) -> None:
    recorder = QKVRecorder(nn.Identity(), tmp_path, layers=(), append=True)
    for value in (1.0, 2.0):
        with recorder:
            recorder.record("a", *number(value), step=None)
            with pytest.raises(RuntimeError, match="already recording"):
                recorder.__enter__()
    assert values(tmp_path) == [1.0, 2.0]


def test_a_layer_that_is_never_called(tmp_path: Path) -> None:
    model = Model()
    with (
        pytest.warns(RuntimeWarning, match="nothing was recorded of blocks.1"),
        QKVRecorder(model, tmp_path, layers=["blocks.0", "blocks.1"]),
    ):
        model.blocks[0](*make_qkv())


# ---- errors -------------------------------------------------------------------------------------


def test_arguments(tmp_path: Path) -> None:
    model: Any = Model()
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, "nn.Module; got str", "model", {}),
        (ValueError, "holds no SLA2Attention.*record", model, {}),
        (TypeError, r"did you mean \['blocks.0'\]", model, {"layers": "blocks.0"}),
        (ValueError, r"no modules named \['blocks.2'\]", model, {"layers": ["blocks.2"]}),
        (ValueError, "not a module of Model", model, {"layers": {"a": Dense()}}),
        (TypeError, "must be a module; got int", model, {"layers": {"a": 5}}),
        (ValueError, "must not be empty", model, {"layers": {"": model}}),
        (TypeError, "got int", model, {"layers": {3: model}}),
        (TypeError, r"a ModuleList, takes \(", model, {"layers": ["blocks"]}),
        (TypeError, "max_samples_per_layer must be an int", model, {"max_samples_per_layer": 2.0}),
        (ValueError, "max_samples_per_layer=0", model, {"max_samples_per_layer": 0}),
        (TypeError, "seed must be an int or None", model, {"seed": "x"}),
        (TypeError, "dtype must be one of.*got torch.int8", model, {"dtype": torch.int8}),
        (ValueError, "layout='BSHD'", model, {"layout": "BSHD"}),
        (TypeError, "append must be True or False", model, {"append": 1}),
    ]
    for error, words, given, options in cases:
        with pytest.raises(error, match=words):
            QKVRecorder(given, tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_tensors_and_timesteps(tmp_path: Path) -> None:
    q, k, v = make_qkv()
    with QKVRecorder(nn.Identity(), tmp_path, layers=()) as recorder:
        with pytest.raises(TypeError, match="layer 'a': k must be a torch.Tensor; got NoneType"):
            recorder.record("a", q, None, v)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"q must be \(B, N, H, D\); got \(130, 2, 16\)"):
            recorder.record("a", q[0], k[0], v[0])
        with pytest.raises(ValueError, match="v .1, 77, 2, 16.*leave cross-attention layers out"):
            recorder.record("a", q, k, v[:, :77])
        with pytest.raises(ValueError, match="must agree; got q .* and k .* torch.float64"):
            recorder.record("a", q, k.double(), v)
        with pytest.raises(TypeError, match="dtype of q must be one of.*torch.int64"):
            recorder.record("a", q.long(), k, v)
        wrong: list[tuple[type[Exception], Any]] = [
            (TypeError, "3"), (TypeError, True), (TypeError, torch.tensor(True)),
            (ValueError, float("nan")), (ValueError, torch.tensor([1, 2])),
        ]  # fmt: skip
        for error, step in wrong:
            with pytest.raises(error, match="a timestep"):
                recorder.step(step)
            with pytest.raises(error, match="a timestep"):
                recorder.record("a", q, k, v, step=step)
    assert not any(tmp_path.iterdir())


def test_hooked_calls_that_cannot_be_recorded(tmp_path: Path) -> None:
    model, (q, k, v) = Model(), make_qkv()
    with QKVRecorder(model, tmp_path, layers=["blocks.0"]):
        with pytest.raises(ValueError, match="layer 'blocks.0'.*cross-attention"):
            model(q, k[:, :3], v[:, :3])
        with pytest.raises(TypeError, match="'v'"):
            model.blocks[0](q, k)
        model.blocks[0](q, v=v, k=k, gain=2.0)
    assert num_hooks(model) == 0 and len(list(read_samples(tmp_path))) == 1


def test_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SafetensorError("I/O error: No space left on device (os error 28)")

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a file")
        raise full

    with QKVRecorder(nn.Identity(), tmp_path, layers=()) as recorder:
        recorder.record("a", *number(1.0))
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", save_file)
            with pytest.raises(OSError, match="a@000001.safetensors: I/O error: No space left"):
                recorder.record("a", *number(2.0))
        assert recorder.counts == {"a": 1} and len(list(tmp_path.iterdir())) == 1
        recorder.record("a", *number(3.0))
    assert values(tmp_path) == [1.0, 3.0]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=str(tmp_path / "file")):
            record_numbers(folder, [1.0])
        with pytest.raises(OSError, match=str(tmp_path / "file")):
            read_samples(folder)
    folder = tmp_path / "gone"
    with QKVRecorder(nn.Identity(), folder, layers=()) as recorder:
        folder.rmdir()
        with pytest.raises(OSError, match=f"cannot write the sample {folder}/a@000000"):
            recorder.record("a", *number(1.0))


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_samples(tmp_path / "nowhere")
    (tmp_path / "sample-x.tmp").write_bytes(b"left by a crash")
    with pytest.raises(ValueError, match="holds no samples"):
        read_samples(tmp_path)
    record_numbers(tmp_path, [1.0, 2.0])
    with pytest.raises(ValueError, match="no samples of layer 'b', only: a$"):
        read_samples(tmp_path, "b")


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **changes: str | None) -> None:
    """The same file with other metadata or tensors; None takes a key out."""
    with safe_open(path, framework="pt") as content:
        metadata = {**content.metadata(), **changes}
        tensors = tensors or {
            name: content.get_tensor(name).clone() for name in list(content.keys())
        }
    left = {key: value for key, value in metadata.items() if value is not None}
    safetensors.torch.save_file(tensors, path, metadata=left)


ONE = torch.ones(1, 1, 1, 1)
DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "empty": ("", lambda path: path.write_bytes(b"")),
    "text": ("", lambda path: path.write_text("no tensors at all")),
    "truncated": ("", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "longer": ("", lambda path: path.write_bytes(path.read_bytes() + b"x")),
    "foreign": ("lacks format", lambda path: safetensors.torch.save_file({"w": ONE}, path)),
    "newer": ("version is '2', written by sla2 9", lambda path: rewrite(
        path, version="2", sla2_version="9")),
    "other layout": ("layout is 'BHND'", lambda path: rewrite(path, layout="BHND")),
    "no version": ("no metadata 'version'", lambda path: rewrite(path, version=None)),
    "renamed": ("layer 'b', call 1: the file was renamed", lambda path: rewrite(path, layer="b")),
    "no v": (r"tensors \['k', 'q'\]", lambda path: rewrite(path, {"q": ONE, "k": ONE * 1})),
    "shapes": ("k is float32 .2, 1, 1, 1.", lambda path: rewrite(
        path, {"q": ONE, "k": torch.ones(2, 1, 1, 1), "v": ONE * 1})),
    "dtype": ("expected float16", lambda path: rewrite(path, dtype="float16")),
    "timestep": ("", lambda path: rewrite(path, timestep="noon")),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named(tmp_path: Path, kind: str) -> None:
    record_numbers(tmp_path, [1.0, 2.0])
    path = tmp_path / "a@000001.safetensors"
    words, damage = DAMAGE[kind]
    damage(path)
    samples = read_samples(tmp_path)
    assert next(samples).q.item() == 1.0
    with pytest.raises(ValueError, match=r"a@000001\.safetensors is damaged.*" + words):
        next(samples)


def test_the_metadata(tmp_path: Path) -> None:
    """What a reader in another language finds."""
    with QKVRecorder(nn.Identity(), tmp_path, layers=()) as recorder:
        recorder.record("a b", *make_qkv(dtype=torch.bfloat16), step=12)
    path = tmp_path / "a%20b@000000.safetensors"
    with safe_open(path, framework="pt") as content:
        metadata = content.metadata()
        assert set(content.keys()) == {"q", "k", "v"}
    assert 0.0 <= float(metadata.pop("priority")) < 1.0
    assert json.loads(metadata.pop("timestep")) == 12.0
    assert metadata == {
        "format": "sla2-qkv", "version": "1", "layer": "a b", "call": "0", "layout": "BNHD",
        "dtype": "bfloat16", "grid": "null", "sla2_version": sla2.__version__,
    }  # fmt: skip
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
