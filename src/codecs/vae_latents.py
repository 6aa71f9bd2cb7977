"""Images as the latents of a frozen autoencoder: what a model draws when it does not draw pixels."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float

from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import read_vae, read_vae_config
from src.interfaces import PyTree


class Latents:
    """Stable Diffusion's `AutoencoderKL` between the data and the patches.

    What the data deliver is told by its channels: pixels in [-1, 1] (3) are encoded, moments (2 · `channels`: mean and
    log-variance, `[h, w, 2L]`, as files of latents keep them) are drawn from, scaled latents (`channels`) stay.

    path       folder with config.json and the weights; read when the first image comes
    channels   L, and `factor` f: latents of a picture [h, w, 3] are [h/f, w/f, L]; other autoencoders are refused
    dtype      of the computation: float32 as published, or bfloat16
    rows       pictures that a device encodes or decodes at a time
    """

    group: ClassVar[str] = "image_codec"  # of the config, for messages

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: int = 4,
        factor: int = 8,
        dtype: str = "float32",
        rows: int = 8,
    ):
        if channels in (1, 3) or channels < 1 or factor < 1 or rows < 1:
            raise ValueError(
                f"{self.group} has channels={channels}, factor={factor}, rows={rows}: give numbers of at least 1, and"
                " channels that are not those of a picture"
            )
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"{self.group}.dtype={dtype!r} is unknown; use float32 or bfloat16")
        self.path, self.channels, self.factor, self.dtype, self.rows = path, channels, factor, dtype, rows

    def __getstate__(self) -> dict[str, Any]:
        # A data worker prepares pictures; it needs no parameters.
        return {name: value for name, value in self.__dict__.items() if name not in ("params", "fingerprint")}

    def shape(self, delivered: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the latents of what the data deliver, both (h, w, C).

        Raises ValueError for what has neither the channels nor the sides for it.
        """
        height, width, channels = delivered
        if channels in (self.channels, 2 * self.channels):
            return height, width, self.channels
        if channels != 3 or height % self.factor or width % self.factor:
            raise ValueError(
                f"images of {height} x {width} x {channels} are neither pictures with sides that are multiples of"
                f" {self.factor}, nor moments or latents of {self.channels} channels: see {self.group} and the tasks"
            )
        return height // self.factor, width // self.factor, self.channels

    def picture(self, latents: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape (h, w, 3) of the pictures of latents (h, w, L)."""
        return latents[0] * self.factor, latents[1] * self.factor, 3

    @functools.cached_property
    def vae(self) -> Vae:
        """The autoencoder, without its parameters. Raises as `read_vae_config`, and ValueError if it is another one."""
        self._check_path()
        config = read_vae_config(epath.Path(self.path) / "config.json")
        if (config.latent_channels, config.factor) != (self.channels, self.factor):
            raise ValueError(
                f"the autoencoder in {os.fspath(self.path)!r} makes {config.latent_channels} channels for"
                f" {config.factor} x {config.factor} pixels: set {self.group}.channels and {self.group}.factor to that"
            )
        return Vae(config, self.dtype)

    @functools.cached_property
    def params(self) -> PyTree:
        """The autoencoder's parameters in the memory of the host, read once. Raises as `read_vae`."""
        _ = self.vae
        return jax.device_get(read_vae(self.path, self.dtype)[1])

    def shapes(self) -> PyTree:
        """The autoencoder's parameters as abstract arrays."""
        return self.vae.shapes()

    def needed(self, params: PyTree, delivered: Iterable[tuple[int, ...]]) -> PyTree:
        """Those of the parameters (arrays or abstract arrays) that `compute` reads for values of these shapes."""
        return self.vae.encoding(params) if any(self.encodes(shape[-1]) for shape in delivered) else {}

    def sketch(self) -> tuple[Latents, str]:
        """This codec for shapes alone, and what was assumed: without its folder it is as Stable Diffusion's.

        Raises ValueError for a factor that no such autoencoder has.
        """
        if os.fspath(self.path) and epath.Path(self.path).exists():
            return self, ""
        levels, widths = self.factor.bit_length(), VaeConfig().block_out_channels
        config = VaeConfig((widths + widths[-1:] * levels)[:levels], latent_channels=self.channels)
        if config.factor != self.factor:
            raise ValueError(f"{self.group}.factor={self.factor} is no power of two: no such autoencoder has it")
        twin = copy.copy(self)
        twin.vae = Vae(config, self.dtype)
        widths = ", ".join(map(str, config.block_out_channels))
        return twin, f"no folder {os.fspath(self.path)!r}: an AutoencoderKL of {widths} channels is assumed"

    @functools.cached_property
    def fingerprint(self) -> str:
        """What latents depend on (`Vae.latents_hash`)."""
        return self.vae.latents_hash(self.params)

    def encodes(self, channels: int) -> bool:
        """Whether what the data deliver are pictures, which `compute` encodes, and not latents already."""
        return channels == 3

    def compute(self, params: PyTree, values: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        """Moments of pictures; what has been encoded already stays as it is."""
        if not self.encodes(values.shape[-1]):
            return values
        return jnp.concatenate(self.vae.moments(params, values), axis=-1)

    def draw(self, values: Float[Array, "B H W D"], key: Array | None) -> Float[Array, "B H W L"]:
        """Scaled latents drawn from moments, or without a key their mean; latents stay as they are."""
        if values.shape[-1] != 2 * self.channels:
            return values
        return self.vae.sample(*jnp.split(values, 2, axis=-1), key)

    def decode(self, params: PyTree, latents: Float[Array, "B H W L"]) -> Float[Array, "B h w 3"]:
        """Pictures of scaled latents, in [-1, 1]."""
        return jnp.clip(self.vae.decode(params, latents), -1, 1)

    def _check_path(self) -> None:
        if not os.fspath(self.path) or not epath.Path(self.path).exists():
            raise FileNotFoundError(
                f"the autoencoder's folder {os.fspath(self.path)!r} does not exist: set {self.group}.path to a folder"
                " with config.json and diffusion_pytorch_model.safetensors (docs/weights.md)"
            )
