"""From the `model` group of a config, and what the data say of themselves, to a Model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from src.common.lookup import check_arguments, lookup
from src.models import lora
from src.models.conditioning import Conditioning, TimestepEmbedder
from src.models.embedders import LabelEmbedder, PatchEmbedder, TokenEmbedder, VisionEmbedder
from src.models.heads.linear import ImageHead, TextHead
from src.models.model import Model
from src.models.transformer import Transformer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Fields:
    """What the tasks bring: size of the vocabulary, shape of the patches, number of classes, and features of a frozen
    encoder (None: not there)."""

    vocab: int | None = None
    patch_features: int | None = None
    channels: int | None = None
    grid: tuple[int, int] | None = None
    classes: int | None = None
    vision_features: int | None = None


def build_model(config: Mapping[str, Any], fields: Fields, rngs: nnx.Rngs) -> Model:
    """Puts embedders, trunk and heads together. Call it under `jax.jit` or `nnx.eval_shape` for large models.

    Raises ValueError, naming the key, for unknown names and sizes that do not fit.
    """
    if config["dtype"] not in DTYPES:
        raise ValueError(f"model.dtype={config['dtype']!r} is unknown; use one of {', '.join(DTYPES)}")
    dtype, width = DTYPES[config["dtype"]], config["trunk"]["width"]

    def part(cls: type, group: str, **given: Any) -> Any:
        """One part, from its group of the config and from what is known already."""
        options = {k: v for k, v in dict(config[group]).items() if k != "name"}
        arguments = options | given | {"dtype": dtype, "rngs": rngs}
        check_arguments(cls, arguments, where=f"model.{group} ({cls.__name__})")
        return cls(**arguments)

    pictured = fields.patch_features is not None
    kind = lookup("models", config["conditioning"]["name"]) if pictured else Conditioning  # no time without an image
    parts: dict[str, Any] = {}
    if fields.vocab is not None:
        parts["text"] = part(TokenEmbedder, "text", vocab=fields.vocab, width=width)
        parts["text_head"] = part(TextHead, "text_head", vocab=fields.vocab, width=width)
    if pictured:
        size = {"width": width, "features": fields.patch_features}
        parts["image"] = part(PatchEmbedder, "image", grid=fields.grid, **size)
        parts["image_head"] = part(ImageHead, "image_head", channels=fields.channels, **size)
        parts["time"] = part(TimestepEmbedder, "time", width=width)
    if fields.vision_features is not None:
        parts["vision"] = part(VisionEmbedder, "vision", features=fields.vision_features, width=width)
    if fields.classes is not None:
        parts["labels"] = part(LabelEmbedder, "labels", classes=fields.classes, width=width)
    trunk = part(Transformer, "trunk", layer=kind.Layer)
    model = Model(
        trunk, part(kind, "conditioning", width=width) if pictured else Conditioning(width, rngs=rngs), **parts
    )
    lora.adapt(trunk, **config.get("lora", {}), rngs=rngs)  # last, so that what is drawn before does not depend on it
    return model
