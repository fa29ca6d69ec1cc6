"""A short video clip: photographs under a slow pan and zoom, or the user's own images or video.

Everything is deterministic and offline: the default photographs ship inside the scikit-image
package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sla2.cli.errors import CliError

Clip = NDArray[np.uint8]  # (frames, height, width, 3)

BUNDLED_PHOTOS = ("coffee.png", "chelsea.png", "motorcycle_left.png")
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"}

# One camera move per shot, taken in turn: (centre x, centre y, zoom) at its start and end, as
# fractions of the largest crop with the clip's aspect ratio.
CAMERA_MOVES = (
    ((0.40, 0.45, 0.95), (0.55, 0.55, 0.70)),
    ((0.60, 0.40, 0.70), (0.45, 0.50, 0.90)),
    ((0.35, 0.55, 0.75), (0.65, 0.45, 0.75)),
)


def load_clip(
    inputs: Sequence[str] | None, frames: int, height: int, width: int
) -> tuple[Clip, str]:
    """(frames, height, width, 3) uint8 and a line that says what it shows.

    `inputs`: image files, or a single video file; None takes the bundled photographs.
    """
    if not inputs:
        photos = [_open_image(path) for path in _bundled_photos()]
        names = ", ".join(Path(name).stem for name in BUNDLED_PHOTOS)
        return _animate(photos, frames, height, width), f"photographs from scikit-image ({names})"
    paths = [Path(name).expanduser() for name in inputs]
    for path in paths:
        if not path.is_file():
            raise CliError(f"--input: {path} is not a file")
    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        photos = [_open_image(path) for path in paths]
        return _animate(photos, frames, height, width), ", ".join(path.name for path in paths)
    if len(paths) > 1:
        raise CliError("--input takes either image files or one video file")
    return _read_video(videos[0], frames, height, width), videos[0].name


def _bundled_photos() -> list[Path]:
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
    # Read the files themselves: skimage.data's loaders would want a downloader for their cache.
    paths = [Path(spec.origin).parent / "data" / name for name in BUNDLED_PHOTOS]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise CliError(
            f"this scikit-image has no {', '.join(absent)}; name image files with --input"
        )
    return paths


def _open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CliError(f"cannot read {path} as an image: {error}") from error


def _animate(photos: Sequence[Image.Image], frames: int, height: int, width: int) -> Clip:
    """The photographs one after another, each as one shot of about equal length."""
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    shots = min(len(photos), frames)
    cuts = [frames * shot // shots for shot in range(shots + 1)]
    for shot in range(shots):
        start, end = CAMERA_MOVES[shot % len(CAMERA_MOVES)]
        first, last = cuts[shot], cuts[shot + 1]
        for frame in range(first, last):
            progress = (frame - first) / max(1, last - first - 1)
            eased = 0.5 - 0.5 * math.cos(math.pi * progress)
            x, y, zoom = ((1 - eased) * a + eased * b for a, b in zip(start, end, strict=True))
            clip[frame] = _crop(photos[shot], x, y, zoom, height, width)
    return clip


def _crop(image: Image.Image, x: float, y: float, zoom: float, height: int, width: int) -> Clip:
    """The window of `zoom` times the largest fitting size around (x, y), at sub-pixel accuracy."""
    largest = min(image.width / width, image.height / height)
    box_width, box_height = width * largest * zoom, height * largest * zoom
    left = min(max(x * image.width - box_width / 2, 0.0), image.width - box_width)
    top = min(max(y * image.height - box_height / 2, 0.0), image.height - box_height)
    box = (left, top, left + box_width, top + box_height)
    if largest * zoom > 1.0:  # shrinking: average over the pixels, or fine detail flickers
        cropped = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    else:
        cropped = image.transform(
            (width, height), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC
        )
    return np.asarray(cropped, dtype=np.uint8)


def _read_video(path: Path, frames: int, height: int, width: int) -> Clip:
    """The first `frames` frames, centre-cropped; a shorter video runs forwards and backwards."""
    decoded = []
    for frame in _decode(path):
        decoded.append(_crop(Image.fromarray(frame), 0.5, 0.5, 1.0, height, width))
        if len(decoded) == frames:
            break
    if not decoded:
        raise CliError(f"{path} holds no frame")
    period = max(1, 2 * len(decoded) - 2)
    order = [min(i % period, period - i % period) for i in range(frames)]
    return np.stack([decoded[i] for i in order])


def _decode(path: Path) -> Iterator[NDArray[np.uint8]]:
    import imageio.v3 as iio

    try:
        for frame in iio.imiter(path):
            pixels = np.asarray(frame)
            if pixels.ndim == 2:
                pixels = np.repeat(pixels[..., None], 3, axis=-1)
            yield np.ascontiguousarray(pixels[..., :3], dtype=np.uint8)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise CliError(
            f"cannot decode {path}: {error}\n"
            "video files need a decoder for imageio: pip install av, or pip install imageio-ffmpeg"
        ) from error
