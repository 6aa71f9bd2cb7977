"""Features of a frozen CLIP tower, for images that are read and not made."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Iterable

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8

from src.codecs import clip
from src.codecs._frozen import FrozenLink
from src.codecs.clip_files import read_clip, read_clip_config
from src.common.files.weight_mapping import content_hash
from src.common.tree import flatten
from src.interfaces import FieldSpec, PyTree


class ClipVision(FrozenLink):
    """CLIP's vision tower: the states before the last block, without the class token (MonoFormer, LLaVA).

    A frozen link, the first of its chain: the data deliver what `preprocess` makes of an image's pixels.

    path       folder with config.json and model.safetensors; read when the first image comes
    size, patch, features   of the tower, ViT-L/14 by default; others are refused
    dtype, rows   of the computation, and images that a device encodes at a time
    """

    kind = "vision tower"
    link = "clip_vision"
    files = "config.json and model.safetensors"

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
        super().__init__(path, dtype, rows)
        self.features = features
        self.takes = (size, size, 3)
        self.shape = ((size // patch) ** 2, features)
        self.spec = FieldSpec((size // patch, size // patch), features=features)
        self._wanted = {"image_size": size, "patch_size": patch, "hidden_size": features}

    @functools.cached_property
    def tower(self) -> clip.Clip:
        """The tower without its parameters. Raises as `read_clip_config`, and ValueError if it is another one."""
        self.check_path()
        config = read_clip_config(epath.Path(self.path) / "config.json")
        for name, value in self._wanted.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"the vision tower in {os.fspath(self.path)!r} has {name} {getattr(config, name)}, not {value}:"
                    " set size, patch and features of clip_vision to those of the tower"
                )
        return clip.Clip(config, self.dtype)

    @functools.cached_property
    def params(self) -> PyTree:
        """The tower's parameters in the memory of the host, read once. Raises as `read_clip`."""
        _ = self.tower
        return jax.device_get(read_clip(self.path, self.dtype)[1])

    def needed(self, params: PyTree, delivered: Iterable[tuple[int, ...]]) -> PyTree:
        """All, where images are delivered."""
        return params if list(delivered) else {}

    def shapes(self) -> PyTree:
        """The tower's parameters as abstract arrays."""
        return self.tower.shapes()

    def sketch(self) -> tuple[ClipVision, str]:
        """This tower for shapes alone, and what was assumed: without its folder it is a ViT-L of the wanted sizes."""
        if self.there:
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
        return clip.preprocess(pixels, self.takes[0])

    def compute(self, params: PyTree, values: Float[Array, "B S S 3"]) -> Float[Array, "B N F"]:
        """The tower's features, f32."""
        return self.tower.features(params, values)

    def draw(self, values: Float[Array, "B N F"], key: Array | None) -> Float[Array, "B N F"]:
        """Nothing is random."""
        return values
