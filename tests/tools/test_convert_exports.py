"""What an export says of itself: its dtype, the settings that the official scripts open, and who sees whom."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest

from src.common.files.lazy_arrays import LazyArrays
from src.models.pretrained.about import made_blocks, other_attention
from src.models.pretrained.initial_weights import write_initial
from src.train.init_from import InitFrom
from tests.helpers.published import as_run, copied, run

DIFFUSION = {"objectives": {"diffusion": {"name": "diffusion", "names": ["image"]}}}
TEXT = {"objectives": {"lm": {"name": "next_token", "names": ["text.caption"]}}}


def tasks(*blocks):
    """Tasks that make images with these blocks (None: not said), and one that reads some."""
    made = {
        f"t{i}": DIFFUSION
        | {"template": {"name": "class_prompt"} | ({} if one is None else {"segment": {"blocks": one}})}
        for i, one in enumerate(blocks)
    }
    return made | {"read": TEXT | {"template": {"name": "image_to_caption", "blocks": "causal"}}}


@pytest.fixture
def begun(tmp_path, capsys, monkeypatch):
    """MonoFormer as initial weights; `use_bi_attn_img_tokens` is `there`, and the run has these tasks."""

    def make(there, tasks):
        copied("monoformer", tmp_path / "there", lambda tensors, config: config.update(use_bi_attn_img_tokens=there))
        assert run(capsys, source=tmp_path / "there", out=tmp_path / "init")[0] == 0
        return as_run(tmp_path / "init", tasks, monkeypatch)

    return make


@pytest.mark.parametrize(
    "blocks, flag",
    [(("causal",), False), ((1,), False), (("bidirectional",), True), ((None,), True), ((0, None), True), ((), None)],
)
@pytest.mark.parametrize("there", [True, False])
def test_an_export_says_how_its_images_see_each_other(there, blocks, flag, begun, tmp_path, capsys):
    """As the run trained, whatever the weights were that it began from."""
    assert run(capsys, source=begun(there, tasks(*blocks)), out=tmp_path / "out")[0] == 0
    config, settings = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "cfg"))
    assert config["use_bi_attn_img_tokens"] is settings["use_bi_attn_img_tokens"] is (there if flag is None else flag)


@pytest.mark.parametrize("blocks", [("block:4",), ("causal", "bidirectional"), ([8, 8],)])
def test_images_that_monoformer_has_not_are_not_exported(blocks, begun, tmp_path, capsys):
    code, _, error = run(capsys, source=begun(True, tasks(*blocks)), out=tmp_path / "out")
    assert code == 1 and "all bidirectional or all causal" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "there, blocks, told",
    [
        (False, (None,), "trained with causal images (use_bi_attn_img_tokens=false)"),
        (True, ("causal",), "trained with bidirectional images (use_bi_attn_img_tokens=true)"),
        (True, ("bidirectional", 4), "some with blocks=4: set blocks='bidirectional'"),
        (True, (None,), ""),
        (False, (1, "causal"), ""),
        (False, (), ""),
        (None, (None,), ""),
    ],
)
def test_a_run_that_starts_from_images_of_another_kind_is_told(there, blocks, told, tmp_path, caplog):
    """A Llama's config.json says nothing of images, and its runs may make them either way."""
    leaves = LazyArrays({"fields/image/embed/linear/bias": np.zeros(4, np.float32)})
    write_initial(tmp_path, leaves, {}, {} if there is None else {"use_bi_attn_img_tokens": there})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    bias = jax.ShapeDtypeStruct((4,), np.float32, sharding=place)
    like = {"fields": {"image": {"embed": {"linear": {"bias": bias}}}}}
    with caplog.at_level(logging.WARNING):
        config = {"fields": {}, "model": {}, "tasks": tasks(*blocks)}
        InitFrom(str(tmp_path), config=config).read(like, lambda paths: {})
    assert (told in caplog.text) if told else not caplog.records
    assert len(caplog.records) == bool(told)


def test_the_way_that_images_see_each_other_is_that_of_the_tasks_that_make_them():
    assert made_blocks({"tasks": tasks()}) == [] and other_attention({"use_bi_attn_img_tokens": True}, {}) == ""
    assert made_blocks({"tasks": tasks(None, "causal", 1)}) == [0, 1]


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {}])
@pytest.mark.parametrize("wanted", [None, "float16"])
def test_an_export_says_one_dtype_and_it_is_that_of_its_tensors(change, wanted, tmp_path, capsys):
    """Whatever the config.json said that the weights came with; a part in bfloat16 changes nothing."""

    def stored(tensors, config):
        config.pop("torch_dtype", None)
        config |= change
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)

    copied("llama", tmp_path / "there", stored)
    assert run(capsys, source=tmp_path / "there", out=tmp_path / "init")[0] == 0
    flags = {"dtype": wanted} if wanted else {}
    assert run(capsys, source=tmp_path / "init", out=tmp_path / "back", **flags)[0] == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == wanted or (wanted is None and config["dtype"] == "float32")
    assert "torch_dtype" not in config
    assert not (tmp_path / "back" / "cfg.json").exists()  # no script of MonoFormer opens a Llama


def test_the_settings_that_official_scripts_open_first(begun, tmp_path, capsys):
    """They print cfg.json, and read whether there is a chat template."""
    assert run(capsys, source=begun(True, tasks(None)), out=tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "cfg.json").read_text()) == {
        "patch_size": 2, "in_channels": 4, "learn_sigma": True, "use_flash_attn": False, "use_pos_embed": True,
        "decoder_t_embed": "add_before_image_tokens", "use_adaln_final_layer": True, "use_bi_attn_img_tokens": True,
        "tokenizer_max_length": 512, "use_chat_template": False,
    }  # fmt: skip
