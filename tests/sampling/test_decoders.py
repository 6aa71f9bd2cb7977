"""Decoders against loops over whole rows: prompts of different lengths, stops, keys, guidance, given tokens, blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.common.rng import stream
from src.corruption.categorical import Categorical
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.sampling.decoders.blocks import Blocks
from src.sampling.decoders.left_to_right import LeftToRight
from src.sampling.guidance import Guidance
from src.sampling.loop import integrate
from src.sampling.steps.ancestral import Ancestral
from src.sampling.steps.categorical import Confidence
from src.sampling.steps.gaussian import DPMSolverPP2M, Heun
from src.sampling.steps.next_token import Sampled
from src.sampling.walk import Walk, fill, plan_of
from src.sequence.segment import Segment
from tests.helpers.small import (
    TEXT,
    VECTORS,
    batch,
    broadcast,
    close,
    ids,
    net,
    text_field,
    tokens,
    vector_field,
    view_of,
)

PAD, EOS = 0, 12
PROMPT = Segment("text.prompt", 3)
KEY = jax.random.key(7)


class Words:
    """A host link with the two ids that a decoder asks for."""

    pad, eos = PAD, EOS


class Chain:
    host = Words()


@pytest.fixture(scope="module")
def model():
    table = {
        "text": text_field(codec=Chain()),
        "image": vector_field(),
        "line": vector_field("line", grid=(2, 2), features=2, step=Heun()),
        "patch": dataclasses.replace(vector_field("patch"), process=None, step=None),
    }
    patch = {"embed": {"name": "patches"}, "head": {"name": "linear", "init": 0.3}}
    return net(table, {"text": TEXT, "image": VECTORS, "line": VECTORS, "patch": patch})


def sampled(model, layout, rows, decoders, null=None, guidance=None, key=KEY):
    """What `fill` makes of rows."""
    view = view_of(layout, rows)
    free = None if null is None else view_of(layout, null)
    plan = plan_of(view.layout, rows)
    run = lambda: fill(Walk.begin(model, view, plan, free, guidance), key, decoders)
    return {name: np.asarray(value) for name, value in jax.jit(run)().items()}


def begun(rows, length):
    """Texts with a beginning that are to be written to the end."""
    value, given = ids(rows, length)
    return tokens(value, target=~given)


def said(model, rows, length, stop=False, choose=None, **more):
    decoder = LeftToRight(stop=stop, **({} if choose is None else {"choose": choose}))
    layout = (Segment("text", length),)
    return sampled(model, layout, batch(text=begun(rows, length)), {"text": decoder}, **more)["text"]


# --------------------------------------------------------------------------- left to right


def test_prompts_of_different_lengths_are_as_each_alone(model):
    prompts, more = [[1, 5, 2, 7], [1, 9], [1, 3, 3]], 5
    together = said(model, prompts, 9)
    for i, prompt in enumerate(prompts):
        alone = said(model, [prompt], len(prompt) + more)[0]
        assert together[i, : len(prompt)].tolist() == prompt
        np.testing.assert_array_equal(together[i, : len(alone)], alone)
    # and greedy text is the argmax of whole passes, token by token
    view = view_of((Segment("text", 9),), batch(text=tokens(together)))
    best = jnp.argmax(model.field("text")(model.hidden({"": view})[""].of("text")), axis=-1)
    np.testing.assert_array_equal(best[1, 1:-1], together[1, 2:])


def test_a_row_that_stops_is_padded_and_the_others_go_on(model):
    prompts = [[1, i] for i in range(1, 9)]
    free, stopped = said(model, prompts, 14), said(model, prompts, 14, stop=True)
    ends = [row.tolist().index(EOS) if EOS in row else None for row in free]
    assert any(e is not None and e < 13 for e in ends) and any(e is None for e in ends), ends
    for row, stop, end in zip(free, stopped, ends, strict=True):
        wanted = row if end is None else [*row[: end + 1], *[PAD] * (13 - end)]
        assert stop.tolist() == list(wanted)


@pytest.mark.faults
def test_text_after_a_text_that_stopped_sees_no_padding(model):
    layout = (Segment("text.a", 8), Segment("text.b", 3))
    prompts = [[i, j] for i in range(1, 13) for j in range(1, 13)]
    rows = batch(text__a=begun(prompts, 8), text__b=tokens(np.zeros((144, 3), np.int32), target=True))
    out = sampled(model, layout, rows, {"text": LeftToRight()})
    ended = [i for i, row in enumerate(out["text.a"]) if EOS in row[:7]]
    assert len(ended) > 3
    for i in ended[:4]:
        shown = out["text.a"][i].tolist()
        shown = shown[: shown.index(EOS) + 1]
        assert said(model, [shown], len(shown) + 3, stop=True)[0, -3:].tolist() == out["text.b"][i].tolist()


def test_a_drawn_token_has_the_key_of_its_name_and_slot(model):
    out = said(model, [[1, 5, 2], [1, 9, 4]], 5, choose=Sampled(temperature=2.0))
    view = view_of((Segment("text", 5),), batch(text=tokens(out)))
    logits = model.field("text")(model.hidden({"": view})[""].of("text"))
    for slot in (3, 4):
        own = jax.random.fold_in(stream(KEY, "text"), slot)
        np.testing.assert_array_equal(Sampled(temperature=2.0)(own, logits[:, slot - 1]), out[:, slot])


def test_vectors_are_made_one_by_one(model):
    layout = (PROMPT, Segment("patch", 4))
    prompt = tokens(*ids([[1, 5, 2], [1, 9]], 3))
    rows = batch(text__prompt=prompt, patch=tokens(np.zeros((2, 4, 4), np.float32), target=True))
    out = sampled(model, layout, rows, {"patch": LeftToRight()})["patch"]
    view = view_of(layout, batch(text__prompt=prompt, patch=tokens(out)))
    states, exists = model.hidden({"": view})[""].before("patch")
    assert exists.all()
    close(out, model.field("patch")(states), 1e-4)


def test_guided_text_is_drawn_once_from_both_halves(model):
    layout = (PROMPT, Segment("text.answer", 4))
    answer = tokens(np.zeros((2, 4), np.int32), target=True)
    shown, free = tokens(*ids([[1, 5, 2], [1, 9]], 3)), tokens(*ids([[1], [1]], 3))
    rows, null = (batch(text__prompt=p, text__answer=answer) for p in (shown, free))
    out = sampled(model, layout, rows, {"text": LeftToRight(stop=False)}, null, Guidance(scale=3.0))["text.answer"]
    logits = []
    for prompt in (shown, free):
        view = view_of(layout, batch(text__prompt=prompt, text__answer=tokens(out)))
        logits.append(model.field("text")(model.hidden({"": view})[""].before("text.answer")[0]))
    np.testing.assert_array_equal(jnp.argmax(3 * logits[0] - 2 * logits[1], axis=-1), out)
    plain = sampled(model, layout, rows, {"text": LeftToRight(stop=False)})["text.answer"]
    assert (plain != out).any()


def test_the_first_token_of_a_row_must_be_given(model):
    with pytest.raises(ValueError, match="text starts the rows"):
        said(model, [[]], 3)
    with pytest.raises(ValueError, match="segment patch has no noisy tokens"):
        rows = batch(patch=tokens(np.zeros((1, 4, 4), np.float32), target=True))
        sampled(model, (Segment("patch", 4),), rows, {"patch": Blocks(steps=2)})


# --------------------------------------------------------------------------- blocks


def image_rows(prompts, target=True, value=None, **more):
    value = np.zeros((len(prompts), 4, 4), np.float32) if value is None else value
    return batch(text__prompt=tokens(*ids(prompts, 3)), image=tokens(value, target=target), **more)


def direct(model, layout, rows, name, key, steps, start=0, size=4, null=None, guidance=None, given=None):
    """One block denoised by whole passes over the rows, with and without conditions, and the sampling loop."""
    bound = model.field(name)
    process, sampler = bound.process, bound.field.step
    count = rows.tokens[name].valid.shape[0]
    here = slice(start, start + size)

    def output(batch, xt, t):
        whole = jnp.asarray(batch.tokens[name].value).at[:, here].set(xt)
        value, time = process.network(whole, broadcast(t, count))
        if size < 4 or given is not None:
            target = np.zeros((count, 4), bool)
            target[:, here] = True if given is None else ~given
            time = jnp.where(target, time, 0.0)
        hidden = model.hidden({"": view_of(layout, batch, {name: value}, {name: time})})[""]
        return bound(hidden.of(name), hidden.vectors[name])[:, here]

    def denoise(xt, t):
        found = output(rows, xt, t)
        found = found if null is None else guidance(found, output(null, xt, t), t)
        return process.estimate(found, xt, t)

    first, loop = jax.random.split(key)
    xt = process.prior(first, (count, size))
    if given is None:
        return integrate(sampler, process, denoise, loop, xt, sampler.times(process, steps))
    times = sampler.times(process, steps)
    keep = lambda x: jnp.where(given[..., None], rows.tokens[name].value, x)
    for i in range(steps):
        xt = keep(xt)
        xt, _ = sampler.step(
            process, jax.random.fold_in(loop, i), denoise(xt, times[i]), xt, times[i], times[i + 1], (), denoise
        )
    return keep(xt)


ONE = (PROMPT, Segment("image", 4, 0, "noisy", lead=1), Segment("text.tail", 4))
PROMPTS, NULL = [[1, 5, 2], [1, 9]], [[1], [1]]


def tailed(prompts, target=True):
    tail = tokens(np.zeros((len(prompts), 4), np.int32), target=target)
    return image_rows(prompts, text__tail=tail)


def test_one_block_is_the_sampler_on_whole_passes_and_text_may_follow(model):
    rows = tailed(PROMPTS)
    out = sampled(model, ONE, rows, {"image": Blocks(steps=3), "text": LeftToRight(stop=False)})
    unseen = tailed(PROMPTS)
    unseen.tokens["text.tail"].valid[:] = False
    wanted = jax.jit(lambda: direct(model, ONE, unseen, "image", stream(KEY, "image"), 3))()
    close(out["image"], wanted, 1e-4)
    view = view_of(ONE, image_rows(PROMPTS, value=out["image"], text__tail=tokens(out["text.tail"])))
    logits = model.field("text")(model.hidden({"": view})[""].before("text.tail")[0])
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), out["text.tail"])


def test_guidance_is_the_direct_loop_with_both_passes(model):
    layout, decoder = ONE[:2], {"image": Blocks(steps=4)}
    rows, null = image_rows(PROMPTS), image_rows(NULL)
    plain = sampled(model, layout, rows, decoder)["image"]
    same = sampled(model, layout, rows, decoder, null, Guidance(scale=1.0))["image"]
    close(plain, same, 2e-5)  # values up to 13, and null + (conditional - null) rounds
    for guidance in (Guidance(scale=3.0), Guidance(scale=2.0, interval=(0.4, 0.8), rescale=0.5)):
        out = sampled(model, layout, rows, decoder, null, guidance)["image"]
        own = stream(KEY, "image")
        run = lambda key=own, g=guidance: direct(model, layout, rows, "image", key, 4, null=null, guidance=g)
        close(out, jax.jit(run)(), 1e-3)
        assert np.abs(out - plain).max() > 1e-2
    some = sampled(model, layout, rows, decoder, null, Guidance(scale=3.0, features=2))["image"]
    assert np.abs(some - out).max() > 1e-3


def test_given_tokens_keep_time_zero_and_come_back_bit_for_bit(model):
    value = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    given = np.array([[True, False, False, True], [False, False, True, False]])
    rows = image_rows(PROMPTS, ~given, value)
    out = sampled(model, ONE[:2], rows, {"image": Blocks(steps=3)})["image"]
    np.testing.assert_array_equal(out[given], value[given])
    wanted = jax.jit(lambda: direct(model, ONE[:2], rows, "image", stream(KEY, "image"), 3, given=given))()
    close(out, wanted, 1e-4)
    assert np.abs(out - value)[~given].max() > 0.1


@pytest.mark.parametrize(
    "segment",
    [
        Segment("image", 4, 2, "copies"),
        Segment("image", 4, (1, 3), "noisy", markov=True),
        pytest.param(Segment("image", 4, 2, "noisy"), marks=pytest.mark.faults),
        pytest.param(Segment("image", 4, (1, 3), "noisy"), marks=pytest.mark.faults),
        pytest.param(Segment("image", 4, 1, "copies", noisy_blocks=2), marks=pytest.mark.faults),
    ],
    ids=str,
)
def test_blocks_follow_each_other(model, segment):
    """Every block is denoised given the finished ones before it, by a key of its own number."""
    layout = (PROMPT, segment)
    out = sampled(model, layout, image_rows(PROMPTS), {"image": Blocks(steps=2)})["image"]
    start = 0
    for number, size in enumerate(segment.sizes(noisy=True)):
        rows = image_rows(PROMPTS, value=np.where(np.arange(4)[:, None] < start, out, 0))
        key = jax.random.fold_in(stream(KEY, "image"), number)
        run = lambda rows=rows, key=key, start=start, size=size: direct(
            model, layout, rows, "image", key, 2, start, size
        )
        close(out[:, start : start + size], jax.jit(run)(), 1e-4)
        start += size


def test_blocks_behind_a_lead_begin_with_it(model):
    segment = Segment("image", 4, 2, "noisy", lead=1)
    rows = image_rows(PROMPTS, text__tail=tokens(np.zeros((2, 4), np.int32), target=True))
    decoders = {"image": Blocks(steps=2), "text": LeftToRight(stop=False)}
    out = sampled(model, (PROMPT, segment, ONE[2]), rows, decoders)
    final = image_rows(PROMPTS, value=out["image"], text__tail=tokens(out["text.tail"]))
    view = view_of((PROMPT, segment, ONE[2]), final)
    logits = model.field("text")(model.hidden({"": view})[""].before("text.tail")[0])
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), out["text.tail"])


def test_other_blocks_than_those_of_the_task(model):
    causal = Segment("image", 4, 1, "copies", noisy_blocks=2)
    assert Blocks(steps=1, blocks=4).fit(causal, 0, False) == dataclasses.replace(causal, noisy_blocks=4)
    assert Blocks(steps=1, blocks=[1, 3]).fit(ONE[1], 0, False).sizes() == (1, 3)
    assert Blocks(steps=1).fit(ONE[1], 0, False) is ONE[1]
    text = Segment("text", 9)
    assert LeftToRight(max_new_tokens=3).fit(text, 5, True).length == 8
    assert LeftToRight(max_new_tokens=3).fit(Segment("patch", 4), 0, False).length == 4


def test_two_names_share_the_passes_and_have_keys_of_their_own(model):
    layout = (PROMPT, Segment(("image", "line"), 4, 0, "noisy", lead=1))
    small = lambda value, target: tokens(np.asarray(value, np.float32), target=target)
    both = image_rows(PROMPTS, line=small(np.zeros((2, 4, 2)), True))
    passes = []

    class Counting(type(model)):
        def extend(self, *arguments):
            passes.append(arguments[1].name)
            return super().extend(*arguments)

    counting = Counting(model.architecture, model.model)
    out = sampled(counting, layout, both, {"image": Blocks(steps=1)})
    # the prompt; one step of both, and one branch of Heun's second evaluation, which the compiler may skip
    assert passes.count("text.prompt") == 1 and passes.count("image") <= 2
    first = model.field("line").process.prior(jax.random.split(stream(KEY, "line"))[0], (2, 4))
    assert np.isfinite(out["line"]).all() and np.abs(out["line"] - first).max() > 1e-3
    # one of them given: it comes back, and the other is made with it
    known = image_rows(PROMPTS, line=small(np.ones((2, 4, 2)), False))
    one = sampled(model, layout, known, {"image": Blocks(steps=1)})
    assert set(one) == {"image"} and np.abs(one["image"] - out["image"]).max() > 1e-3


@pytest.mark.faults
def test_rows_with_a_hint_see_their_own_last_estimate():
    field = vector_field(hint=True, step=DPMSolverPP2M())
    hinted = net({"text": text_field(), "image": field}, {"text": TEXT, "image": VECTORS})
    rows = image_rows(PROMPTS)
    out = sampled(hinted, ONE[:2], rows, {"image": Blocks(steps=3)})["image"]
    bound, process, step = hinted.field("image"), field.process, field.step
    first, loop = jax.random.split(stream(KEY, "image"))
    xt, times, hints = process.prior(first, (2, 4)), step.times(process, 3), {}
    state = step.init(process, xt)
    for i in range(3):
        value, time = process.network(xt, broadcast(times[i], 2))
        hidden = hinted.hidden({"": view_of(ONE[:2], rows, {"image": value}, {"image": time}, hints)})[""]
        estimate = process.estimate(bound(hidden.of("image"), hidden.vectors["image"]), xt, times[i])
        again = lambda x, t, estimate=estimate: estimate
        own = jax.random.fold_in(loop, i)
        xt, state = step.step(process, own, estimate, xt, times[i], times[i + 1], state, again)
        hints = {"image": process.hint(estimate)}
    close(out, xt, 1e-4)
    blind = sampled(dataclasses.replace(hinted), ONE[:2], rows, {"image": Blocks(steps=1)})["image"]
    assert np.abs(blind - out).max() > 1e-3


class Coarse(Gaussian):
    """A process of scales: a block begins around the mean of the finished ones, and reads as a pair."""

    def prior(self, key, shape, past=None):
        around = 0.0 if past is None else 3.0 * past.mean(axis=1, keepdims=True)
        return super().prior(key, shape) + around


@pytest.mark.faults
def test_scales_begin_from_the_finished_blocks():
    field = vector_field("line", grid=(7,))
    process = Coarse(field=field.spec, schedule=Linear(), parameterization="velocity")
    table = {"text": text_field(), "line": dataclasses.replace(field, process=process, timed=False)}
    model = net(table, {"text": TEXT, "line": VECTORS | {"head": {"name": "linear", "init": 0.3}}})
    for markov in (False, True):
        layout = (PROMPT, Segment("line", 7, (1, 2, 4), "noisy", markov=markov))
        prompt = tokens(*ids(PROMPTS, 3))
        rows = batch(text__prompt=prompt, line=tokens(np.zeros((2, 7, 4), np.float32), target=True))
        out = sampled(model, layout, rows, {"line": Blocks(steps=1)})["line"]
        start, times = 0, field.step.times(process, 1)
        for number, size in enumerate((1, 2, 4)):
            first, loop = jax.random.split(jax.random.fold_in(stream(KEY, "line"), number))
            xt = process.prior(first, (2, size), jnp.asarray(out[:, :start]) if start else None)
            value = jnp.concatenate([out[:, :start], xt, np.zeros((2, 7 - start - size, 4), np.float32)], axis=1)
            view = view_of(layout, batch(text__prompt=prompt, line=tokens(np.asarray(value))), {"line": value})
            output = model.field("line")(model.hidden({"": view})[""].of("line"))[:, start : start + size]
            estimate = process.estimate(output, xt, times[0])
            again = lambda x, t, estimate=estimate: estimate
            given = (jax.random.fold_in(loop, 0), estimate, xt, times[0], times[1], ())
            close(out[:, start : start + size], field.step.step(process, *given, again)[0], 1e-4)
            start += size


@pytest.mark.faults
@pytest.mark.parametrize("step", [Ancestral(), Confidence(gumbel=1.0)], ids=["ancestral", "confidence"])
def test_one_field_both_ways_token_by_token_and_block_by_block(step):
    """Clean tokens are causal, noisy copies denoise blocks of 4; given tokens stay, no mask is left."""
    field = text_field(codec=Chain())
    process = Categorical(field=field.spec)
    table = {"text": dataclasses.replace(field, process=process, step=step, timed=False)}
    model = net(table, {"text": TEXT | {"embed": {"name": "tokens", "init": 1.0}}})
    layout = (Segment("text.source", 3), Segment("text", 8, 1, "copies", noisy_blocks=4))
    value = np.random.default_rng(0).integers(0, 12, (2, 8)).astype(np.int32)
    given = np.array([[1, 0, 0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]], bool)
    source = tokens(*ids([[1, 5, 2], [1, 9]], 3))
    rows = batch(text__source=source, text=tokens(value, target=~given))
    out = sampled(model, layout, rows, {"text": Blocks(steps=3)})["text"]
    np.testing.assert_array_equal(out[given], value[given])
    assert out.min() >= 0 and out.max() < 13 and (out != value)[~given].any()
    greedy = sampled(model, layout, rows, {"text": LeftToRight(stop=False)})["text"]
    np.testing.assert_array_equal(greedy[given], value[given])
    view = view_of(layout, batch(text__source=source, text=tokens(greedy)))
    logits = model.field("text")(model.hidden({"": view})[""].before("text")[0])
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1)[~given], greedy[~given])
