"""Texts that go on: ids behind given ones, drawn token by token, until something stops them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, UInt32

from src.common.rng import stream
from src.evals.language.network import SHORTEST, TextNetwork, TextProgram, stacked
from src.interfaces import PyTree, row_of
from src.sampling.decoders.left_to_right import LeftToRight
from src.sampling.rows import row_shards
from src.sampling.steps.next_token import Greedy
from src.sampling.walk import SamplingPlan, Walk, fill

ROUND = 32  # tokens of the first round
Choose = Callable[[Array, Array], Array]


def continue_rows(
    network: TextNetwork,
    prompts: Sequence[Sequence[int]],
    new: int,
    *,
    stops: Callable[[list[int]], bool] = lambda ids: False,
    choose: Choose | None = None,
    seed: int = 0,
    told: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Up to `new` ids behind each prompt; they end before the end-of-text id of the field's codec.

    stops   whether ids that were made need no more behind them
    choose  (key, logits [B, V]) -> ids [B]; None: the most likely one
    told    gets the number of prompts that are done

    Tokens are made in rounds, each twice as long as the one before; a row that has ended is left out of the next one.
    The keys of draws depend on seed and round. Raises ValueError for an empty prompt, and where prompt and new tokens
    are more than a row may have.
    """
    longest = max(map(len, prompts), default=0)
    if not all(len(prompt) for prompt in prompts) or new < 1 or longest + new > network.length:
        raise ValueError(
            f"{new} new tokens behind prompts of up to {longest} are not possible: give prompts of at least one token,"
            f" and at most {network.length} tokens in all"
        )
    made: list[list[int]] = [[] for _ in prompts]
    end = getattr(network.field.codec.host, "eos", None)
    open_rows, made_so_far, number = list(range(len(prompts))), 0, 0
    while open_rows and made_so_far < new:
        step = min(ROUND << number, new - made_so_far)
        rows = [[*prompts[row], *made[row]] for row in open_rows]
        ended = set()
        for row, ids in zip(open_rows, _round(network, rows, step, choose or Greedy(), (seed, number)), strict=True):
            made[row] += ids[: ids.index(end)] if end in ids else ids
            if end in ids or stops(made[row]):
                ended.add(row)
        open_rows = [row for row in open_rows if row not in ended]
        made_so_far, number = made_so_far + step, number + 1
        if told is not None:
            told(len(prompts) - (len(open_rows) if made_so_far < new else 0))
    return made


def _round(
    network: TextNetwork, rows: list[list[int]], new: int, choose: Choose, seeds: tuple[int, int]
) -> list[list[int]]:
    """`new` ids behind each row, in the order of the rows; what stands behind an end of text means nothing."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    size, program = network.rows(len(rows)), network.program(row_shards(network.mesh))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        batch = [rows[number] for number in numbers]
        shortest, longest = len(batch[-1]), len(batch[0])
        coarse = max(SHORTEST, 1 << max(longest.bit_length() - 4, 0))  # so that few programs serve all rows
        begin, slots = max(shortest // coarse * coarse, 1), -(-longest // coarse) * coarse + new
        ids, given = stacked(batch, size, slots)
        key = np.full(size, seeds[0], np.uint32), np.tile(np.array([seeds[1], start], np.int32), (size, 1))
        out = network.run(_continued, program, (begin, new, choose), (ids, given, *key))
        for number, row, count in zip(numbers, out, given, strict=False):
            found[number] = row[count : count + new].tolist()
    return [found[number] for number in range(len(rows))]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _continued(
    program: TextProgram,
    begin: int,
    new: int,
    choose: Choose,
    params: PyTree,
    ids: Int[Array, "B N"],
    given: Int[Array, " B"],
    seed: UInt32[Array, " B"],
    at: Int[Array, "B 2"],
) -> Int[Array, "B N"]:
    """The rows with `new` tokens behind the given ones, of which the first `begin` are read in one pass.

    The key depends on the seed and on the two numbers `at`, each of them the same in all rows.
    """
    plan = SamplingPlan((program.name,), (program.name,), (begin,))
    walk = Walk.begin(program.net(params), program.view(ids, given + new, given), plan)
    key = stream(jax.random.key(seed[0]), program.name, at[0, 0], at[0, 1])
    return fill(walk, key, {row_of(program.name): LeftToRight(choose=choose)})[program.name]
