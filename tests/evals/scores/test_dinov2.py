"""DINOv2 against transformers 5.24.0 and torch 2.13.0 (golden arrays of random weights), and its Fréchet distance."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from src.common.tree import count_parameters
from src.evals.frechet import frechet_distance
from src.evals.networks.dinov2 import Dinov2, Dinov2Config, canonical, interpolation, preprocess, read_dinov2, smoothed
from src.tools import scores

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/dinov2"


def close(found, want, message="", share=2e-6):
    np.testing.assert_allclose(found, want, rtol=0, atol=share * np.abs(want).max(), err_msg=message)


@pytest.mark.parametrize("folder", [GOLDEN, GOLDEN / "registers"], ids=["plain", "registers"])
def test_states_and_features_are_those_of_transformers(folder):
    network, params = read_dinov2(folder)
    network = Dinov2(network.config, offset=0.0)  # as transformers interpolates positions
    want = np.load(folder / "expected.npz")
    images = jnp.moveaxis(want["images"], 1, -1)
    for depth, states in enumerate(want["hidden"]):
        close(network.hidden(params, images, depth), states, f"after {depth} blocks")
    close(jax.jit(network.features)(params, images), want["pooled"])


def test_positions_are_interpolated_as_the_published_code_does():
    """torch's interpolate with the factor (16 + 0.1) / 37; it computes places in float32."""
    want = np.load(GOLDEN / "expected.npz")
    matrix = interpolation(37, 16)
    close(matrix @ want["places"] @ matrix.T, want["fewer"], share=5e-6)
    np.testing.assert_array_equal(interpolation(16, 16), np.eye(16))
    want = np.load(GOLDEN / "registers/expected.npz")  # fewer of one axis, more of the other
    close(smoothed(37, 16) @ want["places"] @ smoothed(37, 40).T, want["fewer"], share=5e-6)
    np.testing.assert_array_equal(smoothed(16, 16), np.eye(16))


def test_published_sizes():
    """ViT-L/14 has 304,368,640 parameters (torch.hub's dinov2_vitl14), its mask token of 1,024 included; registers are
    four more tokens."""
    assert count_parameters(Dinov2().shapes()) == 304_368_640 - 1024
    assert count_parameters(Dinov2(Dinov2Config(num_register_tokens=4)).shapes()) == 304_368_640 + 3 * 1024


def test_images_are_prepared_as_by_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    found = preprocess(pixels, 28)
    resized = np.asarray(Image.fromarray(pixels).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    close(found[..., 2], (resized[..., 2] - 0.406) / 0.225)


def test_names_of_later_files_and_a_head(tmp_path):
    later = {
        "attention.query": "q_proj",
        "attention.key": "k_proj",
        "attention.value": "v_proj",
        "output.dense": "o_proj",
    }
    tensors = load_file(GOLDEN / "model.safetensors")
    for old, new in later.items():
        tensors = {name.replace(f"attention.{old}.", f"attention.{new}."): each for name, each in tensors.items()}
    tensors = {f"dinov2.{name}": each for name, each in tensors.items()} | {"classifier.weight": np.ones((2, 12))}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read_dinov2(tmp_path), read_dinov2(GOLDEN))
    assert canonical("dinov2_with_registers.embeddings.register_tokens") == "embeddings.register_tokens"


def test_the_distance_by_the_command(tmp_path, capsys):
    made, real = np.random.default_rng(0).integers(0, 256, (2, 20, 10, 12, 3)).astype(np.uint8)
    np.savez(tmp_path / "made.npz", made)
    np.savez(tmp_path / "real.npz", real)
    flags = [f"--images={tmp_path}/made.npz", f"--reference={tmp_path}/real.npz", f"--json={tmp_path}/s.json"]
    assert scores.main(["scores", "--network=dinov2", f"--weights={GOLDEN}", *flags, "--metrics=fid,kid"]) == 0
    network, params = read_dinov2(GOLDEN)
    features = lambda images: np.asarray(network.features(params, jnp.stack([preprocess(each) for each in images])))
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["scores"]["fd_dinov2"] == pytest.approx(frechet_distance(features(made), features(real)), rel=1e-3)
    assert set(report["scores"]) == {"fd_dinov2", "kd_dinov2", "kd_dinov2_std"}, "it is no FID"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "vit"}, "of model_type 'vit', and read are dinov2 and dinov2_with_registers"),
        ({"model_type": "dinov2_with_registers"}, "embeddings.register_tokens"),
        ({"use_swiglu_ffn": True}, "its blocks are gated"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide 12"),
        ({"hidden_size": 16}, r"\[1, 1, 12\], the model \[1, 1, 16\]"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change, told, tmp_path):
    shutil.copy(GOLDEN / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((GOLDEN / "config.json").read_text()) | change))
    with pytest.raises(ValueError, match=told) as caught:
        read_dinov2(tmp_path)
    assert "\n" not in str(caught.value)
