"""Codes of published tokenizers: vectors on a grid <-> ids, on the device, behind `vq_latents`.

1. `Codebook`: a table of codes c_k. nearest: argmin |z - c|² (VQGAN); cosine: of z and c at length 1, which are decoded
   at length 1, too (LlamaGen); inner: argmax z · c (IBQ).
2. `Signs`: an id's bits are the signs of the numbers, the first is the highest bit; a code is ±1 in each (MAGVIT-v2).
"""

from __future__ import annotations

import functools
import hashlib
import os
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from src.codecs.vqgan_files import CODES, FILES
from src.common.files.safetensors import SafeTensors
from src.interfaces import FieldSpec

LOOKUPS = ("nearest", "cosine", "inner")


class _Grid:
    """What both have: a link in front with values [h, w, D]."""

    where: ClassVar[str] = "device"

    def __init__(self, before: Any, vocab: int):
        if before.spec is not None or len(before.shape) != 3:
            raise ValueError(f"{type(self).__name__} needs a link in front that gives latents [h, w, D], as vq_latents")
        height, width, self.numbers = before.shape
        self.spec, self.shape = FieldSpec((height, width), vocab=vocab), (height * width,)

    def gridded(self, codes: Float[Array, "B N D"]) -> Float[Array, "B h w D"]:
        """Codes in their rows and columns."""
        return codes.reshape(codes.shape[0], *self.spec.grid, self.numbers)


class Codebook(_Grid):
    """The nearest of `codes` vectors in a published file.

    before   the link in front, of latents [h, w, D]
    path     folder with model.safetensors, whose tensor `quantize.embedding.weight` is [codes, D]; read at first use
    lookup   nearest, cosine or inner (docstring of the module, 1)

    Raises ValueError for less than 2 codes, an unknown look-up, and a file with others than `codes` codes of D numbers.
    """

    def __init__(self, codes: int, before: Any, path: str | os.PathLike[str] = "", lookup: str = "nearest"):
        if codes < 2 or lookup not in LOOKUPS:
            raise ValueError(f"codes={codes} must be at least 2, and lookup={lookup!r} one of {', '.join(LOOKUPS)}")
        super().__init__(before, codes)
        self.codes, self.path, self.lookup = codes, path, lookup

    @functools.cached_property
    def table(self) -> Float[np.ndarray, "codes D"]:
        """The codes as they are decoded, f32."""
        tensors, wanted = SafeTensors(self.path, FILES), (self.codes, self.numbers)
        found = tensors.entries.get(CODES)
        if found is None or tuple(found.shape) != wanted:
            there = "none" if found is None else f"one of {tuple(found.shape)}"
            raise ValueError(
                f"{os.fspath(self.path)!r} has no table {CODES} of {wanted} codes and numbers, but {there}: set codes"
                " of the codebook, and channels of vq_latents, to those of the file"
            )
        table = np.asarray(tensors[CODES], np.float32)
        return _unit(table, np) if self.lookup == "cosine" else table

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the codes and how they are looked up."""
        return hashlib.sha256(self.table.tobytes() + self.lookup.encode()).hexdigest()[:16]

    def encode(self, value: Float[Array, "B h w D"]) -> Int[Array, "B N"]:
        """Ids of latents, row by row; the first of equals."""
        value = value.reshape(value.shape[0], -1, value.shape[-1])
        value = _unit(value, jnp) if self.lookup == "cosine" else value
        table = jnp.asarray(self.table)
        score = jnp.einsum("bnd,kd->bnk", value, table, precision=jax.lax.Precision.HIGHEST)
        if self.lookup == "nearest":
            score = 2 * score - (table**2).sum(-1)
        return jnp.argmax(score, axis=-1).astype(jnp.int32)

    def decode(self, tokens: Int[Array, "B N"]) -> Float[Array, "B h w D"]:
        """The codes of ids."""
        return self.gridded(jnp.asarray(self.table)[tokens])


class Signs(_Grid):
    """Bits of the signs of D numbers; the vocabulary has 2^D ids. A number of exactly 0 counts as -1.

    before   the link in front, of latents [h, w, D]

    Raises ValueError for more than 24 numbers.
    """

    def __init__(self, before: Any):
        if len(before.shape) == 3 and before.shape[2] > 24:
            raise ValueError(f"signs of {before.shape[2]} numbers are too many: an id has at most 24 bits")
        super().__init__(before, 2 ** before.shape[-1])

    @property
    def powers(self) -> Int[np.ndarray, " D"]:
        """Of each bit."""
        return 2 ** np.arange(self.numbers - 1, -1, -1, dtype=np.int32)

    def encode(self, value: Float[Array, "B h w D"]) -> Int[Array, "B N"]:
        """Ids of latents, row by row."""
        return ((value > 0) * self.powers).sum(axis=-1).astype(jnp.int32).reshape(value.shape[0], -1)

    def decode(self, tokens: Int[Array, "B N"]) -> Float[Array, "B h w D"]:
        """±1 for each bit of an id."""
        return self.gridded(jnp.where(tokens[..., None] & self.powers, 1.0, -1.0))


def _unit(x: Any, xp: Any) -> Any:
    return x / xp.maximum(xp.sqrt((x**2).sum(axis=-1, keepdims=True)), 1e-12)
