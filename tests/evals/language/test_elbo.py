"""Bounds by masked tokens against sums over all subsets: of a known law, and of a small network in blocks."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from src.codecs.chain import build_chain
from src.corruption.categorical import Categorical
from src.evals.language.elbo import Elbo, masks
from src.evals.language.likelihood import log_likelihoods
from src.evals.language.network import TextNetwork
from src.evals.language.text_model import TextModel
from src.interfaces import FieldSpec, Hidden
from src.models.heads.chunked_cross_entropy import nll_of_logits
from src.models.model import FieldParts, Network
from src.sequence.segment import Segment
from src.tools.perplexity import measure
from tests.helpers.oracle import CategoricalOracle
from tests.helpers.small import TEXT, WORDS, batch, net, network, text_field, tokens, view_of
from tests.helpers.tasks import nothing

BOS, SYMBOLS, LENGTH = 3, 3, 4
WHOLE = {"role": "noisy", "blocks": 0, "noisy_blocks": None}
BLOCKS = {"role": "copies", "blocks": 1, "noisy_blocks": 3}


# --------------------------------------------------------------------------- a known law


class Logits(nnx.Module):
    """A head whose outputs are the hidden states."""

    def nll(self, hidden, target, noise=()):
        return nll_of_logits(hidden, target)


@functools.cache
def law():
    """Probabilities of three tokens of three symbols, [3, 3, 3]."""
    process = Categorical(field=FieldSpec((3,), vocab=3))
    return CategoricalOracle(process, law=1).probabilities().reshape(3, 3, 3)


@jax.jit
def conditionals(noisy):
    """log p(x_i | the known tokens) of rows <s> x_1 x_2 x_3, [B, 4, 4]: the best network."""
    known = jax.nn.one_hot(noisy[:, 1:], SYMBOLS) + (noisy[:, 1:, None] >= SYMBOLS)
    joint = jnp.einsum("abc,ia,ib,ic->iabc", jnp.asarray(law(), jnp.float32), *jnp.moveaxis(known, 1, 0))
    each = jnp.stack([joint.sum((2, 3)), joint.sum((1, 3)), joint.sum((1, 2))], axis=1)
    each = each / each.sum(-1, keepdims=True)
    return jnp.pad(jnp.log(jnp.maximum(each, 1e-30)), ((0, 0), (1, 0), (0, 1)), constant_values=-60.0)


class Known(Network):
    """A network that knows the law."""

    def field(self, name):
        return dataclasses.replace(super().field(name), parts=FieldParts(head=Logits()))

    def hidden(self, views):
        return {task: Hidden(view, conditionals(view.noisy["text"]), {}) for task, view in views.items()}


def oracle():
    """The law's network, whose ids are three symbols and <s>."""
    spec = FieldSpec(vocab=4)
    field = dataclasses.replace(text_field(process=Categorical(field=spec), timed=False), spec=spec)
    small = net({"text": field}, {"text": TEXT})
    bind = lambda params, placement: Known(small.architecture, small.model)
    return TextNetwork(bind, field, {}, jnp.float32, LENGTH, 256)


def by_subsets(ids, block, given, nll):
    """The bound as the sum over all subsets of masked tokens: for each block, mean over k of L / k times the mean over
    the subsets of k tokens. `nll(masked)` gives -log p of each token."""
    total = 0.0
    for number in range(block.max() + 1):
        places = [i for i in range(given, len(ids)) if block[i] == number]
        for k in range(1, len(places) + 1):
            subsets = list(itertools.combinations(places, k))
            each = [nll(subset)[list(subset)].sum() for subset in subsets]
            total += np.mean(each) / k  # (1 / L) (L / k)
    return total


def test_the_bound_of_a_known_law_is_exact():
    """With the exact conditionals every order of the tokens gives -log p, so the bound is -log p itself."""
    model, elbo = oracle(), Elbo(WHOLE, draws=240, groups=4)
    texts = [(0, 1, 2), (2, 2, 0), (1, 0, 0)]
    pairs = [([BOS], list(text)) for text in texts]
    for (_, text), found in zip(pairs, elbo(model, pairs), strict=True):
        exact = -math.log(law()[tuple(text)])
        ids = np.array([BOS, *text])

        def nll(masked, ids=ids):
            noisy = np.where(np.isin(np.arange(4), masked), 4, ids)
            return np.asarray(nll_of_logits(conditionals(jnp.asarray(noisy[None])), jnp.asarray(ids[None])))[0]

        assert by_subsets(ids, np.zeros(4, int), 1, nll) == pytest.approx(exact, abs=1e-5)
        assert found.draws == 240 and 0 < found.error < 0.2
        assert abs(found.nats - exact) < 5 * found.error + 1e-3
    # what is given is no target: -log p(x_3 | x_1, x_2), without any error, since one token has one level
    found = elbo(model, [([BOS, 0, 1], [2])])[0]
    assert found.nats == pytest.approx(-math.log(law()[0, 1, 2] / law()[0, 1].sum()), abs=1e-5)
    assert found.error == pytest.approx(0, abs=1e-6)


# --------------------------------------------------------------------------- blocks of a small network


@functools.cache
def small():
    process = Categorical(field=WORDS)
    field = text_field(process=process, timed=False)
    architecture, params = network({"text": field}, {"text": TEXT})
    return TextNetwork(architecture.bind, field, params, jnp.float32, 12, 128)


def test_the_bound_of_blocks_is_the_sum_over_subsets():
    """Two tokens of a block are given; the last block has one token more than the continuation, which stays masked."""
    model, ids, given = small(), np.array([1, 5, 2, 7, 3, 9, 9, 4]), 2
    slots, size = 9, 3
    block = np.arange(slots) // size
    value = np.pad(ids, (0, slots - len(ids)))
    one = model.bind(model.params, None)

    @jax.jit
    def passed(noisy):
        view = view_of((Segment("text", slots, 1, "copies", size),), batch(text=tokens(value[None])))
        hidden = one.hidden({"": view.replace(noisy={"text": noisy[None]})})[""]
        return one.field("text").nll(hidden.of("text"), jnp.asarray(value[None]))[0]

    def nll(masked):
        unknown = np.isin(np.arange(slots), masked) | (np.arange(slots) >= len(ids))
        return np.asarray(passed(jnp.asarray(np.where(unknown, 13, value))))

    exact = by_subsets(ids, block, given, nll)
    found = Elbo(BLOCKS, draws=240, groups=8)(model, [(ids[:given].tolist(), ids[given:].tolist())])[0]
    assert found.error < 0.05 * exact and abs(found.nats - exact) < 4 * found.error


def test_blocks_of_one_token_are_exact_and_do_not_vary():
    """The mask is then that of next-token prediction with the token itself masked: a sum without choices."""
    model, options = small(), BLOCKS | {"noisy_blocks": 1}
    found = Elbo(options, draws=4, groups=2)(model, [([1, 5], [2, 7, 3])])[0]
    assert found.error == pytest.approx(0, abs=1e-5) and np.isfinite(found.nats)
    exact = -log_likelihoods(model, [([1, 5], [2, 7, 3])])[0][0]
    assert found.nats != pytest.approx(exact, abs=1e-3), "the two ways to write are two models"


def test_levels_are_spread_evenly():
    """Each group goes once through the levels of a block, whatever its shift."""
    block = np.repeat(np.arange(3), 4)
    target = np.arange(12) >= 2
    for _, group in itertools.groupby(
        enumerate(masks(block, target, 24, 2, np.random.default_rng(0))), lambda p: p[0] // 12
    ):
        drawn = [mask for _, (mask, _) in group]
        for number, count in ((0, 2), (1, 4), (2, 4)):
            levels = [int(mask[block == number].sum()) for mask in drawn]
            assert sorted(levels) == sorted(list(range(1, count + 1)) * (12 // count))
        assert not any(mask[:2].any() for mask in drawn)


def test_a_text_model_tells_bounds_with_their_uncertainty():
    """Long texts in windows; the errors of all bounds are kept."""
    chain = build_chain({"host": {"name": "text:Bytes"}}, "fields.text.codec", nothing)
    process = Categorical(field=chain.spec)
    field = dataclasses.replace(text_field(codec=chain, process=process, timed=False), spec=chain.spec)
    architecture, params = network({"text": field}, {"text": TEXT})
    rows = TextNetwork(architecture.bind, field, params, jnp.float32, 12, 16)
    model = TextModel(rows, elbo=Elbo(BLOCKS, draws=8, groups=2))
    assert model.uncertainty() == {}
    ids = model.encode_plain("seven is three plus four")
    ((total, count),) = model.whole([ids])
    assert count == len(ids) == 24 and total < -count, "a random network"
    told = model.uncertainty()
    assert told["bounds"] == 3 and told["draws"] == 8
    assert 0 < told["standard_error"] <= told["largest_standard_error"]
    assert total == pytest.approx(-sum(bound.nats for bound in model.bounds))
    report = measure(model, ["seven", "is"])
    assert report["bounds"] == 5 and report["perplexity"] > 1 and report["standard_error"] > 0
    (_, greedy), *_ = model.log_likelihoods([(ids[:3], ids[3:5])])
    assert not greedy, "which answer is the likeliest is not known"
    with pytest.raises(ValueError, match="told its time"):
        timed = dataclasses.replace(rows, field=dataclasses.replace(field, timed=True))
        TextModel(timed, elbo=model.elbo)


def test_what_has_no_bound_is_refused():
    model = small()
    timed = dataclasses.replace(model, field=dataclasses.replace(model.field, timed=True))
    mixed = dataclasses.replace(model.field, process=Categorical(field=WORDS, mask=0.5))
    elbo, pair = Elbo(BLOCKS, draws=4, groups=2), [([1], [2])]
    for wrong, told in ((timed, "told its time"), (dataclasses.replace(model, field=mixed), "only masks")):
        with pytest.raises(ValueError, match=told):
            elbo(wrong, pair)
    with pytest.raises(ValueError, match="pair 0 has 0 and 1 tokens"):
        elbo(model, [([], [1])])
    with pytest.raises(ValueError, match="two groups"):
        Elbo(BLOCKS, draws=5, groups=2)
    with pytest.raises(ValueError, match="role=copies or role=noisy"):
        Elbo({"role": "clean"})
