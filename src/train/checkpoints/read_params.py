"""Parameters of a checkpoint, read leaf by leaf, without the devices or memory of a whole train state."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from src.common.files.checksums import Running
from src.common.files.lazy_arrays import is_stacked
from src.common.tree import unflatten
from src.train.checkpoints import metadata
from src.train.checkpoints.integrity import DamageError, check_marker, describe_damage


class CheckpointParams:
    """The parameters of one checkpoint (`<workdir>/checkpoints/<step>`) as `Leaves`, verified when read.

    average   the moving average of the parameters in place of the last ones, or the name of a further average
    config    of the run
    step      of the checkpoint
    version   of the framework that wrote it

    The constructor and reading a leaf raise ValueError for a damaged checkpoint or another format.
    """

    def __init__(self, folder: str | os.PathLike[str], average: bool | str = False):
        folder = epath.Path(folder)
        further = f"extra/averages/{average}" if isinstance(average, str) else ""
        self.folder, self._part = folder, further or ("ema" if average else "params")
        try:
            check_marker(folder, metadata.ITEMS)
            meta = metadata.checked_meta(metadata.read_item(folder / "meta"))
        except (DamageError, OSError, ValueError) as error:
            raise self._damaged(error) from error
        metadata.check_format(meta, str(folder))
        try:
            data = metadata.checked_data(metadata.read_item(folder / "data"), meta)
            meta, _ = metadata.migrated(meta, data)
        except Exception as error:  # an untrusted file may have any contents
            raise self._damaged(error) from error
        self._moved: dict[str, str] = meta.get("moved", {})
        self.config: dict[str, Any] = meta["config"]
        self.step: int = meta["step"]
        self.version = str(meta.get("version", "unknown"))
        begin = f"{self._part}/"
        self._saved = {p.removeprefix(begin): leaf for p, leaf in meta["leaves"].items() if p.startswith(begin)}
        if not self._saved:
            raise ValueError(f"the checkpoint {folder} keeps no {self._part}: see ema.more and ema.power of its config")
        self.shapes = {
            path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"]) for path, leaf in self._saved.items()
        }

    @property
    def weights(self) -> int:
        """The checksum of these parameters that `train/setting.py` gives, without reading them."""
        return metadata.checksum({path: leaf["print"] for path, leaf in self._saved.items()})

    @functools.cached_property
    def _reader(self) -> Any:
        import orbax.checkpoint as ocp

        return ocp.PyTreeCheckpointHandler()

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """See `Leaves`."""
        leaf = self._read(path)
        yield from leaf if is_stacked(path) else [leaf]

    def _read(self, path: str) -> np.ndarray:
        import orbax.checkpoint as ocp

        shape = self.shapes[path]
        now = f"{self._part}/{path}"
        wanted = unflatten({self._moved.get(now, now): metadata.target(shape)})
        kinds = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=kinds, partial_restore=True)
        try:
            (leaf,) = jax.tree.leaves(self._reader.restore(self.folder / "state", args=args))
            leaf = np.asarray(leaf)
            if Running().add(leaf).value() != self._saved[path]["print"]:
                raise DamageError(f"state: the leaf {self._part}/{path} has a wrong fingerprint")
        except Exception as error:  # Orbax raises errors of several classes
            raise self._damaged(error) from error
        return leaf

    def _damaged(self, error: Exception) -> ValueError:
        damage = error if isinstance(error, DamageError) else DamageError(str(error).splitlines()[0][:200])
        found = describe_damage(self.folder, damage)
        return ValueError(f"the checkpoint {self.folder} is damaged ({found}): choose another --step")
