"""DINOv2 (Oquab et al. 2023; transformers' `Dinov2Model`): images -> the normalized class token, for FD-DINOv2.

Stein et al. 2023 compare these features of ViT-L/14. The blocks are those of `codecs/clip.py`, each part scaled by a
learned vector. The positions, which are of 37 x 37 patches, are interpolated to the image's 16 x 16.

Networks with registers (Darcet et al. 2024; transformers' `Dinov2WithRegistersModel`) have learned tokens without
positions behind the class token, and their positions are interpolated with anti-aliasing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, UInt8

from src.codecs.clip import TowerBlock, run_blocks
from src.codecs.clip_files import BYTES, wrong_fields
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.strict_json import read_json
from src.common.files.weight_mapping import import_weights
from src.common.tree import flatten, listed

SIDE = 224  # pixels of the images that are compared
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue in [0, 1], ImageNet's
OFFSET = 0.1  # patches that the published code adds to the size of the grid that positions are interpolated to
SHARPNESS = -0.75  # of PyTorch's cubic interpolation
SMOOTH = -0.5  # the same with anti-aliasing
# Kinds of networks in transformers, and what it takes where these fields are absent.
KINDS = {
    "dinov2": {"num_register_tokens": 0, "patch_size": 14},
    "dinov2_with_registers": {"num_register_tokens": 4, "patch_size": 16},
}
# What transformers takes where a field is absent, and lowest and highest value.
FIELDS: dict[str, tuple[Any, int | float, int | float]] = {
    "hidden_size": (768, 1, 2**15),
    "num_hidden_layers": (12, 1, 2**10),
    "num_attention_heads": (12, 1, 2**10),
    "mlp_ratio": (4, 1, 64),
    "image_size": (224, 1, 2**13),
    "patch_size": (14, 1, 2**10),
    "num_channels": (3, 3, 3),
    "num_register_tokens": (0, 0, 64),
    "layer_norm_eps": (1e-6, 1e-12, 0.1),
}
SINGLE = {
    "class_token": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "positions": "embeddings.position_embeddings",
    "patch_embedding/kernel": "embeddings.patch_embeddings.projection.weight",
    "patch_embedding/bias": "embeddings.patch_embeddings.projection.bias",
    "norm/scale": "layernorm.weight",
    "norm/bias": "layernorm.bias",
}
INSIDE = {"q_proj": "attention.attention.query", "k_proj": "attention.attention.key"}
INSIDE |= {"v_proj": "attention.attention.value", "out_proj": "attention.output.dense"}
INSIDE |= {"layer_norm1": "norm1", "layer_norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
SCALES = {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}
LATER = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}
PREFIX = re.compile(r"^dinov2(_with_registers)?\.")  # where the network was saved with a head


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Sizes of the network, in the names of transformers' `config.json`; the defaults are those of ViT-L/14."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    image_size: int = 518
    patch_size: int = 14
    num_channels: int = 3
    num_register_tokens: int = 0
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"

    @property
    def intermediate_size(self) -> int:
        """Between the two layers of a block's mlp."""
        return self.hidden_size * self.mlp_ratio

    @property
    def grid(self) -> int:
        """Patches of a side that there are positions for."""
        return self.image_size // self.patch_size


class ScaledBlock(TowerBlock):
    """x + a · attention(norm(x)), then x + b · mlp(norm(x)), with learned vectors a and b."""

    def __init__(self, config: Any, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.scale1, self.scale2 = (nnx.Param(jnp.ones(config.hidden_size)) for _ in range(2))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = x + self.scale1[...] * self.attend(self.layer_norm1(x))
        return x + self.scale2[...] * self.fc2(jax.nn.gelu(self.fc1(self.layer_norm2(x)), approximate=False))


class Dinov2Tower(nnx.Module):
    """Patches and a class token with learned positions, registers without, stacked blocks `[L]`, a norm; f32."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        width, patch = config.hidden_size, (config.patch_size,) * 2
        args = {"strides": patch, "padding": "VALID", "precision": jax.lax.Precision.HIGHEST, "rngs": rngs}
        self.patch_embedding = nnx.Conv(3, width, patch, **args)
        normal = nnx.initializers.normal(0.02)
        self.class_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        self.positions = nnx.Param(normal(rngs.params(), (1, config.grid**2 + 1, width)))
        if config.num_register_tokens:
            self.registers = nnx.Param(normal(rngs.params(), (1, config.num_register_tokens, width)))
        make = lambda keys: ScaledBlock(config, jnp.float32, keys)
        self.layers = nnx.split_rngs(splits=config.num_hidden_layers)(nnx.vmap(make))(rngs)
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.grid = config.grid

    def hidden(self, images: Float[Array, "B h w 3"], depth: int, offset: float) -> Float[Array, "B T D"]:
        """States after `depth` blocks, the class token first, then the registers."""
        x = self.patch_embedding(images)
        places = self.positions[...][0, 1:].reshape(self.grid, self.grid, -1)
        for axis in (0, 1):
            size = x.shape[1 + axis]
            smooth = hasattr(self, "registers")
            matrix = smoothed(self.grid, size) if smooth else interpolation(self.grid, size, offset)
            places = jnp.moveaxis(jnp.tensordot(matrix, places, (1, axis), precision="highest"), 0, axis)
        x = (x + places).reshape(x.shape[0], -1, x.shape[-1])
        first = [self.class_token[...] + self.positions[...][:, :1]]
        first += [self.registers[...]] if hasattr(self, "registers") else []
        x = jnp.concatenate([*(jnp.repeat(each, x.shape[0], axis=0) for each in first), x], axis=1)
        return run_blocks(self.layers, x, depth)


def interpolation(have: int, want: int, offset: float = OFFSET) -> Float[np.ndarray, "{want} {have}"]:
    """The matrix of PyTorch's cubic interpolation of `have` values to `want`, where the scale is that of `want` +
    `offset`; the identity where both are equal."""
    if have == want:
        return np.eye(have, dtype=np.float32)
    places = (np.arange(want) + 0.5) * have / (want + offset) - 0.5
    low = np.floor(places).astype(int)
    found = np.zeros((want, have))
    for step in range(-1, 3):
        distance = np.abs(places - low - step)
        np.add.at(found, (np.arange(want), np.clip(low + step, 0, have - 1)), _cubic(distance, SHARPNESS))
    return found.astype(np.float32)


def smoothed(have: int, want: int) -> Float[np.ndarray, "{want} {have}"]:
    """The matrix of PyTorch's cubic interpolation of `have` values to `want` with anti-aliasing: where there are fewer,
    each is a mean over as many more; the identity where both are equal."""
    if have == want:
        return np.eye(have, dtype=np.float32)
    scale = have / want
    wide = max(scale, 1.0)
    distance = np.abs(np.arange(have) + 0.5 - scale * (np.arange(want)[:, None] + 0.5)) / wide
    found = _cubic(distance, SMOOTH)
    return (found / found.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(distance: np.ndarray, sharpness: float) -> np.ndarray:
    """The weight of a value so far away (Keys 1981): 1 at 0, 0 from 2 on."""
    a, d = sharpness, distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


@dataclasses.dataclass(frozen=True)
class Dinov2:
    """The network as pure functions of its parameters, a nested dict of f32 arrays.

    offset   of `interpolation`: the published code's, or 0 as transformers has it; of no use with registers
    """

    config: Dinov2Config = Dinov2Config()
    offset: float = OFFSET

    def shapes(self) -> dict[str, Any]:
        """The tree of the parameters as abstract arrays."""
        return _abstract(self.config)[1]

    def features(self, params: Any, images: Float[Array, "B h w 3"]) -> Float[Array, "B D"]:
        """The class token behind the last norm, of images that `preprocess` prepared."""
        states = self.hidden(params, images, self.config.num_hidden_layers)
        return self._tower(params).norm(states[:, 0])

    def hidden(self, params: Any, images: Float[Array, "B h w 3"], depth: int) -> Float[Array, "B T D"]:
        """States after `depth` blocks."""
        return self._tower(params).hidden(images, depth, self.offset)

    def _tower(self, params: Any) -> Dinov2Tower:
        return nnx.merge(_abstract(self.config)[0], nnx.State(params))


def preprocess(pixels: UInt8[np.ndarray, "h w 3"], size: int = SIDE) -> Float[np.ndarray, "{size} {size} 3"]:
    """An image as Stein et al. 2023 prepare it, on the host: `size` x `size` pixels of 8 bits whatever its shape was
    (bicubic, with anti-aliasing), [0, 1], minus `MEAN`, over `DEVIATION`."""
    from PIL import Image

    resized = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    return (resized.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION)


def read_dinov2(folder: str | os.PathLike[str]) -> tuple[Dinov2, Any]:
    """The network in a folder (config.json, model.safetensors), and its parameters.

    Raises FileNotFoundError, OSError, and ValueError, in one sentence, for files that cannot be used.
    """
    config = read_dinov2_config(folder)
    like = _abstract(config)[1]
    names = {path: _name(path, config.num_hidden_layers) for path in flatten(like)}
    return Dinov2(config), import_weights(SafeTensors(folder), names, like, canonical)


def read_dinov2_config(folder: str | os.PathLike[str]) -> Dinov2Config:
    """The sizes in a folder's `config.json`.

    Raises FileNotFoundError, and ValueError, in one sentence, for another network, also one with gated blocks (ViT-g),
    and for sizes that cannot be.
    """
    path = epath.Path(folder) / "config.json"
    fields, where = read_json(path, limit=BYTES, what="config"), f"the config {shown(path)}"
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{where} is of model_type {shown(kind)}, and read are {' and '.join(KINDS)}")
    fields = KINDS[kind] | fields | ({} if kind != "dinov2" else {"num_register_tokens": 0})
    given = {name: fields.get(name, default) for name, (default, _, _) in FIELDS.items()}
    wrong = wrong_fields(given | {"hidden_act": fields.get("hidden_act", "gelu")}, FIELDS)
    if fields.get("hidden_act", "gelu") != "gelu" or fields.get("use_swiglu_ffn", False):
        wrong.append("its blocks are gated or have another activation than gelu")
    if not wrong and given["hidden_size"] % given["num_attention_heads"]:
        wrong.append(f"num_attention_heads={given['num_attention_heads']} does not divide {given['hidden_size']}")
    if not wrong and SIDE % given["patch_size"]:
        wrong.append(f"patches of {given['patch_size']} pixels do not divide images of {SIDE}")
    if wrong:
        raise ValueError(f"{where} cannot be used: {listed(wrong)}; give the config that belongs to the weights")
    return Dinov2Config(**given)


def canonical(name: str) -> str | None:
    """The published name of a tensor: without a prefix, and as before transformers 5; None for what is not read."""
    name = PREFIX.sub("", name)
    later = re.fullmatch(r"(encoder\.layer\.\d+\.attention)\.([qkvo]_proj)\.(weight|bias)", name)
    if later:
        return f"{later[1]}.{LATER[later[2]]}.{later[3]}"
    return None if name == "embeddings.mask_token" or name.startswith("classifier.") else name


def _name(path: str, layers: int) -> str | tuple[str, ...]:
    """The published name of a leaf, or those of its blocks."""
    if path in SINGLE:
        return SINGLE[path]
    inner = path.removeprefix("layers/")
    stem, _, leaf = inner.rpartition("/")
    part = SCALES.get(inner) or f"{INSIDE[stem]}.{'bias' if leaf == 'bias' else 'weight'}"
    return tuple(f"encoder.layer.{i}.{part}" for i in range(layers))


@functools.cache
def _abstract(config: Dinov2Config) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Dinov2Tower(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)
