"""Short clips out of photographs: pans, zooms, and cut-outs that move over them.

The photographs ship inside the scikit-image package, so nothing is downloaded. Those of `TRAIN` and
`HELD_OUT` show different things: a loss on `HELD_OUT` is one on content the model has never seen.
"""

from __future__ import annotations

import hashlib
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TRAIN = (
    *("astronaut.png", "brick.png", "camera.png", "clock_motion.png", "coins.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg", "rocket.jpg"),
)
HELD_OUT = ("chelsea.png", "coffee.png", "grass.png", "motorcycle_left.png")

# Heights of the copies of a photograph that crops are taken from, in heights of a clip. With
# ZOOMS around 1 a crop is never shrunk by much, so plain bilinear sampling does not alias.
LEVELS = (1.25, 1.75, 2.5)
ZOOMS = (0.7, 1.15)  # side of the window on the photograph, in sides of a clip
TRAVEL = 0.3  # of the window's side, the farthest that a camera or a cut-out goes in a clip
CUT_OUT_SHARE = 0.5  # of the clips
EDGE = 0.05  # width of a cut-out's soft edge, in its radius


def derive_seed(*key: object) -> int:
    """A seed for every use of its own: neighbouring steps must not draw related numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Clips:
    """Makes batches of clips (B, 3, frames, height, width) in [-1, 1] from photographs.

    A batch depends on its key alone, so that a run can stop and go on anywhere.
    """

    def __init__(
        self, names: tuple[str, ...], size: tuple[int, int, int], device: torch.device
    ) -> None:
        self.frames, self.height, self.width = size
        self._device = device
        self._photos = [self._pyramid(path) for path in photo_paths(names)]
        # (height, width, 2): the pixels of a frame, x and y from its centre.
        ys = torch.arange(self.height, device=device) - (self.height - 1) / 2
        xs = torch.arange(self.width, device=device) - (self.width - 1) / 2
        self._pixels = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)

    def _pyramid(self, path: Path) -> list[Tensor]:
        """The photograph (3, h, w) at every level."""
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        photo = pixels.permute(2, 0, 1).float() / 127.5 - 1.0
        levels = []
        for level in LEVELS:
            shrink = max(level * self.height / photo.shape[1], level * self.width / photo.shape[2])
            size = [max(2, round(shrink * n)) for n in photo.shape[1:]]
            resized = F.interpolate(photo[None], size, mode="bilinear", antialias=True)[0]
            levels.append(resized.to(self._device))
        return levels

    def batch(self, count: int, *key: object) -> Tensor:
        draw = random.Random(derive_seed("clips", *key))
        return torch.stack([self._clip(draw) for _ in range(count)])

    def _clip(self, draw: random.Random) -> Tensor:
        """(3, frames, height, width)."""
        clip = self._camera(draw)
        if draw.random() < CUT_OUT_SHARE:
            clip = self._paste(clip, draw)
        return clip.flip(-1) if draw.random() < 0.5 else clip

    def _camera(self, draw: random.Random) -> Tensor:
        """A shot of one photograph: the window moves and changes its size steadily."""
        photo = draw.choice(draw.choice(self._photos))
        zooms = torch.tensor([draw.uniform(*ZOOMS) for _ in range(2)])
        start, travel = ([draw.uniform(-1, 1) for _ in range(2)] for _ in range(2))
        progress = torch.linspace(0, 1, self.frames)
        zoom = zooms[0] + (zooms[1] - zooms[0]) * progress
        centres = []
        for size, window, begin, move in zip(
            photo.shape[:0:-1], (self.width, self.height), start, travel, strict=True
        ):
            room = max(0.0, (size - 1 - window * float(zooms.max())) / 2)
            path = begin * room + TRAVEL * window * move * progress
            centres.append((size - 1) / 2 + path.clamp(-room, room))
        return self._sample(photo, torch.stack(centres, dim=1), zoom)

    def _paste(self, clip: Tensor, draw: random.Random) -> Tensor:
        """An ellipse out of another shot, with its content, moves over the clip."""
        photo = draw.choice(draw.choice(self._photos))
        side = min(self.height, self.width)
        radii = torch.tensor([draw.uniform(0.15, 0.35) * side for _ in range(2)])
        begin = torch.tensor([draw.uniform(-0.3, 0.3) * side for _ in range(2)])
        move = torch.tensor([draw.uniform(-TRAVEL, TRAVEL) * side for _ in range(2)])
        path = begin + move * torch.linspace(0, 1, self.frames)[:, None]
        room = torch.tensor([max(0.0, (n - 1) / 2 - side) for n in photo.shape[:0:-1]])
        middle = torch.tensor([(n - 1) / 2 for n in photo.shape[:0:-1]])
        shift = torch.tensor([draw.uniform(-1, 1) for _ in range(2)])
        content = self._sample(photo, middle + shift * room - path, torch.ones(self.frames))
        path, radii = self._send(path[:, None, None], radii)
        offset = (self._pixels - path) / radii
        mask = torch.sigmoid((1.0 - offset.norm(dim=-1)) / EDGE)  # (frames, height, width)
        return torch.lerp(clip, content, mask)

    def _sample(self, photo: Tensor, centres: Tensor, zoom: Tensor) -> Tensor:
        """Windows of side `zoom` (frames,) around `centres` (frames, 2): x, y in its pixels."""
        last = torch.tensor([n - 1 for n in photo.shape[:0:-1]])
        # grid_sample's coordinates run from -1 to 1 between the centres of the outermost pixels.
        middle, scale = (2 * centres / last - 1), 2 * zoom[:, None] / last
        middle, scale = self._send(middle[:, None, None], scale[:, None, None])
        grid = (middle + scale * self._pixels).flatten(0, 1)[None]
        frames = F.grid_sample(
            photo[None], grid, mode="bilinear", padding_mode="reflection", align_corners=True
        )
        return frames[0].unflatten(1, (self.frames, self.height))

    def _send(self, *tensors: Tensor) -> list[Tensor]:
        """To the device, without waiting for the training step that it is still busy with."""
        return [x.to(self._device, non_blocking=True) for x in tensors]


def photo_paths(names: tuple[str, ...]) -> list[Path]:
    """Files of the installed scikit-image; its own loaders would want a downloader."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
    return [Path(spec.origin).parent / "data" / name for name in names]
