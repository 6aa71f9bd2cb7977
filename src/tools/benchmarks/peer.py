"""Ours against a peer: first that both compute the same, then both timed alternately.

Equal means: the losses and gradient norms of three steps from the same weights on the same batches and noise agree, and
so do drawn images and written texts. Timing goes A B C A B C … in short turns, so that what else the machine does falls
on all; the ratios are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from src.common.lookup import lookup
from src.common.rng import step_key, stream
from src.common.tree import flatten
from src.interfaces import row_of
from src.objectives.diffusion import Diffusion
from src.tools.benchmarks import clock, parts
from src.train.system import draw

CHECKED_STEPS = 3
TOLERANCE = 1e-4  # of losses and norms, relative
SPREAD = 0.05  # deviation added to every parameter, so that what starts at zero is compared too
TURN = 5  # calls of one side before the other has its turn
LEAST_ROUNDS = 3


def alternate(
    sides: Mapping[str, Callable[[], Any]], peer: Any, bench: parts.Bench, turn: int = TURN
) -> dict[str, Any]:
    """Seconds of a call by side, and for each side but the first (ours) how many times slower than ours it is.

    Every side has `turn` calls in each round; `bench.steps` rounds, or with 0 as many as fit into `bench.seconds` for
    each side. The peer's sides run with the number of threads that suits each best.
    """
    ours, *others = sides
    chosen = {name: peer.fastest(sides[name]) for name in others}
    sides = {ours: sides[ours]} | {name: action for name, (_, action) in chosen.items()}
    for _ in range(parts.WARM):
        jax.block_until_ready(sides[ours]())
    seconds, rounds = bench.seconds, bench.steps
    taken: dict[str, list[list[float]]] = {name: [] for name in sides}
    began = time.perf_counter()
    for done in itertools.count():
        late = time.perf_counter() - began > seconds * len(sides) and done >= LEAST_ROUNDS
        if done == rounds if rounds else late:
            break
        for name, side in sides.items():
            taken[name].append([clock.clock(side) for _ in range(turn)])
    medians = {name: [statistics.median(t) for t in turns] for name, turns in taken.items()}
    found: dict[str, Any] = {name: clock.spread([t for turn in turns for t in turn]) for name, turns in taken.items()}
    found["slower_than_ours"] = {
        name: clock.spread([b / a for a, b in zip(medians[ours], medians[name], strict=True)]) for name in others
    }
    return found | {"threads": {name: threads for name, (threads, _) in chosen.items()}}


def measure_peer(bench: parts.Bench, name: str, compared: tuple[str, ...]) -> dict[str, Any]:
    """Compares those of "step", "sample" and "decode" that are named with the peer `peers/<name>.py`.

    Raises ValueError when the peer is unknown or does not compute the same, ImportError without its libraries.
    """
    bench.say(f"the peer {name}: building, comparing")
    params = disturbed(bench.trainer.init().params)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    rates = np.asarray(bench.trainer.schedule(jnp.arange(bench.system.config.steps)))
    peer = lookup("tools/benchmarks/peers", name)(bench.system, flat, rates)
    bench.state = fresh(bench, params)
    found: dict[str, Any] = {"name": name, "versions": peer.versions()}
    if "step" in compared:
        found["step"] = compare_steps(bench, peer, flat)
    bench.state = bench.state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
    peer.reset(flat)
    if "sample" in compared and parts.drawing(bench.system):
        found["sample"] = compare_drawing(bench, peer)
    if "decode" in compared and parts.writing(bench.system):
        found["decode"] = compare_writing(bench, peer)
    return found


def disturbed(params: Any) -> Any:
    """The parameters plus noise, each leaf with its own."""
    key = jax.random.key(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + SPREAD * jax.random.normal(stream(key, jax.tree_util.keystr(path)), leaf.shape),
        params,
    )


def fresh(bench: parts.Bench, params: Any) -> Any:
    """A state at step 0 with copies of these parameters, which a step may take over, laid out as the step wants it."""
    state = bench.trainer.init().replace(params=jax.tree.map(jnp.copy, params), ema=jax.tree.map(jnp.copy, params))
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, bench.trainer.abstract))


def refuse(what: str, difference: float, tolerance: float) -> None:
    """Raises ValueError unless a difference is small."""
    if not difference <= tolerance:
        raise ValueError(
            f"the peer does not compute what we compute: {what} differ by {difference:.2g} (at most {tolerance:g}), so"
            " nothing is timed"
        )


# --------------------------------------------------------------------------- the train step


def drawn_noise(bench: parts.Bench, batch: Any, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(t, eps) that our step number `step` draws, by "task/name"."""
    system = bench.system
    key = step_key(system.config.seed, step)
    _, draws = jax.jit(lambda b: draw(system, b, key))(batch)
    found = {}
    for task, plan in system.tasks.items():
        for label, (objective, _) in plan.objectives.items():
            if isinstance(objective, Diffusion):
                drawn = draws[task][label]
                found |= {f"{task}/{n}": (np.asarray(drawn["times"]), np.asarray(x)) for n, x in drawn["noise"].items()}
    return found


def compare_steps(bench: parts.Bench, peer: Any, flat: Any) -> dict[str, Any]:
    """Equality of some steps, then their times."""
    worst = dict.fromkeys(peer.steps, 0.0)
    measured = []
    for i in range(CHECKED_STEPS):
        noise = drawn_noise(bench, bench.batches[i], i)
        terms = jax.device_get(bench.step(bench.trainer.place(bench.batches[i], 0)).terms)
        measured.append((noise, {k: float(terms[k].total) for k in ("total", "grad_norm")}))
    for side, train in peer.steps.items():
        bench.say(f"comparing steps, {side}")
        peer.reset(flat)
        for batch, (noise, ours) in zip(bench.batches, measured, strict=False):
            theirs = train(peer.put(batch), peer.noise(noise))
            worst[side] = max(worst[side], *(abs(float(theirs[k]) / ours[k] - 1) for k in ours))
        bench.say(f"losses and gradient norms of {CHECKED_STEPS} steps differ by {worst[side]:.1e}")
        refuse("losses or gradient norms", worst[side], TOLERANCE)
    ours, theirs = bench.on_device(), itertools.cycle([peer.put(batch) for batch in bench.batches])
    sides = {"ours": lambda: bench.step(next(ours))}
    sides |= {side: lambda train=train: train(next(theirs)) for side, train in peer.steps.items()}
    bench.say("steps, alternately")
    return {"largest_difference": worst, **alternate(sides, peer, bench)}


# --------------------------------------------------------------------------- drawing


def compare_drawing(bench: parts.Bench, peer: Any) -> dict[str, Any]:
    """Guided images from the same noise: equality, then times."""
    system = bench.system
    task, examples = parts.drawing(system)
    plan, pipeline = system.tasks[task], bench.pipeline()
    name, scale = plan.task.fill[0], parts.guided_scale(pipeline)
    field, decoder = system.fields[row_of(name)], pipeline.decoders[row_of(name)]
    prompts = [plan.task.prompt(examples, null=null)[1].tokens for null in (False, True)]
    (text,) = [s.name for s in plan.layout.segments[: plan.layout.segments.index(plan.layout.segment(name))]]
    given = jax.tree.map(lambda *a: np.concatenate(a), *(tokens[text] for tokens in prompts))
    # the first noise of the decoder `blocks`, which folds these names into the key
    key = stream(stream(jax.random.key(0), name, 0), name)
    noise = field.process.prior(jax.random.split(key)[0], (len(examples), field.spec.tokens))
    times = np.asarray(field.step.times(field.process, decoder.steps)).tolist()
    draw_ours = lambda: pipeline.values(task, examples, 0, scale=scale)[name]
    ours = np.asarray(field.codec.encode(jnp.asarray(draw_ours())))
    sides: dict[str, Callable[[], Any]] = {"ours": draw_ours}
    worst = {}
    for side, action in peer.drawing(plan, given, np.asarray(noise), times, scale).items():
        bench.say(f"comparing guided images, {side}")
        worst[side] = float(np.abs(np.asarray(action()) - ours).max() / np.abs(ours).max())
        refuse(f"images ({side})", worst[side], 10 * TOLERANCE)
        sides[side] = action
    bench.say(f"drawing, alternately; images differ by {max(worst.values()):.1e} of their range")
    times_taken = alternate(sides, peer, bench, turn=1)
    return {"task": task, "rows": len(examples), "steps": decoder.steps, "scale": scale,
            "largest_difference": worst, **times_taken}  # fmt: skip


# --------------------------------------------------------------------------- writing


def compare_writing(bench: parts.Bench, peer: Any) -> dict[str, Any]:
    """Greedy text after the same beginnings: equality, then times."""
    system = bench.system
    task, examples = parts.writing(system)
    if parts.reads_images(system, task):
        return {"skipped": "no task writes without an image"}
    data, pipeline = system.tasks[task].task, bench.pipeline()
    name = data.fill[0]
    row, codec = row_of(name), system.fields[row_of(name)].codec.host
    decoder = dataclasses.replace(pipeline.decoders[row], stop=False)  # none stops, as theirs
    tokens = data.prompt(examples)[1].tokens[name]
    begun = np.asarray(tokens.valid) & ~np.asarray(tokens.target)
    starts = [ids[flags].tolist() for ids, flags in zip(np.asarray(tokens.value), begun, strict=True)]
    write = lambda: pipeline(task, examples, 0, decoders={row: decoder})
    theirs = lambda: peer.write(starts, decoder.max_new_tokens)
    said = [codec.decode(_until(ids, codec.eos)) for ids in np.asarray(theirs()).tolist()]
    different = float(np.mean([a != b[name] for a, b in zip(said, write(), strict=True)]))
    bench.say(f"writing, alternately; {different:.1%} of the texts differ")
    refuse("written texts", different, 0.05)  # a tie of two tokens may fall either way
    return {"task": task, "rows": len(examples), "tokens": len(examples) * decoder.max_new_tokens,
            "texts_that_differ": different,
            **alternate({"ours": write, "generate": theirs}, peer, bench, turn=2)}  # fmt: skip


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
