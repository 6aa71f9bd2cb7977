"""Blocks of ids over the cache: what is sure is kept first, rows end by themselves, and the law is the network's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.categorical import Categorical
from src.interfaces import FieldSpec
from src.sampling.decoders.blocks import Blocks
from src.sampling.decoders.left_to_right import LeftToRight
from src.sampling.loop import FieldSampler, integrate_counted
from src.sampling.steps.ancestral import Ancestral
from src.sampling.steps.threshold import Threshold, sure_tokens
from src.sampling.walk import NoisyTokens, SamplingPlan, Walk, fill, plan_of
from src.sequence.segment import Segment
from tests.helpers.oracle import CategoricalOracle, floor, total_variation
from tests.helpers.small import TEXT, WORDS, batch, close, ids, net, text_field, tokens, view_of

ORACLE = CategoricalOracle(Categorical(field=FieldSpec((3,), vocab=3)))
SIZE, LENGTH, EOS, MASK = 4, 12, 12, 13


# --------------------------------------------------------------------------- the step sampler


def test_tokens_kept_one_at_a_time_have_the_law_of_the_network():
    one_by_one = total_variation(ORACLE, Threshold(confidence=2.0), 3)
    together = total_variation(ORACLE, Threshold(confidence=0.0), 3)
    between = total_variation(ORACLE, Threshold(confidence=2.0, entropy=0.5), 3)
    assert one_by_one < floor(ORACLE) + 0.01 and together > 0.3
    assert floor(ORACLE) < between < together / 1.5


def test_what_is_kept_is_what_is_sure():
    p = np.array([[[0.95, 0.05], [0.5, 0.5], [0.9, 0.1], [0.99, 0.01]]])
    known = jnp.asarray([[False, False, False, True]])
    kept = lambda **rules: sure_tokens(jnp.log(p), known, **rules)[0].tolist()
    assert kept(confidence=0.9, entropy=0.0) == [True, False, True, False]
    assert kept(confidence=0.96, entropy=0.0) == [True, False, False, False], "one at least"
    assert kept(confidence=2.0, entropy=0.0) == [True, False, False, False]
    entropies = -(p * np.log(p)).sum(-1)[0]  # 0.20, 0.69, 0.33 and one that is known
    assert kept(confidence=2.0, entropy=entropies[0] - 0.01) == [True, False, False, False]
    assert kept(confidence=2.0, entropy=entropies[0] + 0.01) == [True, False, True, False]
    assert kept(confidence=2.0, entropy=entropies[0] + entropies[2] + 0.01) == [True, True, True, False]
    with pytest.raises(ValueError, match="confidence=-1"):
        Threshold(confidence=-1)


def test_the_loop_ends_with_the_last_row_and_counts_the_steps_of_each():
    process, asked = ORACLE.process, []
    xt = jnp.asarray([[0, 1, 2], [3, 1, 2], [3, 3, 3]])
    one = FieldSampler(Threshold(confidence=2.0), process, jax.random.key(0))

    def denoise(xts, t, hints):
        jax.debug.callback(lambda: asked.append(1))
        return {"": ORACLE.estimate(xts[""], t)}

    made, taken = integrate_counted({"": one}, denoise, {"": xt}, one.sampler.times(process, 16))
    jax.block_until_ready(taken)
    assert taken.tolist() == [0, 1, 3] and len(asked) == 3
    assert (made[""] < 3).all() and made[""][0].tolist() == [0, 1, 2]
    plain = FieldSampler(Ancestral(), process, jax.random.key(0))
    assert integrate_counted({"": plain}, denoise, {"": xt}, one.sampler.times(process, 4))[1] == 4


def test_other_noise_than_masks_is_refused():
    with pytest.raises(ValueError, match="mask=1"):
        Threshold().init(Categorical(field=FieldSpec((3,), vocab=3), mask=0.5), jnp.zeros((1, 3), jnp.int32))


# --------------------------------------------------------------------------- the decoder


class Words:
    """A host link with the ids that a decoder asks for."""

    pad, eos = 0, EOS


class Chain:
    host = Words()


@functools.cache
def model():
    process = Categorical(field=WORDS)
    field = text_field(codec=Chain(), process=process, step=Threshold(confidence=0.5, temperature=0), timed=False)
    return net({"text": field}, {"text": TEXT}, trunk={"width": 16, "depth": 2, "heads": 2, "init": 0.4})


def written(rows, decoder, role="copies", length=LENGTH):
    """What a decoder writes behind the beginnings of rows, and the passes that each needed."""
    segment = Segment("text", length, 1 if role == "copies" else 0, role, SIZE if role == "copies" else None)
    segment = decoder.fit(segment, max(map(len, rows)), False)
    value, given = ids(rows, segment.length)
    asked, network = batch(text=tokens(value, target=~given)), model()

    def run():
        view = view_of((segment,), asked)
        walk = Walk.begin(network, view, plan_of(view.layout, asked))
        return (
            fill(walk, jax.random.key(0), {"text": decoder})["text"],
            walk.calls,
            walk.view.batch.tokens["text"].valid,
        )

    return tuple(np.asarray(a) for a in jax.jit(run)())


@functools.partial(jax.jit, static_argnums=3)
def whole_pass(value, noisy, there, length):
    """The estimate of all tokens by one pass over clean tokens and noisy copies."""
    segment = Segment("text", length, 1, "copies", SIZE)
    view = view_of((segment,), batch(text=tokens(np.zeros((1, length), np.int32))))
    clean = dataclasses.replace(view.batch.tokens["text"], value=value, valid=there)
    view = view.replace(batch=batch(text=clean), noisy={"text": noisy})
    bound = model().field("text")
    return bound.process.estimate(bound(model().hidden({"": view})[""].of("text")), noisy, 0.5)


def by_whole_passes(prompt, given_blocks):
    """The text behind a prompt, each step by a pass over the whole row, and the passes that a cache needs."""
    value, calls = np.zeros((1, LENGTH), np.int32), int(given_blocks > 0)
    value[0, : len(prompt)] = prompt
    field = model().field("text").field

    @jax.jit
    def one_step(logs, xt):
        times, known = (jnp.float32(1), jnp.float32(0.5)), xt < MASK
        return field.step.step(field.process, jax.random.key(0), logs, xt, *times, known, lambda x, t: logs)[0]

    for start in range(given_blocks * SIZE, LENGTH, SIZE):
        here = slice(start, start + SIZE)
        noisy = np.where(np.arange(LENGTH) < len(prompt), value, MASK)
        noisy[:, :start] = value[:, :start]
        while (noisy[:, here] == MASK).any():
            logs = whole_pass(jnp.asarray(value), jnp.asarray(noisy), np.arange(LENGTH)[None] < start + SIZE, LENGTH)
            noisy[:, here] = one_step(logs[:, here], jnp.asarray(noisy[:, here]))
            calls += 1
        value[:, here] = noisy[:, here]
        if EOS in value[0, max(start, len(prompt)) : start + SIZE] or start + SIZE == LENGTH:
            break
        calls += 1  # the finished block is read
    return value[0, : start + SIZE].tolist(), calls


def test_blocks_over_the_cache_are_those_of_whole_passes():
    """Prompts of different lengths, one of them longer than a block; rows end by themselves, and passes are counted."""
    prompts = [[1, 5, 2, 7, 3], [1, 9, 4, 4, 4, 6], [1, 3, 3, 8, 2], [1, 2, 9, 5, 6, 7, 8, 9]]
    prompts += [[1, i, 3, i, 5] for i in range(2, 12)]
    made, calls, valid = written(prompts, Blocks(steps=16))
    wanted = [by_whole_passes(prompt, 1) for prompt in prompts]
    for row, there, needed, (text, passes) in zip(made, valid, calls, wanted, strict=True):
        assert row[: len(text)].tolist() == text and needed == passes
        assert there[: len(text)].all() and not there[len(text) :].any(), "nobody sees what is behind the end"
    lengths = {len(text) for text, _ in wanted}
    assert len(lengths) > 1 and len(set(calls.tolist())) > 2, "rows differ in their ends and in their steps"


def test_states_of_blocks_over_the_cache_equal_those_of_one_pass():
    """The noisy block and the clean tokens behind it, block by block."""
    network, rng = model(), np.random.default_rng(0)
    value, noisy = (rng.integers(0, top, (3, LENGTH)).astype(np.int32) for top in (13, 14))
    segment = Segment("text", LENGTH, 1, "copies", SIZE)
    view = view_of((segment,), batch(text=tokens(value)))
    times = jnp.full((3, 1), 0.5)

    @jax.jit
    def compare():
        whole = network.hidden({"": view.replace(noisy={"text": jnp.asarray(noisy)})})[""]
        walk, found = Walk.begin(network, view, SamplingPlan(())), {"noisy": [], "clean": []}
        for start in range(0, LENGTH, SIZE):
            piece = {"text": NoisyTokens(jnp.asarray(noisy[:, start : start + SIZE]), times)}
            there = walk.with_noisy(segment, piece, start)
            found["noisy"].append(there.run(segment, "noisy", start, SIZE, keep=False))
            found["clean"].append(walk.run(segment, "clean", start, SIZE, keep=True))
        return [(whole.of("text", copy), jnp.concatenate(states, axis=1)) for copy, states in found.items()]

    for wanted, states in compare():
        close(states, wanted, 1e-5)


def test_a_checkpoint_writes_from_left_to_right_without_its_noisy_copies():
    prompts = [[1, 5, 2, 7, 3], [1, 9, 4]]
    made, calls, valid = written(prompts, LeftToRight())
    plain, *_ = written(prompts, LeftToRight(stop=False))
    view = view_of((Segment("text", LENGTH),), batch(text=tokens(plain)))
    logits = model().field("text")(model().hidden({"": view})[""].before("text")[0])
    for row, there, greedy, best, prompt, needed in zip(
        made, valid, plain, np.argmax(logits, -1), prompts, calls, strict=True
    ):
        np.testing.assert_array_equal(best[len(prompt) :], greedy[len(prompt) :])
        new = int(there.sum()) - len(prompt)
        np.testing.assert_array_equal(row[: len(prompt) + new], greedy[: len(prompt) + new])
        assert needed == new, "one pass for each token, the prompt's is the first"
    segment = Segment("text", LENGTH, 1, "copies", SIZE)
    assert LeftToRight().fit(segment, 3, True) == Segment("text", LENGTH)


def test_known_spans_are_filled_in_with_what_is_on_both_sides():
    """One block, as in masked diffusion of whole texts: the last word changes what stands before it."""
    value = np.array([[1, 5, 0, 0, 7, 3, 0, 9]], np.int32)
    given, network = value > 0, model()
    segment = Segment("text", 8, 1, "copies", 0)

    ends = np.arange(2, 12)
    values = np.where(np.arange(8) == 7, ends[:, None], value).astype(np.int32)
    rows = batch(text=tokens(values, target=np.repeat(~given, len(ends), 0)))
    view, decoders = view_of((segment,), rows), {"text": Blocks(steps=8)}
    run = lambda: fill(Walk.begin(network, view, plan_of(view.layout, rows)), jax.random.key(0), decoders)["text"]
    found = np.asarray(jax.jit(run)())
    for last, row in zip(ends, found, strict=True):
        np.testing.assert_array_equal(row[given[0]][:-1], value[given][:-1])
        assert row[-1] == last and (row < MASK).all()
    assert len({tuple(row[~given[0]]) for row in found}) > 1


def test_room_for_new_tokens_is_whole_blocks():
    segment = Segment("text", 32, 1, "copies", SIZE)
    assert Blocks(steps=4, max_new_tokens=5).fit(segment, 6, True).length == 12
    assert Blocks(steps=4, max_new_tokens=5).fit(segment, 6, False).length == 32
    with pytest.raises(ValueError, match="blocks of one size"):
        Blocks(steps=4, max_new_tokens=5).fit(Segment("text", 32, 0, "noisy"), 6, True)
