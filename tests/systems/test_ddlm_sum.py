"""DDLM-Sum: the summaries and their judge, masks that depend on the word, and what the order of words is worth."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ddlm_sum
from src.build import build_system
from src.codecs.text import SentencePiece
from src.common.tree import count_parameters
from src.corruption.by_id import ById
from src.corruption.categorical import Categorical
from src.data.sources.summaries import ANIMALS, Summaries, summary
from src.interfaces import FieldSpec
from src.sampling.steps.ancestral import Ancestral
from tests.helpers.oracle import CategoricalOracle, total_variation

IDS = FieldSpec((3,), vocab=3)
V = 4


def test_summaries_are_judged():
    source = Summaries()
    example = source[7]
    first, second, third = example["answers"]
    assert example["text"] == f"{example['prompt']} {second}" and len({first, second, third}) == 3
    assert source.judged(example, f" {third}") == {"right": 1, "form": 1, "rouge_1": 1}
    animal, verb, _, place = third.split()
    for mixed in (f"{animal} {verb} in {first.split()[3]}", f"{first.split()[0]} {verb} in {place}"):
        found = source.judged(example, mixed)
        assert found["right"] == 0 and found["form"] == 1 and found["rouge_1"] >= 0.5, mixed
    absent = next(n for n in range(16) if ANIMALS[n] not in example["prompt"])
    assert source.judged(example, summary(absent))["right"] == 0
    assert source.judged(example, "") == {"right": 0, "form": 0, "rouge_1": 0}


def test_rare_words_are_important(tmp_path):
    """The numbers of the config are the idf of the words of summaries, as shares of the largest, to 0.15."""
    source = Summaries()
    group = ddlm_sum.get_config().fields.text
    codec = SentencePiece(vocab_size=group.codec.vocab_size, folder=tmp_path).fit(source.texts())
    process = ById(field=FieldSpec(vocab=codec.vocab_size), importance=group.process.importance)
    texts = [source[number]["answers"][number % 3] for number in range(1000)]
    found = collections.Counter(i for text in texts for i in set(codec.encode(text)))
    assert len(found) == 1 + 4 + 8 + 16  # a word is one id
    idf = {i: math.log(len(texts) / count) / math.log(16) for i, count in found.items()}
    assert max(abs(idf[i] - process.weights[i]) for i in idf) < 0.15
    assert process.weights[codec.eos] == 0


def test_without_importance_it_is_absorbing():
    field = FieldSpec((5,), vocab=V)
    plain, ours = Categorical(field=field), ById(field=field, importance=())
    x0 = jnp.arange(10).reshape(2, 5) % V
    noise, t, s = plain.noise(jax.random.key(0), (2, 5)), jnp.float32([[0.9], [0.4]]), jnp.float32([[0.3], [0.0]])
    p = jax.nn.softmax(jax.random.normal(jax.random.key(1), (2, 5, V)))
    each = lambda kernel: (kernel.corrupt(x0, noise, t).xt, kernel.reverse(jnp.full((2, 5), V), p, t, s))
    (one, first), (two, second) = jax.jit(lambda: [each(plain), each(ours)])()
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_words_are_masked_as_the_formula_says():
    """The share of masks of each id, and q(x_s | x_0) = E q(x_s | x_t, x_0) over x_t ~ q(x_t | x_0)."""
    a = np.array([0.0, 0.3, 0.8, 1.0])
    process, rows = ById(field=FieldSpec((V,), vocab=V), importance=tuple(a.tolist())), 20_000
    x0 = jnp.broadcast_to(jnp.arange(V), (rows, V))

    @jax.jit
    def run(t, s):
        xt = process.corrupt(x0, process.noise(jax.random.key(0), x0.shape), t).xt
        once, each = jax.nn.one_hot(x0[:1], V), jnp.arange(V)[None]
        masked = process.reverse(jnp.full((1, V), V), once, t, s)
        known = process.reverse(each, once, t, s)
        q = process.likelihood(jnp.full((1, V), V), jnp.broadcast_to(t, (1, V)))[0, jnp.arange(V), jnp.arange(V)]
        return (xt == V).mean(0), q, (masked * q[:, None] + known * (1 - q[:, None]))[0, :, V]

    for t, s in [(0.9, 0.6), (0.6, 0.2), (0.3, 0.0)]:
        share, q, later = run(t, s)
        np.testing.assert_allclose(q, np.clip(t - (1 - t) * a, 0, 1), atol=1e-6)
        np.testing.assert_allclose(share, q, atol=0.012)
        np.testing.assert_allclose(later, np.clip(s - (1 - s) * a, 0, 1), atol=1e-6)


def right_of_a_perfect_network(importance, steps):
    """The share of right summaries where the words of three animals share none: one is right if all words agree that
    are drawn in the first step that draws any, each of them evenly."""
    process, right, left = ById(field=IDS, importance=importance), 0.0, 1.0
    times = np.linspace(1, 0, steps + 1)
    for t, s in itertools.pairwise(times):
        before, after = (np.asarray(process.keeps(jnp.float32(time)), np.float64) for time in (t, s))
        shown = (after - before) / np.maximum(1 - before, 1e-9)
        for drawn in itertools.product((False, True), repeat=3):
            chance = np.where(drawn, shown, 1 - shown).prod()
            right += left * chance * (any(drawn) and (1 / 3) ** (sum(drawn) - 1))
        left *= (1 - shown).prod()
    return right


def test_what_order_is_worth_with_a_perfect_network():
    """The important words are drawn in less time, so that more of them are drawn together: fewer are right."""
    rare_last, plain = (
        [right_of_a_perfect_network(a, steps) for steps in (1, 2, 4, 8, 16)] for a in [(1, 0.5, 0.75), ()]
    )
    np.testing.assert_allclose(rare_last, [0.111, 0.208, 0.586, 0.788, 0.893], atol=6e-4)
    np.testing.assert_allclose(plain, [0.111, 0.528, 0.757, 0.877, 0.938], atol=6e-4)


def exact_two_steps(oracle):
    """The law of the samples of two steps, by all states at s = 1/2."""
    process, states = oracle.process, oracle.states()
    patterns = jnp.array(list(itertools.product(range(4), repeat=3)))  # 3 is the mask
    prior = jnp.full((1, 3), 3)
    first = process.reverse(prior, jnp.exp(oracle.estimate(prior, 1.0)), 1.0, 0.5)[0]  # [token, id]
    chance = jnp.take_along_axis(first[None], patterns[..., None], -1)[..., 0].prod(-1)
    p = jnp.exp(oracle.estimate(patterns, 0.5))
    last = p[:, np.arange(3), states].prod(-1)  # [pattern, state]
    return np.asarray((chance[:, None] * last).sum(0))


@pytest.mark.faults
def test_the_order_of_words_changes_the_error():
    """Two steps, with the exact posterior for the network: each order has its own error, which can be computed."""
    errors = {}
    for importance in [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), ()]:
        oracle = CategoricalOracle(ById(field=IDS, importance=importance), law=1)
        exact = 0.5 * np.abs(exact_two_steps(oracle) - oracle.probabilities()).sum()
        errors[importance] = exact
        assert abs(exact - total_variation(oracle, Ancestral(), 2)) < 0.02, importance
    low, *_, high = sorted(errors.values())
    assert high - low > 0.03, errors


def test_what_it_refuses():
    for words, options in [
        ("own schedule", {"masks": 2}),
        ("'idf' is unknown", {"importance": "idf"}),
        (r"shape \(4,\); give up to 3", {"importance": (0, 0, 0, 0)}),
        (r"shape \(1,\)", {"importance": (1.5,)}),
    ]:
        with pytest.raises(ValueError, match=words):
            ById(field=IDS, **options)
    with pytest.raises(ValueError, match="posterior_kl"):
        ById(field=IDS).rate(0.5)
    assert ById(field=IDS).weights.tolist() == pytest.approx([0, math.log(2) / math.log(3), 1])


def test_published_sizes_build():
    system = build_system(ddlm_sum.get_config("cnndm"))
    assert count_parameters(jax.eval_shape(system.init, jax.random.key(0))) > 130_000_000
