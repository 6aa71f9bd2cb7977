"""DiTAR's head and aggregation: what they read, and that sampling reads the same as training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from src.interfaces import Field, FieldSpec
from src.models.embedders.aggregate import AggregateEmbedder
from src.models.heads.local_transformer import LocalTransformerHead
from src.objectives.next_token import NextToken
from src.sampling.decoders.left_to_right import LeftToRight
from src.sampling.walk import Walk, fill, plan_of
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers.small import TEXT, batch, close, net, text_field, tokens, view_of

SPEC, WIDTH = FieldSpec((2, 2), features=6), 8
SIZES = {"parts": 3, "past": 2, "mlp_width": 8, "depth": 1, "heads": 2}


def random(cls, **options):
    """A module whose tensors are all random, so that nothing hides behind a zero."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(width=WIDTH, spec=SPEC, rngs=nnx.Rngs(0), **options)))
    draw = np.random.default_rng(7)
    fill = lambda a: jnp.asarray(0.25 * draw.normal(size=a.shape), jnp.float32)
    return nnx.merge(graph, jax.tree.map(fill, state))


def test_a_token_reads_its_own_state_and_the_past_tokens_before_it_all_parts_of_them():
    head, embed = random(LocalTransformerHead, outputs=6, **SIZES), random(AggregateEmbedder, parts=3, heads=2)
    draw = np.random.default_rng(0)
    hidden, target = (draw.normal(size=(1, 1, 4, size)).astype(np.float32) for size in (WIDTH, 6))
    moved = 3 * np.eye(24, dtype=np.float32).reshape(24, 1, 4, 6)  # each number of the tokens in turn
    hiddens = np.concatenate([hidden + np.eye(4, dtype=np.float32)[:, None, :, None], np.repeat(hidden, 25, axis=0)])
    targets = np.concatenate([np.repeat(target, 4, axis=0), target + moved, target])

    @jax.jit
    def values(hiddens, targets):
        draws = head.noise(jax.random.key(1), (1, 4))
        return jax.vmap(lambda h, x: head.nll(h, x, draws)[0])(hiddens, targets), embed(targets[4:, 0])

    losses, summaries = map(np.asarray, values(hiddens, targets))
    differs = np.abs(losses[:-1] - losses[-1]) > 0
    np.testing.assert_array_equal(differs[:4], np.eye(4, dtype=bool))
    source, token = np.arange(24)[:, None] // 6, np.arange(4)
    np.testing.assert_array_equal(differs[4:], (source <= token) & (token - source <= 2))
    np.testing.assert_array_equal(np.abs(summaries[:-1] - summaries[-1]).max(-1) > 0, source == token)


@pytest.mark.faults
def test_the_walk_gives_the_tokens_that_training_reads():
    """Without noise (tau = 0) a token is a function of its state and of the tokens before: those of training."""
    head = {"name": "local_transformer", "tau": 0.0, "steps": 3, "drop": 0.1, "guidance": 1.5, "init": 0.5} | SIZES
    groups = {"text": TEXT, "patch": {"embed": {"name": "aggregate", "parts": 3}, "head": head}}
    model = net({"text": text_field(), "patch": Field("patch", SPEC, None)}, groups)
    layout = (Segment("text", 2), Segment("patch", 4))
    rows = batch(text=tokens(np.array([[1, 5], [3, 2]])), patch=tokens(np.zeros((2, 4, 6), np.float32), target=True))

    @jax.jit
    def sample():
        view = view_of(layout, rows)
        walk = Walk.begin(model, view, plan_of(FixedLayout(layout), rows))
        return fill(walk, jax.random.key(0), {"patch": LeftToRight()})["patch"]

    out = sample()

    @jax.jit
    def again(out):
        view = view_of(layout, rows.replace(tokens=rows.tokens | {"patch": rows.tokens["patch"].replace(value=out)}))
        states, _ = model.hidden({"": view})[""].before("patch")
        past = [jnp.stack([out[:, i - k] if i >= k else 0 * out[:, 0] for k in (2, 1)], axis=1) for i in range(4)]
        guide = lambda output, t: output
        found = [model.field("patch").sample(jax.random.key(9), states[:, i], guide, guide, past[i]) for i in range(4)]
        return jnp.stack(found, axis=1)

    close(out, again(out), 1e-4)
    assert np.abs(np.diff(np.asarray(out), axis=1)).max() > 0.1


def test_rows_of_several_examples_are_refused():
    """The first token of an example would read the last ones of the example before it."""
    head = {"name": "local_transformer"} | SIZES
    groups = {"text": TEXT, "patch": {"embed": {"name": "aggregate", "parts": 3}, "head": head}}

    def loss(examples):
        model = net({"text": text_field(), "patch": Field("patch", SPEC, None)}, groups)
        place = np.tile(np.stack(np.unravel_index(np.arange(4), SPEC.grid), -1), (2, examples, 1))
        rows = tokens(np.zeros((2, 4 * examples, 6), np.float32), target=True, place=place)
        hidden = model.hidden({"": view_of((Segment("patch", 4 * examples),), batch(patch=rows))})[""]
        draws = {"patch": model.field("patch").noise(jax.random.key(0), (2, 4 * examples))}
        return NextToken("patch").loss(model, hidden, draws)["nll"].count

    assert jax.eval_shape(lambda: loss(1)).shape == ()
    with pytest.raises(
        ValueError, match="the 8 tokens in a row are of several examples: take the head token_diffusion"
    ):
        jax.eval_shape(lambda: loss(2))


@pytest.mark.parametrize(
    "cls, options, match",
    [
        (LocalTransformerHead, {"parts": 4}, r"head\.parts=4 must divide the 6"),
        (LocalTransformerHead, {"past": 0}, r"head\.past=0"),
        (LocalTransformerHead, {"heads": 3}, "no 3 heads"),
        (AggregateEmbedder, {"parts": 5}, r"embed\.parts=5"),
    ],
)
def test_refusals(cls, options, match):
    options = (SIZES | {"outputs": 6} if cls is LocalTransformerHead else {}) | options
    with pytest.raises(ValueError, match=match):
        random(cls, **options)
