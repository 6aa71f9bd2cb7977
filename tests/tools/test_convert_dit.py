"""Published DiT and SiT through the tool, against their formulas: what the network gives with the converted weights."""

import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import common
from src.codecs.patch import Patch
from src.common.files.safetensors import CONVERT
from src.common.tree import unflatten
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear, LinearBetas
from src.interfaces import Batch, Field, FieldSpec, Tokens, View
from src.models.build import build_architecture
from src.models.layers import sincos_2d
from src.models.model import bind
from src.models.pretrained.about import value_of
from src.models.pretrained.initial_weights import Initial
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers.published import run

D, HEADS, DEPTH, SIDE, C, CLASSES = 16, 2, 2, 4, 4, 3
PATCH = Patch(2, before=types.SimpleNamespace(shape=(2 * SIDE, 2 * SIDE, C)))


def tensors():
    """A tiny one by its published names; the output has as many channels more, for a variance."""
    rng = np.random.default_rng(0)
    shapes = {"x_embedder.proj": (D, C, 2, 2), "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * D, D), "final_layer.linear": (4 * 2 * C, D)}
    block = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    block |= {"adaLN_modulation.1": (6 * D, D)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in block.items()}
    found = {f"{name}.weight": rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
    found |= {f"{name}.bias": rng.normal(0, 0.2, shape[:1]) for name, shape in shapes.items()}
    found |= {"y_embedder.embedding_table.weight": rng.normal(0, 1, (CLASSES + 1, D))}
    found |= {"pos_embed": sincos_2d(SIDE, SIDE, D)[None]}
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def published(w, x, t, y):
    """The published formula: [B, C, h, w], times as the network reads them, classes -> [B, 2C, h, w]."""
    w = {name: tensor.astype(np.float64) for name, tensor in w.items()}
    linear = lambda name, v: v @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    silu = lambda v: v / (1 + np.exp(-v))
    norm = lambda v: (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)
    gelu = lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
    modulate = lambda v, shift, scale: norm(v) * (1 + scale[:, None]) + shift[:, None]
    b = len(x)
    cut = x.reshape(b, C, SIDE, 2, SIDE, 2)
    h = np.einsum("bcirjs,dcrs->bijd", cut, w["x_embedder.proj.weight"]).reshape(b, SIDE**2, D)
    h = h + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t[:, None].astype(np.float32) * (10_000.0 ** (-np.arange(128) / 128)).astype(np.float32)  # in f32 there
    features = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
    c = silu(c + w["y_embedder.embedding_table.weight"][y])
    for i in range(DEPTH):
        parts = np.split(linear(f"blocks.{i}.adaLN_modulation.1", c), 6, -1)
        qkv = linear(f"blocks.{i}.attn.qkv", modulate(h, *parts[:2])).reshape(b, -1, 3, HEADS, D // HEADS)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(D // HEADS))
        seen = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(b, -1, D)
        h = h + parts[2][:, None] * linear(f"blocks.{i}.attn.proj", seen)
        inner = gelu(linear(f"blocks.{i}.mlp.fc1", modulate(h, *parts[3:5])))
        h = h + parts[5][:, None] * linear(f"blocks.{i}.mlp.fc2", inner)
    out = linear("final_layer.linear", modulate(h, *np.split(linear("final_layer.adaLN_modulation.1", c), 2, -1)))
    return np.einsum("bijrsc->bcirjs", out.reshape(b, SIDE, SIDE, 2, 2, 2 * C)).reshape(b, 2 * C, 2 * SIDE, -1)


def ours(network, folder, x, times, y):
    """Our network's output for the converted weights: patches [B, N, features]."""
    sit = network == "sit"
    schedule = Linear(time_scale=1.0) if sit else LinearBetas()
    kind = {"parameterization": "velocity"} if sit else {"parameterization": "eps", "variance": "learned_range"}
    process = Gaussian(field=PATCH.spec, schedule=schedule, **kind)
    head = {"name": "adaln", "order": "rsc", "channels": C, "unused_variance": sit}
    groups = {"image": {"embed": {"name": "patches"}, "head": head}, "label": {"embed": {"name": "classes"}}}
    table = {
        "image": Field("image", PATCH.spec, None, process),
        "label": Field("label", FieldSpec(vocab=CLASSES), None),
    }
    model = common.dit(width=D, depth=DEPTH, heads=HEADS) | {"dtype": "float32", "time": {}}
    architecture, init = build_architecture(model, groups, table)
    found = Initial(folder)
    want = {path: leaf.shape for path, leaf in found.shapes.items()}
    like = jax.eval_shape(init, jax.random.key(0))
    params = unflatten({path: jnp.asarray(np.stack([*found.blocks(path)]) if path.startswith("trunk/layers/")
                        else next(found.blocks(path))) for path in found.shapes})  # fmt: skip
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, like), want
    layout = FixedLayout((Segment("image", PATCH.tokens, "bidirectional", role="noisy"),))
    z = PATCH.encode(jnp.moveaxis(jnp.asarray(x, jnp.float32), 1, -1))
    tokens = Tokens(np.zeros(z.shape, np.float32), np.ones(z.shape[:2], bool), np.ones(z.shape[:2], bool))
    view = View(Batch({"image": tokens}, {"label": jnp.asarray(y)}), layout)
    times = schedule.time_input(jnp.asarray(times, jnp.float32))[:, None]
    view = view.replace(noisy={"image": z}, times={"image": times})

    @jax.jit
    def compute(params):
        net = bind(architecture, params)
        hidden = net.hidden({"image": view})["image"]
        return net.field("image")(hidden.of("image"), hidden.vectors["image"])

    return compute(params)


@pytest.mark.parametrize("network", ["dit", "sit"])
def test_the_network_computes_what_the_published_one_does(network, tmp_path, capsys):
    """DiT's noise and variance at its step numbers; SiT's velocity, whose time and sign are the other way round."""
    save_file(tensors(), tmp_path / "model.safetensors")
    code, said, error = run(capsys, source=tmp_path, out=tmp_path / "init", network=network, heads=HEADS)
    assert code == 0 and "hash" in said, error
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, C, 2 * SIDE, 2 * SIDE)), np.array([0, 2, CLASSES])  # the last: no class
    patches = lambda values: np.asarray(PATCH.encode(jnp.moveaxis(jnp.asarray(values, jnp.float32), 1, -1)))
    if network == "sit":
        t = np.array([0.1, 0.6, 0.93])
        want = -patches(published(tensors(), x, 1 - t, y)[:, :C])
    else:
        t = (np.array([0, 421, 999]) + 1) / 1000
        out = published(tensors(), x, t * 1000 - 1, y)
        want = np.concatenate([patches(out[:, :C]), patches(out[:, C:])], -1)
    got = ours(network, tmp_path / "init", x, t, y)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())  # angles up to 999 are rounded in f32


def test_what_the_weights_are_made_for_is_what_the_config_has(tmp_path, capsys):
    """Of SiT as published; sizes are those of the tensors."""
    from configs import sit_xl2_imagenet256

    save_file(tensors(), tmp_path / "model.safetensors")
    assert run(capsys, source=tmp_path, out=tmp_path / "init", network="sit", heads=HEADS)[0] == 0
    about = Initial(tmp_path / "init").meta["about"]
    config = sit_xl2_imagenet256.get_config("official").to_dict()
    sizes = ("width", "depth", "heads", "kv_heads", "mlp_width")
    for name, value in about.items():
        if name.rpartition(".")[2] not in sizes:
            assert value_of(config, name) == value, name
    assert [about[f"model.trunk.{name}"] for name in sizes] == [D, DEPTH, HEADS, HEADS, 4 * D]
    plain = sit_xl2_imagenet256.get_config().to_dict()
    differ = {name for name, value in about.items() if value_of(plain, name) != value}
    assert {"fields.image.process.schedule.time_scale", "fields.image.head.order"} <= differ


def spoilt(change):
    found = tensors()
    change(found)
    return found


@pytest.mark.parametrize(
    "change, flags, words",
    [
        (lambda w: None, {"heads": HEADS}, "a DiT or a SiT, which are alike: give --network=dit or sit"),
        (lambda w: None, {"network": "dit"}, "width 16, and its attention has unknown heads: give --heads"),
        (lambda w: None, {"network": "dit", "heads": 3}, "has 3 heads: give --heads, which divide the width"),
        (lambda w: w.pop("t_embedder.mlp.0.bias"), {}, "t_embedder.mlp.0.bias is missing"),
        (lambda w: w.update(surprise=np.zeros(2, np.float32)), {}, "'surprise' is not in this model"),
        (lambda w: w.update({"blocks.1.mlp.fc2.bias": np.zeros(3, np.float32)}), {}, "has shape [3], and [16] would"),
        (lambda w: w.update({"pos_embed": w["pos_embed"] + 1}), {}, "other numbers than the fixed sin-cos positions"),
        (lambda w: w.update({"pos_embed": w["pos_embed"][:, :3]}), {}, "other numbers than the fixed sin-cos"),
        (lambda w: w.update({"final_layer.linear.bias": np.zeros(32, np.int32)}), {}, "is int32, no float"),
    ],
)
def test_everything_that_is_wrong_is_one_sentence(change, flags, words, tmp_path, capsys):
    save_file(spoilt(change), tmp_path / "model.safetensors")
    flags = flags or {"network": "sit", "heads": HEADS}
    code, _, error = run(capsys, source=tmp_path, out=tmp_path / "init", **flags)
    assert code == 1 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "init").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_a_pt_file_goes_through_the_command_that_the_message_gives(whole, tmp_path, capsys):
    """The file itself or its folder; of a checkpoint of training the average is taken. The command runs with a stand-in
    for torch, whose `load` gives arrays."""
    (tmp_path / "SiT-XL-2.pt").write_bytes(b"PK\x03\x04")
    code, _, error = run(capsys, source=tmp_path / "SiT-XL-2.pt" if whole else tmp_path, out=tmp_path / "init")
    assert code == 1 and CONVERT.replace("FILE", "SiT-XL-2.pt") in error
    np.savez(tmp_path / "arrays.npz", **tensors())
    for name, text in {
        "torch/__init__.py": STAND_IN,
        "safetensors/torch.py": "from numpy_files import save_file\n",
        "safetensors/__init__.py": "",
        "numpy_files.py": SAVE,
    }.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(text.replace("WHOLE", repr(whole)))
    command = CONVERT.partition(' -c "')[2].rpartition('"')[0].replace("FILE", "SiT-XL-2.pt")
    env = {"PYTHONPATH": str(tmp_path / "lib")}
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=env, check=True)
    (tmp_path / "saved.npz").rename(tmp_path / "arrays.npz")
    save_file(dict(np.load(tmp_path / "arrays.npz")), tmp_path / "model.safetensors")
    assert run(capsys, source=tmp_path, out=tmp_path / "init", network="sit", heads=HEADS)[0] == 0
    assert json.loads((tmp_path / "init" / "weights.json").read_text())["about"]["model.trunk.width"] == D
    assert load_file(tmp_path / "init" / "model.safetensors").keys() == Initial(tmp_path / "init").shapes.keys()


STAND_IN = """
import types, numpy
class T(numpy.ndarray):
    def contiguous(self): return self
    def clone(self): return self
serialization = types.SimpleNamespace(add_safe_globals=lambda kinds: None)
def load(name, map_location, weights_only):
    assert (name, map_location, weights_only) == ('SiT-XL-2.pt', 'cpu', True)
    arrays = {k: v.view(T) for k, v in numpy.load('arrays.npz').items()}
    return arrays if WHOLE else {'model': None, 'ema': arrays, 'opt': {}, 'args': None}
"""
SAVE = """
import numpy
def save_file(tensors, name):
    assert name == 'model.safetensors'
    numpy.savez('saved.npz', **tensors)
"""
