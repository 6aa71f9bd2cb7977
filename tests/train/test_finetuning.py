"""Fine-tuning switches in the train step: what is frozen stays, adapters, copies and a teacher on any mesh."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from configs import common
from src.build import build_system
from src.common.runtime.writers import Many
from src.common.tree import flatten, joined
from src.models import lora
from src.models import mixture_of_transformers as mot
from src.models.pretrained.llama_weights import HEAD, TABLE
from src.tools import convert
from src.train import loop
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.state import first_state
from src.train.system import draw, losses
from src.train.trainer import make_trainer, open_data
from tests.helpers.runs import Recorder, close, config_of
from tests.helpers.weights import config_from, with_checkpoint

ALL = {
    "model.lora.rank": 2,
    "model.trunk.mot": ("mlp_norm", "mlp"),
    "optim.lr_multipliers": (("^fields/text/embed/", 0.0), ("lora_b$", 4.0), (".*", 1.0)),
    "optim.weight_decay": 0.1,
    "optim.decays": (("norm|bias|scale", 0.0),),
    "fields.text.head.chunk": 90,
}
KL = "number_sentences/keep/kl"


def config_with(steps=2, **changes):
    """The digits' debug system with a teacher of its sentences, and these changes."""
    config = config_of(**{"model.trunk.kv_heads": 2, "fields.text.codec.vocab_size": 200} | changes)
    with config.unlocked():
        del config.tasks["image_to_caption"]
        config.batch, config.steps, config.optim.schedule = 32, steps, "constant"
        config.tasks.number_sentences.objectives.keep = common.distill("text.sentence", temperature=2.0)
    return config


def train(devices=1, **changes):
    """(state before, state after, what each step measured), on the host."""
    config = config_with(**changes)
    trainer = make_trainer(build_system(config), jax.devices()[:devices])
    state, step, data = trainer.init(), trainer.compile(), open_data(trainer)
    before, measured = jax.device_get(state), []
    with jax.set_mesh(trainer.mesh):
        for number in range(config.steps):
            state, found = step(state, trainer.place(next(data), number))
            measured.append(jax.device_get(found))
    data.close()
    return before, jax.device_get(state), measured


@pytest.mark.faults
def test_all_switches_together_train_what_they_should_and_nothing_else():
    before, after, (first, second) = train(**ALL)
    params, rule = flatten(before.params), lora.FROZEN
    frozen = {path for path in params if path.startswith("fields/text/embed/") or re.search(rule, path)}
    adapters = {path for path in params if lora.is_adapter(path)}
    copied = {path for path in params if mot.is_copy(path)}
    assert len(adapters) == 14 and len(copied) == 4 and frozen > {"trunk/final_norm/scale", TABLE}
    # No moments, no gradient, no drift, no weight decay.
    moments = [path for path in flatten(after.opt_state) if "/mu/" in path]
    assert {path.split("/mu/")[1] for path in moments} == params.keys() - frozen == first.squares["grad"].keys()
    for path, start in params.items():
        for tree in (after.params, after.ema):
            assert np.array_equal(flatten(tree)[path], start) == (path in frozen), path
    # The teacher is the start of what is trained and text passes through; the first step finds no difference to it.
    taught = flatten(before.extra["teacher"])
    assert taught.keys() == adapters | {HEAD}
    jax.tree.map(np.testing.assert_array_equal, taught, flatten(after.extra["teacher"]))
    jax.tree.map(np.testing.assert_array_equal, taught, {path: params[path] for path in taught})
    assert first.terms[KL].total == 0 and second.terms[KL].total > 0
    assert first.terms[KL].count == second.terms[KL].count == first.terms["number_sentences/text/nll"].count


@pytest.mark.faults
@pytest.mark.parametrize("switch", [{"model.lora.rank": 2}, {"model.trunk.mot": mot.PARTS}, ALL], ids=str)
def test_the_first_step_is_that_of_the_plain_run(switch):
    """Losses, and the gradients of what is neither adapted nor copied."""
    plain, changed = (train(steps=1, **c)[2][0] for c in ({}, switch))
    mean = lambda measured, name: measured.terms[name].total / np.maximum(measured.terms[name].count, 1)
    for name in plain.terms:
        if "norm" not in name:
            np.testing.assert_allclose(mean(changed, name), mean(plain, name), rtol=1e-5, atol=1e-6, err_msg=name)
    for path in ("fields/image/embed/linear/kernel", "time/first/kernel", HEAD):
        np.testing.assert_allclose(changed.squares["grad"][path], plain.squares["grad"][path], rtol=1e-4, err_msg=path)


@pytest.mark.faults
@pytest.mark.parametrize(
    "mesh, more",
    [((1, 2, 2, 2), {}), ((2, 2, 2, 1), {"accumulate": 2, "model.trunk.remat": "dots"})],
    ids=str,
)
def test_on_a_mesh_all_switches_do_what_they_do_on_one_device(mesh, more):
    changes = ALL | {"sharding.min_size": 1}
    sizes = {f"mesh.{axis}": n for axis, n in zip(("data", "fsdp", "tensor", "context"), mesh, strict=True)}
    _, alone, expected = train(steps=3, **changes)
    _, state, found = train(8, steps=3, **changes | sizes | more)
    pick = lambda measured: [{k: v.total for k, v in m.terms.items() if k != "update_norm"} for m in measured]
    close(pick(found), pick(expected), rtol=2e-4, atol=1e-5)
    close((state.params, state.ema, state.extra["teacher"]), (alone.params, alone.ema, alone.extra["teacher"]),
          rtol=0, atol=2e-4)  # fmt: skip


@pytest.mark.faults
def test_a_resumed_run_has_the_teacher_of_the_first(tmp_path):
    """Bit for bit; the teacher comes from the checkpoint, not from what the parameters are by then."""

    def run(folder, last=None):
        system = build_system(config_with(steps=6, **ALL | {"checkpoint.every": 3}))
        checkpoints, recorder = Checkpointer(str(folder), every=3), Recorder(last)
        with contextlib.closing(checkpoints), contextlib.suppress(KeyboardInterrupt):
            return jax.device_get(
                loop.train(make_trainer(system, jax.devices()[:1]), checkpoints, Many([recorder]), 0.0)[0]
            )

    straight = run(tmp_path / "straight")
    assert run(tmp_path / "cut", last=4) is None
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "cut"), straight)


@pytest.mark.faults
def test_merged_parameters_give_the_losses_of_the_adapted_run():
    """After some steps, on the plain system without adapters."""
    _, state, _ = train(steps=3, **{"model.lora.rank": 2})
    adapted, plain = (build_system(config_with(**{"model.lora.rank": rank})) for rank in (2, 0))
    batch = jax.tree.map(jnp.asarray, {name: plan.task.fake(plan.rows, 0) for name, plan in plain.tasks.items()})
    merged = lora.merge(state.params, 16.0)
    assert flatten(merged).keys() == flatten(jax.eval_shape(plain.init, jax.random.key(0))).keys()

    def terms(system, params):
        shown = joined(params, {"teacher": params})
        found = losses(system, shown, draw(system, batch, jax.random.key(0)))
        return {name: term.total for name, term in found.items()}

    found = jax.jit(lambda p, q: (terms(adapted, p), terms(plain, q)))(state.params, merged)
    close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.faults
def test_a_run_with_adapters_is_published_merged(tmp_path, capsys):
    config = config_from("").unlock()
    config.model.lora.update({"rank": 2, "alpha": 6.0})
    trainer = make_trainer(build_system(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), trainer.abstract.params)
    state = first_state(params, optax.identity(), 0).replace(step=jnp.int32(3))
    with_checkpoint(tmp_path / "run", trainer, state)
    flags = [f"--source={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--image_size=256"]
    assert convert.main(["convert", *flags]) == 0, capsys.readouterr()
    found, merged = load_file(tmp_path / "out" / "model.safetensors"), flatten(lora.merge(params, 6.0))
    for name, path in (("self_attn.q_proj", "attention/q"), ("mlp.down_proj", "mlp/down")):
        want = merged[f"trunk/layers/{path}/kernel"][1].T
        np.testing.assert_allclose(found[f"model.layers.1.{name}.weight"], want, rtol=1e-5, atol=1e-5)
        assert np.abs(want - params["trunk"]["layers"][path.split("/")[0]][path.split("/")[1]]["kernel"][1].T).max() > 1
    assert not [name for name in found if "lora" in name]


def test_a_distillation_that_holds_nothing_is_refused():
    def build(**changes):
        make_trainer(build_system(config_with(**changes)), jax.devices()[:1])

    with pytest.raises(ValueError, match="all that its fields use is frozen"):
        build(**{"optim.lr_multipliers": (("^(trunk|fields/text)/", 0.0), (".*", 1.0))})
    with pytest.raises(ValueError, match=r"teacher\.dtype='half' is unknown; use one of float32, bfloat16"):
        build(**{"teacher.dtype": "half"})
