"""The prompts of a set of images that is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from src.evals.given import read_prompts
from src.evals.scores.benchmarks import read_benchmark


class ImagePrompts:
    """The lines of a file of prompts, and which of them each image has.

    drawn   what the images were drawn with (`about.json` of `src.tools.draw`), or None: then line i is that of image i

    Raises FileNotFoundError, and ValueError, in one sentence, for another file than the images were drawn from.
    """

    def __init__(self, path: str, drawn: Mapping[str, Any] | None):
        self.path, self.drawn, self.each = path, drawn, 1
        benchmark = None if drawn is None else drawn.get("benchmark")
        if benchmark:
            self.lines = [prompt.text for prompt in read_benchmark(benchmark, path)]
            digest = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
            self.each = max(int(drawn["count"]) // len(self.lines), 1)
        else:
            self.lines = read_prompts(path)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        if drawn is not None and drawn.get("prompts") != digest:
            told = "from classes" if "prompts" not in drawn else "from another file"
            raise ValueError(f"--prompts={path} are not those of the images, which were drawn {told}")
        self.about = {"path": path, "sha256": digest, "lines": len(self.lines)}

    def of_images(self, count: int) -> Int[np.ndarray, " {count}"]:
        """The number of the line of each image.

        Raises ValueError where images that were not drawn here are more or fewer than lines.
        """
        if self.drawn is None and count != len(self.lines):
            raise ValueError(f"--prompts={self.path} has {len(self.lines)} lines, and there are {count} images: each"
                             " image needs its own")  # fmt: skip
        return np.arange(count) // self.each % len(self.lines)
