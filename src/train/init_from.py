"""Where a run's first parameters come from: `config.init_from`, a folder of `python -m src.tools.convert`.

    init_from = {"path": "", "ema": False, "skip": ()}

path   the folder, local or in a store; "" initialises everything as the config says
ema    its averaged weights (the folder `ema` in it) instead of the last ones
skip   regexes: leaves whose paths one of them finds are initialised as the config says, though the folder has them

Leaves that the folder does not have are initialised as always, and what it has beyond the model is left there; both are
told. The folder's hash is part of a run's identity (`System.identity`), so that a run that goes on needs the folder no
more, and is not taken for one that began from other weights.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from src.common import tree
from src.common.files.checksums import fingerprint, fingerprint_in_parts
from src.common.files.lazy_arrays import place
from src.common.files.paths import shown
from src.common.mesh.distributed import agree, check_same
from src.models import mixture_of_transformers as mot
from src.models.pretrained.about import parameters_of, value_of
from src.models.pretrained.initial_weights import Initial, read_meta

EMA = "ema"
LARGE, PART = 2**24, 2**22  # elements


@dataclasses.dataclass
class Start:
    """`config.init_from`; `config` has the groups `model` and `fields`, against which the weights are held."""

    path: str
    ema: bool = False
    skip: tuple[str, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _hash: str | None = None

    @property
    def folder(self) -> epath.Path:
        """The folder that is read."""
        return epath.Path(self.path) / EMA if self.ema else epath.Path(self.path)

    def hash(self) -> str | None:
        """The hash of the weights; None where the folder is not there, unless `recall` told it."""
        if self._hash is None:
            try:
                self._hash = read_meta(self.folder)["hash"]
            except OSError:  # a run that goes on does not need it
                return None
        return self._hash

    def recall(self, saved: Mapping[str, Any]) -> None:
        """Takes the hash from the identity of a checkpoint of this run where the folder is gone."""
        same = (saved.get("init_from") or {}).get("path") == self.path
        if self.hash() is None and same:
            self._hash = saved.get("weights")

    def read(self, abstract: Any, init: Callable[[Any], Any]) -> Any:
        """Parameters like `abstract` (with shardings), placed as it says.

        init   which leaves -> them, initialised as the config says; called once, with the others' paths left out

        Raises FileNotFoundError, OSError, and ValueError, in one sentence, when the folder cannot be read or its
        weights are for another model, with all that differs.
        """
        found, wanted = self._opened(), tree.flatten(abstract)
        skipped = [path for path in found.shapes if any(re.search(rule, path) for rule in self.skip)]
        taken = [path for path in wanted if path in found.shapes and path not in skipped]
        self._check(found, wanted, taken)
        self._hash = found.hash
        check_same({"the initial weights": found.hash})
        fresh = [path for path in wanted if path not in taken]
        leaves = dict(init(fresh)) if fresh else {}
        leaves |= {path: place(found, path, wanted[path].dtype, wanted[path].sharding) for path in taken}
        for path in fresh:  # copies begin as what they are copies of
            if mot.is_copy(path) and mot.original(path) in taken:
                leaves[path] = jnp.copy(leaves[mot.original(path)])
        found.check(_prints({path: leaves[path] for path in taken}, found))
        self._tell(found, wanted, taken, fresh, skipped)
        return tree.rebuild(leaves, abstract)

    def _opened(self) -> Initial:
        found, problem = None, None
        try:
            found = Initial(self.folder)
        except (OSError, ValueError) as error:
            problem = error
        if reason := agree("" if problem is None else str(problem)):  # the others do not wait for this process
            raise problem or OSError(reason)
        return found

    def _check(self, found: Initial, wanted: Mapping[str, Any], taken: list[str]) -> None:
        wrong, advice = [], []
        for name, value in found.meta["about"].items():
            now, prefix = value_of(self.config, name, value), parameters_of(name)
            if any(path.startswith(prefix) for path in taken) and now != value:
                wrong.append(f"{name} is {value!r} there and {now!r} here")
                advice.append(f"{name}={value}")
        for path in taken:
            if found.shapes[path].shape != wanted[path].shape:
                wrong.append(f"{path} is {list(found.shapes[path].shape)} there and {list(wanted[path].shape)} here")
        if not taken:
            wrong.append("they have no leaf of this model")
        if wrong:
            do = f"set {', '.join(advice)}" if advice else "give weights for it"
            raise ValueError(
                f"the initial weights {shown(self.folder)} are for another model ({tree.listed(wrong, 100)}): {do}, or "
                "leave parts of them out with init_from.skip"
            )
        idle = [rule for rule in self.skip if not any(re.search(rule, path) for path in found.shapes)]
        if idle:
            raise ValueError(f"init_from.skip has rules that find nothing in {shown(self.folder)}: {tree.listed(idle)}")

    def _tell(
        self, found: Initial, wanted: Mapping[str, Any], taken: list[str], fresh: list[str], skipped: list[str]
    ) -> None:
        count = lambda paths: f"{sum(int(np.prod(wanted[path].shape)) for path in paths):,}"
        logging.info("initial weights %s from %s: %s parameters of %d leaves (%s)", found.hash, self.folder,
                     count(taken), len(taken), ", ".join(_parts(taken)))  # fmt: skip
        if fresh:
            logging.info("initialised as the config says: %s parameters of %s", count(fresh), ", ".join(fresh))
        unused = [path for path in found.shapes if path not in wanted]
        if unused or skipped:
            logging.info("not used of the initial weights: %s", ", ".join(sorted({*unused, *skipped})))


def _parts(paths: list[str]) -> list[str]:
    """`trunk`, `fields/<row>`, …"""
    return sorted({"/".join(path.split("/")[: 2 if path.startswith("fields/") else 1]) for path in paths})


def _prints(leaves: Mapping[str, jax.Array], found: Initial) -> dict[str, int]:
    """Checksums of the leaves as they were in the folder; not of those that lost digits on the way here."""
    kinds = {path: found.shapes[path].dtype for path in leaves}
    exact = {path: leaf for path, leaf in leaves.items() if jnp.promote_types(kinds[path], leaf.dtype) == leaf.dtype}
    sums = _sums(exact, tuple((path, kinds[path].name, *_parts_of(leaf)) for path, leaf in exact.items()))
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def _parts_of(leaf: jax.Array) -> tuple[int, int]:
    """Along which axis, one that devices do not share, and in how many parts a large leaf is summed; else 0 and 1."""
    spec = [*getattr(leaf.sharding, "spec", ()), *[None] * leaf.ndim][: leaf.ndim]
    if leaf.size < LARGE or None not in spec:
        return 0, 1
    axis = spec.index(None)
    return axis, next(
        n
        for n in range(1, leaf.shape[axis] + 1)
        if leaf.shape[axis] % n == 0 and (leaf.size <= n * PART or n == leaf.shape[axis])
    )


@functools.partial(jax.jit, static_argnums=1)
def _sums(flat: dict[str, jax.Array], kinds: tuple[tuple[str, str, int, int], ...]) -> dict[str, jax.Array]:
    """`fingerprint` of each leaf in another dtype, in parts: some compilers keep 32 bits of every element summed."""

    def one(leaf: jax.Array, kind: str, axis: int, parts: int) -> jax.Array:
        whole = parts == 1
        return fingerprint(leaf.astype(kind)) if whole else fingerprint_in_parts(leaf, kind, axis, parts)

    return {path: one(flat[path], *how) for path, *how in kinds}


def make_start(config: Any) -> Start | None:
    """What the config says, or None when nothing is read. Raises ValueError for a rule that is no regex."""
    settings = config.init_from.to_dict()
    if not settings["path"]:
        return None
    try:
        for rule in settings["skip"]:
            re.compile(rule)
    except re.error as error:
        raise ValueError(f"init_from.skip has a rule that is no regex ({error}): correct it") from error
    held = {"model": config.model.to_dict(), "fields": config.fields.to_dict()}
    return Start(settings["path"], settings["ema"], tuple(settings["skip"]), held)
