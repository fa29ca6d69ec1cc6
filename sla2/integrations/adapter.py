"""What SLA2 has to know of a family of models, and the registry of the families it knows."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..checks import Grid


class Adapter(ABC):
    """One family of models. Subclass it, decorate it with `register_adapter`, and `sla2.apply`
    takes these models.

    An adapter has no state of its own. The attention modules it names must have diffusers'
    `set_processor` and `processor`, and call the processor with the arguments (attn, hidden_states,
    encoder_hidden_states, attention_mask, rotary_emb) in this order.
    """

    name: str
    """For reports and messages, such as "Wan"."""

    @abstractmethod
    def handles(self, model: nn.Module) -> bool:
        """Whether `model` is of this family: by its class, not by names of modules."""

    @abstractmethod
    def self_attention(self, model: nn.Module) -> dict[str, Any]:
        """The self-attention layers by their names in `model`, in the order of the blocks."""

    @abstractmethod
    def heads(self, attn: Any) -> tuple[int, int]:
        """(H, D) of a self-attention layer."""

    @abstractmethod
    def video_grid(self, model: nn.Module, num_frames: int, height: int, width: int) -> Grid:
        """The tokens of a video of that many frames and pixels. Raises ValueError where it has
        none, or where the model does not tell."""

    @abstractmethod
    def call_grid(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Grid | None:
        """The grid of a call `model(*args, **kwargs)`, from shapes and sizes alone; None where the
        order of its tokens cannot be told."""

    @abstractmethod
    def project(
        self, attn: Any, hidden_states: Tensor, rotary_emb: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> q, k, v, (B, N, H, D) each: projected, normalised and rotated as the model's
        own processor does it, to the bit."""

    def merge(self, attn: Any, out: Tensor) -> Tensor:
        """(B, N, H, D) -> (B, N, C): heads joined, the output projection, dropout."""
        projection, dropout = attn.to_out
        merged: Tensor = dropout(projection(out.flatten(2, 3)))
        return merged


_A = TypeVar("_A", bound=type[Adapter])
_REGISTRY: list[Adapter] = []


def register_adapter(adapter: _A) -> _A:
    """Class decorator: `sla2.apply` asks this adapter too, before the ones registered earlier."""
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(f"register_adapter decorates a subclass of Adapter; got {adapter!r}")
    _REGISTRY.insert(0, adapter())
    return adapter


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of the model's family. Raises TypeError where there is none."""
    if not isinstance(model, nn.Module):
        parts = [name for name in ("transformer", "transformer_2") if hasattr(model, name)]
        hint = f": pass its {' and its '.join(parts)}" if parts else ""
        raise TypeError(f"expected a model (torch.nn.Module); got {type(model).__name__}{hint}")
    for adapter in _REGISTRY:
        if adapter.handles(model):
            return adapter
    classes = sorted({type(module).__name__ for module in model.modules()})
    attention = [name for name in classes if "attention" in name.lower()]
    raise TypeError(
        f"no adapter for {type(model).__name__}. There are adapters for "
        f"{', '.join(adapter.name for adapter in _REGISTRY)}; a compiled or wrapped model has to "
        "be unwrapped first, and sla2.integrations.register_adapter takes one for another family. "
        f"Attention classes seen: {', '.join(attention) or 'none'}"
    )


def loaded_class(name: str) -> type | None:
    """A class of diffusers by its public name; None where diffusers is not loaded or lacks it."""
    # A model of diffusers cannot exist before diffusers is loaded: there is nothing to import.
    diffusers = sys.modules.get("diffusers")
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) else None


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a call, wherever it stands; None where it was left out."""
    return args[position] if len(args) > position else kwargs.get(name)
