"""Initial weights of format 1 and runs of format 2, from before fields were rows of a table, through the tool."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from src.common.files.lazy_arrays import LazyArrays
from src.common.tree import unflatten
from src.models.pretrained import initial_weights
from src.models.pretrained.about import renamed, value_of
from src.models.pretrained.initial_weights import Initial, write_initial
from src.models.pretrained.llama_weights import TABLE
from src.models.pretrained.old_paths import MOVED
from src.train.checkpoints import metadata
from src.train.checkpoints.checkpointer import Checkpointer
from tests.helpers.published import copied, run, same, understanding_clip
from tests.helpers.recorded import FOLDER, read


def path_then(path):
    """The path that a parameter had."""
    for then, now in MOVED:
        if path.startswith(now):
            return then + path.removeprefix(now)
    return path


def test_weights_of_format_1_are_read_as_if_they_were_written_today(tmp_path, capsys):
    """Their parameters had other paths, and their `about` other names; the hash is that of their file."""
    copied("monoformer", tmp_path / "there", understanding_clip)
    assert run(capsys, source=tmp_path / "there", out=tmp_path / "now")[0] == 0
    now = Initial(tmp_path / "now")
    then = {path: path_then(path) for path in now.shapes}
    assert then[TABLE] == "text/table/embedding" and sum(path != old for path, old in then.items()) == 12
    told = {name.removeprefix("model."): value for name, value in now.meta["about"].items() if "fields" not in name}
    told |= {"image_head.order": "rsc", "image_head.variance": "learned", "vision.name": "vision:Clip"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial_weights, "FORMAT", 1)
        write_initial(tmp_path / "old", LazyArrays({old: now.tensors[new] for new, old in then.items()}), told,
                      now.meta["published"])  # fmt: skip
    old = Initial(tmp_path / "old")
    assert json.loads((tmp_path / "old" / "weights.json").read_text())["hash"] == old.hash != now.hash
    assert old.meta["about"] == now.meta["about"] and old.shapes == now.shapes
    for path in now.shapes:
        for a, b in zip(old.blocks(path), now.blocks(path), strict=True):
            np.testing.assert_array_equal(a, b)
    old.check({path: leaf["print"] for path, leaf in now.meta["leaves"].items()})
    assert run(capsys, source=tmp_path / "old", out=tmp_path / "back")[0] == 0
    kept = {n: t for n, t in load_file(tmp_path / "there" / "model.safetensors").items() if "vision_tower" not in n}
    same(load_file(tmp_path / "back" / "model.safetensors"), kept)


def test_an_encoder_of_format_1_has_the_names_of_its_links():
    told = {"vision.name": "vision:Latents", "vision.size": 64, "vision.patch": 4, "trunk.depth": 2}
    host = {"name": "pixels", "height": 64, "width": 64, "fit": "letterbox"}
    codec = {"host": host, "frozen": {"name": "vae_latents"}, "device": {"name": "patch", "size": 4}}
    found = renamed(told, {})
    assert found.pop("model.trunk.depth") == 2 and len(found) == 7
    assert found == {name: value_of({"fields": {"vision": {"codec": codec}}}, name) for name in found}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_of_format_2_is_published(tmp_path, capsys):
    """By the paths and the config that it has today."""
    rng, then = np.random.default_rng(0), json.loads((FOLDER / "format_2" / "configs.json").read_text())
    shapes = read("parameters")["imagenet256:debug"]
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    state = {"params": unflatten(params), "ema": unflatten({path: 2 * leaf for path, leaf in params.items()})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "FORMAT", 2)
        checkpointer = Checkpointer(tmp_path / "run")
        checkpointer.save(0, state, {"rows": {}}, then["imagenet256:debug"])
        checkpointer.close()
    code, _, error = run(capsys, source=tmp_path / "run", out=tmp_path / "out", ema=True)
    assert code == 0, error
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["image_size"], config["patch_size"], config["in_channels"], config["learn_sigma"]) == (
        32,
        2,
        4,
        True,
    )
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (32, 2, 32004)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(tensors["lm_head.weight"], 2 * params["text_head/linear/kernel"].T)
    kernel = 2 * params["image_head/linear/kernel"].reshape(32, 8, 4)  # noise and variance of 4 channels, 2 x 2 pixels
    np.testing.assert_array_equal(tensors["final_layer.linear.weight"], kernel.swapaxes(1, 2).reshape(32, 32).T)
