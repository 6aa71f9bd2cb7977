"""What frozen links share: a network from a folder, which is read when it is needed first."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any, ClassVar

from etils import epath

from src.interfaces import FieldSpec, PyTree

DTYPES = ("float32", "bfloat16")


class FrozenLink:
    """A network whose parameters are never trained. Subclasses say how messages call it (`kind`), its name in a
    config (`link`) and the `files` of its folder.

    path    the folder
    dtype   of the computation: float32 as published, or bfloat16
    rows    images that a device encodes or decodes at a time

    Raises ValueError for another dtype, and fewer than one row.
    """

    where: ClassVar[str] = "frozen"
    kind: ClassVar[str]
    link: ClassVar[str]
    files: ClassVar[str]
    spec: FieldSpec | None = None
    params: Any

    def __init__(self, path: str | os.PathLike[str], dtype: str, rows: int):
        if rows < 1:
            raise ValueError(f"rows={rows}: give a number of at least 1")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; use {' or '.join(DTYPES)}")
        self.path, self.dtype, self.rows = path, dtype, rows

    def __getstate__(self) -> dict[str, Any]:
        # A data worker prepares images; it needs no parameters.
        return {name: value for name, value in self.__dict__.items() if name not in ("_read", "params", "fingerprint")}

    @property
    def there(self) -> bool:
        """Whether the folder exists."""
        return bool(os.fspath(self.path)) and epath.Path(self.path).exists()

    def check_path(self) -> None:
        """Raises FileNotFoundError where there is no folder."""
        if not self.there:
            raise FileNotFoundError(
                f"the {self.kind}'s folder {os.fspath(self.path)!r} does not exist: set path of {self.link}"
                f" (fields.<name>.codec) to a folder with {self.files} (docs/weights.md)"
            )


class FrozenAutoencoder(FrozenLink):
    """A network between the pixels [h, w, 3] of the link before and latents [h/f, w/f, D]. Subclasses have `network`:
    it without its parameters.

    channels, factor   D and f

    Raises ValueError as `FrozenLink`, and for pixels that f does not divide.
    """

    network: Any

    def __init__(self, path: str | os.PathLike[str], before: Any, channels: int, factor: int, dtype: str, rows: int):
        super().__init__(path, dtype, rows)
        if channels < 1 or factor < 1:
            raise ValueError(f"channels={channels}, factor={factor}: give numbers of at least 1")
        height, width, colours = before.shape
        if colours != 3 or height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} x {colours} have no latents: the {self.kind} needs 3 channels, and"
                f" sides that are multiples of factor={factor}"
            )
        self.channels, self.factor, self.takes = channels, factor, before.shape
        self.shape = (height // factor, width // factor, channels)

    @property
    def delivered(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what the data may deliver in place of pixels, by the name of messages."""
        return {"latents": self.shape}

    def shapes(self) -> PyTree:
        """The parameters as abstract arrays."""
        return self.network.shapes()

    def needed(self, params: PyTree, delivered: Iterable[tuple[int, ...]]) -> PyTree:
        """Those of the parameters (arrays or abstract arrays) that `compute` reads for values [h, w, C] like these."""
        return self.network.encoding(params) if any(self.encodes(shape) for shape in delivered) else {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """The hash of all that latents depend on."""
        return self.network.latents_hash(self.params)

    def check_sizes(self, channels: int, factor: int) -> None:
        """Raises ValueError where the network in the folder has other sizes."""
        if (channels, factor) != (self.channels, self.factor):
            raise ValueError(
                f"the {self.kind} in {os.fspath(self.path)!r} makes {channels} channels for {factor} x {factor}"
                f" pixels: set channels and factor of {self.link} to that"
            )

    def encodes(self, shape: tuple[int, ...]) -> bool:
        """Whether values [h, w, C] that the data deliver are pixels, which `compute` encodes, and not latents already.

        Raises ValueError for what is neither.
        """
        if tuple(shape) in self.delivered.values():
            return False
        if len(shape) != 3 or shape[2] != 3:
            others = "".join(f", nor {name} {known}" for name, known in self.delivered.items())
            raise ValueError(
                f"values of {tuple(shape)} are neither pixels {self.takes}{others} of this codec: see"
                " fields.<name>.codec and the task's source"
            )
        return True
