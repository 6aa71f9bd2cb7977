"""With model.dtype=bfloat16, what must stay f32 does: read off the traced step, nothing is compiled."""

import jax
import jax.numpy as jnp

from configs import digits
from src.build import build_system
from src.common.tree import flatten
from src.train.step import make_train_step
from src.train.trainer import make_trainer

# Of squares, sums and logarithms; exp is looked at where its input is as large as attention's logits.
DELICATE = ("rsqrt", "sqrt", "log", "log1p", "reduce_max", "argmax", "cumsum", "cumlogsumexp")


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):  # closed programs are leaves
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_states_norms_softmax_and_losses_stay_f32():
    config = digits.get_config("debug")
    with config.unlocked():
        config.eval.evaluators, config.model.dtype, config.mesh.data = {}, "bfloat16", 1
    trainer = make_trainer(build_system(config), jax.devices()[:1])
    step = make_train_step(trainer.system, trainer.optimizer, config, trainer.placement)
    closed, (state, measured) = jax.make_jaxpr(step, return_shape=True)(trainer.abstract, trainer.system.spec())
    kept = {leaf.dtype.name for leaf in jax.tree.leaves((state, trainer.abstract, measured))}
    assert kept == {"float32", "int32", "uint32"}

    def reads(equation, ndim=0):
        shaped = [v.aval for v in equation.invars if getattr(v.aval, "ndim", -1) >= ndim]
        return {a.dtype for a in shaped if a.dtype in (jnp.bfloat16, jnp.float32)}

    found = list(equations(closed.jaxpr))
    products = [e for e in found if e.primitive.name == "dot_general"]
    narrow = [e for e in products if reads(e) == {jnp.dtype("bfloat16")}]
    assert len(narrow) > len(products) * 3 / 4, "the computation is not in bfloat16"
    delicate = [e for e in found if e.primitive.name in DELICATE or (e.primitive.name == "exp" and reads(e, 4))]
    assert {e.primitive.name for e in delicate} >= {"rsqrt", "exp", "log", "reduce_max"}
    assert not [str(e) for e in delicate if jnp.dtype("bfloat16") in reads(e)]
    # Logits of attention, of the vocabulary and the prediction of patches come out of their products in f32.
    wide = [e.outvars[0].aval.shape for e in narrow if e.outvars[0].aval.dtype == jnp.float32]
    system = trainer.system
    row, vocab, patch = 26, system.fields["text"].spec.vocab, system.fields["image"].spec.features
    assert {vocab, patch} <= {shape[-1] for shape in wide}
    assert any(shape.count(row) == 2 for shape in wide), "scores of attention, whatever the order of their axes"
    # The cast weights of a layer are not kept until its backward pass.
    stacks = {leaf.shape for path, leaf in flatten(state.params).items() if path.startswith("trunk/layers")}
    made = [v.aval for e in found if e.primitive.name == "scan" for v in e.outvars]
    assert made and not [a for a in made if a.dtype == jnp.bfloat16 and a.shape in stacks]
