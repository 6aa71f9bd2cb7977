"""Checkpoints of format 2, from before fields were rows of a table: leaves, configs and sums have their names of today.

That such runs go on with the losses of then is in tests/test_recorded.py.
"""

import importlib
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.common.lookup import lookup
from src.common.tree import flatten, unflatten
from src.models.pretrained.old_paths import path_now
from src.train.checkpoints import metadata
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import check_config, plain
from src.train.checkpoints.migrations import _leaf_now
from src.train.checkpoints.migrations_config_2 import _path, config_now
from src.train.checkpoints.migrations_tasks_2 import RENAMED, TASKS
from src.train.checkpoints.read_params import CheckpointParams
from src.train.loop import ELASTIC
from src.train.optim import build_optimizer
from src.train.state import first_state
from tests.helpers import recorded

PARAMETERS = {
    "text/table/embedding": (130, 128),
    "text_head/linear/kernel": (128, 130),
    "image/linear/kernel": (4, 8),
    "image_head/adaln/kernel": (8, 16),
    "vision/first/bias": (8,),
    "labels/table/embedding": (11, 8),
    "time/first/kernel": (8, 8),
    "trunk/layers/mlp/up/kernel": (2, 128, 128),
    "trunk/layers/image/mlp/up/kernel": (2, 128, 128),
    "trunk/layers/attention/q/lora_a": (2, 8, 3),
}
NOW = {path_now(path): shape for path, shape in PARAMETERS.items()}
FROZEN = {"lr_multipliers": (("lora", 0.0), ("adaln", 2.0), (".*", 1.0)), "weight_decay": 0.1}


def state_of(shapes, teacher, **optim):
    """A state of random numbers with a teacher; the same numbers for the same order of parameters."""
    rng = np.random.default_rng(0)
    params = unflatten({path: jnp.asarray(rng.normal(size=shape), "float32") for path, shape in shapes.items()})
    optimizer, _ = build_optimizer(optim, params)
    keep = lambda params: unflatten({path: flatten(params)[path] for path in teacher})
    state = first_state(params, optimizer, 3, keep)
    fresh = iter(np.random.default_rng(1).normal(size=10**6).astype("float32"))
    moments = jax.tree.map(lambda x: x + jnp.asarray(next(fresh), x.dtype), state.opt_state)
    return state.replace(opt_state=moments)


def test_the_paths_of_then_and_now():
    assert [*NOW][:3] == ["fields/text/embed/table/embedding", "fields/text/head/linear/kernel",
                          "fields/image/embed/linear/kernel"]  # fmt: skip
    assert "trunk/layers/mot/mlp/up/kernel" in NOW and "fields/label/embed/table/embedding" in NOW
    assert all(path_now(path) == path for path in NOW)


@pytest.mark.parametrize("optim", [{}, FROZEN, {"moments": "factored"}, FROZEN | {"moments": "bfloat16"}], ids=str)
def test_every_leaf_of_a_state_is_found_under_its_path_of_then(optim):
    """Whatever an optimizer keeps: moments, rows and columns of factored ones, of a part of the parameters alone."""
    old, new = (jax.eval_shape(lambda shapes=s, t=t: state_of(shapes, t, **optim)) for s, t in (
        (PARAMETERS, ["text_head/linear/kernel"]), (NOW, ["fields/text/head/linear/kernel"])))  # fmt: skip
    then, now = flatten(old), flatten(new)
    found = {_leaf_now(path, {*PARAMETERS}): leaf.shape for path, leaf in then.items()}
    assert found == {path: leaf.shape for path, leaf in now.items()} and len(then) == len(now)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_state_is_read_under_its_paths_of_today(tmp_path):
    """With its sums since the last log line; and so are the parameters alone, and their average."""
    old, new = state_of(PARAMETERS, ["text_head/linear/kernel"]), state_of(NOW, ["fields/text/head/linear/kernel"])
    old = old.replace(ema=jax.tree.map(lambda x: 2 * x, old.params))
    sums = {"write/text/nats": [3.0, 2.0], "draw/diffusion/mse@0.00-0.25": [1.0, 1.0], "total": [4.0, 1.0]}
    position = {"rows": {"write": 7}, "counts": {}, "meter": {"steps": 1, "taken": 1, "sums": sums}}
    config = json.loads((recorded.FOLDER / "format_2" / "configs.json").read_text())["digits:debug"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "FORMAT", 2)
        checkpointer = Checkpointer(tmp_path)
        checkpointer.save(0, old, position, config | {"tokenizer": "abcd", "frozen": {}, "weights": None})
        checkpointer.close()
    found, position, meta = Checkpointer(tmp_path).restore(jax.eval_shape(lambda: new))
    expected = {_leaf_now(path, {*PARAMETERS}): leaf for path, leaf in flatten(old).items()}
    for path, leaf in flatten(found).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert [*position["meter"]["sums"]] == ["write/text/nll", *[*sums][1:]] and position["rows"] == {"write": 7}
    assert meta["format"] == metadata.FORMAT and meta["config"]["codecs"] == {"text": {"SentencePiece": "abcd"}}

    for average in (False, True):
        leaves = CheckpointParams(tmp_path / "checkpoints" / "0", average)
        assert leaves.shapes.keys() == NOW.keys() and "fields" in leaves.config
        for path in NOW:
            want = expected[f"{'ema' if average else 'params'}/{path}"]
            blocks = list(leaves.blocks(path))
            np.testing.assert_array_equal(blocks if path.startswith("trunk/layers/") else blocks[0], want)


def configs():
    """By name and variant, the configs of then."""
    return json.loads((recorded.FOLDER / "format_2" / "configs.json").read_text())


@pytest.mark.parametrize("name", configs())
def test_the_configs_of_then_are_those_of_today(name):
    """A run of any of them goes on with the config of its name; another value is still another config."""
    file, variant = name.split(":")
    forms = recorded.read("parameters")
    shapes = forms.get(name) or forms[f"{file}:{'debug' if 'debug' in variant else ''}"]
    leaves = {f"params/{path}": {"shape": shape} for path, shape in shapes.items()}
    known = {"tokenizer": "abcd", "frozen": {"image": "ef", "vision": "01"}, "weights": None}
    then = config_now(configs()[name] | known, leaves)
    form = f"arrays,{variant}" if file == "sit_xl2_imagenet256" else variant  # what that config read then
    today = plain(importlib.import_module(f"configs.{file}").get_config(form))
    today |= {"codecs": then["codecs"], "weights": None}
    if then["ema"]["warmup"] != today["ema"]["warmup"]:  # the default since; a run of then needs a flag to go on
        with pytest.raises(ValueError, match=r"\(ema\.warmup: False -> True\).*add --config\.ema\.warmup=False"):
            check_config(then, today, ELASTIC)
        assert "official" not in variant
        today["ema"]["warmup"] = False
    template = today["tasks"].get("caption_to_image", {}).get("template", {})
    if template.get("length") == 129:  # one token more, as in the released code
        length = r"\(tasks\.caption_to_image\.template\.length: 128 -> 129\)"
        with pytest.raises(ValueError, match=length):
            check_config(then, today, ELASTIC)
        template["length"] = 128
    check_config(then, today, ELASTIC)
    assert set(then["codecs"]) == set(then["fields"]) & {"text", "image", "vision"} - without_files(today)
    today["optim"]["lr"] *= 2
    with pytest.raises(ValueError, match=r"\(optim\.lr: [^;]*\)"):
        check_config(then, today, ELASTIC)


def without_files(config):
    """Rows whose codecs have no tokenizer and no network."""
    found = {row for row, field in config["fields"].items() if "name" not in field["codec"]}
    return {row for row in found if "frozen" not in config["fields"][row]["codec"]}


def test_every_option_of_a_task_has_a_place():
    for source, options, template, names in TASKS.values():
        sources, templates = (
            inspect.signature(lookup(f"data/{folder}", name)).parameters
            for folder, name in (("sources", source), ("templates", template))
        )
        assert {RENAMED.get(option, option) for option in options} <= set(sources), source
        assert {name.split(".")[0] for name in names.values()} <= set(templates), template


@pytest.mark.parametrize(
    "then, now",
    [
        ("^text/", "^fields/text/embed/"),
        ("^text", "^fields/text"),
        ("^(trunk|text|text_head)/", "^(trunk|fields/text/embed|fields/text/head)/"),
        ("(^|/)text/table/embedding", "(^|/)fields/text/embed/table/embedding"),
        ("image_head/(adaln|linear)", "fields/image/head/(adaln|linear)"),
        ("layers/image/mlp", "layers/mot/mlp"),
        ("^labels/table", "^fields/label/embed/table"),
        ("norm|bias|scale", "norm|bias|scale"),
        (r"(lora_b|vision/second)", "(lora_b|fields/vision/embed/second)"),
        (".*", ".*"),
    ],
)
def test_rules_find_the_parameters_that_they_found(then, now):
    assert _path(then) == now
    for path in PARAMETERS:
        assert bool(re.search(then, path)) == bool(re.search(now, path_now(path))), path


def test_a_checkpoint_of_format_1_takes_both_steps():
    leaf = {"print": 0, "dtype": "float32", "shape": [2]}
    leaves = {f"{part}/text/table/embedding": leaf for part in ("params", "ema", "opt_state/0/mu")}
    meta = {"format": 1, "step": 5, "config": {"seed": 7}, "data": 0, "leaves": leaves}
    found, data = metadata.migrated(meta | {"moved": {"a": "b"}}, {"value": {"images": 60}})
    assert found["fill"]["extra/seed"] == 7 and found["config"] == {"seed": 7} and data["value"]["rows"]["images"] == 60
    assert found["moved"]["opt_state/0/mu/fields/text/embed/table/embedding"] == "opt_state/0/mu/text/table/embedding"
    assert set(found["moved"].values()) == set(leaves) and set(found["leaves"]) == set(found["moved"])
