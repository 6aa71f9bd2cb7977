"""Every check finds what is planted, and is silent on healthy runs."""

import dataclasses
import importlib
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import sit_digits
from src.build import build_system
from src.common.mesh.distributed import put_batch
from src.common.tree import flatten, unflatten
from src.doctor import batch_checks as checks
from src.doctor import dry_run, run_checks
from src.doctor.callback import Doctor
from src.doctor.context import CheckContext, check_context
from src.doctor.report import diagnose
from src.interfaces import LossTerm
from src.sequence.layout import FixedLayout
from src.train.trainer import make_trainer, open_data
from tests.helpers.runs import config_of


def trainer_of(config, devices=1):
    return make_trainer(build_system(config), jax.devices()[:devices])


def first_batch(trainer):
    rows = open_data(trainer)
    batch = next(rows)
    rows.close()
    return batch


@pytest.fixture(scope="module")
def context():
    """A healthy system with its first batch, on the host; nothing is compiled."""
    trainer = trainer_of(config_of())
    return check_context(trainer, first_batch(trainer))


def told(found, *severities):
    return [str(f) for f in found if f.severity in (severities or ("error", "warning"))]


def planted(context, task, name, **changes):
    """The context with other arrays in the tokens of a name: a function of the old array each."""
    return check_context(context.trainer, with_tokens(context.batch, task, name, **changes))


def with_tokens(batch, task, name, **changes):
    old = batch[task].tokens[name]
    new = old.replace(**{k: f(np.array(getattr(old, k))) for k, f in changes.items()})
    return {**batch, task: batch[task].replace(tokens=batch[task].tokens | {name: new})}


def with_plan(context, task, **changes):
    plans = dict(context.system.tasks) | {task: dataclasses.replace(context.system.tasks[task], **changes)}
    system = dataclasses.replace(context.system, tasks=plans)
    return dataclasses.replace(context, trainer=dataclasses.replace(context.trainer, system=system))


def put(array, where, value):
    array[where] = value
    return array


def test_what_is_healthy_is_left_alone(context):
    for check in (run_checks.frozen, run_checks.unsharded, run_checks.few_rows, checks.spec, *run_checks.BATCH_CHECKS):
        assert told(check(context)) == [], check.__name__
    assert told(checks.unpredicted_names(context), "note")[0] == (
        "note: task caption_to_image reads text.prompt, text.tail and predicts image"
    )
    assert checks.padding(context) == []


def late(marked):
    """Loss on the padding that comes right after a token."""
    return np.logical_or(marked, np.pad(marked, [(0, 0), (1, 0)])[:, :-1])


FIRST, HOLE = np.s_[0, 1], np.s_[:4, 2]
SAID, DRAWN = ("number_sentences", "text.sentence"), ("caption_to_image", "image")
FAULTS = {
    "ids above the vocabulary": (checks.values, SAID, {"value": lambda a: put(a, FIRST, 999)}, "ids .* 999, but the"),
    "ids below it": (checks.values, SAID, {"value": lambda a: put(a, FIRST, -1)}, "run from -1 to"),
    "NaN in an image": (checks.values, DRAWN, {"value": lambda a: put(a, (3, 0), np.nan)}, r"1 of 32 rows \(3\)"),
    "bytes": (checks.values, DRAWN, {"value": lambda a: (a + 1) * 127.5}, "^warning: .* from 0 to 255.*fields.image"),
    "halves": (checks.values, DRAWN, {"value": lambda a: (a + 1) / 2}, "^warning: .* none below 0.*fields.image.codec"),
    "blank images": (checks.values, DRAWN, {"value": np.zeros_like}, "^warning: .* deviation 0, and the noise"),
    "padding as target": (checks.targets, SAID, {"target": late}, "^warning: .* are targets, but are padding"),
    "no objective": (
        checks.targets, ("image_to_caption", "text.head"), {"target": np.ones_like},
        "48 tokens in text.head .* 'text.head' .*tasks.image_to_caption.objectives",
    ),
    "no target": (checks.targets, SAID, {"target": np.zeros_like}, "objective text has the name text.sentence"),
    "no image as target": (checks.targets, DRAWN, {"target": np.zeros_like}, "objective diffusion has the name image"),
    "the first token": (checks.targets, SAID, {"target": lambda a: put(a, np.s_[:, 0], True)}, "^warning: 32 .* first"),
    "after padding": (
        checks.targets, SAID,
        {"valid": lambda a: put(a, HOLE, False), "target": lambda a: put(a, HOLE, False)}, "^warning: 4 .* padding",
    ),
    "an empty row": (checks.empty_attention, SAID, {"valid": lambda a: put(a, 5, False)}, "1 of 32 .* have no token"),
    "much padding": (checks.padding, SAID, {"valid": lambda a: put(a, np.s_[:, 2:], False)}, "^note: 80% of task"),
    "a dtype": (checks.spec, SAID, {"target": lambda a: a.astype(np.float32)}, "^error: .* float32 .* declares bool"),
    "a shape": (checks.spec, DRAWN, {"value": lambda a: a[:, :4]}, r"^error: .*\(32, 4, 8, 1\) as image/value, "),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_data_is_found(context, fault):
    check, (task, field), changes, match = FAULTS[fault]
    found = [str(f) for f in check(planted(context, task, field, **changes))]
    assert len(found) == 1 and task in found[0] and re.search(match, found[0]), found


def test_an_image_that_is_not_there_may_hold_anything(context):
    spoilt = {"value": lambda a: put(a, 3, np.nan)} | dict.fromkeys(("valid", "target"), lambda a: put(a, 3, False))
    assert [f for check in run_checks.BATCH_CHECKS for f in told(check(planted(context, *DRAWN, **spoilt)))] == []


def test_a_missing_field_and_a_wrong_label(context):
    task = context.batch["image_to_caption"]
    tokens = {name: each for name, each in task.tokens.items() if name != "text.head"}
    found = told(
        checks.spec(check_context(context.trainer, {**context.batch, "image_to_caption": task.replace(tokens=tokens)}))
    )
    assert len(found) == 3 and "error: task image_to_caption delivers nothing as text.head/" in found[0]
    trainer = trainer_of(config_of(sit_digits))
    batch = first_batch(trainer)
    assert checks.values(check_context(trainer, batch)) == []
    labels = {"label": put(np.array(batch["label_to_image"].cond["label"]), 2, 11)}
    batch = {"label_to_image": batch["label_to_image"].replace(cond=labels)}
    (found,) = told(checks.values(check_context(trainer, batch)), "error")
    assert re.search(r"labels in label of task label_to_image .* to 11, .* 0 to 10 \(rows 2 ", found)


def test_a_mask_with_an_empty_row_is_found(context):
    class Late(FixedLayout):
        """A token becomes readable one place too late, so that the first one sees nothing."""

        def static_orders(self):
            read, write, group = super().static_orders()
            return read, write + 1, group

    layout = Late(context.system.tasks["number_sentences"].layout.segments)
    (found,) = told(checks.empty_attention(with_plan(context, "number_sentences", layout=layout)))
    assert re.search("^error: 1 tokens of a row of task number_sentences .in text.sentence. may see no token", found)


def test_a_task_of_few_rows_a_frozen_parameter_and_a_whole_one_are_found(context):
    plan = context.system.tasks["image_to_caption"]
    heavy = {label: (objective, 40.0) for label, (objective, _) in plan.objectives.items()}
    (found,) = told(run_checks.few_rows(with_plan(context, "image_to_caption", objectives=heavy, rows=6)))
    assert re.search(r"^warning: task image_to_caption has too few rows: 6 row\(s\), 8.6% .* 95%", found)
    trainer = trainer_of(config_of(**{"optim.lr_multipliers": (("^fields/text/head/", 0.0), (".*", 1.0))}))
    (found,) = told(run_checks.frozen(dataclasses.replace(context, trainer=trainer)), "note")
    assert "freezes 1 tensors: fields/text/head/linear/kernel" in found
    split = {"mesh.fsdp": 8, "sharding.min_size": 64}
    trainer = trainer_of(config_of(**split), 8)
    assert run_checks.unsharded(dataclasses.replace(context, trainer=trainer)) == []
    trainer = trainer_of(config_of(**split | {"model.trunk.width": 36}), 8)
    (found,) = told(run_checks.unsharded(dataclasses.replace(context, trainer=trainer)))
    assert re.search("^warning: no axis .* splits .*trunk/layers/attention/out/kernel.* mesh.fsdp=8 div", found)


# --------------------------------------------------------------------------- with steps


@pytest.fixture(scope="module")
def official():
    """MonoFormer as published, with one trunk pass, compiled: (trainer, step, batch)."""
    config = config_of(variant="official,debug")
    with config.unlocked():
        del config.tasks.number_sentences
    trainer = trainer_of(config)
    return trainer, trainer.compile(), put_batch(first_batch(trainer), trainer.mesh)


def check_run(trainer, update, batch, state=None):
    with jax.set_mesh(trainer.mesh):
        return run_checks.check_run(trainer, update, trainer.init() if state is None else state, batch)


@pytest.mark.faults
def test_the_official_time_token_is_found_and_the_state_is_as_new(official):
    trainer = official[0]
    fresh = jax.device_get(trainer.init())
    state, found = check_run(*official)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), fresh)
    (dead,) = told(found)
    assert dead.startswith("warning: no objective trains 3 tensors (2,080 numbers), whose gradient is 0 in 6 steps")
    names = "conditioning/first/bias, conditioning/first/kernel, conditioning/second/kernel; connect"
    assert names in dead


def test_a_dead_layer_and_an_idle_objective_are_found(official):
    trainer, update, batch = official
    state = trainer.init()
    params = flatten(state.params)
    dead = [path for path in params if path.startswith("trunk/layers/mlp/")]
    params |= {path: params[path].at[1].set(0) for path in dead}
    batch = with_tokens(batch, "image_to_caption", "text.caption", target=np.zeros_like)
    _, found = check_run(trainer, update, batch, state.replace(params=unflatten(params)))
    assert told(found, "error") == [
        "error: objective image_to_caption/text has no target in the first batch (38 rows): mark targets in its names,"
        " or remove it"
    ]
    assert all(f"{path} (layers 1)" in told(found)[-1] for path in dead), told(found)


def test_a_batch_of_bad_rows_alone_is_not_the_fault_of_the_objective(official):
    trainer, update, batch = official
    batch = with_tokens(batch, "image_to_caption", "text.caption", target=np.zeros_like)
    for name in batch["image_to_caption"].tokens:
        batch = with_tokens(batch, "image_to_caption", name, valid=np.zeros_like)
    _, found = check_run(trainer, update, batch)
    assert not told(found, "error")
    said = [text for text in told(found) if "image_to_caption" in text]
    (bad,) = [text for text in said if "are bad" in text]
    assert bad.startswith("warning: all 38 rows of task image_to_caption in the first batch are bad")
    assert not any("trains" in text for text in told(found)), "nor of the parts that it alone trains"


def test_an_untrained_name_of_an_objective_of_several_names_is_found():
    """Each of its terms has the name between the objective and the loss; by time they are no terms of their own."""
    none, some = (LossTerm(np.zeros(()), np.asarray(count)) for count in (0.0, 5.0))
    terms = {"layout/both/kind/nll": some, "layout/both/box/mse": none, "layout/both/box/vlb": none}
    terms |= {"layout/both/box/mse@0.00-0.25": dataclasses.replace(none, trained=False), "layout/words/nll": none}
    system = SimpleNamespace(
        weights={"layout/both": 1.0, "layout/words": 1.0}, tasks={"layout": SimpleNamespace(rows=7)}
    )
    found = run_checks.untrained_objectives(
        SimpleNamespace(system=system, batch={}, steps=[SimpleNamespace(terms=terms | {"total": none})])
    )
    assert [str(f) for f in found] == [
        "error: objective layout/both has no target in box in the first batch (7 rows): mark targets in its names, or"
        " remove it",
        "error: objective layout/words has no target in the first batch (7 rows): mark targets in its names, or"
        " remove it",
    ]


def test_what_is_not_finite_at_the_first_step_is_an_error(official):
    trainer, update, batch = official
    state = trainer.init()
    params = flatten(state.params)
    params["fields/image/head/linear/kernel"] = params["fields/image/head/linear/kernel"].at[0, 0].set(np.inf)
    _, found = check_run(trainer, update, batch, state.replace(params=unflatten(params)))
    (wrong,) = told(found)
    assert wrong.startswith("error: NaN or infinite at the first step: caption_to_image/diffusion/mse")


def test_a_gradient_that_explodes_later_is_no_sign_of_life(official):
    trainer, update, batch = official
    _, steps = run_checks.trial_steps(trainer, update, trainer.init(), batch)
    grads = steps[0].squares["grad"]
    burst = steps[1].replace(squares={"grad": {path: a * np.nan for path, a in grads.items()}})
    (found,) = told(run_checks.zero_gradients(CheckContext(trainer, {}, {}, (steps[0], burst))))
    assert "trains 3 tensors (2,080 numbers), whose gradient is 0 in 2 steps" in found


def test_the_callback_stops_a_run_with_the_whole_list(official):
    trainer, update, batch = official
    bad = with_tokens(batch, "caption_to_image", "image", value=lambda a: a * np.nan)
    state = trainer.init()
    with pytest.raises(
        ValueError, match=r"doctor.checks=False.*\n  error: image of .* NaN .*\n  note: task caption_to"
    ):
        Doctor().on_start(trainer, update, state, bad)
    assert Doctor(checks=False).on_start(trainer, update, state, bad) is state
    seen = Doctor(measurements=[lambda *a: {"a": 1.0}, lambda step, *a: {"b": step}]).on_log(3, state, batch, None)
    assert seen == {"a": 1.0, "b": 3}


@pytest.mark.faults  # the suite looks at a run of tests/test_main.py
@pytest.mark.parametrize(
    "name", ["sit_digits", "digits", "digits_canvas", "showo_digits", "blackout_digits", "latentlm_digits"]
)
def test_healthy_configs_are_silent(name, monkeypatch):
    """Checks and dry run. SiT's blocks are behind zero gates behind a zero head, here with a warm-up from nothing."""
    monkeypatch.setattr(dry_run, "WAITING", 1.0)  # which of two small times is longer depends on what else runs
    slow = {"optim.warmup": 10_000, "optim.steps": 20_000, "optim.lr": 1e-4}
    system = build_system(config_of(importlib.import_module(f"configs.{name}"), **slow))
    report = diagnose(system, devices=jax.devices()[:1])
    assert told(report.findings) == []
    assert report.text.startswith("doctor: 0 errors, 0 warnings") and "dry run: 8 steps on 1 cpu" in report.text
    assert re.search(r"loss/\w+/\w+/\w+: \d.* -> \d", report.text) and re.search(r"block_01 \d\.\de-0\d", report.text)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["imagenet256", "sit_xl2_imagenet256"])
def test_the_large_configs_in_small_are_silent(tmp_path, name, monkeypatch):
    """bfloat16, over four devices; MonoFormer's text head has no objective there, and that is all there is to say."""
    monkeypatch.setattr(dry_run, "WAITING", 1.0)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.standard_normal((64, 32, 32, 4), np.float32))
    np.save(tmp_path / "labels.npy", rng.integers(0, 2, 64))
    (tmp_path / "names.json").write_text('["a", "b"]')
    config = config_of(importlib.import_module(f"configs.{name}"))
    (task,) = config.tasks
    with config.unlocked():
        config.tasks[task].source = {"name": "arrays", "folder": str(tmp_path)}
        config.fields.image.codec = {  # latents as they are
            "host": {"name": "pixels", "height": 32, "width": 32, "channels": 4},
            "device": {"name": "patch", "size": 2},
        }
        if name == "imagenet256":  # from random weights
            config.fields.text.codec = {"name": "text:Bytes"}
            config.init_from.path = ""
        else:
            config.fields.label.codec.count = 2
        config.batch, config.sharding.min_size = 16, 2**10
        config.mesh.update({"data": 1, "fsdp": 2, "tensor": 2} if task == "class_to_image" else {"data": 2, "fsdp": 2})
    report = diagnose(build_system(config), devices=jax.devices()[:4])
    said = [re.sub(r"\(.*? numbers\)", "", text) for text in told(report.findings)]
    head = (
        "warning: no objective trains 1 tensors , whose gradient is 0 in 6 steps on the first batch: fields/text/head/"
    )
    assert said == [] if task == "class_to_image" else len(said) == 1 and said[0].startswith(head), said
