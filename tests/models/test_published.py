"""`config.json` of strangers: what is there is typed and within ranges, and all that is wrong is one sentence."""

import json
import math
import pathlib

import numpy as np
import pytest

from src.models.pretrained.hf_config import read_config
from src.models.pretrained.hf_rope import published_rope
from src.models.pretrained.llama_weights import Published, place_of

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def fields(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def test_published_configs_are_read(tmp_path):
    llama, mono = (read_config(GOLDEN / name) for name in ("llama", "monoformer"))
    assert (llama.hidden_size, llama.num_key_value_heads, llama.rms_norm_eps, llama.image) == (48, 2, 1e-5, None)
    assert (mono.architecture, mono.vocab_size, mono.image.image_size) == ("MonoFormerForCausalLM", 96, 64)
    assert mono.image.learn_sigma and mono.image.decoder_t_embed == "add_before_image_tokens"
    newer = {k: v for k, v in fields("llama").items() if k not in ("rope_theta", "rope_scaling", "num_key_value_heads")}
    newer |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    read = read_config(tmp_path)
    assert (read.rope_theta, read.num_key_value_heads) == (5e5, 6)


@pytest.mark.parametrize(
    "change, theta, scaling",
    [
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, ("llama3", 8.0, 1.0, 4.0, 32)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}, 5e5, ("llama3", 8.0, 1.0, 4.0, 32)),
        ({"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, ("llama3", 8.0, 1.0, 4.0, 32)),
        ({"rope_theta": 1e4, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, ("llama3", 8.0, 1.0, 4.0, 32)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, ("linear", 4)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 1e4, ("linear", 4.0)),
        ({"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 2e4}}, 2e4, ("linear", 4.0)),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, 1e4, ()),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": None}, 1e4, ()),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1e4, ("dynamic", 2.0, 128)),
        ({"rope_scaling": YARN}, 1e4, ("yarn", 4.0, 32, 1, 32, 0.1 * math.log(4) + 1)),
        ({"rope_scaling": YARN | {"attention_factor": 1.5, "beta_slow": 2}}, 1e4, ("yarn", 4.0, 32, 2, 32, 1.5)),
        (
            {"rope_scaling": YARN | {"mscale": 2, "mscale_all_dim": 1.0}},
            1e4,
            ("yarn", 4.0, 32, 1, 32, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1.0}}, 1e4, ("yarn", 1.0, 32, 1, 128, 1.0)),
        # the config's own length comes before the table's, as in transformers
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, 1e4, ("llama3", 8.0, 1.0, 4.0, 64)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
            1e4,
            ("yarn", 4.0, 32, 1, 64, 0.1 * math.log(4) + 1),
        ),
        ({"hidden_act": "swish", "rope_scaling": {}}, 1e4, ()),
    ],
)
def test_rotary_scaling_is_read_in_every_spelling(change, theta, scaling, tmp_path):
    given = fields("llama") | change
    given = {k: v for k, v in given.items() if not (k == "rope_theta" and v is None)}
    (tmp_path / "config.json").write_text(json.dumps(given))
    read = read_config(tmp_path)
    assert (read.rope_theta, read.rope_scaling) == (theta, scaling)
    back = {k: v for k, v in given.items() if k != "rope_parameters"} | {"rope_theta": theta}
    (tmp_path / "config.json").write_text(json.dumps(back | {"rope_scaling": published_rope(scaling)}))
    assert read_config(tmp_path).rope_scaling == scaling


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "llama",
            {"architectures": ["GPT2LMHeadModel"]},
            r"known are LlamaForCausalLM \(llama\), MonoFormerForCausalLM",
        ),
        ("llama", {"architectures": "LlamaForCausalLM"}, "known are"),
        ("llama", {"architectures": None}, "known are"),
        ("llama", {"model_type": "mistral"}, "model_type 'mistral'"),
        ("llama", {"hidden_size": 0, "vocab_size": -3}, "hidden_size=0 is not a whole.*vocab_size=-3"),
        ("llama", {"hidden_size": 48.0}, "hidden_size=48.0 is not a whole number"),
        ("llama", {"hidden_size": True}, "hidden_size=True"),
        ("llama", {"hidden_size": "48"}, "hidden_size='48' is not a whole number"),
        ("llama", {"num_hidden_layers": 10**30}, "num_hidden_layers="),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps=0 is not a number from 1e-12 to 0.1"),
        ("llama", {"hidden_size": 50}, "is no even multiple of num_attention_heads=6"),
        ("llama", {"num_key_value_heads": 4}, "is no multiple of num_key_value_heads=4"),
        ("monoformer", {"head_dim": 48}, "head_dim=48, here hidden_size / num_attention_heads only"),
        (
            "llama",
            {"attention_bias": True, "hidden_act": "gelu"},
            "hidden_act='gelu', here 'silu' only, attention_bias",
        ),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is not true or false"),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", "factor": 2}},
            "rope_scaling is of type 'longrope', here default, linear, dynamic, llama3, yarn only",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn"}},
            "factor=None in rope_parameters is not a number",
        ),
        ("llama", {"rope_scaling": YARN | {"truncate": False}}, "type 'yarn' has truncate=False.* give other weights"),
        ("llama", {"rope_scaling": YARN | {"beta_fast": 1}}, "beta_fast=1 in rope_scaling is not above beta_slow"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor=0.5 in rope_scaling is not a number"),
        ("llama", {"rope_parameters": {"type": "longrope"}}, "rope_parameters is of type 'longrope'"),
        ("llama", {"rope_scaling": {"type": ["linear"]}}, "rope_scaling is of type \\['linear'\\]"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' in rope_scaling is not a number"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor=None in rope_scaling is not a number"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor=4.0 in rope_scaling is not"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear' is no table"),
        ("llama", {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 4.0}}, "differ in factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5, here 1.0 only"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}},
            "rope_theta='big' is not a number",
        ),
        (
            "monoformer",
            {"mlp_bias": True, "head_dim": 48},
            "mlp_bias=True, here False only, head_dim=48.* give other weights",
        ),
        ("llama", {"hidden_size": 98304, "num_hidden_layers": 1000, "intermediate_size": 2**19}, "parameters, more"),
        ("monoformer", {"decoder_t_embed": "add_at_each_layer"}, "decoder_t_embed='add_at_each_layer' is none of"),
        (
            "monoformer",
            {"learn_sigma": 1, "image_size": None},
            "image_size=None .*learn_sigma=1 is not true",
        ),
        ("monoformer", {"add_pos_embed_each_layer": True}, "add_pos_embed_each_layer"),
        ("monoformer", {"vision_encoder": ["clip"]}, "vision_encoder=\\['clip'\\] is none of clip, vae"),
        (
            "monoformer",
            {"vision_encoder": "vae", "vision_encoder_args": {"patch_size": 0, "resolution": True}},
            "vision_encoder_path=None is no path, .*patch_size=0 is not a whole .*resolution=True",
        ),
        (
            "monoformer",
            {"vision_encoder": "clip", "vision_encoder_path": "a", "vision_encoder_args": 3},
            "vision_encoder_args=3 is no table",
        ),
    ],
)
def test_wrong_configs_are_refused_in_one_sentence(name, change, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields(name) | change))
    with pytest.raises(ValueError, match=f"^the config '{tmp_path / 'config.json'}' .*{words}") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


def test_blocks_have_plain_numbers_without_gaps():
    for index in ("-1", "01", "+1", "1_0", "٣", "9" * 5000, "", "x"):
        assert place_of(f"model.layers.{index}.input_layernorm.weight") is None
    assert place_of("model.layers.10.input_layernorm.weight") == ("trunk/layers/attention_norm/scale", 10)
    name = "model.layers.{}.input_layernorm.weight"
    found = Published({name.format(i): np.full(2, i) for i in (1, 0)})
    assert [block[0] for block in found.blocks("trunk/layers/attention_norm/scale")] == [0, 1]
    for blocks in ({0: 2, 2: 2}, {0: 2, 1: 3}):
        assert "lacks blocks, or has" in Published({name.format(i): np.zeros(n) for i, n in blocks.items()}).wrong[0]
