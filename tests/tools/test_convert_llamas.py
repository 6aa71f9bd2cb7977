"""Llamas of other makers through the tool: tied heads, scaled rotations, names, dtypes, and words of their own."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from src.models.pretrained.hf_config import read_config
from src.models.pretrained.initial_weights import Initial, write_initial
from src.models.pretrained.llama_weights import HEAD, TABLE
from tests.cases.llamas import llama
from tests.helpers.published import run

DOWN = "trunk/layers/mlp/down/kernel"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


def converted(capsys, folder, **flags):
    """The initial weights of a folder; no words are added."""
    code, _, error = run(capsys, source=folder, out=f"{folder}-out", **{"new_words": 0} | flags)
    assert code == 0, error
    return Initial(f"{folder}-out")


def refused(capsys, folder, **flags):
    code, _, error = run(capsys, source=folder, out=f"{folder}-out", **{"new_words": 0} | flags)
    assert code == 1 and error.count("\n") == 1, error
    return error


def renamed(folder, change, **more):
    """The tensors of a folder under other names, in two files with an index."""
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()} | more
    (folder / "model.safetensors").unlink()
    table = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(table.values()):
        save_file({n: t for n, t in tensors.items() if table[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_the_embedding_and_goes_out_as_the_run_has_it(stored, tmp_path, capsys):
    tensors = llama(tmp_path / "l", head=False, tie_word_embeddings=True)
    if stored:
        whole = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        save_file(whole, tmp_path / "l" / "model.safetensors")
    found = converted(capsys, tmp_path / "l")
    leaves = found.tensors
    np.testing.assert_array_equal(leaves[TABLE], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(leaves[HEAD], tensors["model.embed_tokens.weight"].T)
    assert run(capsys, source=tmp_path / "l-out", out=tmp_path / "tied")[0] == 0
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    assert load_file(tmp_path / "tied" / "model.safetensors").keys() == tensors.keys()
    about = found.meta["about"]
    assert about.pop("fields.text.head.tied") is True
    write_initial(tmp_path / "untied", found, about, found.meta["published"])
    assert run(capsys, source=tmp_path / "untied", out=tmp_path / "back")[0] == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(
        load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"], tensors["model.embed_tokens.weight"]
    )


def test_a_head_that_is_tied_and_another_tensor_is_refused(tmp_path, capsys):
    llama(tmp_path / "l", tie_word_embeddings=True)
    assert "tie_word_embeddings is true and lm_head.weight another tensor" in refused(capsys, tmp_path / "l")
    llama(tmp_path / "untied", head=False)
    assert "lm_head.weight is missing" in refused(capsys, tmp_path / "untied")


@pytest.mark.parametrize(
    "fields, scaling, written",
    [
        ({"rope_scaling": LLAMA3}, ["llama3", 8.0, 1.0, 4.0, 32], LLAMA3),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, ["llama3", 8.0, 1.0, 4.0, 32], LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear", 2.0], {"type": "linear", "factor": 2.0}),
        ({"rope_scaling": None}, None, None),
        ({"rope_scaling": {"rope_type": "default", "factor": 1.0, "attention_factor": None}}, None, None),
    ],
)
def test_a_scaled_rotation_is_an_option_of_the_trunk(fields, scaling, written, tmp_path, capsys):
    llama(tmp_path / "l", **fields)
    about = converted(capsys, tmp_path / "l").meta["about"]
    assert about.get("model.trunk.rope_scaling") == scaling
    theta = 5e5 if "rope_parameters" in fields else 1e4
    assert about["model.trunk.rope_theta"] == theta
    assert run(capsys, source=tmp_path / "l-out", out=tmp_path / "back")[0] == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["rope_scaling"], config["rope_theta"]) == (written, theta) and "rope_parameters" not in config
    assert read_config(tmp_path / "back").rope_scaling == tuple(scaling or ())


@pytest.mark.parametrize("prefix", ["module.", "model.", "base_model.model."])
def test_names_behind_a_prefix_are_the_same_weights(prefix, tmp_path, capsys):
    llama(tmp_path / "plain")
    llama(tmp_path / "l", prefix=prefix)
    assert converted(capsys, tmp_path / "l").hash == converted(capsys, tmp_path / "plain").hash


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_trunk_that_was_saved_alone_is_read_where_its_head_is_tied(prefix, tmp_path, capsys):
    """As `LlamaModel` saves itself, in several files."""
    llama(tmp_path / "plain", head=False, tie_word_embeddings=True)
    llama(tmp_path / "l", head=False, tie_word_embeddings=True, architectures=["LlamaModel"])
    renamed(tmp_path / "l", lambda name: prefix + name.removeprefix("model."))
    assert converted(capsys, tmp_path / "l").hash == converted(capsys, tmp_path / "plain").hash
    llama(tmp_path / "twice", head=False, tie_word_embeddings=True)
    renamed(tmp_path / "twice", str, **{"norm.weight": np.zeros(32, np.float32)})
    assert "'norm.weight' is not in this model" in refused(capsys, tmp_path / "twice")


@pytest.mark.parametrize(
    "later, kind", [(ml_dtypes.bfloat16, "float32"), (np.float16, "float32"), (np.float32, "float32")]
)
def test_blocks_of_several_dtypes_become_the_one_that_holds_all(later, kind, tmp_path, capsys):
    tensors = llama(tmp_path / "l", later=later)
    leaf = converted(capsys, tmp_path / "l").tensors[DOWN]
    assert leaf.dtype.name == kind
    for block in (0, 1):
        want = tensors[f"model.layers.{block}.mlp.down_proj.weight"].T.astype(np.float32)
        np.testing.assert_array_equal(leaf[block], want)


def test_two_halves_become_float32_and_one_stays(tmp_path, capsys):
    tensors = llama(tmp_path / "l", later=np.float16)
    mixed = {n: t.astype(ml_dtypes.bfloat16) if t.dtype == np.float32 else t for n, t in tensors.items()}
    save_file(mixed, tmp_path / "l" / "model.safetensors")
    found = converted(capsys, tmp_path / "l")
    assert (found.shapes[DOWN].dtype, found.shapes[TABLE].dtype) == (np.float32, jnp.bfloat16)
    assert run(capsys, source=tmp_path / "l-out", out=tmp_path / "back")[0] == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling is of type 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "'yarn' has truncate=False"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling of type 'default' has factor=2.0"),
        ({"rope_scaling": LLAMA3 | {"mrope_section": [4]}}, "rope_scaling of type 'llama3' has mrope_section=[4]"),
        ({"attention_bias": True}, "attention_bias=True, here False only"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', here 'silu' only"),
    ],
)
def test_other_llamas_are_refused_by_the_value_that_this_model_has_not(fields, words, tmp_path, capsys):
    llama(tmp_path / "l", **fields)
    error = refused(capsys, tmp_path / "l")
    assert words in error and "give other weights (docs/weights.md)" in error and "belongs to the weights" not in error
    assert not (tmp_path / "l-out").exists()


@pytest.mark.parametrize("index", [False, True])
def test_files_of_weights_that_are_not_read_are_named(tmp_path, capsys, index):
    tensors = llama(tmp_path / "l")
    if index:
        renamed(tmp_path / "l", str)
    for name in ("adapter_model.safetensors", "model-00003-of-00003.safetensors"):
        save_file({"lora_A": np.zeros((4, 4), np.float32)}, tmp_path / "l" / name)
    for name in ("pytorch_model.BIN", "a.gguf", "tokenizer.json", "README.md"):
        (tmp_path / "l" / name).write_bytes(b"{}")
    named = "a.gguf, adapter_model.safetensors, model-00003-of-00003.safetensors, pytorch_model.BIN"
    told = f"{tmp_path / 'l'}: other files of weights are not read: {named}"
    code, said, error = run(capsys, source=tmp_path / "l", out=tmp_path / "l-out", new_words=0)
    assert code == 0 and told in said.splitlines(), error
    assert told in run(capsys, source=tmp_path / "l", info=True)[1].splitlines() and len(tensors)


def test_templates_averages_and_rotations_that_are_not_read_are_named(tmp_path, capsys):
    llama(tmp_path / "l", rope_theta=1e4, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    (tmp_path / "l/ema").mkdir()
    (tmp_path / "l/tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (tmp_path / "l/chat_template.jinja").write_text("{{ messages }}")
    code, said, _ = run(capsys, source=tmp_path / "l", out=tmp_path / "l-out", new_words=0)
    assert code == 0 and [line.partition(": ")[2] for line in said.splitlines() if " not " in line] == [
        "the folder ema has no config.json and is not read",
        "rope_theta=10000.0 is not read: its table of rotations has 500000.0",
        "the chat template of tokenizer_config.json, chat_template.jinja is not used: chats of a run are <s> question"
        " answer </s>",
    ]
    (tmp_path / "l/tokenizer_config.json").write_text("{}")
    (tmp_path / "l/chat_template.jinja").unlink()
    assert "the chat template" not in run(capsys, source=tmp_path / "l", info=True)[1]


def test_folders_and_buffers_that_are_not_read_are_named(tmp_path, capsys):
    tensors = llama(tmp_path / "l")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | buffer, tmp_path / "l" / "model.safetensors")
    for name in ("original", "onnx", ".cache"):
        (tmp_path / "l" / name).mkdir()
    code, said, error = run(capsys, source=tmp_path / "l", out=tmp_path / "out", new_words=0)
    assert code == 0, error
    for words in (
        "folders beside the weights are not read: onnx/, original/\n",
        "1 tensors such as 'model.layers.0.self_attn.rotary_emb.inv_freq' are not read, since rotations",
    ):
        assert words in said + error, words


def test_keys_and_towers_that_are_not_read_are_named(tmp_path, capsys):
    plain = {"use_cache": True, "_name_or_path": "x", "eos_token_id": 2, "use_sliding_window": False, "layers_off": []}
    llama(tmp_path / "plain", **plain)
    code, said, _ = run(capsys, source=tmp_path / "plain", out=tmp_path / "plain-out", new_words=0)
    assert code == 0 and "read" not in said and "left out" not in said
    tensors = llama(tmp_path / "l", **plain | {"logits_scaling": 8.0, "layer_types": ["full", "sliding"]})
    save_file(tensors | {"vision_encoder.a": np.zeros(3, np.float32)}, tmp_path / "l/model.safetensors")
    lines = [
        f"{tmp_path / 'l'}: 1 tensors of a frozen encoder are left out, such as 'vision_encoder.a'",
        f"{tmp_path / 'l'}: keys of config.json that no plain Llama has are not read: logits_scaling=8.0, "
        "layer_types=['full', 'sliding']",
    ]
    for flags in ({"out": tmp_path / "l-out", "new_words": 0}, {"info": True}):
        said = run(capsys, source=tmp_path / "l", **flags)[1].splitlines()
        assert [line for line in said if line in lines] == lines


def test_floats_of_8_bits_are_refused_by_name(tmp_path, capsys):
    tensors = llama(tmp_path / "l")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: np.zeros((64, 32), ml_dtypes.float8_e4m3fn)}, tmp_path / "l/model.safetensors")
    assert f"{name} is float8_e4m3fn, no float of 16 bits or more" in refused(capsys, tmp_path / "l")
