"""Images as the latents of a frozen autoencoder, instead of pixels."""

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
from src.interfaces import FieldSpec, PyTree


class VaeLatents:
    """Stable Diffusion's `AutoencoderKL`, a frozen link between pixels and patches.

    The data deliver pixels in [-1, 1] of the link before, which are encoded, or moments of latents (mean and
    log-variance, `[h, w, 2L]`, as files of latents keep them), which are drawn from, or scaled latents, which stay.
    Their whole shape decides which of them it is.

    path       folder with config.json and the weights; read when the first image comes
    channels   L, and `factor` f: latents of an image [h, w, 3] are [h/f, w/f, L]; other autoencoders are refused
    dtype      of the computation: float32 as published, or bfloat16
    rows       images that a device encodes or decodes at a time
    """

    where: ClassVar[str] = "frozen"
    spec: ClassVar[FieldSpec | None] = None

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
        if channels < 1 or factor < 1 or rows < 1:
            raise ValueError(f"channels={channels}, factor={factor}, rows={rows}: give numbers of at least 1")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r} is unknown; use float32 or bfloat16")
        height, width, colours = before.shape
        if colours != 3 or height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} x {colours} have no latents: the autoencoder needs 3 channels, and sides"
                f" that are multiples of factor={factor}"
            )
        self.path, self.channels, self.factor, self.dtype, self.rows = path, channels, factor, dtype, rows
        self.takes = before.shape
        self.shape = (height // factor, width // factor, channels)

    @property
    def moments(self) -> tuple[int, int, int]:
        """Shape [h, w, 2L] of the moments of an image's latents."""
        return (*self.shape[:2], 2 * self.channels)

    def __getstate__(self) -> dict[str, Any]:
        # A data worker prepares images; it needs no parameters.
        return {name: value for name, value in self.__dict__.items() if name not in ("params", "fingerprint")}

    @functools.cached_property
    def vae(self) -> Vae:
        """The autoencoder, without its parameters. Raises as `read_vae_config`, and ValueError if it is another one."""
        self._check_path()
        config = read_vae_config(epath.Path(self.path) / "config.json")
        if (config.latent_channels, config.factor) != (self.channels, self.factor):
            raise ValueError(
                f"the autoencoder in {os.fspath(self.path)!r} makes {config.latent_channels} channels for"
                f" {config.factor} x {config.factor} pixels: set channels and factor of vae_latents to that"
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
        """Those of the parameters (arrays or abstract arrays) that `compute` reads for values [h, w, C] like these."""
        return self.vae.encoding(params) if any(self.encodes(shape) for shape in delivered) else {}

    def sketch(self) -> tuple[VaeLatents, str]:
        """This codec for shapes alone, and what was assumed: without its folder it is as Stable Diffusion's.

        Raises ValueError for a factor that no such autoencoder has.
        """
        if os.fspath(self.path) and epath.Path(self.path).exists():
            return self, ""
        levels, widths = self.factor.bit_length(), VaeConfig().block_out_channels
        config = VaeConfig((widths + widths[-1:] * levels)[:levels], latent_channels=self.channels)
        if config.factor != self.factor:
            raise ValueError(f"vae_latents has factor={self.factor}, no power of two: no such autoencoder has it")
        twin = copy.copy(self)
        twin.vae = Vae(config, self.dtype)
        widths = ", ".join(map(str, config.block_out_channels))
        return twin, f"no folder {os.fspath(self.path)!r}: an AutoencoderKL of {widths} channels is assumed"

    @functools.cached_property
    def fingerprint(self) -> str:
        """The hash of all that latents depend on (`Vae.latents_hash`)."""
        return self.vae.latents_hash(self.params)

    def encodes(self, shape: tuple[int, ...]) -> bool:
        """Whether values [h, w, C] that the data deliver are pixels, which `compute` encodes, and not latents already.

        Raises ValueError for what is neither.
        """
        if tuple(shape) in (self.shape, self.moments):
            return False
        if len(shape) != 3 or shape[2] != 3:
            raise ValueError(
                f"values of {tuple(shape)} are neither pixels {self.takes}, nor moments {self.moments}, nor latents"
                f" {self.shape} of this codec: see fields.<name>.codec and the task's source"
            )
        return True

    def compute(self, params: PyTree, values: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        """Moments of pixels; what has been encoded already stays as it is."""
        if not self.encodes(values.shape[1:]):
            return values
        return jnp.concatenate(self.vae.moments(params, values), axis=-1)

    def draw(self, values: Float[Array, "B H W D"], key: Array | None) -> Float[Array, "B H W L"]:
        """Scaled latents drawn from moments, or without a key their mean; latents stay as they are."""
        if values.shape[-1] != 2 * self.channels:
            return values
        return self.vae.sample(*jnp.split(values, 2, axis=-1), key)

    def decode(self, params: PyTree, latents: Float[Array, "B H W L"]) -> Float[Array, "B h w 3"]:
        """Images of scaled latents, in [-1, 1]."""
        return jnp.clip(self.vae.decode(params, latents), -1, 1)

    def _check_path(self) -> None:
        if not os.fspath(self.path) or not epath.Path(self.path).exists():
            raise FileNotFoundError(
                f"the autoencoder's folder {os.fspath(self.path)!r} does not exist: set path of vae_latents"
                " (fields.<name>.codec) to a folder with config.json and diffusion_pytorch_model.safetensors"
                " (docs/weights.md)"
            )
