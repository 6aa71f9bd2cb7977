"""CLIP's vision tower: transformers' numbers, its files, its preparation of images, and what is refused."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from src.codecs.chain import Chain
from src.codecs.clip import Clip, activation, preprocess
from src.codecs.clip_files import FILE, published_names, read_clip, read_clip_config
from src.codecs.clip_vision import ClipVision
from src.common.tree import count_parameters, flatten
from tests.helpers.published import write_clip

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "clip_vision"


@pytest.fixture(scope="module")
def golden():
    clip, params = read_clip(GOLDEN)
    want = dict(np.load(GOLDEN / "expected.npz"))
    return clip, params, jnp.moveaxis(want["pixel_values"], 1, -1), want


def test_features_are_those_of_transformers(golden):
    """Alone without jit, and jitted with the rows on eight devices."""
    clip, params, images, want = golden
    features = clip.features(params, images)
    np.testing.assert_allclose(features, want["features"], atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    run = jax.jit(lambda p, x: (clip.features(p, x), clip.last(p, x)))
    args = jax.device_put(params, everywhere), jax.device_put(jnp.concatenate([images] * 4), rows)
    lowered = run.lower(*args)
    products = [line for line in lowered.as_text().splitlines() if re.search(r"\.(?:convolution|dot_general)", line)]
    assert products and all("HIGHEST" in line for line in products)  # accelerators take shorter ones unless told
    split = lowered.compile()(*args)
    for name, value in zip(("features", "last_hidden_state"), split, strict=True):
        assert value.sharding.is_equivalent_to(rows, value.ndim)
        np.testing.assert_allclose(value, np.concatenate([want[name]] * 4), atol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match=r"images are .*, the vision tower expects"):
        clip.features(params, images[:, :14, :14])


def test_bfloat16_and_the_exact_gelu(golden):
    clip, params, images, want = golden
    low = jax.jit(Clip(clip.config, "bfloat16").features)(params, images)
    error = np.sqrt(np.mean((low - want["features"]) ** 2) / np.mean(want["features"] ** 2))
    assert low.dtype == jnp.float32 and 1e-4 < error < 0.02, error
    np.testing.assert_allclose(activation("quick_gelu", jnp.asarray(1.0)), 1 / (1 + np.exp(-1.702)), rtol=1e-6)
    np.testing.assert_allclose(activation("gelu", jnp.asarray(1.0)), 0.8413447, rtol=1e-6)


def test_published_sizes():
    """ViT-L/14: the vision tower's parameters, and its 391 tensors. Nothing is allocated."""
    like = Clip().shapes()
    assert count_parameters(like) == 303_179_776
    names = published_names(like, 24)
    tensors = {n for parts in names.values() for n in ((parts,) if isinstance(parts, str) else parts)}
    assert len(tensors) == 391 and "vision_model.encoder.layers.23.self_attn.out_proj.bias" in tensors
    assert flatten(like)["position_embedding"].shape == (257, 1024) and Clip().config.tokens == 256


def test_files(golden, tmp_path):
    """What is written is what was read, bit for bit; a whole CLIP gives its vision tower."""
    clip, params, _, _ = golden
    tensors = load_file(GOLDEN / FILE)
    write_clip(tmp_path / "ours", clip, params)
    written = load_file(tmp_path / "ours" / FILE)
    assert written.keys() == tensors.keys() and all((written[n] == tensors[n]).all() for n in tensors)
    again, same = read_clip(tmp_path / "ours")
    assert again == clip
    jax.tree.map(np.testing.assert_array_equal, same, params)

    fields = json.loads((GOLDEN / "config.json").read_text())
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": {}, "vision_config": fields}
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    more = {"logit_scale": np.ones((), np.float32), "text_model.final_layer_norm.bias": np.ones(3, np.float32)}
    more |= {"visual_projection.weight": np.ones((3, 32), np.float32)}
    more |= {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    save_file(tensors | more, tmp_path / "whole" / FILE)
    again, same = read_clip(tmp_path / "whole")
    assert again == clip
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.vision_model.", "vision_tower.vision_tower.vision_model."])
def test_the_tower_is_read_under_any_prefix(prefix, whole, golden, tmp_path):
    """transformers 5 saves a tower alone without `vision_model.`; a buffer and the text tower are left out."""
    clip, params, _, _ = golden
    tensors = {prefix + n.removeprefix("vision_model."): tensor for n, tensor in load_file(GOLDEN / FILE).items()}
    tensors[prefix + "embeddings.position_ids"] = np.arange(17)[None]
    if whole:
        more = {"text_model.final_layer_norm.bias": np.ones(3, np.float32), "logit_scale": np.ones((), np.float32)}
        tensors |= {prefix.removesuffix("vision_model.") + name: tensor for name, tensor in more.items()}
    shutil.copy(GOLDEN / "config.json", tmp_path)
    save_file(tensors, tmp_path / FILE)
    again, same = read_clip(tmp_path)
    assert again == clip
    jax.tree.map(np.testing.assert_array_equal, same, params)

    save_file(tensors | {"encoder.layers.9.mlp.fc1.bias": np.zeros(64, np.float32)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"encoder\.layers\.9\.mlp\.fc1\.bias' is not in this model"):
        read_clip(tmp_path)


def test_all_that_does_not_fit_is_in_one_message(tmp_path):
    tensors = load_file(GOLDEN / FILE)
    tensors["vision_model.encoder.layers.3.mlp.fc1.bias"] = np.zeros(64, np.float32)
    tensors["vision_model.pre_layrnorm.bias"] = np.zeros(31, np.float32)
    del tensors["vision_model.encoder.layers.1.mlp.fc2.weight"]
    save_file(tensors, tmp_path / FILE)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(ValueError) as caught:
        read_clip(tmp_path)
    for part in (
        "'vision_model.encoder.layers.3.mlp.fc1.bias' is not in this model",
        "'vision_model.pre_layrnorm.bias' has shape [31], the model [32]",
        "vision_model.encoder.layers.1.mlp.fc2.weight is missing",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["SiglipVisionModel"]}, "SiglipVisionModel.*known are CLIPVisionModel"),
        ({"model_type": "llama"}, "known are CLIPVisionModel.*of model_type clip_vision_model or clip"),
        ({"hidden_act": "relu"}, "hidden_act='?relu'? is none of quick_gelu, gelu"),
        ({"patch_size": 5, "num_attention_heads": 5}, "num_attention_heads=5 does not divide.*patch_size=5 does not"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a whole number from 1"),
        ({"hidden_size": 2**15, "num_hidden_layers": 2**10}, "parameters, more than"),
    ],
)
def test_refused_configs(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((GOLDEN / "config.json").read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_clip_config(tmp_path)


def test_the_link_of_a_chain(golden):
    """The first one: the data deliver what it prepares. What is wrong names the link and its options."""
    clip, _, images, want = golden
    sizes = {"size": clip.config.image_size, "patch": clip.config.patch_size, "features": clip.config.hidden_size}
    codec = Chain((ClipVision(GOLDEN, **sizes),))
    net = codec.frozen
    np.testing.assert_allclose(net.draw(net.compute(net.params, images), None), want["features"], atol=1e-5)
    assert codec.delivered == net.preprocess(np.zeros((9, 5, 3), np.uint8)).shape == images.shape[1:]
    assert (codec.spec.tokens, codec.spec.features) == net.shape == want["features"].shape[1:]
    assert list(codec.fingerprint) == ["ClipVision"] and len(codec.fingerprint["ClipVision"]) > 15
    with pytest.raises(FileNotFoundError, match=r"'gone' does not exist: set path of clip_vision \(fields\."):
        _ = ClipVision("gone").params
    with pytest.raises(ValueError, match=r"image_size 28, not 224: set size, patch and features of clip_vision"):
        _ = ClipVision(GOLDEN).params


def test_images_are_prepared_as_transformers_does():
    """`CLIPImageProcessor` of transformers 4.38.0 at 28 pixels: wide, high, enlarged."""
    stored = np.load(GOLDEN / "preprocess.npz")
    for name in ("wide", "high", "small"):
        np.testing.assert_allclose(preprocess(stored[name], 28), stored[f"{name}_pixels"], atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="an image of 0 x 5 pixels cannot be resized"):
        preprocess(np.zeros((0, 5, 3), np.uint8))
