"""A system that learns from packed documents: text, images that are drawn and images that are understood."""

import contextlib
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from configs import common
from src.build import build_system
from src.common.runtime.writers import JsonLinesWriter
from src.doctor.batch_checks import spec
from src.doctor.context import check_context
from src.doctor.report import diagnose
from src.doctor.run_checks import BATCH_CHECKS
from src.tools.compile.hlo import communications, parse
from src.train import loop
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.flops import step_flops
from src.train.metrics import Metrics
from src.train.nonfinite.locate import NonfiniteLocator
from src.train.trainer import make_trainer, open_data
from tests.data.test_documents import corpus
from tests.helpers.runs import close, logged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data") / "documents", 48)


def config_of(folder, mesh=(1, 1, 1, 1), **changes):
    config = common.base()
    vision = common.vision(**common.patches_of_squares(8, patch=4))
    config.fields = {"text": common.text(name="text:Bytes"), "image": common.image(8, 8, 3, patch=4), "vision": vision}
    config.tasks = {
        "documents": {
            "weight": 1.0,
            "source": {"name": "documents", "folder": str(folder)},
            "template": {"name": "packed", "length": 48, "images": 2, "visions": 2, "drop": 0.2, "prompt_length": 16},
            "objectives": {"diffusion": common.diffusion(), "text": common.next_token("text", weight=0.5)},
        }
    }
    config = common.debug(config)
    config.batch, config.steps, config.log.every, config.sharding.min_size = 16, 6, 1, 1
    config.checkpoint.every, config.model.trunk.kv_heads = 3, 2
    config.mesh.update(dict(zip(("data", "fsdp", "tensor", "context"), mesh, strict=True)))
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def told(findings):
    return [str(f) for f in findings if f.severity != "note"]


def test_a_system_of_packed_documents_fits_together_and_is_found_healthy(folder):
    system = build_system(config_of(folder))
    assert [s.lead for s in system.tasks["documents"].layout.segments] == [0, 1, 1]
    assert system.tasks["documents"].task.prompt([{"prompt": "a"}])[0].length == 16 + 4
    trainer = make_trainer(system, jax.devices()[:1])
    assert Metrics(system, trainer.schedule).images == 16 * 2
    assert step_flops(system)["vision/embed"] == 6 * 16 * 2 * 4 * (48 * 32 + 32 * 32)
    with contextlib.closing(open_data(trainer)) as data:
        batch = trainer.place(next(data), 0)
    context = check_context(trainer, batch)
    found = [f for check in (spec, *BATCH_CHECKS) for f in check(context)]
    assert told(found) == []
    assert any("reads vision and predicts image, text" in str(f) for f in found), found

    rows = context.batch["documents"]
    read, text = rows.tokens["vision"], rows.tokens["text"]
    first = np.diff(np.asarray(rows.packing.segment), axis=1, prepend=0) > 0
    tokens = {
        "vision": read.replace(valid=np.zeros_like(read.valid)),
        "text": text.replace(target=text.target | first & text.valid),
    }
    bare = {"documents": rows.replace(tokens=rows.tokens | tokens)}
    found = [f for check in BATCH_CHECKS for f in check(check_context(trainer, bare))]
    assert len(told(found)) == 2 and f"{first.sum()} tokens in text" in told(found)[0]
    assert re.search(r"task documents.*vision", told(found)[1])


def run(folder, data, **changes):
    """Trains on one device and returns the weights and the lines of the log."""
    folder.mkdir(exist_ok=True)
    system = build_system(config_of(data, **changes))
    trainer = make_trainer(system, jax.devices()[:1])
    checkpoints = Checkpointer(str(folder), every=system.config.checkpoint.every)
    with contextlib.closing(checkpoints):
        state, _ = loop.train(trainer, checkpoints, JsonLinesWriter(folder / "log.jsonl"), 0.0)
    return jax.device_get((state.params, state.ema)), logged(folder)


@pytest.mark.faults
def test_a_resumed_run_is_the_same_run(folder, tmp_path):
    weights, lines = run(tmp_path / "one", folder)
    assert len(lines) == 6 and {"loss/documents/diffusion/mse", "loss/documents/text/nll"} <= lines[0].keys()
    assert lines[-1]["loss/documents/text/nll"] < lines[0]["loss/documents/text/nll"]
    run(tmp_path / "two", folder, steps=3)
    again, resumed = run(tmp_path / "two", folder)
    assert resumed == lines
    jax.tree.map(np.testing.assert_array_equal, again, weights)


def steps(folder, mesh, **changes):
    """What three steps measure, and the weights after them."""
    trainer = make_trainer(build_system(config_of(folder, mesh, **changes)), jax.devices()[: math.prod(mesh)])
    state, step, measured = trainer.init(), trainer.compile(), []
    assert skippable(step.as_text()) == [], "a device that skips a collective leaves the others waiting"
    with contextlib.closing(open_data(trainer)) as data, jax.set_mesh(trainer.mesh):
        for number in range(3):
            state, found = step(state, trainer.place(next(data), number))
            measured.append({k: v.total for k, v in found.terms.items() if k != "update_norm"})
            jax.block_until_ready(state)
    return jax.device_get(measured), jax.device_get((state.params, state.ema))


def skippable(text):
    """Conditionals, and loops without a known number of trips, around collectives of a program."""
    computations, inside, found = parse(text), set(), []
    meeting = {c.name for c, _ in communications(computations)}
    branches = ("branch_computations", "true_computation", "false_computation")
    for name, computation in computations.items():  # callees stand before callers
        for i in computation.instructions.values():
            held = inside.intersection(i.called("body", "condition", "calls", "to_apply", *branches))
            counted = i.opcode == "while" and "known_trip_count" in i.attributes
            found += [i.name] * bool(held and i.opcode in ("while", "conditional") and not counted)
            if held or name in meeting:
                inside.add(name)
    return found


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "loop"])
def test_a_collective_that_not_all_devices_run_is_seen(branch):
    def run(x):
        add = lambda x: jax.lax.psum(x, "data")
        many = jax.lax.axis_index("data") > 1
        if branch:
            return jax.lax.cond(many, add, lambda x: 2 * x, x)
        return jax.lax.while_loop(lambda x: x.sum() < 9, add, x)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    run = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False)
    )
    assert len(skippable(run.lower(np.ones((4, 8), np.float32)).compile().as_text())) == 1


# (2, 4, 1, 1) has a collective beside the loop over the layers: without `emulation.ordered` XLA aborts here
@pytest.mark.faults
@pytest.mark.parametrize("mesh", [(2, 4, 1, 1), (8, 1, 1, 1), (1, 2, 2, 2), (1, 1, 2, 2), (2, 1, 1, 1)], ids=str)
def test_any_mesh_learns_the_same(folder, mesh):
    expected, weights = steps(folder, (1, 1, 1, 1))
    assert all(step["documents/diffusion/mse"] > 0 and step["documents/text/nll"] > 0 for step in expected)
    found, other = steps(folder, mesh, accumulate=8 // math.prod(mesh))
    close(found, expected, rtol=3e-4, atol=1e-5)
    close(other, weights, rtol=0, atol=3e-4)


@pytest.mark.faults
def test_the_doctor_and_the_search_for_bad_values_know_packed_rows(folder):
    system = build_system(config_of(folder))
    report = diagnose(system, steps=3, devices=jax.devices()[:1])
    assert "dry run: 3 steps" in report.text and "errors" in report.text and "doctor: 0 errors" in report.text
    trainer = make_trainer(system, jax.devices()[:1])
    with contextlib.closing(open_data(trainer)) as data:
        batch = trainer.place(next(data), 0)
    params = trainer.init_params()
    find = lambda: NonfiniteLocator(trainer).locate(params, batch, 0, {})
    assert find() == ""
    head = params["fields"]["image"]["head"]["linear"]
    head["kernel"] = head["kernel"] + 3e38
    assert re.match(r"head: task documents, diffusion, image, row 0, 1, 2", find())
    pipeline = system.pipeline.with_params(trainer.init_params())
    made = pipeline("documents", [{"prompt": "draw 3"}, {"prompt": "a"}], seed=0)
    assert [row["image"].shape for row in made] == [(8, 8, 3)] * 2
