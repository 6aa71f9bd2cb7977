"""Motion curves of an action, with words for the action and its length. Several curves fit the same words.

    a_c(f) = a · 0.8^c · wave(f / P + phase - c / 8)   for frames f below the length, then 0

The wave and its period P are the action's, the number of active windows is the length's. The words say neither the size
a (0.7 to 1, of either sign) nor the phase (one of four), which all windows must have in common. So a curve is judged by
construction: for each action, length and phase the best size is known by least squares, and the curve is read as the
candidate that leaves least of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from src.data.example import Example

PHASES = 4
DECAY, DELAY = 0.8, 1 / 8  # of each further channel: its size, and periods by which it is late
SMALLEST = 0.7  # size
LEFT = 0.05  # share of a curve's energy that its best candidate may leave
COUNT, HELD_OUT = 3072, 384
ACTIONS = {  # period in windows, wave
    "sway": (4.0, lambda u: np.sin(2 * np.pi * u)),
    "hop": (4.0, lambda u: np.abs(np.sin(np.pi * u))),
    "lift": (4.0, lambda u: 2 * (u % 1) - 1),
    "shake": (2.0, lambda u: np.sign(np.sin(2 * np.pi * (u + 1e-6)))),
}
LENGTHS = {"briefly": 0.375, "for a while": 0.625, "for long": 0.875}  # share of active windows


class _Candidate(NamedTuple):
    action: str
    length: str
    curve: np.ndarray


class Motions:
    """`image`, float32 [windows, 1, frames · channels], the frames of a window with channels fastest; its `caption`,
    and the `action` and `length` that it says.

    windows, frames, channels   of a motion, of a window, of a frame

    Raises ValueError for less than 8 windows, or less than one frame or channel.
    """

    holds = "values"
    held_out = HELD_OUT

    def __init__(self, *, windows: int = 16, frames: int = 4, channels: int = 2):
        if windows < 8 or min(frames, channels) < 1:
            raise ValueError(
                f"motions with windows={windows}, frames={frames}, channels={channels} are not possible: give at least"
                " 8 windows, and one frame and channel"
            )
        self.windows, self.frames, self.channels = windows, frames, channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of each motion."""
        return self.windows, 1, self.frames * self.channels

    def __len__(self) -> int:
        return COUNT + HELD_OUT

    def __getitem__(self, number: int) -> Example:
        size, sign, phase = np.random.RandomState(number).random_sample(3)
        action, length = self._words(number)
        size = (SMALLEST + (1 - SMALLEST) * size) * (1 if sign < 0.5 else -1)
        curve = np.float32(size * self.curve(action, length, int(phase * PHASES)))
        said = {"caption": caption(action, length), "action": action, "length": length}
        return Example({"image": curve} | said, f"motion {number}")

    def curve(self, action: str, length: str, phase: int) -> Float[np.ndarray, "windows 1 P"]:
        """The curve of size 1."""
        period, wave = ACTIONS[action]
        total, late = self.windows * self.frames, np.arange(self.channels)
        at = np.arange(total)[:, None] / (period * self.frames) + phase / PHASES - late * DELAY
        active = np.arange(total)[:, None] < round(LENGTHS[length] * self.windows) * self.frames
        return (DECAY**late * wave(at) * active).reshape(self.image_shape)

    def every(self, name: str) -> list[str]:
        """All captions."""
        return [caption(action, length) for action in ACTIONS for length in LENGTHS]

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer is trained on."""
        return tuple(self.every("caption"))

    def judged(self, asked: Mapping[str, Any], made: Float[np.ndarray, "windows 1 P"]) -> dict[str, float]:
        """`right`: the curve is read as what was asked for, and at most `LEFT` of it is left; `action` and `length`: as
        what it is read; `left`: the share of its energy that is left (1 for a curve of zeros)."""
        found, left = self.read(made)
        same = {name: float(getattr(found, name) == asked[name]) for name in ("action", "length")}
        return {"right": float(all(same.values()) and left <= LEFT), **same, "left": left}

    def read(self, made: Float[np.ndarray, "windows 1 P"]) -> tuple[_Candidate, float]:
        """The candidate that leaves least of a curve, and the share of the curve's energy that it leaves."""
        curve = np.asarray(made, np.float64).reshape(-1)
        names, units = self._candidates
        energy = float(curve @ curve)
        products = units @ curve
        best = int(np.argmax(np.abs(products)))
        left = 1.0 if not energy > 0 else max(1 - float(products[best] ** 2) / energy, 0.0)
        return names[best], left

    @functools.cached_property
    def _candidates(self) -> tuple[list[_Candidate], np.ndarray]:
        names = [
            _Candidate(action, length, self.curve(action, length, phase).reshape(-1))
            for action in ACTIONS
            for length in LENGTHS
            for phase in range(PHASES)
        ]
        return names, np.stack([each.curve / np.linalg.norm(each.curve) for each in names])

    def _words(self, number: int) -> tuple[str, str]:
        action, length = divmod(number % (len(ACTIONS) * len(LENGTHS)), len(LENGTHS))
        return tuple(ACTIONS)[action], tuple(LENGTHS)[length]


def caption(action: str, length: str) -> str:
    """The words, "a person who sways for a while"."""
    return f"a person who {action}s {length}"
