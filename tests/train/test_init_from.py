"""A run that begins from converted weights: what it takes, that it goes on without them, and what it gives back."""

import dataclasses
import gc
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from src.build import build_system
from src.common.files.lazy_arrays import LazyArrays
from src.common.tree import flatten, rebuild
from src.doctor.held_out import HeldOut
from src.interfaces import FieldSpec
from src.models.heads.adaln import AdaLNHead
from src.models.pretrained.about import key_of
from src.models.pretrained.hf_vision_config import PublishedVision
from src.models.pretrained.initial_weights import Initial, write_initial
from src.models.pretrained.llama_weights import HEAD, TABLE
from src.tools import convert
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import check_config
from src.train.checkpoints.read_params import CheckpointParams
from src.train.init_from import InitFrom, make_init_from
from src.train.loop import ELASTIC, restore
from src.train.trainer import make_trainer
from tests.helpers.weights import config_from, published, with_checkpoint

# Orbax's readers drop their futures when one of them finds damage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def tidy():
    """Has Python report what Orbax's readers dropped here, where it is ignored."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The published tensors, the folder with the initial weights, and a trainer that begins from them."""
    folder = tmp_path_factory.mktemp("weights")
    tensors = published(folder / "llama")
    assert convert.main(["convert", f"--source={folder / 'llama'}", f"--out={folder / 'init'}"]) == 0
    trainer = make_trainer(build_system(config_from(folder / "init")))
    return tensors, folder, trainer, trainer.init()


def test_what_the_folder_has_is_taken_and_the_rest_is_initialised_as_always(world, caplog):
    tensors, folder, trainer, state = world
    got = flatten(state.params)
    new = [path for path in got if not path.startswith(("trunk/", "fields/text/"))]
    drawn = ("fields/image/embed/linear/kernel", "time/first/kernel")
    assert len(new) == 14 and set(drawn) < set(new)

    always = flatten(
        dataclasses.replace(trainer, system=dataclasses.replace(trainer.system, init_from=None)).init_params()
    )
    for path in drawn:
        np.testing.assert_array_equal(got[path], always[path])
    assert all(not np.asarray(got[path]).any() for path in new if path.endswith("bias"))
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1.mlp.down"):
            np.testing.assert_array_equal(got["trunk/layers/mlp/down/kernel"][1], tensor.T.astype(np.float32))
    np.testing.assert_array_equal(got[TABLE][:258], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(got[HEAD].T[:258], tensors["lm_head.weight"])
    wanted = flatten(trainer.abstract.params)
    split = 0
    for path, leaf in got.items():
        assert leaf.dtype == wanted[path].dtype and leaf.sharding == wanted[path].sharding, path
        split += not leaf.sharding.is_fully_replicated
    assert split > 10
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    assert trainer.system.identity()["weights"] == Initial(folder / "init").hash
    with caplog.at_level(logging.INFO):
        trainer.system.init_from.read(trainer.abstract.params, zeros)
    assert "from" in caplog.text and "parameters of 12 leaves (fields/text, trunk)" in caplog.text
    assert "initialized at random" in caplog.text and "fields/image/head/linear/kernel" in caplog.text


def begun(trainer, path, **init_from):
    """The same trainer with other weights to begin from."""
    config = config_from(path, **init_from)
    system = dataclasses.replace(trainer.system, config=config, init_from=make_init_from(config))
    return dataclasses.replace(trainer, system=system)


def zeros(paths):
    """What is initialised by the config, without compiling anything."""
    return {path: jnp.zeros(()) for path in paths}


def test_the_run_goes_on_without_the_folder_and_notices_another(world, tmp_path, monkeypatch):
    _, folder, trainer, state = world
    shutil.copytree(folder / "init", tmp_path / "init")
    first = begun(trainer, tmp_path / "init")
    with_checkpoint(tmp_path / "run", first, state.replace(step=jnp.int32(3)))
    shutil.move(tmp_path / "init", tmp_path / "moved")

    again = begun(trainer, tmp_path / "init")
    assert again.system.identity()["weights"] is None
    found, step, _ = restore(again, Checkpointer(tmp_path / "run"))
    assert step == 3 and again.system.identity() == first.system.identity()
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    moved = begun(trainer, tmp_path / "moved").system.identity()
    assert list(check_config(first.system.identity(), moved, ELASTIC)) == ["init_from.path"]  # equal weights elsewhere

    published(tmp_path / "llama", seed=1)
    convert.main(["convert", f"--source={tmp_path / 'llama'}", f"--out={tmp_path / 'init'}"])
    for path in (tmp_path / "init", tmp_path / "nowhere", ""):
        with pytest.raises(ValueError, match=r"weights: .* set init_from to the run's initial weights"):
            restore(begun(trainer, path), Checkpointer(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match=r"nowhere. do not exist: correct the path"):
        begun(trainer, tmp_path / "nowhere").init_params()
    monkeypatch.setattr("src.doctor.held_out._held_out", lambda name, plan: False)  # there are no data
    assert HeldOut(begun(trainer, tmp_path / "nowhere"))._at_the_start(state) == {}


def test_a_trained_run_is_published_and_read_back(world, tmp_path, capsys):
    """With our order of the head's outputs, which is turned around on the way; the average, in bfloat16, too."""
    _, _, trainer, state = world
    draw = lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype)
    params, ema = jax.tree.map(draw, state.params), jax.tree.map(lambda x: 2 * draw(x), state.params)
    with_checkpoint(tmp_path / "run", trainer, state.replace(params=params, ema=ema, opt_state=(), step=jnp.int32(7)))
    run = lambda *flags: convert.main(["convert", f"--source={tmp_path / 'run'}", *flags])
    assert run(f"--out={tmp_path / 'out'}", "--step=7") == 0, capsys.readouterr()
    assert "MonoFormerForCausalLM" in capsys.readouterr().out and (tmp_path / "out" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["image_size"], config["vocab_size"], config["image_token_index"]) == (256, 262, 259)
    assert (config["learn_sigma"], config["decoder_t_embed"]) == (True, "add_before_image_tokens")
    assert config["max_position_embeddings"] == 64  # as it came

    assert convert.main(["convert", f"--source={tmp_path / 'out'}", f"--out={tmp_path / 'back'}"]) == 0
    back, want = Initial(tmp_path / "back").tensors, flatten(params)
    assert set(back) == set(want)
    for path, leaf in want.items():
        if not path.startswith("fields/image/head/linear"):
            np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    rng = np.random.default_rng(0)
    hidden, vector = jnp.asarray(rng.normal(size=(2, 4, 32)), "float32"), jnp.ones((2, 1, 32))
    heads = []
    for order, leaves in (("crs", want), ("rsc", back)):
        options = {"outputs": 32, "order": order, "channels": 4, "rngs": nnx.Rngs(0)}
        graph, like = nnx.split(AdaLNHead(width=32, spec=FieldSpec((16, 16), features=16), **options))
        like = nnx.to_pure_dict(like)
        own = {path: jnp.asarray(leaves[f"fields/image/head/{path}"]) for path in flatten(like)}
        heads.append(nnx.merge(graph, nnx.State(rebuild(own, like)))(hidden, vector))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *heads)

    assert run(f"--out={tmp_path / 'half'}", "--ema", "--dtype=bfloat16") == 0
    half = load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(half, np.asarray(flatten(ema)["trunk/final_norm/scale"], ml_dtypes.bfloat16))
    capsys.readouterr()
    assert run("--info") == 0 and "began from the initial weights" in capsys.readouterr().out
    for flags, words in (
        (["--step=6"], "there is no checkpoint of step 6"),
        (["--step=best"], "checkpoint.best.metric is not set"),
    ):
        assert run(f"--out={tmp_path / 'none'}", *flags) == 1
        assert words in capsys.readouterr().err
    saved = CheckpointParams(tmp_path / "run" / "checkpoints" / "7")
    saved._saved["trunk/final_norm/scale"]["print"] ^= 1
    with pytest.raises(ValueError, match=r"damaged \(.*params/trunk/final_norm/scale has a wrong fingerprint"):
        next(saved.blocks("trunk/final_norm/scale"))
    damage(tmp_path / "run" / "checkpoints" / "7" / "state")
    assert run(f"--out={tmp_path / 'none'}") == 1
    assert "is damaged" in capsys.readouterr().err


def damage(folder):
    """Flips a bit in every large file."""
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(bytes(data))


def test_what_does_not_fit_is_told_before_anything_is_read(world):
    _, folder, trainer, _ = world
    model = trainer.system.config.model.to_dict()
    model["trunk"] |= {"heads": 4, "rope_theta": 5e5}
    like = flatten(trainer.abstract.params)
    like["trunk/layers/mlp/down/kernel"] = jax.ShapeDtypeStruct((2, 96, 32), "float32")
    start = InitFrom(str(folder / "init"), config={"model": model})
    with pytest.raises(ValueError, match=r"for another model \(.*\): set .*model\.trunk\.heads=2") as error:
        start.read(like, zeros)
    for words in ("model.trunk.heads is 2 there and 4 here", "model.trunk.rope_theta is 10000.0 there and 500000.0",
                  "trunk/layers/mlp/down/kernel is [2, 64, 32] there and [2, 96, 32] here"):  # fmt: skip
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"skip has rules without a match in .*: vision"):
        begun(trainer, folder / "init", skip=("text/head", "vision")).init_params()
    with pytest.raises(ValueError, match=r"skip has a rule that is not a regex"):
        make_init_from(config_from(folder / "init", skip=("(",)))


def test_the_average_and_parts_of_a_folder_and_damage(world, tmp_path):
    _, folder, trainer, state = world
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(state.params).items()}
    write_initial(
        tmp_path / "init", LazyArrays(leaves | {"fields/label/embed/table/embedding": np.zeros((3, 4), np.float32)}), {}
    )
    shutil.copytree(tmp_path / "init", tmp_path / "whole" / "ema")
    shutil.copytree(folder / "init", tmp_path / "whole", dirs_exist_ok=True)
    ema = begun(trainer, tmp_path / "whole", ema=True).init_params()
    jax.tree.map(np.testing.assert_array_equal, ema, state.params)
    start = InitFrom(str(tmp_path / "whole"), skip=("^fields/text/head/",))
    part = flatten(start.read(trainer.abstract.params, zeros))
    assert part[HEAD].shape == part["fields/image/embed/linear/bias"].shape == ()
    np.testing.assert_array_equal(part["trunk/final_norm/scale"], leaves["trunk/final_norm/scale"])
    damage(tmp_path / "whole" / "ema")
    with pytest.raises(ValueError, match=r"are damaged: .* came otherwise than they were written"):
        InitFrom(str(tmp_path / "whole"), ema=True).read(trainer.abstract.params, zeros)


def square(size, **frozen):
    """A codec of images in a square, of their latents or their pixels."""
    host = {"name": "pixels", "height": size, "width": size, "fit": "letterbox"}
    links = {"host": host, "device": {"name": "patch", "size": 2}}
    return links | ({"frozen": {"name": "vae_latents"} | frozen} if frozen else {})


@pytest.mark.parametrize(
    "codec, field",
    [
        (square(32), "frozen.name is 'vae_latents' there and None here"),
        (square(64, path="here"), "host.height is 32 there and 64 here"),
        ({"name": "clip_vision"}, "frozen.name is 'vae_latents' there and 'clip_vision' here"),
        ({}, "device.size is 2 there and None here"),
    ],
)
def test_a_projector_for_another_encoder_is_refused(codec, field, tmp_path):
    leaves = LazyArrays({"fields/vision/embed/first/kernel": np.zeros((16, 4), np.float32)})
    made = PublishedVision("vae", "hub/name", {"resolution": 32}).about()
    write_initial(tmp_path, leaves, made | {"fields.image.head.order": "rsc", "model.trunk.depth": 2})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"fields": {"vision": {"embed": {"first": {"kernel": jax.ShapeDtypeStruct((16, 4), np.float32)}}}}}
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), like)
    config = lambda codec: {"fields": {"vision": {"codec": codec}, "image": {}}, "model": {"trunk": {"depth": 3}}}
    assert InitFrom(str(tmp_path), config=config(square(32, path="here"))).read(like, zeros)
    with pytest.raises(ValueError, match=r": set fields\.vision\.codec\.") as error:
        InitFrom(str(tmp_path), config=config(codec)).read(like, zeros)
    assert f"fields.vision.codec.{field}" in str(error.value)
    assert "trunk" not in str(error.value) and "image" not in str(error.value), "of parameters that are not taken"


def test_an_option_of_a_codec_is_named_where_the_config_has_it():
    name = "fields.text.codec.host.reserved"
    link = {"name": "text:Llama", "reserved": 3}
    for codec, key in (
        (link, "fields.text.codec.reserved"),
        ({"host": link}, name),
        ([link], "fields.text.codec[0].reserved"),
        ({"host": {"name": "pixels"}}, name),
    ):
        assert key_of({"fields": {"text": {"codec": codec}}}, name) == key
    assert key_of({"fields": {}}, name) == name and key_of({}, "model.trunk.width") == "model.trunk.width"


def test_the_advice_about_reserved_rows_can_be_followed(tmp_path):
    leaves = LazyArrays({"fields/text/embed/table/embedding": np.zeros((16, 4), np.float32)})
    write_initial(tmp_path, leaves, {"fields.text.codec.host.reserved": 20})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"fields": {"text": {"embed": {"table": {"embedding": np.zeros((16, 4), np.float32)}}}}}
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), like)
    config = lambda **codec: {"fields": {"text": {"codec": {"name": "text:Llama", "path": "a"} | codec}}}
    with pytest.raises(ValueError, match=r": set fields\.text\.codec\.reserved=20, or"):
        InitFrom(str(tmp_path), config=config()).read(like, zeros)
    assert InitFrom(str(tmp_path), config=config(reserved=20)).read(like, zeros)
