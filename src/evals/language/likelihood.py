"""log p(continuation | context) of token ids, under next-token prediction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from src.evals.language.network import TextNetwork, TextProgram, stacked
from src.interfaces import PyTree
from src.models.heads.chunked_cross_entropy import nll_of_logits
from src.sampling.rows import row_shards

LOGITS = 2**28  # bytes of logits that a device holds at a time
Pair = tuple[Sequence[int], Sequence[int]]  # ids of the context, ids of the continuation


@dataclasses.dataclass
class _Row:
    """A row of the network, and what is read of it: `wanted` has the request, its targets and their first slot."""

    ids: list[int]
    wanted: list[tuple[int, list[int], int]] = dataclasses.field(default_factory=list)

    @property
    def targets(self) -> int:
        return sum(len(targets) for _, targets, _ in self.wanted)


def log_likelihoods(
    network: TextNetwork, pairs: Sequence[Pair], told: Callable[[int], None] | None = None
) -> list[tuple[float, bool]]:
    """Of each pair: the sum of log p (nats) over the tokens of the continuation, each given all tokens before it, and
    whether every one of them is the most likely token at its place.

    A pair that is too long loses the beginning of its context: `length` tokens are read, and the last one is not among
    them. Pairs with equal rows, such as answers of one token to one question, share a row. The longest rows come first.

    told   gets the number of pairs that are done

    Raises ValueError for a pair without context or continuation, and for a continuation that is longer than a row.
    """
    rows = _rows_of(pairs, network.length)
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    size, done = network.rows(len(rows)), 0
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        logs, best = _call(network, batch, size)
        for row, log, most in zip(batch, logs, best, strict=False):
            first = 0
            for request, targets, _ in row.wanted:
                own = slice(first, first + len(targets))
                found[request] = float(log[own].sum(dtype=np.float64)), bool(most[own].all())
                first += len(targets)
        done += sum(len(row.wanted) for row in batch)
        if told is not None:
            told(done)
    return found


def windows(ids: Sequence[int], first: int, length: int, context: int = 1) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of context and continuation that predict each token of a text once, in rows of at most `length` tokens.

    first     the id in front of the text
    context   tokens that are at least read before a predicted one, behind the first window

    Each window but the first ends with new tokens, and reads as many of the earlier ones as there is room for. The
    windows are those of lm-eval (`get_rolling_token_windows`, `make_disjoint_window`).

    Raises ValueError for a context that leaves no room.
    """
    if not 1 <= context <= length:
        raise ValueError(f"a context of {context} tokens is not possible in rows of {length}: give 1 to {length}")
    ids = list(ids)
    if ids:
        yield [first], ids[:length]
    done = min(length, len(ids))
    while done < len(ids):
        new = min(len(ids) - done, length - context + 1)
        end = done + new
        yield ids[end - length - 1 : done], ids[done:end]
        done = end


def _rows_of(pairs: Sequence[Pair], length: int) -> list[_Row]:
    """The rows that pairs need, the longest first."""
    rows: dict[tuple[int, ...], _Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"pair {number} has an empty context or continuation: give at least one token of both")
        if len(continuation) > length:
            raise ValueError(
                f"pair {number} has a continuation of {len(continuation):,} tokens, and {length:,} are read at once:"
                " give a larger max_length"
            )
        read = [*context, *continuation][-length - 1 : -1]
        row = rows.setdefault(tuple(read), _Row(read))
        row.wanted.append((number, list(continuation), len(read) - len(continuation)))
    return sorted(rows.values(), key=lambda row: (-len(row.ids), row.ids))


def _call(network: TextNetwork, rows: list[_Row], size: int) -> tuple[np.ndarray, np.ndarray]:
    """log p, and whether it is the largest, [rows, K], of each row's targets one request after the other."""
    ids, count = stacked([row.ids for row in rows], size, network.slots(len(rows[0].ids)))
    most = 1 << (max(row.targets for row in rows) - 1).bit_length()
    places, targets = np.zeros((2, size, most), np.int32)
    for number, row in enumerate(rows):
        at = [slot for _, wanted, first in row.wanted for slot in range(first, first + len(wanted))]
        places[number, : len(at)] = at
        targets[number, : len(at)] = [target for _, wanted, _ in row.wanted for target in wanted]
    program = network.program(row_shards(network.mesh))
    return network.run(_scores, program, (), (ids, count, places, targets))


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    program: TextProgram,
    params: PyTree,
    ids: Int[Array, "B N"],
    count: Int[Array, " B"],
    places: Int[Array, "B K"],
    targets: Int[Array, "B K"],
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    """log p of `targets` behind `places`; logits are made of these states alone, some at a time."""
    net = program.net(params)
    hidden = net.hidden({program.name: program.view(ids, count, count)})[program.name]
    states = jnp.take_along_axis(hidden.of(program.name, "clean"), places[..., None], axis=1)
    bound = net.field(program.name)

    def piece(now: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = bound(now[0])
        return -nll_of_logits(logits, now[1]), jnp.argmax(logits, axis=-1) == now[1]

    rows, most = targets.shape
    width = 1
    row_bytes = 4 * (bound.field.spec.vocab or 1) * -(-rows // program.shards)
    while 2 * width <= most and 2 * width * row_bytes <= LOGITS:
        width *= 2
    cut = lambda a: jnp.moveaxis(a.reshape(rows, most // width, width, *a.shape[2:]), 1, 0)
    logs, best = jax.lax.map(piece, (cut(states), cut(targets)))
    whole = lambda a: jnp.moveaxis(a, 0, 1).reshape(rows, most)
    return whole(logs), whole(best)
