"""Bounds of log p(continuation | context) under masked diffusion, of whole rows or block by block.

For a process that only masks, the bound of a block with L unknown tokens does not depend on the schedule (Shi et al.
2024, section 4; Ou et al. 2024): with k uniform on 1 … L and a subset of k of the tokens masked at random,

    -log p(block | what is before it)  <=  E_k E_subset  (L / k)  sum over the masked tokens of  -log p(x_i | the rest).

The levels k of a block are those of u = shift + j / m mod 1 at k = floor(u L) + 1, with one random shift for each group
of m draws (low discrepancy). The groups are independent, and the standard error is that of their means.

A continuation that ends inside a block leaves the rest of the block masked and unscored. A context that ends inside one
is given there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from src.evals.language.network import SHORTEST, TextNetwork, TextProgram, stacked
from src.interfaces import PyTree
from src.sampling.rows import row_shards
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment


class Bound(NamedTuple):
    """An estimate of a bound of -log p, in nats, its standard error, and the number of draws."""

    nats: float
    error: float
    draws: int


@dataclasses.dataclass(frozen=True)
class Elbo:
    """How a bound is estimated.

    segment   options of the segment as the network was trained: `role`, `blocks`, `noisy_blocks`
    draws     of each continuation, in all; `groups` of them are independent
    seed      of the draws, which depend on it and on the number of the pair alone

    Raises ValueError for draws that are no multiple of the groups, and for fewer than two groups.
    """

    segment: Mapping[str, Any]
    draws: int = 64
    groups: int = 4
    seed: int = 0

    def __post_init__(self):
        if self.groups < 2 or self.draws < 1 or self.draws % self.groups:
            raise ValueError(
                f"a bound of {self.draws} draws in {self.groups} groups has no standard error: give a multiple of at"
                " least two groups"
            )
        if self.segment.get("role", "clean") == "clean":
            raise ValueError("a bound needs a segment with noise: give it role=copies or role=noisy")

    def blocks(self, length: int) -> tuple[int, ...]:
        """Sizes of the noisy blocks of rows of so many tokens."""
        return Segment("row", length, **self.segment).sizes(noisy=True)

    def slots(self, network: TextNetwork, tokens: int) -> int:
        """Slots of rows of so many tokens: whole blocks, and the length of the training rows for one block."""
        sizes = self.blocks(network.length)
        if len(sizes) == 1 or len(set(sizes[:-1])) > 1:
            return network.length
        size = sizes[0]
        whole = -(-max(tokens, SHORTEST) // size) * size
        return min(-(-(1 << (whole - 1).bit_length()) // size) * size, network.length)

    def __call__(
        self,
        network: TextNetwork,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        told: Callable[[int], None] | None = None,
    ) -> list[Bound]:
        """The bound of each pair of context and continuation, token ids. A pair that is too long loses the beginning
        of its context.

        told   gets the number of pairs that are done

        Raises ValueError for a field that is told its time or has other noise than masks, and for pairs that do not
        fit.
        """
        check_field(network)
        found: list[Bound] = []
        for number, (context, continuation) in enumerate(pairs):
            if not len(context) or not 0 < len(continuation) < network.length:
                raise ValueError(
                    f"pair {number} has {len(context)} and {len(continuation)} tokens: give at least one of both, and"
                    f" fewer than {network.length:,}"
                )
            ids = [*context, *continuation][-network.length :]
            each = self._each(network, ids, len(ids) - len(continuation), number)
            means = each.reshape(self.groups, -1).mean(axis=1)
            found.append(Bound(float(means.mean()), float(means.std(ddof=1) / self.groups**0.5), self.draws))
            if told is not None:
                told(number + 1)
        return found

    def _each(self, network: TextNetwork, ids: list[int], given: int, number: int) -> Float[np.ndarray, " draws"]:
        """The bound by each draw."""
        slots = self.slots(network, len(ids))
        sizes = self.blocks(slots)
        block = np.repeat(np.arange(len(sizes)), sizes)
        target = (np.arange(slots) >= given) & (np.arange(slots) < len(ids))
        count = int(np.cumsum(sizes)[block[len(ids) - 1]])
        rng = np.random.default_rng([self.seed, number])
        draws = list(masks(block, target, self.draws, self.groups, rng))
        row, _ = stacked([ids], 1, slots)
        unknown = np.arange(slots) >= len(ids)
        size, out = network.rows(len(draws)), []
        program = network.program(row_shards(network.mesh))
        for start in range(0, len(draws), size):
            some = draws[start : start + size]
            some = some + [some[-1]] * (size - len(some))
            masked = np.stack([mask for mask, _ in some]) | unknown
            weight = np.stack([weight for _, weight in some]).astype(np.float32)
            rows = np.repeat(row, size, axis=0), masked, weight, np.full(size, count, np.int32)
            out.append(network.run(_bounds, program, (tuple(sorted(self.segment.items())),), rows))
        return np.concatenate(out)[: len(draws)].astype(np.float64)


def options_of(segment: Segment) -> dict[str, Any]:
    """The options of a segment that a bound needs."""
    return {"role": segment.role, "blocks": segment.blocks, "noisy_blocks": segment.noisy_blocks}


def check_field(network: TextNetwork) -> None:
    """Raises ValueError unless the field has masks for noise, and is not told how many."""
    field = network.field
    if getattr(field.process, "mask", None) != 1:
        raise ValueError(
            f"fields.{field.name} has no process that only masks (mask=1): it has no bound by masked tokens"
        )
    if field.timed:
        raise ValueError(
            f"fields.{field.name} is told its time, and the bound counts masked tokens instead: train with timed=False"
        )


def masks(
    block: Int[np.ndarray, " N"], target: np.ndarray, draws: int, groups: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which tokens are masked, bool [N], and the weight L / k of each masked one (0: not scored), of each draw."""
    blocks = np.unique(block[target])
    total = np.array([(target & (block == number)).sum() for number in blocks])
    each = draws // groups
    for _ in range(groups):
        shift = rng.random(len(blocks))
        orders = np.argsort(rng.random((len(blocks), each)), axis=1)  # which levels of the blocks meet is random
        for draw in range(each):
            u = (shift + orders[:, draw] / each) % 1.0
            level = np.minimum((u * total).astype(int), total - 1) + 1
            masked, weight = np.zeros(len(block), bool), np.zeros(len(block))
            for number, count, most in zip(blocks, level, total, strict=True):
                places = rng.permutation(np.flatnonzero(target & (block == number)))[:count]
                masked[places], weight[places] = True, most / count
            yield masked, weight


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bounds(
    program: TextProgram,
    options: tuple[tuple[str, Any], ...],
    params: PyTree,
    ids: Int[Array, "B N"],
    masked: Array,
    weight: Float[Array, "B N"],
    count: Int[Array, " B"],
) -> Float[Array, " B"]:
    """The weighted sum of -log p of each row's masked tokens."""
    net, name = program.net(params), program.name
    bound = net.field(name)
    noisy = jnp.where(masked, bound.process.field.vocab, ids)
    view = program.view(ids, count, count)
    segment = Segment((name,), ids.shape[1], **dict(options))
    times = jnp.zeros((ids.shape[0], 1), jnp.float32)
    view = view.replace(layout=FixedLayout((segment,)), noisy={name: noisy}, times={name: times})
    nll = bound.nll(net.hidden({name: view})[name].of(name), ids, ())
    return (weight * nll).sum(axis=1)
