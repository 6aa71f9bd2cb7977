"""Images as the latents of a published tokenizer, before its codes are looked up (`codebook.py`)."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from src.codecs._frozen import FrozenAutoencoder
from src.codecs.vqgan import Vqgan, VqganConfig, VqLevel
from src.codecs.vqgan_files import read_vqgan
from src.interfaces import PyTree


class VqLatents(FrozenAutoencoder):
    """VQGAN, LlamaGen's or MAGVIT-v2's networks, a frozen link between pixels and codes (`codebook`, `codebook:Signs`).

    The data deliver pixels in [-1, 1] of the link before, which are encoded, or latents, which stay.

    path       folder with model.safetensors; read when the first image comes
    channels   D, numbers of a code, and `factor` f: latents of an image [h, w, 3] are [h/f, w/f, D]
    dtype      of the computation: float32 as published, or bfloat16
    rows       images that a device encodes or decodes at a time

    Raises ValueError for sizes that do not fit; a file of other sizes is refused when it is read.
    """

    kind = "tokenizer"
    link = "vq_latents"
    files = "model.safetensors"

    def __init__(
        self,
        path: str | os.PathLike[str],
        before: Any,
        *,
        channels: int = 8,
        factor: int = 16,
        dtype: str = "float32",
        rows: int = 8,
    ):
        super().__init__(path, before, channels, factor, dtype, rows)

    @functools.cached_property
    def _read(self) -> tuple[Vqgan, PyTree]:
        self.check_path()
        vqgan, params = read_vqgan(self.path, self.dtype)
        self.check_sizes(vqgan.config.code, vqgan.config.factor)
        return vqgan, params

    @property
    def network(self) -> Vqgan:
        """The networks, without their parameters. Raises as `read_vqgan`, and ValueError for other sizes."""
        return self._read[0]

    @functools.cached_property
    def params(self) -> PyTree:
        """The parameters in the memory of the host."""
        return jax.device_get(self._read[1])

    def sketch(self) -> tuple[VqLatents, str]:
        """This link for shapes alone, and what was assumed: without its folder it is of LlamaGen's widths."""
        if self.there:
            return self, ""
        widths = [128 * n for n in (1, 1, 2, 2, 4, 4, 4)][: self.factor.bit_length()]
        if 2 ** (len(widths) - 1) != self.factor:
            raise ValueError(f"vq_latents has factor={self.factor}: no such tokenizer has it, give a power of two")
        levels = [VqLevel(width, 2, width == widths[-1]) for width in widths]
        more = tuple(VqLevel(level.width, 3, level.attention) for level in levels[::-1])
        twin = copy.copy(self)
        twin.__dict__["_read"] = (Vqgan(VqganConfig(tuple(levels), more, code=self.channels), self.dtype), {})
        return twin, f"no folder {os.fspath(self.path)!r}: a VQGAN of {', '.join(map(str, widths))} channels is assumed"

    def compute(self, params: PyTree, values: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        """Latents of pixels; what has been encoded already stays as it is."""
        return self.network.latents(params, values) if self.encodes(values.shape[1:]) else values

    def draw(self, values: Float[Array, "B H W D"], key: Array | None) -> Float[Array, "B H W D"]:
        """The values themselves: nothing is random."""
        return values

    def decode(self, params: PyTree, codes: Float[Array, "B H W D"]) -> Float[Array, "B h w 3"]:
        """Images of codes, in [-1, 1]."""
        return jnp.clip(self.network.decode(params, codes), -1, 1)
