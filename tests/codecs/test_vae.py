"""Stable Diffusion's autoencoder: diffusers' numbers, its files in all their forms, and what is refused."""

import dataclasses
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

from src.codecs.chain import build_chain
from src.codecs.pixels import Pixels
from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import FILE, OLD, published_names, read_vae, read_vae_config, write_vae
from src.codecs.vae_latents import VaeLatents
from src.common.files.weight_mapping import export_weights
from src.common.tree import count_parameters, flatten

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "autoencoder_kl"
PARTS = ("mean", "logvar", "decoded")


def last(x):
    return jnp.moveaxis(x, 1, -1)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def golden():
    vae, params = read_vae(GOLDEN)
    return vae, params, {name: last(value) for name, value in np.load(GOLDEN / "expected.npz").items()}


def both(vae):
    """Moments of images and the images of their means, as one program."""

    def run(params, images):
        mean, log_variance = vae.moments(params, images)
        return mean, log_variance, vae.decode(params, vae.sample(mean, log_variance, None))

    return run


def test_moments_and_images_are_those_of_diffusers(golden):
    """With the rows on eight devices, and with another scale and shift, which the decoder undoes."""
    vae, params, want = golden
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    other = Vae(dataclasses.replace(vae.config, scaling_factor=0.5, shift_factor=3.0))
    images = jax.device_put(jnp.concatenate([want["image"]] * 4), rows)
    params = jax.device_put(params, everywhere)
    lowered = jax.jit(both(other)).lower(params, images)
    products = [line for line in lowered.as_text().splitlines() if re.search(r"\.(?:convolution|dot_general)", line)]
    assert products and all("HIGHEST" in line for line in products)  # accelerators take shorter ones unless told
    for name, value in zip(PARTS, lowered.compile()(params, images), strict=True):
        assert value.sharding.is_equivalent_to(rows, value.ndim)
        np.testing.assert_allclose(value, jnp.concatenate([want[name]] * 4), atol=1e-5, err_msg=name)


@pytest.mark.faults
def test_alone_without_jit_and_in_bfloat16(golden):
    """The error in bfloat16 is of the root mean square."""
    vae, params, want = golden
    image = want["image"][:1]
    mean, log_variance = vae.moments(params, image)
    np.testing.assert_allclose(mean, want["mean"][:1], atol=1e-5)
    np.testing.assert_allclose(log_variance, want["logvar"][:1], atol=1e-5)
    low = jax.jit(Vae(vae.config, "bfloat16").decode)(params, vae.sample(mean, log_variance, None))
    error = np.sqrt(np.mean((low - want["decoded"][:1]) ** 2) / np.mean(want["decoded"][:1] ** 2))
    assert low.dtype == jnp.float32 and 1e-4 < error < 0.03, error
    with pytest.raises(ValueError, match=r"images of 31 x 32 do not fit .* 2 x 2 pixels"):
        vae.moments(params, image[:, 1:])


def test_latents_are_drawn_from_the_posterior():
    """(mean + deviation · noise - shift) · scale; without a key the mean."""
    vae = Vae(VaeConfig(scaling_factor=0.5, shift_factor=3.0))
    mean = jnp.full((2, 64, 64, 4), 5.0)
    np.testing.assert_array_equal(vae.sample(mean, mean, None), 1.0)
    drawn = jax.jit(vae.sample)(mean, jnp.full(mean.shape, 2 * np.log(0.1)), jax.random.key(1))
    assert abs(drawn.mean() - 1.0) < 2e-3 and abs(drawn.std() - 0.05) < 1e-3


def test_published_sizes():
    """sd-vae-ft-mse: its parameters, its 248 tensors, and some of their names and shapes. Nothing is allocated."""
    like = Vae().shapes()
    assert count_parameters(like) == 83_653_863
    names = published_names(flatten(like))
    shapes = {names[path]: leaf.shape for path, leaf in flatten(like).items()}
    assert len(shapes) == 248 and VaeConfig().factor == 8
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"] == (1, 1, 128, 256)
    assert shapes["encoder.down_blocks.2.downsamplers.0.conv.bias"] == (512,)
    assert shapes["decoder.up_blocks.2.resnets.0.conv1.weight"] == (3, 3, 512, 256)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert not any(name.startswith("decoder.up_blocks.3.upsamplers") for name in shapes)


def test_files_in_all_their_forms(golden, tmp_path):
    vae, params, _ = golden
    tensors = load_file(GOLDEN / FILE)
    write_vae(tmp_path / "ours", vae, params)
    written = load_file(tmp_path / "ours" / FILE)
    assert written.keys() == tensors.keys() and all((written[n] == tensors[n]).all() for n in tensors)
    again, same = read_vae(tmp_path / "ours")
    assert again == vae
    equal(same, params)

    def folder(name, files, index=None):
        (tmp_path / name).mkdir()
        shutil.copy(GOLDEN / "config.json", tmp_path / name)
        for file, content in files.items():
            save_file(content, tmp_path / name / file)
        if index:
            where = {tensor: file for file, content in files.items() for tensor in content}
            (tmp_path / name / index).write_text(json.dumps({"weight_map": where}))
        return tmp_path / name

    new = {value: key for key, value in OLD.items()}
    older = {re.sub(r"(to_[qkv]|to_out\.0)(?=\.\w+$)", lambda m: new[m[1]], name): x for name, x in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in older
    halves = [dict(list(older.items())[i::2]) for i in range(2)]
    parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": half for i, half in enumerate(halves)}
    equal(read_vae(folder("older", parts, f"{FILE}.index.json"))[1], params)
    short = {name: x.astype(np.float16) for name, x in tensors.items()}
    _, read = read_vae(folder("short", {"diffusion_pytorch_model.fp16.safetensors": short}))
    equal(read, jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params))
    (tmp_path / "torch").mkdir()
    shutil.copy(GOLDEN / "config.json", tmp_path / "torch")
    (tmp_path / "torch" / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match="may run code"):
        read_vae(tmp_path / "torch")


def test_all_that_does_not_fit_is_in_one_message(golden, tmp_path):
    _, params, _ = golden
    tensors = export_weights(params, published_names(flatten(params)))
    attention = "encoder.mid_block.attentions.0."
    tensors["surprise"] = np.zeros(2, np.float32)
    tensors[f"{attention}query.weight"] = tensors[f"{attention}to_q.weight"]
    tensors["quant_conv.bias"] = np.zeros(8, np.int32)
    tensors["decoder.conv_in.weight"] = np.zeros((32, 4, 1, 1), np.float32)
    del tensors["encoder.conv_in.bias"], tensors["decoder.conv_out.weight"]
    save_file(tensors, tmp_path / FILE)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(ValueError) as caught:
        read_vae(tmp_path)
    for part in (
        "'surprise' is not in this model",
        f"'{attention}to_q.weight'",
        "quant_conv.bias' is int32, no float",
        "decoder.conv_in.weight' has shape [32, 4, 1, 1], the model [32, 4, 3, 3]",
        "encoder.conv_in.bias is missing",
        "decoder.conv_out.weight is missing",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny'?: known is AutoencoderKL"),
        ({"new_switch": True}, "new_switch=True is not known here and may change the function"),
        (
            {"act_fn": "relu", "layers_per_block": 0},
            "act_fn='relu', here 'silu' only.*|layers_per_block=0 is not a whole",
        ),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "here one DownEncoderBlock2D for each"),
        ({"block_out_channels": [16, 20]}, "norm_num_groups=8 does not divide the 20"),
        ({"block_out_channels": [16, "32"]}, "block_out_channels=.* is not a list"),
        ({"latents_mean": [0.0] * 4}, "latents_mean=.*, here None only"),
        ({"scaling_factor": True}, "scaling_factor=True is not a number"),
        ({"block_out_channels": [8192] * 8, "layers_per_block": 64}, "parameters, more than"),
    ],
)
def test_refused_configs(change, message, tmp_path):
    fields = json.loads((GOLDEN / "config.json").read_text()) | change
    fields["down_block_types"] = change.get(
        "down_block_types", ["DownEncoderBlock2D"] * len(fields["block_out_channels"])
    )
    fields["up_block_types"] = ["UpDecoderBlock2D"] * len(fields["block_out_channels"])
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_vae_config(tmp_path)


def test_configs_without_optional_fields(tmp_path):
    """The first files had no scaling factor; later ones have a shift and no 1 x 1 convolutions."""
    fields = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"layers_per_block": 2, "sample_size": 256}))
    assert read_vae_config(tmp_path) == VaeConfig()
    config = VaeConfig((8, 8), 1, 4, 16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    vae, draw = Vae(config), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), vae.shapes())
    write_vae(tmp_path, vae, params)
    again, same = read_vae(tmp_path)
    assert again == vae and "quant_conv" not in params
    equal(same, params)


def test_latents_hash(golden):
    """It changes with any bit that latents depend on, and with no other."""
    vae, params, _ = golden
    first = vae.latents_hash(params)
    assert re.fullmatch("[0-9a-f]{64}", first)
    decoder = params | {"decoder": jax.tree.map(lambda x: x + 1, params["decoder"])}
    assert Vae(vae.config, "bfloat16").latents_hash(decoder) == first
    bias = np.array(params["quant_conv"]["bias"])
    bias[0] = np.nextafter(bias[0], np.float32(9))
    assert vae.latents_hash(params | {"quant_conv": params["quant_conv"] | {"bias": bias}}) != first


def nothing(what, first):
    """No link here learns from data."""
    raise AssertionError(what)


def link(path="", size=8, channels=3, **options):
    """The autoencoder behind pixels."""
    return VaeLatents(path, Pixels(size, size, channels), **options)


def test_what_is_wrong_names_the_link_and_its_options():
    with pytest.raises(FileNotFoundError, match=r"'gone' does not exist: set path of vae_latents \(fields\."):
        _ = link("gone").params
    with pytest.raises(ValueError, match="set channels and factor of vae_latents"):
        _ = link(GOLDEN, factor=4).params
    with pytest.raises(ValueError, match="dtype='int8'"):
        link("gone", dtype="int8")
    for options in ({"size": 12}, {"channels": 1}):
        with pytest.raises(ValueError, match=r"needs 3 channels, and sides that are multiples of factor=8"):
            link("gone", **options)
    with pytest.raises(ValueError, match=r"fields\.image\.codec\.frozen: dtype='int8'"):
        frozen = {"name": "vae_latents", "path": "gone", "dtype": "int8"}
        build_chain(
            {"host": {"name": "pixels", "height": 8, "width": 8}, "frozen": frozen}, "fields.image.codec", nothing
        )


def test_the_link_between_pixels_and_patches(golden):
    """Pixels are encoded, moments that were kept are drawn from, latents that were kept stay; and back to pixels."""
    _, _, want = golden
    size = want["image"].shape[1]
    host = {"name": "pixels", "height": size, "width": size}
    frozen = {"name": "vae_latents", "path": str(GOLDEN), "factor": 2}
    codec = build_chain({"host": host, "frozen": frozen, "device": {"name": "patch", "size": 2}}, "codec", nothing)
    net = codec.frozen
    moments = net.compute(net.params, want["image"])
    np.testing.assert_allclose(moments, jnp.concatenate([want["mean"], want["logvar"]], axis=-1), atol=1e-5)
    mean = net.draw(moments, None)
    np.testing.assert_allclose(mean, want["mean"] * net.network.config.scaling_factor, atol=1e-5)
    assert (net.takes, net.shape, net.moments) == ((size, size, 3), mean.shape[1:], moments.shape[1:])
    for kept in (moments, mean):
        assert net.compute(None, kept) is kept
    assert net.draw(mean, jax.random.key(0)) is mean
    assert np.abs(net.draw(moments, jax.random.key(0)) - mean).max() > 1e-4
    tokens = codec.encode(mean)
    assert tokens.shape[1:] == (codec.spec.tokens, codec.spec.features) == ((size // 4) ** 2, 16)
    np.testing.assert_array_equal(codec.decode(tokens), mean)
    decoded = jnp.clip(want["decoded"], -1, 1)
    np.testing.assert_allclose(net.decode(net.params, mean), decoded, atol=1e-5)
    assert codec.fingerprint == {"VaeLatents": net.network.latents_hash(net.params)}
    with pytest.raises(ValueError, match="are neither pixels"):
        net.encodes((size, size, 5))
