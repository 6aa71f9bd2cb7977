"""From the `model` group of a config, and what the data say of themselves, to a Model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from src.common.lookup import lookup
from src.models.conditioning import TimestepEmbedder
from src.models.embedders import LabelEmbedder, PatchEmbedder, TokenEmbedder
from src.models.heads import ImageHead, TextHead
from src.models.model import Model
from src.models.transformer import Transformer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Fields:
    """What the tasks bring: size of the vocabulary, shape of the patches, number of classes (None: not there)."""

    vocab: int | None = None
    patch_features: int | None = None
    channels: int | None = None
    grid: tuple[int, int] | None = None
    classes: int | None = None


def build_model(config: Mapping[str, Any], fields: Fields, rngs: nnx.Rngs) -> Model:
    """Puts embedders, trunk and heads together. Call it under `jax.jit` or `nnx.eval_shape` for large models.

    Raises ValueError, naming the key, for unknown names and sizes that do not fit.
    """
    if config["dtype"] not in DTYPES:
        raise ValueError(f"model.dtype={config['dtype']!r} is unknown; use one of {', '.join(DTYPES)}")
    args = {"dtype": DTYPES[config["dtype"]], "rngs": rngs}
    trunk_config, conditioning = dict(config["trunk"]), dict(config["conditioning"])
    kind = lookup("models", conditioning.pop("name"))
    width = trunk_config["width"]
    parts: dict[str, Any] = {}
    if fields.vocab is not None:
        text = config["text"]
        parts["text"] = TokenEmbedder(fields.vocab, width, init=text["init"], **args)
        parts["text_head"] = TextHead(width, fields.vocab, init=text["head_init"], **args)
    if fields.patch_features is not None:
        image = dict(config["image"])
        embedder = functools.partial(PatchEmbedder, fields.patch_features, fields.grid, width)
        parts["image"] = embedder(init=image.pop("init"), **args)
        parts["image_head"] = ImageHead(width, fields.patch_features, fields.channels, **image, **args)
        parts["time"] = TimestepEmbedder(width, **config["time"], **args)
    if fields.classes is not None:
        parts["labels"] = LabelEmbedder(fields.classes, width, **config["labels"], **args)
    trunk = Transformer(**trunk_config, layer=kind.Layer, **args)
    return Model(trunk, kind(width, **conditioning, **args), **parts)
