"""Stable Diffusion's image autoencoder (Rombach et al. 2022; diffusers' `AutoencoderKL`): images <-> latents.

Frozen: a `Vae` has no arrays. Its parameters are handed to every call, as those of any pure function, so they stay
outside the train state and lie where the caller puts them. Convolutions are NHWC, the layout of TPUs. Modules have
the names of the published tensors. `src/codecs/vae_files.py` reads and writes the published files.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.common.files.weight_mapping import content_hash
from src.common.tree import flatten

RANDOM = nnx.initializers.lecun_normal()
EPSILON = 1e-6  # of all group norms
ENCODING = ("encoder", "quant_conv")
LOG_VARIANCE = (-30.0, 20.0)  # bounds of the encoder's output


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the network, in the names of diffusers' `config.json`."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def factor(self) -> int:
        """Pixels of an image for one latent, along each side: 8 of Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class ConvParts:
    """Makes the layers of one network: f32 parameters, computing in `dtype`."""

    groups: int
    dtype: Any
    rngs: nnx.Rngs
    init: Any

    @property
    def precision(self) -> Any:  # TPUs and GPUs use shorter products for f32 by default
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def conv(self, d_in: int, d_out: int, size: int = 3, stride: int = 1, padding: Any = "SAME") -> nnx.Conv:
        args = {"dtype": self.dtype, "precision": self.precision, "kernel_init": self.init, "rngs": self.rngs}
        return nnx.Conv(d_in, d_out, (size, size), strides=stride, padding=padding, **args)

    def linear(self, width: int) -> nnx.Linear:
        args = {"dtype": self.dtype, "precision": self.precision, "kernel_init": self.init, "rngs": self.rngs}
        return nnx.Linear(width, width, **args)

    def norm(self, width: int) -> nnx.GroupNorm:
        # The fast variance, E[x²] - E[x]², loses digits: some channels of the published nets are in the thousands.
        args = {"epsilon": EPSILON, "use_fast_variance": False, "dtype": self.dtype, "rngs": self.rngs}
        return nnx.GroupNorm(width, self.groups, **args)


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution on x where the widths differ."""

    def __init__(self, d_in: int, d_out: int, parts: ConvParts):
        self.norm1, self.conv1 = parts.norm(d_in), parts.conv(d_in, d_out)
        self.norm2, self.conv2 = parts.norm(d_out), parts.conv(d_out, d_out)
        self.conv_shortcut = parts.conv(d_in, d_out, 1) if d_in != d_out else None

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B h w O"]:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nnx.Module):
    """x + attention over all h · w places with a single head; scores and their softmax in f32."""

    def __init__(self, width: int, parts: ConvParts):
        self.group_norm, self.precision = parts.norm(width), parts.precision
        self.to_q, self.to_k, self.to_v = (parts.linear(width) for _ in range(3))
        self.to_out = parts.linear(width)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        y = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)
        f32 = {"preferred_element_type": jnp.float32, "precision": self.precision}
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k, **f32) * x.shape[-1] ** -0.5, axis=-1)
        y = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v, precision=self.precision)
        return x + self.to_out(y).reshape(x.shape)


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, width: int, attention: bool, parts: ConvParts):
        self.resnets = nnx.List([ResnetBlock(width, width, parts) for _ in range(2)])
        self.attentions = nnx.List([SpatialAttention(width, parts)] if attention else [])

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Level(nnx.Module):
    """The resnets of one resolution, then at most one convolution that halves or doubles it.

    Halving pads a row below and a column on the right only; doubling repeats pixels.
    """

    def __init__(self, d_in: int, d_out: int, depth: int, parts: ConvParts, *, down: bool = False, up: bool = False):
        self.resnets = nnx.List([ResnetBlock(d_in if i == 0 else d_out, d_out, parts) for i in range(depth)])
        one_sided = ((0, 1), (0, 1))
        self.downsamplers = nnx.List([parts.conv(d_out, d_out, stride=2, padding=one_sided)] if down else [])
        self.upsamplers = nnx.List([parts.conv(d_out, d_out)] if up else [])

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B H W O"]:
        for resnet in self.resnets:
            x = resnet(x)
        for conv in self.downsamplers:
            x = conv(x)
        for conv in self.upsamplers:
            x = conv(x.repeat(2, axis=1).repeat(2, axis=2))
        return x


class VaeEncoder(nnx.Module):
    """Images -> means and log-variances, side by side."""

    def __init__(self, config: VaeConfig, parts: ConvParts):
        widths = config.block_out_channels
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.conv_in = parts.conv(config.in_channels, widths[0])
        self.down_blocks = nnx.List(
            [Level(a, b, config.layers_per_block, parts, down=i < len(pairs) - 1) for i, (a, b) in enumerate(pairs)]
        )
        self.mid_block = MidBlock(widths[-1], config.mid_block_add_attention, parts)
        self.conv_norm_out = parts.norm(widths[-1])
        self.conv_out = parts.conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W L"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class VaeDecoder(nnx.Module):
    """Latents -> images."""

    def __init__(self, config: VaeConfig, parts: ConvParts):
        widths = config.block_out_channels[::-1]
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.conv_in = parts.conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], config.mid_block_add_attention, parts)
        self.up_blocks = nnx.List(
            [Level(a, b, config.layers_per_block + 1, parts, up=i < len(pairs) - 1) for i, (a, b) in enumerate(pairs)]
        )
        self.conv_norm_out = parts.norm(widths[-1])
        self.conv_out = parts.conv(widths[-1], config.out_channels)

    def __call__(self, z: Float[Array, "B h w L"]) -> Float[Array, "B H W C"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Autoencoder(nnx.Module):
    """Encoder, decoder and the 1 x 1 convolutions between them."""

    def __init__(self, config: VaeConfig, dtype: Any, rngs: nnx.Rngs, init: Any = RANDOM):
        parts, latents = ConvParts(config.norm_num_groups, dtype, rngs, init), config.latent_channels
        self.encoder, self.decoder = VaeEncoder(config, parts), VaeDecoder(config, parts)
        self.quant_conv = parts.conv(2 * latents, 2 * latents, 1) if config.use_quant_conv else None
        self.post_quant_conv = parts.conv(latents, latents, 1) if config.use_post_quant_conv else None


@dataclasses.dataclass(frozen=True)
class Vae:
    """The autoencoder as pure functions of its parameters, a nested dict of f32 arrays.

    `dtype` is that of the computation: float32 as published, or bfloat16. Images are in [-1, 1], channels last, of
    sides that `config.factor` (f) divides. Rows do not see each other, so all functions shard by rows.
    """

    config: VaeConfig = VaeConfig()
    dtype: str = "float32"

    def init(self, key: Array) -> dict[str, Any]:
        """Random parameters, for tests and benches."""
        return nnx.to_pure_dict(nnx.state(Autoencoder(self.config, jnp.dtype(self.dtype), nnx.Rngs(key)), nnx.Param))

    def shapes(self) -> dict[str, Any]:
        """The tree of the parameters as abstract arrays."""
        return _abstract(self.config, self.dtype)[1]

    def encoding(self, params: Any) -> dict[str, Any]:
        """The parameters that `moments` reads: it takes these alone, too."""
        return {name: part for name, part in params.items() if name in ENCODING}

    def moments(self, params: Any, images: Float[Array, "B h w C"]) -> tuple[Array, Array]:
        """Mean and log-variance of the posterior, `[B, h/f, w/f, latent_channels]` each, f32 and not scaled.

        Raises ValueError for images whose sides are no multiples of f.
        """
        if images.shape[1] % self.config.factor or images.shape[2] % self.config.factor:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} do not fit an autoencoder that makes one latent of "
                f"{self.config.factor} x {self.config.factor} pixels: crop or resize them to multiples of that"
            )
        net = self._bind(params)
        x = net.encoder(images.astype(self.dtype))
        x = x if net.quant_conv is None else net.quant_conv(x)
        mean, log_variance = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def sample(
        self, mean: Float[Array, "B H W L"], log_variance: Float[Array, "B H W L"], key: Array | None
    ) -> Float[Array, "B H W L"]:
        """(mean + exp(log-variance / 2) · noise - shift_factor) · scaling_factor; without a key no noise."""
        mean = mean.astype(jnp.float32)
        if key is not None:
            deviation = jnp.exp(0.5 * log_variance.astype(jnp.float32))
            mean = mean + deviation * jax.random.normal(key, mean.shape, jnp.float32)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def encode(self, params: Any, images: Float[Array, "B h w C"], key: Array | None = None) -> Float[Array, "B H W L"]:
        """Scaled latents of images: drawn from the posterior, or without a key its mean. Raises as `moments`."""
        return self.sample(*self.moments(params, images), key)

    def decode(self, params: Any, latents: Float[Array, "B H W L"]) -> Float[Array, "B h w C"]:
        """Images of scaled latents, f32; about in [-1, 1] and not clipped."""
        net = self._bind(params)
        z = (latents / self.config.scaling_factor + self.config.shift_factor).astype(self.dtype)
        z = z if net.post_quant_conv is None else net.post_quant_conv(z)
        return net.decoder(z).astype(jnp.float32)

    def latents_hash(self, params: Any) -> str:
        """SHA-256 of all that `moments` depends on: latents with another one are of another codec.

        The decoder, the scale and `dtype` are left out: sd-vae-ft-mse and sd-vae-ft-ema, say, have the same encoder.
        """
        fields = ("block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels", "in_channels")
        leaves = flatten(self.encoding(params))
        return content_hash(leaves, {name: getattr(self.config, name) for name in fields})

    def _bind(self, params: Any) -> Autoencoder:
        graph, shapes = _abstract(self.config, self.dtype)
        return nnx.merge(graph, nnx.State(shapes | params))  # what is not given is not read


@functools.cache
def _abstract(config: VaeConfig, dtype: str) -> tuple[nnx.GraphDef, dict[str, Any]]:
    zeros = nnx.initializers.zeros_init()  # much faster to trace than random ones
    graph, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, jnp.dtype(dtype), nnx.Rngs(0), zeros)))
    return graph, nnx.to_pure_dict(state)
