"""Our leaves as a published checkpoint: names, order of axes, config.json (the inverse of `pretrained`)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from src.common.files.lazy_arrays import Leaves, is_stacked
from src.common.files.paths import shown
from src.common.files.safetensors_writer import SHARD_BYTES, Tensor, write_tensors
from src.common.files.store import write_whole
from src.common.tree import listed
from src.models.pretrained.about import HEAD_DIM, ONLY, SCALING, TIED, TRUNK, WINDOW
from src.models.pretrained.families import LLAMA, Family, nearest_family
from src.models.pretrained.hf_rope import TABLES, published_length, published_rope
from src.models.pretrained.hf_vision_config import FIELDS as VISION
from src.models.pretrained.llama_weights import HEAD, IMAGE, PROJECTOR, TABLE, names_of

PIXELS = 8  # a side of a latent's element, in pixels of the image
LINEAR = f"{IMAGE}/head/linear"
# Of cfg.json, those that config.json has, too.
SETTINGS = ("patch_size", "in_channels", "learn_sigma", "use_flash_attn", "use_pos_embed", "decoder_t_embed",
            "use_adaln_final_layer", "use_bi_attn_img_tokens", "tokenizer_max_length")  # fmt: skip


def published_config(
    leaves: Leaves,
    made_for: Mapping[str, Any],
    base: Mapping[str, Any],
    patch: int,
    side: int,
    dtype: str | None = None,
    family: Family = LLAMA,
) -> dict[str, Any]:
    """The fields of config.json for leaves that were `made_for` such a model (`about.py`).

    base   fields that it came with, of which those that do not follow from the leaves are kept
    patch  side of a patch; side: of the latents; only read where there are images
    dtype  of all tensors, or None
    family that `check_exportable` gave
    """
    shapes = leaves.shapes
    fields = {
        "model_type": family.model_type,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "use_cache": True,
    }
    told = (*TABLES, *LLAMA.fixed, *family.fixed, "model_type", "head_dim", "tie_word_embeddings", "layer_types")
    kept = {name: value for name, value in base.items() if name not in told}
    fields |= family.fixed | kept | {theirs: made_for[ours] for ours, theirs in TRUNK.items()}
    fields |= _attention(made_for, base, family)
    fields["max_position_embeddings"] = published_length(made_for.get(SCALING, ()), fields["max_position_embeddings"])
    fields["tie_word_embeddings"] = bool(made_for.get(TIED, False))
    fields |= {"vocab_size": shapes[TABLE].shape[0], "architectures": [family.architecture]}
    fields.pop("torch_dtype", None)  # the older name; transformers reads `dtype`, and where it is absent the tensors'
    kinds = {jnp.dtype(leaf.dtype) for leaf in shapes.values()}
    fields["dtype"] = dtype or functools.reduce(jnp.promote_types, kinds).name
    if PROJECTOR not in shapes:  # the official class would look for an encoder
        fields = {name: value for name, value in fields.items() if name not in VISION}
    same = base.get("architectures") == [family.architecture]
    return _with_images(fields, shapes, patch, side, same and "pad_token_id" in base) if family.images else fields


def _with_images(
    fields: dict[str, Any], shapes: Mapping[str, Any], patch: int, side: int, padded: bool
) -> dict[str, Any]:
    """The fields of config.json with those of MonoFormer's images; `padded`: they have its token of padding."""
    features = shapes[f"{IMAGE}/embed/linear/kernel"].shape[0]
    outputs = getattr(shapes.get(f"{LINEAR}/kernel"), "shape", (features,))[-1]
    token = "conditioning/first/kernel" in shapes
    pad = fields["vocab_size"] - 4
    new = {
        "image_token_index": pad + 1,
        "tokenizer_max_length": 512,
        "tokenizer_padding_side": "right",
        "use_flash_attn": False,
        "use_bi_attn_img_tokens": True,
        "add_pos_embed_each_layer": False,
        "use_hybrid_attn_mask": None,
    }
    if not padded:
        fields["pad_token_id"] = pad  # a Llama's is another token
    return new | fields | {
        "patch_size": patch,
        "in_channels": features // patch**2,
        "image_size": side * PIXELS,
        "learn_sigma": outputs != features,
        "use_pos_embed": True,
        "use_adaln_final_layer": True,
        "decoder_t_embed": "add_before_image_tokens" if token else "adaln_before_decoder",
    }  # fmt: skip


def _attention(made_for: Mapping[str, Any], base: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of config.json about heads, rotations and windows."""
    width, heads, depth = (made_for[f"model.trunk.{name}"] for name in ("width", "heads", "depth"))
    size, window = made_for.get(HEAD_DIM, 0), made_for.get(WINDOW, 0)
    fields: dict[str, Any] = {"rope_scaling": published_rope(made_for.get(SCALING, ()))}
    if size or "head_dim" in base or "head_dim" in family.usual:
        fields["head_dim"] = size or width // heads
    if family.windows:
        fields["sliding_window"] = window or None
    if "use_sliding_window" in family.windows:
        fields |= {"use_sliding_window": bool(window), "max_window_layers": 0 if window else depth}
    return fields


def check_exportable(leaves: Leaves, made_for: Mapping[str, Any], preferred: Any = None) -> Family:
    """The family of leaves that were `made_for` such a model: the `preferred` architecture where it has all options.

    Raises ValueError, in one sentence that lists everything that no published checkpoint has.
    """
    family = nearest_family(made_for, f"{IMAGE}/embed/linear/kernel" in leaves.shapes, preferred)
    wrong = [f"{name} is not known" for name in (*ONLY, *TRUNK) if name not in made_for]
    wrong += [f"{name}={made_for[name]!r}, there {value!r} only" for name, value in ONLY.items()
              if made_for.get(name, value) != value]  # fmt: skip
    wrong += family.lacks(made_for)
    for path, leaf in leaves.shapes.items():
        axes = 2 + is_stacked(path) if path.endswith(("kernel", "embedding")) else 1 + is_stacked(path)
        if len(leaf.shape) != axes or names_of(path, leaf.shape[0] if is_stacked(path) else 1, family) is None:
            wrong.append(f"the parameter {shown(path)}")
    needed = (TABLE,) if made_for.get(TIED, False) else (TABLE, HEAD)
    wrong += [f"no parameter {path}" for path in needed if path not in leaves.shapes]
    if wrong:
        raise ValueError(
            f"this model cannot be published as {family.architecture}, the nearest architecture, which lacks: "
            f"{listed(wrong, 100)}"
        )
    return family


@dataclasses.dataclass(frozen=True)
class Headless:
    """`Leaves` without the head, where that is the embedding."""

    inner: Leaves

    @property
    def shapes(self) -> dict[str, Any]:
        """See `Leaves`."""
        return {path: shape for path, shape in self.inner.shapes.items() if path != HEAD}

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """See `Leaves`."""
        return self.inner.blocks(path)


def write_config(folder: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Writes config.json into a folder, which comes last, so that a folder with it is whole. Raises OSError."""
    write_whole(epath.Path(folder) / "config.json", (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def write_settings(folder: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Writes cfg.json, the settings of training that the official scripts open first. Raises OSError.

    They print it, and read whether the text goes through a chat template, which no run here has.
    """
    settings = {name: fields[name] for name in SETTINGS} | {"use_chat_template": False}
    write_whole(epath.Path(folder) / "cfg.json", (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())


def write_published(
    folder: str | os.PathLike[str],
    leaves: Leaves,
    order: str,
    patch: int,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    more: Mapping[str, Tensor] | None = None,
    family: Family = LLAMA,
) -> list[str]:
    """Writes the tensors of `check_exportable` leaves into a folder, a block at a time; returns the names of the files.

    order   of the image head's outputs, `crs` or `rsc` (see `models/heads/adaln.py`); published is `rsc`
    patch   side of a patch
    dtype   of all tensors; None keeps that of each leaf
    more    tensors that are written, too, as they are
    family  whose names the tensors get
    """
    tensors: dict[str, Tensor] = {}
    for path, leaf in leaves.shapes.items():
        kind = jnp.dtype(dtype or leaf.dtype)
        shape = tuple(leaf.shape[1:] if is_stacked(path) else leaf.shape)
        names = names_of(path, leaf.shape[0], family) or ()
        blocks = _Blocks(leaves, path, patch if _turned(path, order) else 0)
        there = shape[::-1] if path.endswith("kernel") else shape
        tensors |= {
            name: Tensor(kind, there, functools.partial(blocks.take, number, number + 1 == len(names)))
            for number, name in enumerate(names)
        }
    return write_tensors(folder, tensors | dict(more or {}), shard_bytes)


@dataclasses.dataclass
class _Blocks:
    """The blocks of one leaf as published, taken one after the other; `patch` of features to turn around, or 0."""

    leaves: Leaves
    path: str
    patch: int
    following: Iterator[np.ndarray] | None = None
    at: int = 0

    def take(self, number: int, last: bool) -> Iterator[np.ndarray]:
        """Block `number`; after the `last` one nothing is kept."""
        if number != self.at or not number:
            self.following = itertools.islice(self.leaves.blocks(self.path), number, None)
        block = next(self.following)
        block = _rsc(block, self.patch) if self.patch else block
        yield block.T if self.path.endswith("kernel") else block
        self.at = number + 1
        if last:
            next(self.following, None)
            self.following = None


def _turned(path: str, order: str) -> bool:
    return order == "crs" and path.startswith(f"{LINEAR}/")


def _rsc(values: np.ndarray, patch: int) -> np.ndarray:
    """Features along the last axis from (channel, row, column) to (row, column, channel)."""
    split = values.reshape(*values.shape[:-1], -1, patch**2)
    return split.swapaxes(-1, -2).reshape(values.shape)
