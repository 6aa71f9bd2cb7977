"""What the teacher reads, which tokens are compared, and what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import Hidden
from src.models.model import TEACHER, bind
from src.objectives.distill import Distill
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers.models import make, row

TAU, NAMES = 2.0, ("text.p", "text.c")


def targets(view, **flags):
    """The view with the targets of some texts."""
    tokens = dict(view.batch.tokens)
    for name, target in flags.items():
        tokens[f"text.{name}"] = tokens[f"text.{name}"].replace(target=jnp.asarray(target, bool))
    return view.replace(batch=view.batch.replace(tokens=tokens))


@pytest.mark.faults
def test_the_teacher_reads_the_text_alone_and_targets_are_compared():
    """[p: 3 tokens] [time, image] [c: 3 tokens], one row with padding; against the dense formula over full passes."""
    loss = [[0, 1, 1], [1, 1, 1]]
    view = targets(row("bidirectional", "TimeToken"), p=loss, c=loss)
    architecture, params = make()
    text = params["fields"]["text"]
    theirs = jax.tree.map(lambda a: a * 0.9, {"trunk": params["trunk"], "fields": {"text": text}})
    objective = Distill(NAMES, temperature=TAU)
    seen, aux = objective.prepare(bind(architecture, params), view, ())
    assert seen is view and aux.batch.tokens.keys() == set(NAMES)
    assert aux.layout == FixedLayout((Segment("text.p", 3), Segment("text.c", 3)))

    @jax.jit
    def both(params, theirs):
        net = bind(architecture, params | {TEACHER: theirs})
        hidden = net.hidden({"t": view})["t"]
        (kl,) = objective.loss(net, hidden, aux).values()
        teacher = bind(architecture, params | {"trunk": theirs["trunk"], "fields": params["fields"] | theirs["fields"]})
        taught = teacher.hidden({"t": aux})["t"]
        laws = [
            {n: jax.nn.log_softmax(model.field(n)(h.before(n)[0]) / TAU) for n in NAMES}
            for model, h in ((net, hidden), (teacher, taught))
        ]
        return kl, laws

    kl, (ours, said) = both(params, theirs)
    counted = {"text.p": np.array([[0, 1, 1], [0, 1, 0]]), "text.c": np.array([[0, 1, 0], [1, 1, 1]])}
    # Not the first token of a row, nor padding (the last of c in row 0, of p in row 1).
    expected = sum(TAU**2 * (np.exp(said[n]) * (said[n] - ours[n])).sum(-1)[counted[n] > 0].sum() for n in counted)
    np.testing.assert_allclose(kl.total, expected, rtol=1e-4)
    assert kl.count == 7 and expected > 0.01


@pytest.mark.faults
def test_no_gradient_reaches_the_teacher_and_without_one_it_is_said():
    view = row("bidirectional", "TimeToken")
    architecture, params = make()
    objective = Distill(("text.c",))
    _, aux = objective.prepare(bind(architecture, params), view, ())

    def loss(params):
        net = bind(architecture, params)
        return objective.loss(net, net.hidden({"t": view})["t"], aux)["kl"].total

    head = {"fields": {"text": {"head": params["fields"]["text"]["head"]}}}
    grads = jax.jit(jax.grad(loss))(params | {TEACHER: head})
    kernel = lambda tree: tree["fields"]["text"]["head"]["linear"]["kernel"]
    assert not np.any(kernel(grads[TEACHER])) and np.any(kernel(grads))
    empty = Hidden(view, jnp.zeros((2, 11, 16)), {})
    with pytest.raises(ValueError, match="no teacher parameters were kept"):
        objective.loss(bind(architecture, params), empty, aux)
    with pytest.raises(ValueError, match=r"temperature=0.0; it must be above 0"):
        Distill(("text.c",), temperature=0.0)
