"""The network of a system as the scores of texts use it: rows of one text field, each token seeing those before it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from src.common.mesh.distributed import to_host
from src.common.mesh.fsdp import Placement
from src.common.runtime import stopping
from src.interfaces import Batch, Field, Net, PyTree, Tokens, View
from src.sampling.rows import chunk, mesh_of, put, specs_of
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment

SHORTEST = 16  # slots of a row


@dataclasses.dataclass(frozen=True)
class TextProgram:
    """The static arguments of a compiled call: `specs` are those of the parameters by path, none if all are whole."""

    bind: Callable[[PyTree, Placement | None], Net]
    name: str
    dtype: Any
    specs: tuple[tuple[str, PartitionSpec], ...]
    shards: int

    def net(self, params: PyTree) -> Net:
        """The network with these parameters."""
        return self.bind(params, Placement(dict(self.specs), self.dtype) if self.specs else None)

    def view(self, ids: Int[Array, "B N"], count: Int[Array, " B"], given: Int[Array, " B"]) -> View:
        """Rows whose first `count` tokens are there, of which the first `given` are given."""
        number = jnp.arange(ids.shape[1])
        valid: Bool[Array, "B N"] = number < count[:, None]
        tokens = Tokens(ids, valid, valid & (number >= given[:, None]))
        return View(Batch({self.name: tokens}), FixedLayout((Segment((self.name,), ids.shape[1]),)))


@dataclasses.dataclass(frozen=True, eq=False)
class TextNetwork:
    """A network with parameters, and one of its fields whose head predicts the next id.

    length      tokens that it may read at once, at most
    batch_size  rows of one call, at most. They are sharded over `data` and `fsdp` of the parameters' mesh

    Raises ValueError for a field that is not of ids, and for a length or size below 1.
    """

    bind: Callable[[PyTree, Placement | None], Net]
    field: Field
    params: PyTree
    dtype: Any
    length: int
    batch_size: int = 8

    def __post_init__(self):
        spec, name = self.field.spec, self.field.name
        if spec.vocab is None or spec.features is not None:
            raise ValueError(f"fields.{name} is not of ids ({spec}), so it has no likelihoods of texts: give another")
        if self.length < 1 or self.batch_size < 1:
            raise ValueError(
                f"rows of {self.length} tokens, {self.batch_size} at a time, are not possible: give at least 1 of both"
            )

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the parameters."""
        return mesh_of(self.params)

    def program(self, shards: int) -> TextProgram:
        """The static arguments for rows on so many shards."""
        specs = tuple(sorted(specs_of(self.params).items()))
        return TextProgram(self.bind, self.field.name, self.dtype, specs, shards)

    def rows(self, count: int) -> int:
        """Rows of each call where there are so many: a power of two below `batch_size`, so that few programs serve."""
        return self.batch_size if count >= self.batch_size else 1 << (count - 1).bit_length()

    def slots(self, tokens: int) -> int:
        """Slots of rows of so many tokens: a power of two, or `length`."""
        return min(max(SHORTEST, 1 << (tokens - 1).bit_length()), self.length)

    def run(self, function: Callable[..., Any], program: TextProgram, static: tuple[Any, ...], rows: Any) -> Any:
        """The arrays on the host of `function(program, *static, params, *rows)` for host arrays with one size."""
        stopping.check()
        mesh, size = self.mesh, len(rows[0])
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            found = function(program, *static, self.params, *put(chunk(rows, 0, size, mesh), mesh))
            return jax.tree.map(lambda array: to_host(array)[:size], found)


def stacked(rows: list[list[int]], size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [size, length] of lists of ids with zeros behind them, and how many each row has; the last row is repeated
    where there are fewer than `size`."""
    rows = rows + [rows[-1]] * (size - len(rows))
    ids = np.zeros((size, length), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids, np.array([len(row) for row in rows], np.int32)
