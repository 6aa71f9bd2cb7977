"""Clips of a handwritten digit that moves: every frame is the one before, rolled by two pixels in one of 4 directions.

The world is a torus of 8 x 8 pixels, so that a frame and its direction decide the next frame. The digit, where it
begins and its direction differ from clip to clip. Predicted frames are judged by construction: the right one is known.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from src.data.example import Example
from src.data.sources import digits
from src.data.sources.digits import SIZE

STEP = 2  # pixels, of a torus that is as wide as a digit
DIRECTIONS = {
    "up": (-STEP, 0),
    "right": (0, STEP),
    "down": (STEP, 0),
    "left": (0, -STEP),
}
SPREAD = 1.22074408460575947536 ** -np.arange(1.0, 4.0)  # whose multiples fill the unit cube evenly


class MovingDigits:
    """`image`, float32 [8 frames, 8, 1] in [-1, 1], the frames below each other, and `label`, the direction (what the
    camera does). A clip of each digit; a training clip begins anywhere and moves anywhere, anew in each pass. Clips of
    held-out digits are held out.

    frames   of a clip

    Raises ValueError for less than two frames.
    """

    holds = "values"
    held_out = 10 * digits.HELD_OUT_OF_EACH
    draws = 3
    classes = tuple({"id": str(number), "name": name} for number, name in enumerate(DIRECTIONS))

    def __init__(self, *, frames: int = 3):
        if frames < 2:
            raise ValueError(f"a clip of frames={frames} does not move: give at least 2")
        self.frames = frames

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of each clip."""
        return self.frames * SIZE, SIZE, 1

    def __len__(self) -> int:
        return len(digits.load("train").labels) + self.held_out

    def __getitem__(self, number: int) -> Example:
        return self.drawn(number, (number + 0.5) * SPREAD % 1)

    def drawn(self, number: int, uniforms: Float[np.ndarray, " 3"]) -> Example:
        """The clip of a digit; the uniform numbers are where it begins (down, right) and its direction."""
        trained = len(self) - self.held_out
        images, row = ("train", number) if number < trained else ("test", number - trained)
        start = tuple((uniforms[:2] * SIZE).astype(int))
        label = int(uniforms[2] * len(DIRECTIONS))
        first = np.roll(digits.load(images).values[row], start, (0, 1))
        return Example({"image": self.clip(first, label), "label": label}, f"clip {number}")

    def clip(self, first: Float[np.ndarray, "8 8 1"], label: int) -> Float[np.ndarray, "h 8 1"]:
        """The frames that follow from the first one."""
        step = np.array(list(DIRECTIONS.values())[label])
        return np.concatenate([np.roll(first, frame * step, (0, 1)) for frame in range(self.frames)])


def frames_of(clips: Float[np.ndarray, "n h 8 1"]) -> Float[np.ndarray, "n frames 8 8 1"]:
    """The frames of clips."""
    return clips.reshape(len(clips), -1, SIZE, SIZE, clips.shape[-1])


def places_of(frames: Float[np.ndarray, "f 8 8 1"], first: Float[np.ndarray, "8 8 1"]) -> Int[np.ndarray, "f 2"]:
    """The roll (down, right) of a frame that is nearest to each of some frames, in squared error."""
    y, x = np.divmod(np.arange(SIZE**2), SIZE)
    source = (y - y[:, None]) % SIZE * SIZE + (x - x[:, None]) % SIZE  # [roll, pixel]
    rolls, flat = first.reshape(-1)[source].astype(np.float64), frames.reshape(len(frames), -1).astype(np.float64)
    best = ((rolls**2).sum(1) - 2 * flat @ rolls.T).argmin(axis=1)
    return np.stack([y[best], x[best]], axis=-1)
