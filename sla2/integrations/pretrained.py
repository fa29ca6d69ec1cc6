"""SLA2 parameters in a model's own checkpoint.

`save_pretrained` writes them, as parts of the model. `from_pretrained` builds a model without SLA2,
finds no place for them, and drops them with a warning that is easily overlooked: `apply` would then
start from an untrained router. So `apply` looks into the checkpoint that the model came from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoint import _METADATA_KEY, load_router, what_is_not_finite
from ..module import SLA2Attention

_MARK = ".processor.sla2."
_PARAMETERS = ("proj_q_delta", "proj_k_delta", "alpha_offset")


def reject_dropped_parameters(model: nn.Module) -> None:
    """Raises ValueError where the checkpoint that `model` was loaded from has SLA2 parameters."""
    for folder in _origins(model):
        for path in sorted(folder.glob("*.safetensors")):
            if any(_MARK in key for key in _header(path)[0]):
                raise ValueError(
                    f"{path} holds SLA2 parameters, and from_pretrained has dropped them: it "
                    "builds the model without SLA2. Pass router= with a file of sla2.save_router, "
                    f"which also checks the settings, or router={str(folder)!r} to load what the "
                    "checkpoint has; router='new' starts with an untrained router"
                )


def load_parameters(
    model: nn.Module, layers: Mapping[str, SLA2Attention], source: str | os.PathLike[str]
) -> None:
    """Fills `layers`, named by their attention modules, from a router file or a checkpoint.

    Raises ValueError for what does not fit or is no such file, FileNotFoundError.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"router={str(source)!r}: there is no such file or folder")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    headers = {file: _header(file) for file in files}
    router_files = [file for file, (_, metadata) in headers.items() if _METADATA_KEY in metadata]
    if len(router_files) == 1:
        load_router(model, router_files[0])
        return
    if router_files:
        names = ", ".join(file.name for file in router_files)
        raise ValueError(f"{path} has {len(router_files)} router files: pass one of {names}")
    values = _read([file for file, (keys, _) in headers.items() if any(_MARK in k for k in keys)])
    if not values:
        raise ValueError(f"{path} is no router file, and no checkpoint with SLA2 parameters")
    for name, layer in layers.items():
        for key in _PARAMETERS:
            stored, parameter = values.get(f"{name}{_MARK}{key}"), getattr(layer, key)
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device: its parameters hold no values")
            if stored is None or stored.shape != parameter.shape:
                shape = "is missing" if stored is None else f"has shape {tuple(stored.shape)}"
                raise ValueError(
                    f"{path}: {name}{_MARK}{key} {shape}; this model needs "
                    f"{tuple(parameter.shape)}, for {layer.num_heads} heads and N={layer.seq_len}"
                )
            if bad := what_is_not_finite(stored):
                raise ValueError(f"{path}: {name}{_MARK}{key} {bad}")
    with torch.no_grad():
        for name, layer in layers.items():
            for key in _PARAMETERS:
                getattr(layer, key).copy_(values[f"{name}{_MARK}{key}"])


def _origins(model: nn.Module) -> list[Path]:
    """The folders where from_pretrained may have found the model: it notes no subfolder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        return []
    root = Path(name)
    if not root.is_dir():
        try:
            from huggingface_hub import snapshot_download

            root = Path(snapshot_download(str(name), local_files_only=True))
        except (ImportError, OSError, ValueError):
            return []  # made from a config, or moved since
    return [root, *sorted(path for path in root.glob("*") if path.is_dir())]


def _header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors and metadata, without the tensors; nothing where it is unreadable."""
    try:
        with safe_open(path, framework="pt") as stream:
            return list(stream.keys()), stream.metadata() or {}
    except (OSError, SafetensorError):
        return [], {}


def _read(paths: list[Path]) -> dict[str, Tensor]:
    """The SLA2 parameters in these files, the shards of one checkpoint."""
    values: dict[str, Tensor] = {}
    for path in paths:
        names = [key for key in _header(path)[0] if _MARK in key]
        with safe_open(path, framework="pt") as stream:
            values |= {name: stream.get_tensor(name) for name in names}
    return values
