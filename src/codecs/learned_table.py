"""Links that learn numbers from the training data once, and keep them in a file."""

from __future__ import annotations

import hashlib
import io
import os
import re
from typing import Any, ClassVar

import numpy as np
from etils import epath
from jaxtyping import Float

from src.common.files.npy import read_npy
from src.common.files.store import cache_folder, local_copy, write_whole


class LearnedTable:
    """A device link with a table that `fit` learns from vectors, or that a file has.

    Subclasses set `kind` (of files and messages) and `what` (in messages), and write `learn` and `options`; they call
    `open` when `before` and the shape of the table are known.
    """

    where: ClassVar[str] = "device"
    learns: ClassVar[str] = "values"
    kind: ClassVar[str]
    what: ClassVar[str]

    def open(self, before: Any, shape: tuple[int | None, ...], path: str, folder: str) -> None:
        """Raises ValueError for a link in front whose tokens are no vectors, and a file with another table;
        FileNotFoundError without the file."""
        if before.spec is None or before.spec.features is None or before.spec.vocab is not None:
            raise ValueError(
                f"{self.kind} needs a link in front whose tokens are vectors, as {{'name': 'patch', 'size': 2}}"
            )
        self.before, self.table_shape = before, shape
        self.folder = folder or os.path.join(cache_folder(), self.kind)
        self._table = self._read(path) if path else None

    def learn(self, samples: Float[np.ndarray, "n P"]) -> Float[np.ndarray, "..."]:
        """The table of samples, f32. Raises ValueError."""
        raise NotImplementedError

    def options(self) -> str:
        """Text that tells tables of the same samples apart."""
        raise NotImplementedError

    @property
    def unfitted(self) -> bool:
        """Whether the table has to be learned before the first use."""
        return self._table is None

    @property
    def table(self) -> Float[np.ndarray, "..."]:
        """What was learned, f32. Raises ValueError before `fit`."""
        if self._table is None:
            raise ValueError(f"{self.what} are not learned yet: call `fit` with vectors of the training data")
        return self._table

    def fit(self, samples: Float[np.ndarray, "n P"], about: str = "") -> Any:
        """Learns the table, at the first time, and else reads it from `folder`; gives the link itself.

        The file's name contains a hash of the samples and options, so that other samples never find an old table.
        `about` is what `recall` may find it by.
        Raises ValueError for samples of another length than the tokens, for some that are not finite, and for what
        `learn` refuses; OSError where the folder cannot be written.
        """
        samples = np.ascontiguousarray(samples, np.float32)
        if samples.shape[1] != self.before.spec.features or not np.isfinite(samples).all():
            raise ValueError(
                f"{self.kind} learns from finite vectors of {self.before.spec.features} numbers, not from samples of "
                f"{samples.shape[1]}, or from some that are not finite"
            )
        options = f"{self.options()} {samples.shape}"
        name = f"{self.kind}-{hashlib.sha256(options.encode() + samples.tobytes()).hexdigest()[:16]}.npy"
        path = epath.Path(self.folder) / name
        try:
            if not path.exists():
                file = io.BytesIO()
                np.save(file, self.learn(samples))
                write_whole(path, file.getvalue())
            if about and _text(self._note(about)) != name:
                write_whole(self._note(about), name.encode())
        except OSError as error:
            raise OSError(
                f"{self.what} cannot be kept in {self.folder} ({error}); set XDG_CACHE_HOME to a writable folder"
            ) from error
        self._table = self._read(path)
        return self

    def recall(self, about: str) -> bool:
        """Takes the table that was learned last with this `about`, without samples; False where there is none."""
        path = epath.Path(self.folder) / (_text(self._note(about)) or "none")
        if not re.fullmatch(rf"{self.kind}-[0-9a-f]{{16}}\.npy", path.name) or not path.exists():
            return False
        self._table = self._read(path)
        return True

    def fingerprint(self) -> str:
        """Sixteen hex digits of the table: others where an id stands for something else."""
        return hashlib.sha256(self.table.tobytes()).hexdigest()[:16]

    def _note(self, about: str) -> epath.Path:
        """The file with the name of the table's file that was used last."""
        return epath.Path(self.folder) / f"last-{hashlib.sha256(about.encode()).hexdigest()[:16]}.txt"

    def _read(self, path: Any) -> Float[np.ndarray, "..."]:
        found = read_npy(local_copy(path))
        if found.shape != self.table_shape or not np.isfinite(found).all():
            what = self.what.split()[-1]
            raise ValueError(
                f"{os.fspath(path)!r} has no finite {what} of {self.table_shape}, but an array of {found.shape}"
            )
        return found.astype(np.float32)


def _text(path: epath.Path) -> str:
    """What a small file says; "" without one."""
    return path.read_text() if path.exists() else ""
