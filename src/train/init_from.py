"""Initial parameters from weights: `config.init_from`, a folder written by `python -m src.tools.convert`.

    init_from = {"path": "", "ema": False, "skip": ()}

path   the folder, local or in a store; "": random initialization of all parameters
ema    use its averaged weights (its folder `ema`) in place of the last ones
skip   regexes: leaves with a matching path are initialized at random, though the folder has them

Leaves that the folder lacks are initialized at random, and leaves that the model lacks are ignored; both are logged.
The embedding of a field whose process has mask ids has rows for them behind those of the folder, which are random: so
diffusion of text begins from a model of next tokens.
The hash of the weights is part of a run's identity (`System.identity`), so a resumed run does not need the folder.
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
from jax.sharding import NamedSharding, PartitionSpec

from src.common import tree
from src.common.files.checksums import fingerprint, fingerprint_in_parts
from src.common.files.lazy_arrays import place
from src.common.files.paths import shown
from src.common.mesh.distributed import agree, check_same
from src.models import mixture_of_transformers as mot
from src.models.pretrained.about import EQUAL, OPTIONS, TIED, key_of, other_attention, parameters_of, value_of
from src.models.pretrained.initial_weights import Initial, read_meta
from src.models.pretrained.llama_weights import HEAD, TABLE

EMA = "ema"
EMBEDDING = "/embed/table/embedding"
LARGE, PART = 2**24, 2**22  # elements


@dataclasses.dataclass
class InitFrom:
    """`config.init_from`; `config` has the groups `model`, `fields` and `tasks`, which the weights must match."""

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
        """The hash of the weights; None if the folder is missing and `restore_hash` was not called."""
        if self._hash is None:
            try:
                self._hash = read_meta(self.folder)["hash"]
            except OSError:  # a resumed run does not need the folder
                return None
        return self._hash

    def restore_hash(self, saved: Mapping[str, Any]) -> None:
        """Sets the hash from the identity in a checkpoint of this run, if the folder is missing."""
        same = (saved.get("init_from") or {}).get("path") == self.path
        if self.hash() is None and same:
            self._hash = saved.get("weights")

    def read(self, abstract: Any, init: Callable[[Any], Any]) -> Any:
        """Parameters with the shapes, dtypes and shardings of `abstract`.

        init   paths -> leaves initialized at random; called at most once, with the paths that are not read

        Raises FileNotFoundError or OSError when the folder cannot be read, and ValueError, with all differences, when
        its weights are for another model.
        """
        found, wanted = self._opened(), tree.flatten(abstract)
        skipped = [path for path in found.shapes if any(re.search(rule, path) for rule in self.skip)]
        taken = [path for path in wanted if path in found.shapes and path not in skipped]
        grown = [path for path in taken if self._masks(path) and _rows(found, path) < wanted[path].shape[0]]
        self._check(found, wanted, taken)
        self._hash = found.hash
        check_same({"the initial weights": found.hash})
        fresh = [path for path in wanted if path not in taken]
        leaves = dict(init([*fresh, *grown])) if fresh or grown else {}
        with_masks = {path: _put_rows(leaves[path], found, path) for path in grown}
        whole = [path for path in taken if path not in grown]
        leaves |= {path: place(found, path, wanted[path].dtype, wanted[path].sharding) for path in whole}
        leaves |= with_masks
        for path in fresh:  # copies of a mixture of transformers start from the trunk's weights
            if mot.is_copy(path) and mot.original(path) in taken:
                leaves[path] = jnp.copy(leaves[mot.original(path)])
        if told := other_attention(found.meta["published"], self.config):
            logging.warning("%s", told)
        read = {path: leaves[path][: _rows(found, path)] if path in grown else leaves[path] for path in taken}
        found.check(_prints(read, found))
        self._tell(found, wanted, taken, fresh, skipped)
        return tree.rebuild(leaves, abstract)

    def _opened(self) -> Initial:
        found, problem = None, None
        try:
            found = Initial(self.folder)
        except (OSError, ValueError) as error:
            problem = error
        if reason := agree("" if problem is None else str(problem)):  # an error in one process is one in all
            raise problem or OSError(reason)
        return found

    def _check(self, found: Initial, wanted: Mapping[str, Any], taken: list[str]) -> None:
        wrong, advice = [], []
        told = {name: OPTIONS[name] for name in EQUAL} | found.meta["about"]
        tied = told.pop(TIED, False)
        for name, value in told.items():
            now, prefix = value_of(self.config, name, value), parameters_of(name)
            if any(path.startswith(prefix) for path in taken) and now != value:
                key = key_of(self.config, name)
                wrong.append(f"{key} is {value!r} there and {now!r} here")
                advice.append(f"{key}={tuple(value) if isinstance(value, list) else value}")
        here = bool(value_of(self.config, TIED))
        lost = HEAD in found.shapes if here and not tied else tied and HEAD in wanted and HEAD not in found.shapes
        if TABLE in taken and here != tied and lost:
            wrong.append(f"{TIED} is {tied} there and {here} here")
            advice.append(f"{TIED}={tied}")
        for path in taken:
            rows, *rest = wanted[path].shape or (0,)
            if found.shapes[path].shape not in (wanted[path].shape, (rows - self._masks(path), *rest)):
                wrong.append(f"{path} is {list(found.shapes[path].shape)} there and {list(wanted[path].shape)} here")
        if not taken:
            wrong.append("they have no parameter of this model")
        if wrong:
            do = f"set {', '.join(advice)}" if advice else "give other weights"
            raise ValueError(
                f"the initial weights {shown(self.folder)} are for another model ({tree.listed(wrong, 100)}): {do}, or "
                "leave parts of them out with init_from.skip"
            )
        idle = [rule for rule in self.skip if not any(re.search(rule, path) for path in found.shapes)]
        if idle:
            raise ValueError(f"init_from.skip has rules without a match in {shown(self.folder)}: {tree.listed(idle)}")

    def _masks(self, path: str) -> int:
        """Rows of an embedding for the mask ids of its field's process."""
        row = path.removeprefix("fields/").removesuffix(EMBEDDING)
        process = self.config.get("fields", {}).get(row, {}).get("process") or {}
        return process.get("masks", 1) if path == f"fields/{row}{EMBEDDING}" and process.get("mask", 0) else 0

    def _tell(
        self, found: Initial, wanted: Mapping[str, Any], taken: list[str], fresh: list[str], skipped: list[str]
    ) -> None:
        count = lambda paths: f"{sum(int(np.prod(wanted[path].shape)) for path in paths):,}"
        logging.info("initial weights %s from %s: %s parameters of %d leaves (%s)", found.hash, self.folder,
                     count(taken), len(taken), ", ".join(_parts(taken)))  # fmt: skip
        if fresh:
            logging.info("initialized at random: %s parameters of %s", count(fresh), ", ".join(fresh))
        unused = [path for path in found.shapes if path not in wanted]
        if unused or skipped:
            logging.info("not used of the initial weights: %s", ", ".join(sorted({*unused, *skipped})))


def _rows(found: Initial, path: str) -> int:
    """The length of a leaf's first axis."""
    return (found.shapes[path].shape or (0,))[0]


def _put_rows(leaf: jax.Array, found: Initial, path: str) -> jax.Array:
    """A leaf with the first rows of the folder's, which has fewer."""
    sharding, rows = leaf.sharding, _rows(found, path)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    put = jax.jit(lambda leaf, read: leaf.at[:rows].set(read), out_shardings=sharding)
    return put(leaf, place(found, path, leaf.dtype, everywhere))


def _parts(paths: list[str]) -> list[str]:
    """`trunk`, `fields/<row>`, …"""
    return sorted({"/".join(path.split("/")[: 2 if path.startswith("fields/") else 1]) for path in paths})


def _prints(leaves: Mapping[str, jax.Array], found: Initial) -> dict[str, int]:
    """Checksums of the leaves in the folder's dtype, except leaves whose dtype here is narrower."""
    kinds = {path: found.shapes[path].dtype for path in leaves}
    exact = {path: leaf for path, leaf in leaves.items() if jnp.promote_types(kinds[path], leaf.dtype) == leaf.dtype}
    sums = _sums(exact, tuple((path, kinds[path].name, *_parts_of(leaf)) for path, leaf in exact.items()))
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def _parts_of(leaf: jax.Array) -> tuple[int, int]:
    """(axis, number of parts) to sum a large leaf in, along an axis that is not sharded; else (0, 1)."""
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
    """`fingerprint` of each leaf in another dtype, in parts, since some compilers keep all elements as 32 bits."""

    def one(leaf: jax.Array, kind: str, axis: int, parts: int) -> jax.Array:
        whole = parts == 1
        return fingerprint(leaf.astype(kind)) if whole else fingerprint_in_parts(leaf, kind, axis, parts)

    return {path: one(flat[path], *how) for path, *how in kinds}


def make_init_from(config: Any) -> InitFrom | None:
    """`config.init_from`, or None without a path. Raises ValueError for a rule that is not a regex."""
    settings = config.init_from.to_dict()
    if not settings["path"]:
        return None
    try:
        for rule in settings["skip"]:
            re.compile(rule)
    except re.error as error:
        raise ValueError(f"init_from.skip has a rule that is not a regex ({error}): correct it") from error
    held = {name: config[name].to_dict() for name in ("model", "fields", "tasks")}
    return InitFrom(settings["path"], settings["ema"], tuple(settings["skip"]), held)
