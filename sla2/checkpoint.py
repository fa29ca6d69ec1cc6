"""Router files: the learned parameters of every SLA2Attention in a model, with their settings.

A model's own checkpoint is not enough for them: libraries that rebuild a model from a config drop
the keys they do not expect with a warning at most, and parameters under other settings (another
topk, another alpha_init) are other functions, which no state_dict would notice.

A router file is a safetensors file. Its tensors have the names and the float32 values of the
state_dict; its metadata holds one entry, `sla2.router`, with a JSON object: `version` of the
format, `sla2_version` that wrote it, and `layers`, the settings by layer. One entry, because
safetensors writes several in a random order, and equal routers shall give equal files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._version import __version__
from .checks import check_grid_of, num_q_blocks
from .constants import BLOCK_K, BLOCK_Q
from .files import write_atomically
from .module import SLA2Attention

_FORMAT_VERSION = 2  # 1 had no grids
_READABLE = (1, _FORMAT_VERSION)
_METADATA_KEY = "sla2.router"
_PARAMETERS = ("proj_q_delta", "proj_k_delta", "alpha_offset")
# What strict=False lets differ: settings that can be tuned while the parameters keep their meaning.
# The others change shapes, blocks, or (alpha_init) what an offset of zero stands for.
_TUNABLE = frozenset({"topk", "quant", "tau", "router_score", "smooth_k", "phi_input"})
# Modules that torch puts around others and that are no part of a layer's name.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})

Settings = dict[str, Any]


def find_layers(model: nn.Module) -> dict[str, SLA2Attention]:
    """Every SLA2Attention of `model` by name, once each, in the model's order.

    Names are those of the model without torch.compile, DistributedDataParallel and checkpoint
    wrappers. Raises TypeError for what is no module, ValueError where there is no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    root = model
    while True:
        if isinstance(root, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            root = root.module
        elif "_orig_mod" in dict(root.named_children()):
            root = root.get_submodule("_orig_mod")
        else:
            break
    layers = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in root.named_modules()
        if isinstance(module, SLA2Attention)
    }
    if not layers:
        raise ValueError(f"{type(root).__name__} has no SLA2Attention among its modules")
    return layers


def save_router(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes router and alpha of every SLA2Attention in `model` to the safetensors file `path`.

    The file is written beside `path` and then renamed: a failure leaves an old file as it was.
    Under FSDP2 every rank must call this, since sharded parameters are gathered; all write the same
    bytes, so that one path for all ranks is fine.

    Raises ValueError where `model` has no SLA2Attention or its parameters have no values here (meta
    device, sharded by other means than FSDP2) or such that are not finite, TypeError where they are
    not float32, OSError.
    """
    safetensors = _import_safetensors()
    layers = find_layers(model)
    tensors = {}
    for name, layer in layers.items():
        _check_parameters(name, layer)
        for key in _PARAMETERS:
            tensors[_join(name, key)] = values = _gather(getattr(layer, key))
            if bad := what_is_not_finite(values):
                raise ValueError(f"{key} of {_called(name)} {bad}; nothing was written to {path}")
    header = {
        "version": _FORMAT_VERSION,
        "sla2_version": __version__,
        "layers": {name: _settings(layer) for name, layer in layers.items()},
    }
    data = safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(header)})
    write_atomically(path, lambda temporary: temporary.write_bytes(data), suffix=".tmp")


@torch.no_grad()
def load_router(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True
) -> list[str]:
    """Copies a file of `save_router` into the SLA2Attention modules of `model`, in place.

    Everything is checked first: an error names the first difference, and nothing has been loaded.
    strict=False loads the layers that both sides have, and lets topk, quant, tau, router_score,
    smooth_k and phi_input differ: the model keeps its own. What else must agree does not change.
    Grids are compared where file and model both have one; else as many tokens are enough.

    Returns the differences that strict=False let pass, in words; an empty list where strict.
    Raises ValueError for a file that is no router file, is damaged, holds NaN or infinity or does
    not fit, and for parameters without values (meta device); TypeError where they are not float32;
    OSError.
    """
    layers = find_layers(model)
    for name, layer in layers.items():
        _check_parameters(name, layer)
    settings, tensors = _read(path)
    passed = []
    for difference in _differences(layers, settings):
        if strict or not difference.tunable:
            remedy = difference.remedy
            if difference.tunable:
                remedy += ", or pass strict=False to load in spite of it"
            raise ValueError(f"{path}: {difference.text}; nothing was loaded. {remedy}")
        passed.append(difference.text)
    common = [name for name in layers if name in settings]
    if not common:
        raise ValueError(
            f"{path} and the model have no layer in common: the file has {_listed(settings)}, "
            f"the model {_listed(layers)}"
        )
    for name in common:
        for key in _PARAMETERS:
            _scatter(tensors[_join(name, key)], getattr(layers[name], key))
    return passed


# ---- what is compared ---------------------------------------------------------------------------


def _settings(layer: SLA2Attention) -> Settings:
    """The constructor's arguments that change the mathematics, and the sizes of the blocks."""
    alpha, tokens = layer.alpha_offset, layer.seq_len
    return {
        "num_heads": layer.num_heads,
        "head_dim": layer.head_dim,
        "seq_len": tokens,
        "grid": check_grid_of(layer.grid, tokens),
        "block_q": BLOCK_Q,
        "block_k": BLOCK_K,
        "per_head_router": layer.proj_q_delta.dim() == 3,
        "per_head_alpha": alpha.dim() == 2,
        "alpha_per_token": alpha.dim() == 2 and alpha.shape[1] == tokens != num_q_blocks(tokens),
        "alpha_init": layer.alpha_init,
        "topk": layer.topk,
        "quant": layer.quant,
        "tau": layer.tau,
        "router_score": layer.router_score,
        "smooth_k": layer.smooth_k,
        "phi_input": layer.phi_input,
    }


def _shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter under these settings."""
    heads, head_dim, tokens = (settings[key] for key in ("num_heads", "head_dim", "seq_len"))
    proj = (heads, head_dim, head_dim) if settings["per_head_router"] else (head_dim, head_dim)
    width = tokens if settings["alpha_per_token"] else num_q_blocks(tokens)
    alpha = (heads, width) if settings["per_head_alpha"] else (width,)
    return dict(zip(_PARAMETERS, (proj, proj, alpha), strict=True))


class _Difference(NamedTuple):
    """Between a file and a model; `tunable`: strict=False lets it pass."""

    text: str
    remedy: str
    tunable: bool


def _differences(
    layers: dict[str, SLA2Attention], settings: dict[str, Settings]
) -> Iterator[_Difference]:
    """In the model's order, then the file's."""
    same_model = "Load into the model that the file was saved from"
    for name, layer in layers.items():
        if name not in settings:
            text = f"the model has {_called(name)}, the file has not: it has {_listed(settings)}"
            yield _Difference(text, same_model, True)
            continue
        for key, own in _settings(layer).items():
            saved = settings[name][key]
            if saved == own or (key == "grid" and None in (saved, own)):
                continue
            text = f"{_called(name)} has {key}={saved!r} in the file, {key}={own!r} in the model"
            remedy = f"Build the layer with {key}={saved!r}"
            if key == "grid":
                remedy = f"alpha belongs to the order of the tokens. {remedy}, or train for {own!r}"
            yield _Difference(text, remedy, key in _TUNABLE)
    for name in settings:
        if name not in layers:
            text = f"the file has {_called(name)}, the model has not: it has {_listed(layers)}"
            yield _Difference(text, same_model, True)


def _check_parameters(name: str, layer: SLA2Attention) -> None:
    """Raises unless every parameter of the layer has float32 values of its full shape."""
    shapes = _shapes(_settings(layer))
    for key in _PARAMETERS:
        parameter = getattr(layer, key)
        if parameter.is_meta:
            raise ValueError(
                f"{key} of {_called(name)} is on the meta device and has no values. Move the model "
                "with to_empty(device=...) and initialise or load it first"
            )
        if parameter.dtype != torch.float32:
            raise TypeError(
                f"{key} of {_called(name)} is {parameter.dtype} and must be torch.float32: in 16 "
                "bit the router chooses other blocks. load_state_dict(assign=True) from a 16-bit "
                "file does this"
            )
        if tuple(parameter.shape) != shapes[key]:
            raise ValueError(
                f"{key} of {_called(name)} has shape {tuple(parameter.shape)} instead of "
                f"{shapes[key]}. Where FSDP1 or ZeRO-3 has sharded it, gather it around this call "
                "(FSDP.summon_full_params, deepspeed.zero.GatheredParameters)"
            )


def what_is_not_finite(values: Tensor) -> str | None:
    """In words; None where all are finite."""
    bad = values.numel() - int(values.isfinite().sum())
    return f"has NaN or infinity in {bad} of its {values.numel()} values" if bad else None


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _called(name: str) -> str:
    # save_router of a single SLA2Attention: the layer is the model and has no name.
    return f"layer {name!r}" if name else "the layer without a name (a bare SLA2Attention)"


def _listed(names: dict[str, Any], limit: int = 4) -> str:
    shown = ", ".join(map(repr, list(names)[:limit]))
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---- parameters ---------------------------------------------------------------------------------


def _gather(parameter: Tensor) -> Tensor:
    """A copy of all values on the CPU. Of a DTensor every rank must call it."""
    full_tensor = getattr(parameter, "full_tensor", None)
    values = parameter if full_tensor is None else full_tensor()
    return values.detach().to("cpu", copy=True).contiguous()


def _scatter(values: Tensor, parameter: Tensor) -> None:
    """parameter <- values. Of a DTensor each rank keeps its own part and sends nothing."""
    values = values.to(parameter.device)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import DTensor, Replicate

        # Every rank has read the whole file, so there is nothing for torch to compare or send.
        whole = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
        values = whole.redistribute(mesh, getattr(parameter, "placements", None))
    parameter.copy_(values)


# ---- the file -----------------------------------------------------------------------------------


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "router files need the package safetensors, which pip installs with sla2: "
            "pip install 'safetensors>=0.4'"
        ) from error
    return safetensors


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Settings], dict[str, Tensor]]:
    """Settings by layer and tensors by name, consistent with each other. Raises ValueError."""
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt", device="cpu") as stream:
            # Before any tensor is read: another program's file may be large.
            settings = _parse_header(path, stream.metadata() or {})
            names = {_join(name, key) for name in settings for key in _PARAMETERS}
            if odd := sorted(names ^ set(stream.keys())):
                where = "lacks" if odd[0] in names else "has an unknown"
                raise ValueError(f"{path} is damaged: it {where} tensor {odd[0]!r}")
            tensors = {name: stream.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is cut short: {error}") from error
    for name, layer in settings.items():
        for key, shape in _shapes(layer).items():
            x = tensors[_join(name, key)]
            if x.dtype != torch.float32 or tuple(x.shape) != shape:
                raise ValueError(
                    f"{path} is damaged: {key} of {_called(name)} is {x.dtype} of shape "
                    f"{tuple(x.shape)}; its settings need torch.float32 of {shape}"
                )
            if bad := what_is_not_finite(x):
                raise ValueError(f"{path}: {key} of {_called(name)} {bad}; nothing was loaded")
    return settings, tensors


def _parse_header(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, Settings]:
    """The settings by layer. Raises ValueError for other formats and versions."""
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but no router file of sla2.save_router: its metadata "
            f"has no entry {_METADATA_KEY!r} (it has {_listed(metadata) or 'none'})"
        )
    try:
        header = json.loads(metadata[_METADATA_KEY])
        version, layers = header["version"], header["layers"]
        if version in _READABLE:
            _check_layers(layers, version)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: entry {_METADATA_KEY!r}: {error!r}") from error
    if version not in _READABLE:
        raise ValueError(
            f"{path} has format version {version!r}, written by sla2 "
            f"{header.get('sla2_version')}; sla2 {__version__} reads the versions "
            f"{' and '.join(map(str, _READABLE))}. Install the sla2 that wrote it, or a newer one"
        )
    return layers


def _check_layers(layers: dict[str, Settings], version: int) -> None:
    """Makes the layers those of the newest version, with grids as tuples.

    Raises TypeError / ValueError unless these are layers with the settings of their version.
    """
    if not isinstance(layers, dict) or not layers:
        raise ValueError("no layers")
    # Every layer has the same keys; this one takes no memory.
    wanted = set(_settings(SLA2Attention(1, 1, seq_len=1, device="meta")))
    if version == 1:
        wanted.remove("grid")
    for name, settings in layers.items():
        if not isinstance(settings, dict) or set(settings) != wanted:
            raise ValueError(f"settings of {_called(name)} are {settings!r}")
        for key in ("num_heads", "head_dim", "seq_len"):
            if type(settings[key]) is not int or settings[key] < 1:
                raise ValueError(f"{key}={settings[key]!r} of {_called(name)}")
        settings["grid"] = check_grid_of(settings.get("grid"), settings["seq_len"])
