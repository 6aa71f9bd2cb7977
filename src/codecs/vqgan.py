"""Convolutional tokenizers with a table of codes (VQGAN and its kin): images <-> latents, before the look-up of codes.

The network of Esser et al. 2021 "taming transformers", which LlamaGen (Sun et al. 2024) and MAGVIT-v2 as in Show-o (Xie
et al. 2024) share up to sizes, names and the place of the last 1 x 1 convolutions. Frozen: a `Vqgan` has no arrays. Its
parameters are handed to every call. `vqgan_files.py` reads the published tensors and finds the sizes in them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.codecs.vae import RANDOM, ConvParts, ResnetBlock
from src.common.files.weight_mapping import content_hash
from src.common.tree import flatten

GROUPS = 32


@dataclasses.dataclass(frozen=True)
class VqLevel:
    """One resolution: its width, its number of resnets, and whether each is followed by attention."""

    width: int
    blocks: int
    attention: bool = False


@dataclasses.dataclass(frozen=True)
class VqganConfig:
    """Sizes. `encoder` from high to low resolution, `decoder` from low to high; `latent` channels between encoder and
    decoder, `code` numbers of a code."""

    encoder: tuple[VqLevel, ...]
    decoder: tuple[VqLevel, ...]
    stem: int = 128
    latent: int = 256
    decoder_latent: int = 256
    code: int = 8
    colours: int = 3

    @property
    def factor(self) -> int:
        """Pixels of an image for one code, along each side."""
        return 2 ** (len(self.encoder) - 1)


class ConvAttention(nnx.Module):
    """x + attention over all places with a single head, of 1 x 1 convolutions; the softmax in f32."""

    def __init__(self, width: int, parts: ConvParts):
        self.norm, self.precision = parts.norm(width), parts.precision
        self.q, self.k, self.v, self.proj_out = (parts.conv(width, width, 1) for _ in range(4))

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        y = self.norm(x)
        q, k, v = (conv(y).reshape(x.shape[0], -1, x.shape[-1]) for conv in (self.q, self.k, self.v))
        f32 = {"preferred_element_type": jnp.float32, "precision": self.precision}
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k, **f32) * x.shape[-1] ** -0.5, axis=-1)
        y = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v, precision=self.precision)
        return x + self.proj_out(y.reshape(x.shape))


class VqMiddle(nnx.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, width: int, parts: ConvParts):
        self.first, self.second = (ResnetBlock(width, width, parts) for _ in range(2))
        self.attention = ConvAttention(width, parts)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        return self.second(self.attention(self.first(x)))


class VqBlocks(nnx.Module):
    """The resnets of one resolution with their attention, then at most one convolution that halves or doubles it.

    Halving pads a row below and a column on the right only; doubling repeats pixels.
    """

    def __init__(self, d_in: int, level: VqLevel, parts: ConvParts, down: bool = False, up: bool = False):
        widths = (d_in, *[level.width] * level.blocks)
        self.res = nnx.List([ResnetBlock(a, b, parts) for a, b in itertools.pairwise(widths)])
        count = level.blocks if level.attention else 0
        self.attn = nnx.List([ConvAttention(level.width, parts) for _ in range(count)])
        one_sided = ((0, 1), (0, 1))
        self.down = parts.conv(widths[-1], widths[-1], stride=2, padding=one_sided) if down else None
        self.up = parts.conv(widths[-1], widths[-1]) if up else None

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B H W O"]:
        for number, res in enumerate(self.res):
            x = res(x)
            x = self.attn[number](x) if self.attn else x
        if self.down is not None:
            x = self.down(x)
        return x if self.up is None else self.up(x.repeat(2, axis=1).repeat(2, axis=2))


class VqStack(nnx.Module):
    """Encoder or decoder."""

    def __init__(self, levels: tuple[VqLevel, ...], d_in: int, d_out: int, stem: int, parts: ConvParts, encoder: bool):
        start = stem if encoder else levels[0].width
        self.conv_in, self.middle_first = parts.conv(d_in, start), not encoder
        last = len(levels) - 1
        widths = (start, *(level.width for level in levels))
        self.levels = nnx.List(
            [
                VqBlocks(widths[i], level, parts, down=encoder and i < last, up=not encoder and i < last)
                for i, level in enumerate(levels)
            ]
        )
        self.mid = VqMiddle(widths[-1] if encoder else start, parts)
        self.norm_out, self.conv_out = parts.norm(widths[-1]), parts.conv(widths[-1], d_out)

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B H W O"]:
        x = self.conv_in(x)
        x = self.mid(x) if self.middle_first else x
        for level in self.levels:
            x = level(x)
        x = x if self.middle_first else self.mid(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class VqNetwork(nnx.Module):
    """Encoder, decoder and the 1 x 1 convolutions between them."""

    def __init__(self, config: VqganConfig, dtype: Any, rngs: nnx.Rngs, init: Any = RANDOM):
        parts = ConvParts(GROUPS, dtype, rngs, init)
        self.encoder = VqStack(config.encoder, config.colours, config.latent, config.stem, parts, encoder=True)
        self.decoder = VqStack(config.decoder, config.decoder_latent, config.colours, config.stem, parts, encoder=False)
        self.quant_conv = parts.conv(config.latent, config.code, 1)
        self.post_quant_conv = parts.conv(config.code, config.decoder_latent, 1)


@dataclasses.dataclass(frozen=True)
class Vqgan:
    """The tokenizer's networks as pure functions of their parameters, a nested dict of f32 arrays.

    Images are in [-1, 1], channels last, of sides that `config.factor` divides.
    """

    config: VqganConfig
    dtype: str = "float32"

    def shapes(self) -> dict[str, Any]:
        """The tree of the parameters as abstract arrays."""
        return _abstract(self.config, self.dtype)[1]

    def encoding(self, params: Any) -> dict[str, Any]:
        """The parameters that `latents` reads."""
        return {name: part for name, part in params.items() if name in ("encoder", "quant_conv")}

    def latents(self, params: Any, images: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        """Vectors of images before the look-up, f32. Raises ValueError for sides that are no multiples of `factor`."""
        if images.shape[1] % self.config.factor or images.shape[2] % self.config.factor:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} do not fit a tokenizer with one code for "
                f"{self.config.factor} x {self.config.factor} pixels: crop or resize them to multiples of that"
            )
        net = self._bind(params)
        return net.quant_conv(net.encoder(images.astype(self.dtype))).astype(jnp.float32)

    def decode(self, params: Any, codes: Float[Array, "B H W D"]) -> Float[Array, "B h w C"]:
        """Images of codes, f32; about in [-1, 1] and not clipped."""
        net = self._bind(params)
        return net.decoder(net.post_quant_conv(codes.astype(self.dtype))).astype(jnp.float32)

    def latents_hash(self, params: Any) -> str:
        """SHA-256 of all that `latents` depends on."""
        about = {"encoder": [dataclasses.astuple(level) for level in self.config.encoder], "code": self.config.code}
        return content_hash(flatten(self.encoding(params)), about)

    def _bind(self, params: Any) -> VqNetwork:
        graph, shapes = _abstract(self.config, self.dtype)
        return nnx.merge(graph, nnx.State(shapes | params))


@functools.cache
def _abstract(config: VqganConfig, dtype: str) -> tuple[nnx.GraphDef, dict[str, Any]]:
    zeros = nnx.initializers.zeros_init()
    graph, state = nnx.split(nnx.eval_shape(lambda: VqNetwork(config, jnp.dtype(dtype), nnx.Rngs(0), zeros)))
    return graph, nnx.to_pure_dict(state)
