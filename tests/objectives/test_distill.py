"""What the teacher reads, which tokens are compared, and what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import Hidden, TokenField
from src.models.model import TEACHER, bind
from src.objectives.distill import Distill
from src.sequence.layout import Layout, Segment
from tests.models.test_lora import make
from tests.models.test_model import row

TAU = 2.0


@pytest.mark.faults
def test_the_teacher_reads_the_text_alone_and_tokens_with_a_loss_are_compared():
    """[p: 3 tokens] [time, image] [c: 3 tokens], one row with padding; against the dense formula over full passes."""
    layout, view = row("bidirectional", "TimeToken")
    graph, params = make()
    theirs = jax.tree.map(lambda a: a * 0.9, {name: params[name] for name in ("trunk", "text", "text_head")})
    loss = jnp.asarray([[0, 1, 1], [1, 1, 1]], bool)
    batch = {n: TokenField(view.inputs[n], view.valid[n], loss) for n in ("p", "c")}
    objective = Distill(("p", "c"), temperature=TAU)
    seen, aux = objective.prepare(view, batch, jax.random.key(0), True)
    assert seen is view and aux.inputs.keys() == {"p", "c"}
    words = Layout((Segment("p", "text", 3), Segment("c", "text", 3)))

    @jax.jit
    def both(params, theirs):
        net = bind(graph, params | {TEACHER: theirs})
        hidden = net.hidden({"t": (layout, view)})["t"]
        (kl,) = objective.loss(net, hidden, batch, aux).values()
        teacher = bind(graph, params | theirs)
        taught = teacher.hidden({"t": (words, aux)})["t"]
        laws = [
            {n: jax.nn.log_softmax(model.text_logits(h.before(n)[0]) / TAU) for n in ("p", "c")}
            for model, h in ((net, hidden), (teacher, taught))
        ]
        return kl, laws

    kl, (ours, said) = both(params, theirs)
    counted = {"p": np.array([[0, 1, 1], [0, 1, 0]]), "c": np.array([[0, 1, 0], [0, 1, 1]])}
    # Not the first token of a row, nor padding (the last of c in row 0, of p in row 1), nor what follows padding in the
    # teacher's row (the first of c in row 1, whose state before is padding there).
    expected = sum(TAU**2 * (np.exp(said[n]) * (said[n] - ours[n])).sum(-1)[counted[n] > 0].sum() for n in counted)
    np.testing.assert_allclose(kl.total, expected, rtol=1e-4)
    assert kl.count == 6 and expected > 0.01


@pytest.mark.faults
def test_no_gradient_reaches_the_teacher_and_without_one_it_is_said():
    layout, view = row("bidirectional", "TimeToken")
    graph, params = make()
    batch = {"c": TokenField(view.inputs["c"], view.valid["c"], jnp.ones((2, 3), bool))}
    objective = Distill(("c",))
    _, aux = objective.prepare(view, batch, jax.random.key(0), True)

    def loss(params):
        net = bind(graph, params)
        return objective.loss(net, net.hidden({"t": (layout, view)})["t"], batch, aux)["kl"].total

    grads = jax.jit(jax.grad(loss))(params | {TEACHER: {"text_head": params["text_head"]}})
    assert not np.any(grads[TEACHER]["text_head"]["linear"]["kernel"])
    assert np.any(grads["text_head"]["linear"]["kernel"])
    empty = Hidden(jnp.zeros((2, 11, 16)), jnp.ones((2, 11), bool), {}, layout)
    with pytest.raises(ValueError, match="these parameters bring no teacher"):
        objective.loss(bind(graph, params), empty, batch, aux)
    with pytest.raises(ValueError, match=r"distill has temperature=0.0; it must be above 0"):
        Distill(("c",), temperature=0.0)
