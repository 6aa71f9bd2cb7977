"""Frozen encoders of images that are understood, not drawn: pixels -> features `[B, N, F]` (MonoFormer, section 3).

tokens       N features of length `features` (F) for one image
shape        (h, w, C) of what `preprocess` makes of a picture, on the host; data tasks deliver that
compute      what a frozen network makes of it, row by row; `draw` ends it with what is random
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from PIL import Image

from src.codecs import clip, vae_latents
from src.codecs.clip_files import read_clip, read_clip_config
from src.codecs.patch import Patch
from src.common.files.weight_mapping import content_hash
from src.common.tree import flatten
from src.interfaces import PyTree


class Pixels:
    """No network: patches of the pixels themselves, for small images and tests."""

    fingerprint = "pixels"
    rows = 1024

    def __init__(self, size: int, patch: int, channels: int = 3):
        self.params: PyTree = {}
        self.shape = (size, size, channels)
        self._patch = Patch(patch, channels, size, size)
        self.tokens, self.features = self._patch.tokens, self._patch.features

    def needed(self, params: PyTree, delivered: Iterable[tuple[int, ...]]) -> PyTree:
        """Nothing."""
        return {}

    def shapes(self) -> PyTree:
        """Nothing."""
        return {}

    def sketch(self) -> tuple[Pixels, str]:
        """Itself: it needs no files."""
        return self, ""

    def preprocess(self, pixels: UInt8[np.ndarray, "h w C"]) -> Float[np.ndarray, "S S C"]:
        """The picture in a square, in [-1, 1]."""
        return letterbox(pixels, self.shape[0])

    def compute(self, params: PyTree, values: Float[Array, "B S S C"]) -> Float[Array, "B N F"]:
        """Patches, features ordered (channel, row, column)."""
        return self._patch.encode(values)

    def draw(self, values: Float[Array, "B N F"], key: Array | None) -> Float[Array, "B N F"]:
        """Nothing is random."""
        return values


class Clip:
    """CLIP's vision tower: the states before the last block, without the class token (MonoFormer, LLaVA).

    path       folder with config.json and model.safetensors; read when the first image comes
    size, patch, features   of the tower, ViT-L/14 by default; others are refused
    dtype, rows   of the computation, and pictures that a device encodes at a time
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int = 224,
        patch: int = 14,
        features: int = 1024,
        dtype: str = "float32",
        rows: int = 32,
    ):
        self.path, self.dtype, self.rows, self.features = path, dtype, rows, features
        self.shape, self.tokens = (size, size, 3), (size // patch) ** 2
        self._wanted = {"image_size": size, "patch_size": patch, "hidden_size": features}

    def __getstate__(self) -> dict[str, Any]:
        # A data worker prepares pictures; it needs no parameters.
        return {name: value for name, value in self.__dict__.items() if name not in ("params", "fingerprint")}

    @functools.cached_property
    def tower(self) -> clip.Clip:
        """The tower without its parameters. Raises as `read_clip_config`, and ValueError if it is another one."""
        if not os.fspath(self.path) or not epath.Path(self.path).exists():
            raise FileNotFoundError(
                f"the vision tower's folder {os.fspath(self.path)!r} does not exist: set vision.path to a folder with"
                " config.json and model.safetensors (docs/weights.md)"
            )
        config = read_clip_config(epath.Path(self.path) / "config.json")
        for name, value in self._wanted.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"the vision tower in {os.fspath(self.path)!r} has {name} {getattr(config, name)}, not {value}:"
                    " set vision.size, vision.patch and vision.features to those of the tower"
                )
        return clip.Clip(config, self.dtype)

    @functools.cached_property
    def params(self) -> PyTree:
        """The tower's parameters in the memory of the host, read once. Raises as `read_clip`."""
        _ = self.tower
        return jax.device_get(read_clip(self.path, self.dtype)[1])

    def needed(self, params: PyTree, delivered: Iterable[tuple[int, ...]]) -> PyTree:
        """See `Latents.needed` of `codecs/vae_latents.py`."""
        return params if list(delivered) else {}

    def shapes(self) -> PyTree:
        """The tower's parameters as abstract arrays."""
        return self.tower.shapes()

    def sketch(self) -> tuple[Clip, str]:
        """This tower for shapes alone, and what was assumed: without its folder it is a ViT-L of the wanted sizes."""
        if os.fspath(self.path) and epath.Path(self.path).exists():
            return self, ""
        width = self.features
        sizes = {"intermediate_size": 4 * width, "num_attention_heads": max(width // 64, 1)}
        config = clip.ClipConfig(**self._wanted, **sizes)
        twin = copy.copy(self)
        twin.tower = clip.Clip(config, self.dtype)
        told = f"{config.num_hidden_layers} blocks of {width}, patches of {config.patch_size}"
        return twin, f"no folder {os.fspath(self.path)!r}: a CLIP tower of {told} is assumed"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the tower's parameters."""
        return content_hash(flatten(self.params), dataclasses.asdict(self.tower.config))

    def preprocess(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "S S 3"]:
        """CLIP's own preparation."""
        return clip.preprocess(pixels, self.shape[0])

    def compute(self, params: PyTree, values: Float[Array, "B S S 3"]) -> Float[Array, "B N F"]:
        """The tower's features, f32."""
        return self.tower.features(params, values)

    def draw(self, values: Float[Array, "B N F"], key: Array | None) -> Float[Array, "B N F"]:
        """Nothing is random."""
        return values


class _Codec(vae_latents.Latents):
    group = "vision"


class Latents:
    """MonoFormer's other branch: latents of the whole picture in a square with black borders, as patches.

    The options are those of `codecs/vae_latents.py`; `size` is that of the square, `patch` that of a token in latents.
    """

    def __init__(self, path: str | os.PathLike[str], *, size: int = 256, patch: int = 2, **options: Any):
        self._codec = _Codec(path, **options)
        height, width, channels = self._codec.shape((size, size, 3))
        self._patch = Patch(patch, channels, height, width)
        self.shape, self.tokens, self.features = (size, size, 3), self._patch.tokens, self._patch.features
        self.rows = self._codec.rows

    @property
    def params(self) -> PyTree:
        """The autoencoder's."""
        return self._codec.params

    def needed(self, params: PyTree, delivered: Iterable[tuple[int, ...]]) -> PyTree:
        """See `Latents.needed` of `codecs/vae_latents.py`."""
        return self._codec.needed(params, delivered)

    def shapes(self) -> PyTree:
        """The autoencoder's parameters as abstract arrays."""
        return self._codec.shapes()

    def sketch(self) -> tuple[Latents, str]:
        """See `Latents.sketch` of `codecs/vae_latents.py`."""
        twin = copy.copy(self)
        twin._codec, assumed = self._codec.sketch()
        return twin, assumed

    @property
    def fingerprint(self) -> str:
        """The autoencoder's."""
        return self._codec.fingerprint

    def preprocess(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "S S 3"]:
        """The picture in a square, in [-1, 1]."""
        return letterbox(pixels, self.shape[0])

    def compute(self, params: PyTree, values: Float[Array, "B S S 3"]) -> Float[Array, "B H W D"]:
        """Moments of the latents."""
        return self._codec.compute(params, values)

    def draw(self, values: Float[Array, "B H W D"], key: Array | None) -> Float[Array, "B N F"]:
        """Patches of latents drawn from the moments, or without a key of their mean."""
        return self._patch.encode(self._codec.draw(values, key))


def letterbox(pixels: UInt8[np.ndarray, "h w C"], size: int) -> Float[np.ndarray, "{size} {size} C"]:
    """A picture scaled (bicubic) until its longer side is `size`, in the middle of a black square, in [-1, 1].

    Raises ValueError for an image without pixels.
    """
    height, width, channels = pixels.shape
    if not height or not width:
        raise ValueError(f"an image of {height} x {width} pixels cannot be scaled: leave it out")
    scale = size / max(height, width)
    new = max(round(width * scale), 1), max(round(height * scale), 1)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).resize(new, Image.Resampling.BICUBIC)
    square = np.zeros((size, size, channels), np.uint8)
    top, left = (size - new[1]) // 2, (size - new[0]) // 2
    square[top : top + new[1], left : left + new[0]] = np.asarray(image).reshape(new[1], new[0], channels)
    return square.astype(np.float32) / 127.5 - 1
