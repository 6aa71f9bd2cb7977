"""Frozen encoders: a program before the train step encodes raw data, so that steps, checks and tools get only latents
and features."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from src.codecs.buckets import Buckets
from src.common.mesh.sharding import batch_spec
from src.common.rng import stream
from src.common.tree import join_rows, split_rows
from src.interfaces import Batch, PyTree, Tokens, row_of


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen links of the fields' codecs, by field (`codecs/vae_latents.py`, `codecs/clip_vision.py`). Values of
    other fields are returned unchanged.

    buckets   of the tasks with images of several aspect ratios, in units of the raw data
    """

    nets: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    buckets: Mapping[str, Buckets] = dataclasses.field(default_factory=dict, hash=False)

    def read(self) -> dict[str, PyTree]:
        """Their parameters, on the host. Raises FileNotFoundError or ValueError for missing or unknown files."""
        return {row: net.params for row, net in self.nets.items()}

    def shapes(self) -> dict[str, PyTree]:
        """Their parameters as abstract arrays. Raises as `read`."""
        return {row: net.shapes() for row, net in self.nets.items()}

    def needed(self, params: Mapping[str, PyTree], raw: Mapping[str, Batch]) -> dict[str, PyTree]:
        """The parameters that `encode` reads for such batches; both may be abstract."""
        seen: dict[str, list[tuple[int, ...]]] = {row: [] for row in self.nets}
        self._each(lambda task, name, tokens: seen[row_of(name)].append(_shape(tokens)), raw)
        return {row: net.needed(params[row], seen[row]) for row, net in self.nets.items()}

    def sketch(self) -> tuple[Encoders, tuple[str, ...]]:
        """The same networks for shapes only, and the assumptions about those whose folders are missing."""
        found = {row: net.sketch() for row, net in self.nets.items()}
        assumed = dict.fromkeys(told for _, told in found.values() if told)
        return dataclasses.replace(self, nets={row: net for row, (net, _) in found.items()}), tuple(assumed)

    def fingerprints(self) -> dict[str, str]:
        """Their fingerprints, by field."""
        return {row: net.fingerprint for row, net in self.nets.items()}

    def check(self, task: str, latents_of: str | None) -> None:
        """Raises ValueError if a task's data are moments of latents of another codec than the fields'.

        latents_of   the hash of that codec, None for images
        """
        if latents_of is None or latents_of in (known := self.fingerprints()).values():
            return
        if not known:
            raise ValueError(
                f"the data of task {task} are moments of latents: add vae_latents to the codec of their field"
            )
        ours = ", ".join(f"fields.{row}.codec has {print[:12]}…" for row, print in known.items())
        raise ValueError(
            f"the data of task {task} are latents of another autoencoder ({latents_of[:12]}…) than the config's"
            f" ({ours}): set the autoencoder that made them, or make them again"
        )

    def spec(self, raw: Mapping[str, Batch]) -> dict[str, Batch]:
        """The result of `encode` as abstract arrays; reads no file."""

        def encoded(task: str, name: str, tokens: Tokens) -> Tokens:
            lead = tokens.valid.shape[:-1]
            shape = (*lead, *self.nets[row_of(name)].shape)
            return tokens.replace(value=jax.ShapeDtypeStruct(shape, jnp.float32))

        return self._each(encoded, raw)

    def encode(
        self, params: Mapping[str, PyTree], batch: Mapping[str, Batch], key: Array, row_shards: int = 1
    ) -> dict[str, Batch]:
        """The batch by task with all values of these fields encoded; rows are sharded over `row_shards` devices.

        Images of buckets are encoded in their own grids, and their latents are folded like them (`codecs/buckets.py`).
        """

        def encoded(task: str, name: str, tokens: Tokens) -> Tokens:
            own = stream(key, f"{task}/{name}/codec")
            buckets = self.buckets.get(task) if tokens.place is not None else None
            return tokens.replace(
                value=self._values(row_of(name), params[row_of(name)], tokens, own, row_shards, buckets)
            )

        return self._each(encoded, batch)

    def _each(self, change: Callable[[str, str, Tokens], Any], batch: Mapping[str, Batch]) -> dict[str, Batch]:
        """The batch with `change(task, name, tokens)` for the names of these fields."""
        out = {}
        for task, rows in batch.items():
            tokens = dict(rows.tokens)
            tokens |= {n: change(task, n, old) for n, old in rows.tokens.items() if row_of(n) in self.nets}
            out[task] = rows.replace(tokens=tokens)
        return out

    def _values(
        self, row: str, params: PyTree, tokens: Tokens, key: Array, row_shards: int, buckets: Buckets | None
    ) -> Array:
        net, lead = self.nets[row], tokens.valid.shape[:-1]
        values = tokens.value.reshape(-1, *_shape(tokens))
        if buckets and net.encodes(values.shape[1:]):
            # Each device loops over its own rows, since the choice of a grid is a branch for each row.
            grids = (tokens.place.max(axis=-2) + 1).reshape(-1, 2)
            rows = (values, grids, tokens.valid[..., 0].reshape(-1))
            found = _by_device(functools.partial(_in_buckets, net, buckets), row_shards, params, rows)
        else:
            rows = values.shape[0] // row_shards
            parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= net.rows)
            compute = functools.partial(net.compute, params)
            found = join_rows(jax.lax.map(compute, split_rows(values, parts))) if parts > 1 else compute(values)
        # One draw for all rows, so that it does not depend on the number of parts.
        found = net.draw(found, key)
        return found.reshape(*lead, *found.shape[1:])


def _shape(tokens: Tokens) -> tuple[int, ...]:
    """Shape of one value, without its rows and parts."""
    return tokens.value.shape[tokens.valid.ndim - 1 :]


def _in_buckets(net: Any, buckets: Buckets, params: PyTree, rows: tuple[Array, Array, Array]) -> Array:
    values, grids, valid = rows
    return buckets.each(functools.partial(net.compute, params), values, grids, valid)


def _by_device(function: Callable[[PyTree, PyTree], Array], row_shards: int, params: PyTree, rows: PyTree) -> Array:
    """function(params, rows), on each of the `row_shards` devices with its own rows."""
    if row_shards == 1:
        return function(params, rows)
    split = batch_spec(jax.sharding.get_abstract_mesh())
    return jax.shard_map(function, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False)(params, rows)
