"""Images as the latents of a frozen autoencoder, instead of pixels."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float

from src.codecs._frozen import FrozenAutoencoder
from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import read_vae, read_vae_config
from src.interfaces import PyTree


class VaeLatents(FrozenAutoencoder):
    """Stable Diffusion's `AutoencoderKL`, a frozen link between pixels and patches.

    The data deliver pixels in [-1, 1] of the link before, which are encoded, or moments of latents (mean and
    log-variance, `[h, w, 2L]`, as files of latents keep them), which are drawn from, or scaled latents, which stay.
    Their whole shape decides which of them it is.

    path       folder with config.json and the weights; read when the first image comes
    channels   L, and `factor` f: latents of an image [h, w, 3] are [h/f, w/f, L]; other autoencoders are refused
    dtype      of the computation: float32 as published, or bfloat16
    rows       images that a device encodes or decodes at a time
    """

    kind = "autoencoder"
    link = "vae_latents"
    files = "config.json and diffusion_pytorch_model.safetensors"

    def __init__(
        self,
        path: str | os.PathLike[str],
        before: Any,
        *,
        channels: int = 4,
        factor: int = 8,
        dtype: str = "float32",
        rows: int = 8,
    ):
        super().__init__(path, before, channels, factor, dtype, rows)

    @property
    def moments(self) -> tuple[int, int, int]:
        """Shape [h, w, 2L] of the moments of an image's latents."""
        return (*self.shape[:2], 2 * self.channels)

    @property
    def delivered(self) -> dict[str, tuple[int, ...]]:
        """See `FrozenAutoencoder.delivered`."""
        return {"moments": self.moments, "latents": self.shape}

    @functools.cached_property
    def network(self) -> Vae:
        """The autoencoder, without its parameters. Raises as `read_vae_config`, and ValueError if it is another one."""
        self.check_path()
        config = read_vae_config(epath.Path(self.path) / "config.json")
        self.check_sizes(config.latent_channels, config.factor)
        return Vae(config, self.dtype)

    @functools.cached_property
    def params(self) -> PyTree:
        """The autoencoder's parameters in the memory of the host, read once. Raises as `read_vae`."""
        _ = self.network
        return jax.device_get(read_vae(self.path, self.dtype)[1])

    def sketch(self) -> tuple[VaeLatents, str]:
        """This codec for shapes alone, and what was assumed: without its folder it is as Stable Diffusion's.

        Raises ValueError for a factor that no such autoencoder has.
        """
        if self.there:
            return self, ""
        levels, widths = self.factor.bit_length(), VaeConfig().block_out_channels
        config = VaeConfig((widths + widths[-1:] * levels)[:levels], latent_channels=self.channels)
        if config.factor != self.factor:
            raise ValueError(f"vae_latents has factor={self.factor}, no power of two: no such autoencoder has it")
        twin = copy.copy(self)
        twin.network = Vae(config, self.dtype)
        widths = ", ".join(map(str, config.block_out_channels))
        return twin, f"no folder {os.fspath(self.path)!r}: an AutoencoderKL of {widths} channels is assumed"

    def compute(self, params: PyTree, values: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        """Moments of pixels; what has been encoded already stays as it is."""
        if not self.encodes(values.shape[1:]):
            return values
        return jnp.concatenate(self.network.moments(params, values), axis=-1)

    def draw(self, values: Float[Array, "B H W D"], key: Array | None) -> Float[Array, "B H W L"]:
        """Scaled latents drawn from moments, or without a key their mean; latents stay as they are."""
        if values.shape[-1] != 2 * self.channels:
            return values
        return self.network.sample(*jnp.split(values, 2, axis=-1), key)

    def decode(self, params: PyTree, latents: Float[Array, "B H W L"]) -> Float[Array, "B h w 3"]:
        """Images of scaled latents, in [-1, 1]."""
        return jnp.clip(self.network.decode(params, latents), -1, 1)
