"""The files of recorded attention inputs: one safetensors file per sample, no other index.

Beside them the file `sessions` has the number of recordings with a seed that began in the folder.

A file is named `<layer>@<call>.safetensors`: the layer percent-encoded, and the number of the call
in the order of recording. It holds q, k and v, each (B, N, H, D) and contiguous, and this metadata:

    format        "sla2-qkv"
    version       "1", raised when an older reader would misread the file
    layer, call   as in the file's name
    timestep      JSON: the diffusion timestep, or null where none was given
    layout        "BNHD"
    dtype         of all three tensors, such as "bfloat16"
    priority      the random number in [0, 1) by which the recorder chose this sample
    grid          JSON: (frames, rows, columns) of the N tokens, or null where it is unknown; files
                  written before it existed lack it
    sla2_version  of the writer
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._version import __version__
from ..checks import Grid, check_grid_of
from ..files import write_atomically

FORMAT = "sla2-qkv"
VERSION = "1"
SUFFIX = ".safetensors"
_SESSIONS = "sessions"
_NAMES = ("q", "k", "v")
# Of a file's tensors, what a fingerprint is made of: 128 KiB in pieces from the first to the last.
_PIECES, _PIECE_BYTES = 8, 1 << 14
_FILE_NAME = re.compile(r"(?P<layer>[^@]+)@(?P<call>[0-9]{6,})\.safetensors")


class Sample(NamedTuple):
    """One recorded call of attention: its layer, timestep (None: not given), q, k, v (B, N, H, D).

    The tensors are on the CPU. Their pages are read from the file when they are first used.
    """

    layer: str
    timestep: float | None
    q: Tensor
    k: Tensor
    v: Tensor


class SampleFile(NamedTuple):
    """A file of the folder, as its name describes it; (layer, call) is unique."""

    path: Path
    layer: str
    call: int


class SampleForm(NamedTuple):
    """What the samples of a layer must agree in, the batch size in `shape` apart."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """(B, N, H, D)."""
    grid: Grid | None
    """None: unknown."""


def read_samples(folder: str | os.PathLike[str], layer: str | None = None) -> Iterator[Sample]:
    """The samples that a `QKVRecorder` left in `folder`, of one layer or of all, one at a time.

    Sorted by layer (blocks.2 before blocks.10), then in the order of recording. A sample is mapped
    into memory when it is its turn, so the folder may be larger than the memory.

    Raises OSError for a folder that cannot be read, ValueError for one without samples or without
    any of `layer`, and ValueError naming the file for a damaged file, one of a newer format, or a
    safetensors file that is no sample.
    """
    files = list_files(folder)
    if not files:
        raise ValueError(f"the folder {folder} holds no samples")
    chosen = [file for file in files if layer is None or file.layer == layer]
    if not chosen:
        layers = ", ".join(dict.fromkeys(file.layer for file in files))
        raise ValueError(f"the folder {folder} holds no samples of layer {layer!r}, only: {layers}")
    # The folder is checked by the call itself, not by the first next().
    return (read_sample(file) for file in chosen)


def list_files(folder: str | os.PathLike[str]) -> list[SampleFile]:
    """The sample files of `folder`, sorted; raises ValueError for other safetensors files."""
    files = []
    for path in safetensors_files(folder):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f"{path} is not named like a sample, <layer>@<call>{SUFFIX}: this folder is not, "
                "or not only, a recording"
            )
        files.append(SampleFile(path, unquote(match["layer"]), int(match["call"])))
    return sorted(files, key=lambda file: (_natural(file.layer), file.layer, file.call))


def safetensors_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Everything a reader looks at. A crashed writer leaves another suffix behind."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix == SUFFIX)


def write_sample(
    folder: Path,
    call: int,
    priority: float,
    layer: str,
    timestep: float | None,
    grid: Grid | None,
    qkv: list[Tensor],
) -> Path:
    """Writes contiguous CPU tensors that share no memory; the file appears complete or not at all.

    Raises OSError naming the file where the folder, its permissions or the disk do not allow it,
    FileExistsError where the file is already there.
    """
    path = folder / f"{quote(layer, safe='')}@{call:06d}{SUFFIX}"
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layer": layer,
        "call": str(call),
        "timestep": json.dumps(timestep),
        "layout": "BNHD",
        "dtype": _dtype_name(qkv[0]),
        "priority": repr(priority),
        "grid": json.dumps(grid),
        "sla2_version": __version__,
    }
    tensors = dict(zip(_NAMES, qkv, strict=True))

    def write(temporary: Path) -> None:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        if path.exists():
            raise FileExistsError(
                f"{path} exists: two recorders write to one folder. Give each its own"
            )

    try:
        write_atomically(path, write, suffix=".tmp")
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the sample {path}: {error}") from error
    return path


def read_sessions(folder: Path) -> int:
    """How many recordings with a seed began in `folder`. Raises ValueError for a damaged file."""
    path = folder / _SESSIONS
    text = path.read_text("utf-8") if path.exists() else "0"
    if not text.strip().isdecimal():
        raise ValueError(f"{path} is damaged: it holds {text!r}, not the number of sessions")
    return int(text)


def write_sessions(folder: Path, count: int) -> None:
    """Raises OSError."""
    text = f"{count}\n"
    write_atomically(
        folder / _SESSIONS, lambda temporary: temporary.write_text(text, "utf-8"), suffix=".tmp"
    )


def read_priority(file: SampleFile) -> float:
    """The priority stored in `file`. Raises what `read_samples` raises for a file."""
    with _open_checked(file) as (_, metadata):
        return float(metadata["priority"])


def read_form(file: SampleFile) -> SampleForm:
    """Of q in `file`, from its header; raises as `read_sample`."""
    with _open_checked(file) as (content, metadata):
        dtype = getattr(torch, metadata["dtype"], None)
        shape = tuple(content.get_slice("q").get_shape())
        if not isinstance(dtype, torch.dtype) or len(shape) != 4:
            raise ValueError(f"q is {metadata['dtype']} {shape}; expected (B, N, H, D)")
        grid = check_grid_of(json.loads(metadata.get("grid", "null")), shape[1])
        return SampleForm(dtype, shape, grid)


def fingerprint(file: SampleFile) -> str:
    """Tells the tensors of one recording from those of another, without reading all of them.

    Of their number of bytes and of pieces spread over them, not of the metadata: the same tensors
    have the same fingerprint when they are recorded again. Raises OSError.
    """
    with file.path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")  # behind the header and its length
        size = stream.seek(0, os.SEEK_END) - start
        digest = hashlib.sha256(str(size).encode())
        for piece in range(_PIECES):
            stream.seek(start + max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
            digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]


def read_sample(file: SampleFile) -> Sample:
    """Raises ValueError naming the file where it is damaged or no sample."""
    with _open_checked(file) as (content, metadata):
        timestep = json.loads(metadata["timestep"])
        q, k, v = (content.get_tensor(name) for name in _NAMES)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4 or x.shape != q.shape or _dtype_name(x) != metadata["dtype"]:
                raise ValueError(
                    f"{name} is {_dtype_name(x)} {tuple(x.shape)}; expected {metadata['dtype']} "
                    f"(B, N, H, D) with q's shape {tuple(q.shape)}"
                )
        return Sample(file.layer, None if timestep is None else float(timestep), q, k, v)


@contextmanager
def _open_checked(file: SampleFile) -> Iterator[tuple[Any, dict[str, str]]]:
    """The open file and its metadata. What is wrong with either, here or in the body of the
    `with`, becomes a ValueError that names the file."""
    try:
        with safe_open(file.path, framework="pt", device="cpu") as content:
            metadata = content.metadata() or {}
            _check_header(file, metadata, content.keys())
            yield content, metadata
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = f"no metadata {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file.path} is damaged or no sample: {reason}") from error


def _check_header(file: SampleFile, metadata: dict[str, str], tensors: Iterable[str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its metadata lacks format={FORMAT!r}")
    if metadata["version"] != VERSION:
        raise ValueError(
            f"its format version is {metadata['version']!r}, written by sla2 "
            f"{metadata.get('sla2_version', '(unknown)')}; this sla2 {__version__} reads "
            f"{VERSION!r}"
        )
    if (metadata["layer"], metadata["call"]) != (file.layer, str(file.call)):
        raise ValueError(
            f"it holds layer {metadata['layer']!r}, call {metadata['call']}: the file was renamed"
        )
    if metadata["layout"] != "BNHD":
        raise ValueError(f"its layout is {metadata['layout']!r}, not 'BNHD'")
    if set(tensors) != set(_NAMES):
        raise ValueError(f"it holds the tensors {sorted(tensors)}, not q, k, v")


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _natural(layer: str) -> list[str | int]:
    """A sort key that compares runs of digits as numbers; text and numbers alternate in it."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", layer))]
