"""Images as the latents of a published tokenizer, before its codes are looked up (`codebook.py`)."""

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

from src.codecs.vqgan import Vqgan, VqganConfig, VqLevel
from src.codecs.vqgan_files import read_vqgan
from src.interfaces import FieldSpec, PyTree


class VqLatents:
    """VQGAN, LlamaGen's or MAGVIT-v2's networks, a frozen link between pixels and codes (`codebook`, `codebook:Signs`).

    The data deliver pixels in [-1, 1] of the link before, which are encoded, or latents, which stay.

    path       folder with model.safetensors; read when the first image comes
    channels   D, numbers of a code, and `factor` f: latents of an image [h, w, 3] are [h/f, w/f, D]
    dtype      of the computation: float32 as published, or bfloat16
    rows       images that a device encodes or decodes at a time

    Raises ValueError for sizes that do not fit; a file of other sizes is refused when it is read.
    """

    where: ClassVar[str] = "frozen"
    spec: ClassVar[FieldSpec | None] = None

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
        if channels < 1 or factor < 1 or rows < 1 or dtype not in ("float32", "bfloat16"):
            raise ValueError(f"channels={channels}, factor={factor}, rows={rows}: at least 1; dtype={dtype!r}: a float")
        height, width, colours = before.shape
        if colours != 3 or height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} x {colours} have no codes: the tokenizer needs 3 channels, and sides"
                f" that are multiples of factor={factor}"
            )
        self.path, self.channels, self.factor, self.dtype, self.rows = path, channels, factor, dtype, rows
        self.takes, self.shape = before.shape, (height // factor, width // factor, channels)

    def __getstate__(self) -> dict[str, Any]:
        # A data worker prepares images; it needs no parameters.
        return {name: value for name, value in self.__dict__.items() if name not in ("_read", "params", "fingerprint")}

    @functools.cached_property
    def _read(self) -> tuple[Vqgan, PyTree]:
        if not os.fspath(self.path) or not epath.Path(self.path).exists():
            raise FileNotFoundError(
                f"the tokenizer's folder {os.fspath(self.path)!r} does not exist: set path of vq_latents"
                " (fields.<name>.codec) to a folder with model.safetensors"
            )
        vqgan, params = read_vqgan(self.path, self.dtype)
        if (vqgan.config.code, vqgan.config.factor) != (self.channels, self.factor):
            raise ValueError(
                f"the tokenizer in {os.fspath(self.path)!r} makes codes of {vqgan.config.code} numbers for"
                f" {vqgan.config.factor} x {vqgan.config.factor} pixels: set channels and factor of vq_latents to that"
            )
        return vqgan, params

    @property
    def vqgan(self) -> Vqgan:
        """The networks, without their parameters. Raises as `read_vqgan`, and ValueError for other sizes."""
        return self._read[0]

    @functools.cached_property
    def params(self) -> PyTree:
        """The parameters in the memory of the host."""
        return jax.device_get(self._read[1])

    def shapes(self) -> PyTree:
        """The parameters as abstract arrays."""
        return self.vqgan.shapes()

    def needed(self, params: PyTree, delivered: Iterable[tuple[int, ...]]) -> PyTree:
        """Those of the parameters that `compute` reads for values [h, w, C] like these."""
        return self.vqgan.encoding(params) if any(self.encodes(shape) for shape in delivered) else {}

    def sketch(self) -> tuple[VqLatents, str]:
        """This link for shapes alone, and what was assumed: without its folder it is of LlamaGen's widths."""
        if os.fspath(self.path) and epath.Path(self.path).exists():
            return self, ""
        widths = [128 * n for n in (1, 1, 2, 2, 4, 4, 4)][: self.factor.bit_length()]
        if 2 ** (len(widths) - 1) != self.factor:
            raise ValueError(f"vq_latents has factor={self.factor}: no such tokenizer has it, give a power of two")
        levels = [VqLevel(width, 2, width == widths[-1]) for width in widths]
        more = tuple(VqLevel(level.width, 3, level.attention) for level in levels[::-1])
        twin = copy.copy(self)
        twin.__dict__["_read"] = (Vqgan(VqganConfig(tuple(levels), more, code=self.channels), self.dtype), {})
        return twin, f"no folder {os.fspath(self.path)!r}: a VQGAN of {', '.join(map(str, widths))} channels is assumed"

    @functools.cached_property
    def fingerprint(self) -> str:
        """The hash of all that latents depend on."""
        return self.vqgan.latents_hash(self.params)

    def encodes(self, shape: tuple[int, ...]) -> bool:
        """Whether values [h, w, C] that the data deliver are pixels, and not latents already.

        Raises ValueError for what is neither.
        """
        if tuple(shape) == self.shape:
            return False
        if len(shape) != 3 or shape[2] != 3:
            raise ValueError(
                f"values of {tuple(shape)} are neither pixels {self.takes}, nor latents {self.shape} of this codec: see"
                " fields.<name>.codec and the task's source"
            )
        return True

    def compute(self, params: PyTree, values: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        """Latents of pixels; what has been encoded already stays as it is."""
        return self.vqgan.latents(params, values) if self.encodes(values.shape[1:]) else values

    def draw(self, values: Float[Array, "B H W D"], key: Array | None) -> Float[Array, "B H W D"]:
        """The values themselves: nothing is random."""
        return values

    def decode(self, params: PyTree, codes: Float[Array, "B H W D"]) -> Float[Array, "B h w 3"]:
        """Images of codes, in [-1, 1]."""
        return jnp.clip(self.vqgan.decode(params, codes), -1, 1)
