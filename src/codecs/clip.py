"""The vision tower of CLIP (Radford et al. 2021; transformers' `CLIPVisionModel`), frozen: images -> features.

Its pure functions take the parameters with every call, as those of `codecs/vae.py` do. `src/codecs/clip_files.py` reads
and writes the published files.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in [0, 1], OpenAI's
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the network, in the names of transformers' `config.json`; the defaults are those of ViT-L/14."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """N, the patches of an image, without the class token: 256 of ViT-L/14 at 224 pixels."""
        return (self.image_size // self.patch_size) ** 2


def activation(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`quick_gelu`, x · sigmoid(1.702 x), of OpenAI's weights, or `gelu`, the exact one, of later ones."""
    return x * jax.nn.sigmoid(1.702 * x) if name == "quick_gelu" else jax.nn.gelu(x, approximate=False)


class TowerBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); every token sees all, or with `causal` those up to itself; scores
    and their softmax in f32. `config` has the sizes of a block, as `ClipConfig` does."""

    def __init__(self, config: Any, dtype: Any, rngs: nnx.Rngs, causal: bool = False):
        width, inner = config.hidden_size, config.intermediate_size
        args = {"dtype": dtype, "precision": _precision(dtype), "rngs": rngs}
        self.heads, self.act, self.precision = config.num_attention_heads, config.hidden_act, _precision(dtype)
        self.causal = causal
        self.layer_norm1, self.layer_norm2 = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nnx.Linear(width, width, **args) for _ in range(4))
        self.fc1, self.fc2 = nnx.Linear(width, inner, **args), nnx.Linear(inner, width, **args)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = x + self.attend(self.layer_norm1(x))
        return x + self.fc2(activation(self.act, self.fc1(self.layer_norm2(x))))

    def attend(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Self-attention of the normalised x."""
        q, k, v = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj))
        f32 = {"preferred_element_type": jnp.float32, "precision": self.precision}
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, **f32) * q.shape[-1] ** -0.5
        if self.causal:
            scores = jnp.where(np.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, precision=self.precision)
        return self.out_proj(out.reshape(x.shape))


class VisionTower(nnx.Module):
    """Patches and a class token with learned positions, a norm before the blocks, stacked blocks `[L]`, a norm after.

    The norm after the blocks is there because the files have it; neither features nor the last state pass through it.
    """

    def __init__(self, config: ClipConfig, dtype: Any, rngs: nnx.Rngs):
        width, patch = config.hidden_size, (config.patch_size,) * 2
        args = {"strides": patch, "padding": "VALID", "use_bias": False, "dtype": dtype, "rngs": rngs}
        self.patch_embedding = nnx.Conv(config.num_channels, width, patch, precision=_precision(dtype), **args)
        normal = nnx.initializers.normal(0.02)
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(normal(rngs.params(), (config.tokens + 1, width)))
        self.pre_norm, self.post_norm = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        make = nnx.split_rngs(splits=config.num_hidden_layers)(nnx.vmap(lambda keys: TowerBlock(config, dtype, keys)))
        self.layers = make(rngs)
        self.dtype = dtype

    def hidden(self, images: Float[Array, "B S S C"], depth: int) -> Float[Array, "B T D"]:
        """States after `depth` blocks, the class token first (T = N + 1)."""
        x = self.patch_embedding(images.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(self.dtype)
        return run_blocks(self.layers, self.pre_norm(x), depth)


def run_blocks(layers: Any, x: Float[Array, "B S D"], depth: int) -> Float[Array, "B S D"]:
    """States after the first `depth` of stacked blocks `[L]`."""
    graph, blocks = nnx.split(layers)
    blocks = jax.tree.map(jnp.asarray, blocks)  # arrays of the host have no traced index

    def body(x, layer):  # indexed, because a stack cut short would be a copy of it
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], blocks))(x), None

    return jax.lax.scan(body, x, jnp.arange(depth))[0]


@dataclasses.dataclass(frozen=True)
class Clip:
    """The tower as pure functions of its parameters, a nested dict of f32 arrays.

    `dtype` is that of the computation: float32 as published, or bfloat16. Rows do not see each other, so the functions
    shard by rows. Images are those of `preprocess`.
    """

    config: ClipConfig = ClipConfig()
    dtype: str = "float32"

    def init(self, key: Array) -> dict[str, Any]:
        """Random parameters, for tests and benches."""
        tower = VisionTower(self.config, jnp.dtype(self.dtype), nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(tower, nnx.Param))

    def shapes(self) -> dict[str, Any]:
        """The tree of the parameters as abstract arrays."""
        return _abstract(self.config, self.dtype)[1]

    def features(self, params: Any, images: Float[Array, "B S S C"]) -> Float[Array, "B N D"]:
        """The features that MonoFormer and LLaVA read: the states before the last block, without the class token; f32.

        Raises ValueError for images of another size than the config's.
        """
        return self._hidden(params, images, self.config.num_hidden_layers - 1)[:, 1:]

    def last(self, params: Any, images: Float[Array, "B S S C"]) -> Float[Array, "B T D"]:
        """The states after the last block, the class token first (T = N + 1), before the norm; f32.

        Raises as `features`.
        """
        return self._hidden(params, images, self.config.num_hidden_layers)

    def pooled(self, params: Any, images: Float[Array, "B S S C"]) -> Float[Array, "B D"]:
        """The class token behind the last block and its norm, which CLIP projects; f32. Raises as `features`."""
        first = self.last(params, images)[:, 0]
        return self._tower(params).post_norm(first).astype(jnp.float32)

    def _hidden(self, params: Any, images: Array, depth: int) -> Array:
        size = self.config.image_size
        if images.shape[1:] != (size, size, self.config.num_channels):
            raise ValueError(
                f"images are {images.shape[1:]}, the vision tower expects {(size, size, self.config.num_channels)} "
                "(height, width, channels): prepare them with clip.preprocess"
            )
        return self._tower(params).hidden(images, depth).astype(jnp.float32)

    def _tower(self, params: Any) -> VisionTower:
        return nnx.merge(_abstract(self.config, self.dtype)[0], nnx.State(params))


def preprocess(pixels: UInt8[np.ndarray, "h w 3"], size: int = 224) -> Float[np.ndarray, "{size} {size} 3"]:
    """CLIP's preparation of an RGB image, on the host: the shorter side to `size` (bicubic, the longer one's length cut
    to a whole number), a square from the middle, [0, 1], minus `MEAN`, over `DEVIATION`.

    As `CLIPImageProcessor` of transformers does. Raises ValueError for an image without pixels.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    if short == 0:
        raise ValueError(f"an image of {height} x {width} pixels cannot be resized: leave it out")
    longer = int(size * long / short)
    new = (size, longer) if width <= height else (longer, size)
    resized = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    square = resized[top : top + size, left : left + size].astype(np.float32) / np.float32(255)
    return (square - np.float32(MEAN)) / np.float32(DEVIATION)


def _norm(config: Any, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    args = {"epsilon": config.layer_norm_eps, "use_fast_variance": False, "dtype": dtype, "rngs": rngs}
    return nnx.LayerNorm(config.hidden_size, **args)


def _precision(dtype: Any) -> Any:  # TPUs and GPUs use shorter products for f32 by default
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@functools.cache
def _abstract(config: ClipConfig, dtype: str) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionTower(config, jnp.dtype(dtype), nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)
