"""Errors that the command line explains in one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Import name -> distribution name of everything the extra `cli` brings.
EXTRA_PACKAGES = {
    "rich": "rich",
    "numpy": "numpy",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "imageio": "imageio",
}


class CliError(Exception):
    """The command cannot do what was asked; the message says why and what would help."""


@contextmanager
def explain_missing_packages(who: str) -> Iterator[None]:
    """Turns the failed import of an optional package into a CliError that names the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in EXTRA_PACKAGES:
            raise CliError(
                f"{who} needs the package {EXTRA_PACKAGES[package]}, which is not installed; "
                'install it with: pip install "sla2[cli]"'
            ) from error
        if package == "torch":
            raise CliError(f"{who} needs PyTorch, which is not installed") from error
        raise
