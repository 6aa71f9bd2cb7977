"""Masked and block diffusion of ids as objectives, beside next-token prediction on the same field."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from src.corruption import keep
from src.corruption.categorical import Categorical
from src.corruption.timesteps import Stratified
from src.interfaces import Batch, FieldSpec, Hidden, Packing, View
from src.models.model import FieldParts, Network
from src.objectives.diffusion import Diffusion
from src.objectives.losses.cross_entropy import CrossEntropy
from src.objectives.next_token import NextToken
from src.sequence.packed import PackedLayout
from src.sequence.segment import Segment
from tests.helpers.family import fixed_logits, golden
from tests.helpers.small import TEXT, batch, close, net, text_field, tokens, view_of
from tests.objectives.test_losses import Cut, masking

VOCAB, LENGTH = 6, 8


class Logits(nnx.Module):
    """A head whose outputs are the hidden states."""

    def __call__(self, hidden, cond=None):
        return hidden


@dataclasses.dataclass(frozen=True)
class Fixed(Network):
    """A network whose hidden states of noisy tokens are the fixed logits of the published numbers."""

    arrays: Any = None
    process: Any = None

    def field(self, name):
        return dataclasses.replace(super().field(name), process=self.process, parts=FieldParts(head=Logits()))

    def hidden(self, views):
        (view,) = views.values()
        logits = fixed_logits(self.arrays, np.asarray(view.noisy["text"]), VOCAB)
        copies = view.layout.length // logits.shape[1]
        return {task: Hidden(view, jnp.tile(logits, (1, copies, 1)), {}) for task in views}


def loss(arrays, process, loss, x0, valid, times, noise, segment):
    """The term of the objective `diffusion` for the published draws."""
    objective = Diffusion(segment.names, loss, Stratified(), per="block")
    view = view_of((segment,), batch(text=tokens(x0, valid=valid, target=True)))
    small = model()
    network = Fixed(small.architecture, small.model, arrays=arrays, process=process)
    view, aux = objective.prepare(network, view, {"times": jnp.asarray(times), "noise": {"text": noise}})
    return objective.loss(network, network.hidden({"": view})[""], aux)["nll"], view


def masks(**options):
    return Categorical(field=FieldSpec((LENGTH,), vocab=VOCAB), **options)


def test_masked_diffusion_has_the_published_loss_of_mdlm():
    arrays = golden("mdlm/loss")
    process = masks(schedule=keep.LinearDecay(least=1e-3))
    noise, segment = masking(1 - arrays["u_mask"]), Segment("text", LENGTH, 0, "noisy")
    term, view = loss(
        arrays,
        process,
        CrossEntropy(elbo=True),
        arrays["x0"],
        arrays["valid"] > 0,
        arrays["t"][:, None],
        noise,
        segment,
    )
    np.testing.assert_array_equal(view.noisy["text"], arrays["x_t"])
    assert term.count == arrays["valid"].sum()
    np.testing.assert_allclose(term.total / term.count, arrays["loss"], rtol=1e-5)


@pytest.mark.parametrize("form, schedule", [("linear", keep.LinearDecay()), ("cosine", keep.CosineDecay())])
def test_masked_diffusion_has_the_published_loss_of_md4(form, schedule):
    arrays = golden("md4/loss")
    noise, segment = masking(arrays["u_mask"]), Segment("text", LENGTH, 0, "noisy")
    rows = np.ones(arrays["x"].shape, bool)
    times = arrays[f"{form}_cont_t"][:, None]
    term, _ = loss(
        arrays, masks(schedule=Cut(schedule)), CrossEntropy(elbo=True), arrays["x"], rows, times, noise, segment
    )
    bits = term.total / term.count / np.log(2)
    np.testing.assert_allclose(bits, arrays[f"{form}_cont_loss_diff"], rtol=3e-4)


@pytest.mark.parametrize("kind", ["full", "clip"])
def test_block_diffusion_has_the_published_loss_of_bd3lm(kind):
    """A time for each block; times of the clipped range have the same weight 1/t."""
    arrays = golden("bd3lm/loss_and_step")
    times, noise = arrays[f"t_{kind}"], masking(1 - arrays["u_mask"])
    segment = Segment("text", LENGTH, 1, "copies", noisy_blocks=int(arrays["block"]))
    rows = np.ones(arrays["x0"].shape, bool)
    assert all(len(set(row)) == 2 for row in times.tolist()), "a time for each of the two blocks"
    term, view = loss(arrays, masks(), CrossEntropy(elbo=True), arrays["x0"], rows, times, noise, segment)
    np.testing.assert_array_equal(view.noisy["text"], arrays[f"x_t_{kind}"])
    np.testing.assert_allclose(term.total / term.count, arrays[f"loss_{kind}"], rtol=1e-4)


def test_the_published_schedules_of_bd3lm():
    arrays = golden("bd3lm/schedules")
    t = arrays["t"]
    for form, schedule in (("loglinear", keep.LinearDecay()), ("square", keep.PowerDecay(exponent=2.0))):
        move = np.maximum(1 - schedule.keep(t), 1e-3)  # clamped there
        np.testing.assert_allclose(move, arrays[f"{form}_move"], rtol=2e-5)
        rate = masks(schedule=schedule).rate(t)
        np.testing.assert_allclose(rate[1:], -arrays[f"{form}_scale"][1:], rtol=2e-5)


def test_a_block_is_denoised_by_the_published_step_of_bd3lm():
    arrays, size = golden("bd3lm/loss_and_step"), 4
    xt, t = jnp.asarray(arrays["step_x_t"]), jnp.asarray(arrays["step_t"])
    kernel = masks()
    logs = kernel.estimate(fixed_logits(arrays, arrays["step_x_t"], VOCAB), xt, t)
    q = np.asarray(kernel.reverse(xt, jnp.exp(logs), t, t - arrays["step_dt"]), np.float64)[:, -size:]
    drawn = (q / (1e-10 - np.log(arrays["step_u_f64"] + 1e-10))).argmax(-1)
    known = arrays["step_x_t"][:, -size:] != arrays["mask_id"]
    np.testing.assert_array_equal(np.where(known, arrays["step_x_t"][:, -size:], drawn), arrays["step_x_s"][:, -size:])
    np.testing.assert_array_equal(arrays["step_x_t"][:, :-size], arrays["step_x_s"][:, :-size])


# --------------------------------------------------------------------------- beside next-token prediction


@functools.cache
def model():
    process = Categorical(field=FieldSpec(vocab=13))
    return net({"text": text_field(process=process, timed=False)}, {"text": TEXT})


def objectives():
    noise = Diffusion("text", CrossEntropy(elbo=True), Stratified(), per="block", given=True)
    return {"noise": noise, "next": NextToken("text")}


@jax.jit
def terms_of(view):
    """Draws, preparation, one pass, and the terms of both objectives."""
    network, seed = model(), 0
    fields, aux = {"text": network.field("text").field}, {}
    for name, objective in objectives().items():
        drawn = objective.draw(jax.random.key(seed), fields, view)
        view, aux[name] = objective.prepare(network, view, drawn)
    hidden = network.hidden({"": view})[""]
    return {n: o.loss(network, hidden, aux[n]) for n, o in objectives().items()}, view, hidden


def said(rows, length):
    """Random texts whose first token is given."""
    rng = np.random.default_rng(rows)
    value, valid = rng.integers(0, 13, (rows, length)), np.arange(length) < rng.integers(5, length + 1, (rows, 1))
    return tokens(value.astype(np.int32), valid=valid, target=np.arange(length) > 0)


def test_next_token_loss_does_not_see_the_noisy_copies():
    network, rows = model(), batch(text=said(4, 10))
    both, view, hidden = terms_of(view_of((Segment("text", 10, 1, "copies", noisy_blocks=4),), rows))
    alone = NextToken("text")
    plain = view_of((Segment("text", 10),), rows)
    found = jax.jit(lambda view: alone.loss(network, network.hidden({"": view})[""], {"text": ()}))(plain)
    assert found["nll"].count == both["next"]["nll"].count == (rows.tokens["text"].valid[:, 1:]).sum()
    close(found["nll"].total, both["next"]["nll"].total, 1e-4)
    assert (view.noisy["text"][:, 0] == rows.tokens["text"].value[:, 0]).all(), "a given token has no noise"
    assert (view.noisy["text"] == 13).any() and both["noise"]["nll"].total > 0
    # and a block reads its own noise, and clean tokens before it: other tokens change nothing
    other = rows.tokens["text"].value.copy()
    other[:, 8:] = (other[:, 8:] + 1) % 13
    changed = view.replace(batch=batch(text=dataclasses.replace(rows.tokens["text"], value=other)))
    states = network.hidden({"": jax.tree.map(jnp.asarray, changed)})[""].of("text")
    there = rows.tokens["text"].valid[:, :8]
    close(np.asarray(states)[:, :8][there], np.asarray(hidden.of("text"))[:, :8][there])


def test_packed_blocks_are_those_of_each_example_alone():
    """Two examples in one row: states of both copies, terms of both objectives, and a time for each block."""
    network, sizes, slots = model(), (7, 6), 15
    example = np.repeat([1, 2, 0], [*sizes, 2])[None]
    rng = np.random.default_rng(1)
    value, there = rng.integers(0, 13, (1, slots)).astype(np.int32), example > 0
    target = there & (np.arange(slots) != 0) & (np.arange(slots) != sizes[0])
    rows = Batch({"text": tokens(value, valid=there, target=target)}, packing=Packing(example, {}))
    segment = Segment("text", slots, 1, "copies", noisy_blocks=4)
    layout = PackedLayout((segment,), slots)
    view = View(jax.tree.map(jnp.asarray, rows), layout)
    fields, process = {"text": network.field("text").field}, network.field("text").process
    drawn = jax.jit(lambda key: objectives()["noise"].draw(key, fields, view))(jax.random.key(0))

    @jax.jit
    def of_one(view, value, noise, times):
        """Its states and the terms of both objectives, for what is drawn of it in the packed row."""
        hidden = network.hidden({"": view})[""]
        aux = {"noise": {"text": process.corrupt(value, noise, times)}, "next": {"text": ()}}
        return hidden, {n: o.loss(network, hidden, aux[n])["nll"].total for n, o in objectives().items()}

    times = np.asarray(drawn["times"])[0]
    assert len(set(times[:4])) == len(set(times[4:7])) == len(set(times[7:11])) == len(set(times[11:13])) == 1
    assert len({times[0], times[4], times[7], times[11]}) == 4
    terms, view, hidden = terms_of(view)
    totals, start = {"noise": 0.0, "next": 0.0}, 0
    for size in sizes:
        here = slice(start, start + size)
        alone = batch(text=tokens(value[:, here], target=target[:, here]))
        own = view_of((Segment("text", size, 1, "copies", noisy_blocks=4),), alone)
        own = own.replace(noisy={"text": view.noisy["text"][:, here]}, times={"text": view.times["text"][:, here]})
        noise = jax.tree.map(lambda a, here=here: np.asarray(a)[:, here], drawn["noise"]["text"])
        own_times = np.where(target[:, here], np.asarray(drawn["times"])[:, here], np.float32(0))
        one, terms_of_one = of_one(own, value[:, here], noise, own_times)
        for copy in ("clean", "noisy"):
            close(np.asarray(hidden.of("text", copy))[:, here], one.of("text", copy))
        totals = {name: totals[name] + float(total) for name, total in terms_of_one.items()}
        start += size
    for name, total in totals.items():
        close(terms[name]["nll"].total, total, 1e-4)
        assert terms[name]["nll"].count == target.sum()
