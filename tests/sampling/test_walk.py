"""States that are made part by part over the cache equal those of one whole pass, in every kind of layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import View
from src.sampling.guidance import Guidance
from src.sampling.walk import NoisyTokens, SamplingPlan, Walk, plan_of
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers.small import TEXT, VECTORS, batch, close, ids, net, text_field, tokens, vector_field

ROWS = 3
PROMPT = Segment("text.prompt", 4)
LAYOUTS = {
    "causal": (PROMPT, Segment("text.answer", 5)),
    "vectors one by one": (PROMPT, Segment("image", 4), Segment("text.tail", 3)),
    "one block with a lead": (PROMPT, Segment("image", 4, 0, "noisy", lead=1), Segment("text.tail", 3)),
    "blocks in place": (PROMPT, Segment("image", 4, 2, "noisy"), Segment("text.tail", 3)),
    "copies in blocks": (PROMPT, Segment("image", 4, 2, "copies"), Segment("text.tail", 3)),
    "copies markov": (PROMPT, Segment("image", 4, 2, "copies", markov=True), Segment("text.tail", 3)),
    "copies beside causal tokens": (PROMPT, Segment("image", 4, 1, "copies", noisy_blocks=2)),
    "scales": (PROMPT, Segment("line", 7, (1, 2, 4), "noisy"), Segment("text.tail", 3)),
    "scales markov": (PROMPT, Segment("line", 7, (1, 2, 4), "noisy", markov=True), Segment("text.tail", 3)),
    "two names": (PROMPT, Segment(("line", "other"), 7, 0, "noisy", lead=1), Segment("text.tail", 3)),
}


def made(conditioning):
    table = {
        "text": text_field(),
        "image": vector_field(),
        "line": vector_field("line", grid=(7,)),
        "other": vector_field("other", grid=(7,), features=2),
    }
    groups = {"text": TEXT, "image": VECTORS, "line": VECTORS, "other": VECTORS}
    return net(table, groups, conditioning={"name": f"conditioning:{conditioning}"})


@pytest.fixture(scope="module")
def model():
    return made("TimeToken")


@pytest.fixture(scope="module")
def modulated():
    return made("AdaLNPerLayer")


def rows_of(layout, seed=0):
    """Random rows of a layout; texts have different lengths."""
    rng, found = np.random.default_rng(seed), {}
    for segment in layout.segments:
        for name in segment.names:
            if name.startswith("text"):
                said = [rng.integers(1, 13, rng.integers(2, segment.length + 1)).tolist() for _ in range(ROWS)]
                found[name] = tokens(*ids(said, segment.length))
            else:
                features = 2 if name == "other" else 4
                found[name] = tokens(rng.normal(size=(ROWS, segment.length, features)).astype(np.float32))
    return batch(**found)


def noise_of(segment, rows, seed=1):
    """x_t of every name of a segment, full length."""
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=rows.tokens[n].value.shape), jnp.float32) for n in segment.names}


LONG = (
    "vectors one by one",
    "one block with a lead",
    "copies markov",
    "blocks in place",
    "scales",
    "two names",
)  # of the group `faults`


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.faults if k in LONG else ()) for k in LAYOUTS])
def test_states_part_by_part_equal_those_of_one_pass(model, modulated, kind):
    layout = FixedLayout(LAYOUTS[kind])
    model = model if any(segment.lead for segment in layout.segments) else modulated
    rows = rows_of(layout)
    view = View(jax.tree.map(jnp.asarray, rows), layout)
    t = jnp.asarray([[0.9], [0.5], [0.2]])

    def compare():
        walk = Walk.begin(model, view, SamplingPlan(()))
        whole, pairs, valid = model.hidden({"": view})[""], [], []
        for segment in layout.segments:
            copy, noisy = ("noisy" if segment.role == "noisy" else "clean"), noise_of(segment, rows)
            start = 0
            for size in segment.sizes(noisy=True) if segment.role != "clean" else (2, segment.length - 2):
                here = slice(start, start + size)
                before = walk.last
                if segment.role != "clean":
                    states = denoised(walk, segment, start, size, noisy, t)
                    wanted = in_one_pass(segment, start, size, noisy, t)
                    pairs += [(states, wanted.of(segment.name)[:, here])]
                    valid += [jnp.ones((ROWS, size), bool)]
                traced = start if segment.lead else jnp.asarray(start)
                states = walk.run(segment, copy, traced, size, keep=True)
                pairs += [(states, whole.of(segment.name, copy)[:, here])]
                there = rows.tokens[segment.name].valid[:, here]
                valid += [there]
                if before is not None and copy == "clean":
                    known, exists = whole.before(segment.name)
                    pairs += [(before[:, None], known[:, start : start + 1])]
                    valid += [exists[:, start : start + 1] & there[:, :1]]
                start += size
        return pairs, valid

    def denoised(walk, segment, start, size, noisy, t):
        piece = {n: NoisyTokens(a[:, start : start + size], t) for n, a in noisy.items()}
        return walk.with_noisy(segment, piece, start).run(segment, "noisy", start, size, keep=False)

    def in_one_pass(segment, start, size, noisy, t):
        """The whole rows, in which the block alone is noisy and the blocks before it are clean."""
        inside = (np.arange(segment.length) >= start) & (np.arange(segment.length) < start + size)
        mixed = {n: jnp.where(inside[:, None], a, rows.tokens[n].value) for n, a in noisy.items()}
        one = len(segment.sizes(noisy=segment.role == "copies")) == 1
        time = model.field(segment.name).process.network(mixed[segment.name], t)[1]
        times = time if one else jnp.where(inside, time, 0.0)
        return model.hidden({"": view.replace(noisy=mixed, times=dict.fromkeys(noisy, times))})[""]

    pairs, valid = jax.jit(compare)()
    assert len(pairs) > 3
    for (ours, wanted), there in zip(pairs, valid, strict=True):
        there = np.asarray(there)
        close(np.asarray(ours)[there], np.asarray(wanted)[there])


def test_a_markov_block_is_made_without_the_blocks_before_it(modulated):
    """Nothing of the segment is kept, and the noisy copy has the states of training."""
    layout = FixedLayout(LAYOUTS["copies markov"][:2])
    rows = rows_of(layout)
    view, (prompt, segment) = View(jax.tree.map(jnp.asarray, rows), layout), layout.segments
    noisy, t = noise_of(segment, rows)["image"], jnp.asarray([[0.9], [0.5], [0.2]])

    @jax.jit
    def compare():
        time = modulated.field("image").process.network(noisy, t)[1]
        whole = modulated.hidden({"": view.replace(noisy={"image": noisy}, times={"image": time})})[""]
        walk = Walk.begin(modulated, view, SamplingPlan(()))
        walk.run(prompt, "clean", 0, prompt.length, keep=True)
        second = walk.with_noisy(segment, {"image": NoisyTokens(noisy[:, 2:], t)}, 2)
        return second.run(segment, "noisy", 2, 2, keep=False), whole.of("image")[:, 2:]

    close(*compare())


def test_the_comparison_fails_for_nan():
    for a, b in ((np.nan, 0.0), (np.nan, np.nan), (np.inf, np.inf), (0.0, 1e-3)):
        with pytest.raises(AssertionError):
            close(np.array([a]), np.array([b]))
    close(np.array([1.0]), np.array([1.0 + 1e-6]))


def test_a_plan_says_what_is_made_and_where_it_begins():
    layout = FixedLayout((PROMPT, Segment(("kind", "box"), 2, 0, "noisy"), Segment("text.answer", 4)))
    zeros = np.zeros((2, 4), np.int32)
    rows = batch(
        text__prompt=tokens(zeros),
        kind=tokens(zeros[:, :2]),
        box=tokens(np.zeros((2, 2, 4)), target=[[True, True], [False, True]]),
        text__answer=tokens(zeros, valid=[[1, 1, 1, 1], [1, 1, 1, 0]], target=[[0, 0, 1, 1], [0, 1, 1, 1]]),
    )
    plan = plan_of(layout, rows)
    assert plan.made == ("box", "text.answer") == plan.mixed and plan.begins == (0, 1)
    assert plan.begin("text.answer") == 1


def test_writing_validity_moves_the_positions_that_follow(model):
    layout = FixedLayout(LAYOUTS["causal"])
    view = View(jax.tree.map(jnp.asarray, rows_of(layout)), layout)
    walk = Walk.begin(model, view, SamplingPlan(()), null=view, guidance=Guidance(scale=2.0))
    assert walk.rows == ROWS and walk.spec.segment.shape == (2 * ROWS, 9)
    walk.write("text.prompt", jnp.full((ROWS, 2), 7), 1, jnp.asarray([[True, True]] * 2 + [[False, False]]))
    assert (walk.value("text.prompt")[:, 1:3] == 7).all()
    assert not walk.spec.segment[4:, 1:3].any() and walk.spec.segment[:4, 1:3].all(), "a row and its null row"
    assert walk.spec.position[4, 4, 0] == walk.spec.segment[4, :4].sum()


def test_a_trunk_without_cache_takes_rows_of_one_part(model):
    layout = FixedLayout(LAYOUTS["causal"])
    view = View(jax.tree.map(jnp.asarray, rows_of(layout)), layout)

    class Mixer(type(model)):
        def start_cache(self, view):
            return None

    with pytest.raises(ValueError, match="one segment"):
        Walk.begin(Mixer(model.architecture, model.model), view, SamplingPlan(()))
