"""Published files of CLIP's vision tower (config.json and model.safetensors) <-> a `Clip`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from src.codecs.clip import Clip, ClipConfig
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.strict_json import read_json
from src.common.files.weight_mapping import Names, import_weights
from src.common.tree import flatten, listed

FILE = "model.safetensors"
FILES = (FILE, "model.safetensors.index.json", "model.fp16.safetensors", "model.safetensors.index.fp16.json")
PREFIX = "vision_model."
BYTES = 1 << 20
PARAMETERS = 2**36
ARCHITECTURES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
KINDS = ("clip_vision_model", "clip")
# Of the fields that shape the network: what transformers takes where one is absent, and lowest and highest value.
FIELDS: dict[str, tuple[Any, int | float, int | float]] = {
    "hidden_size": (768, 1, 2**15),
    "intermediate_size": (3072, 1, 2**17),
    "num_hidden_layers": (12, 1, 2**10),
    "num_attention_heads": (12, 1, 2**10),
    "image_size": (224, 1, 2**13),
    "patch_size": (32, 1, 2**10),
    "num_channels": (3, 1, 2**10),
    "layer_norm_eps": (1e-5, 1e-12, 0.1),
}
ACTIVATIONS = ("quick_gelu", "gelu")
SINGLE = {
    "class_embedding": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "patch_embedding/kernel": "embeddings.patch_embedding.weight",
    "pre_norm": "pre_layrnorm",  # the misspelling is theirs
    "post_norm": "post_layernorm",
}
INSIDE = {f"{n}_proj": f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")}
INSIDE |= {n: f"mlp.{n}" for n in ("fc1", "fc2")} | {n: n for n in ("layer_norm1", "layer_norm2")}
OTHERS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # of the whole CLIP
BUFFER = "embeddings.position_ids"  # of older files


def read_clip(folder: str | os.PathLike[str], dtype: str = "float32") -> tuple[Clip, Any]:
    """The vision tower in a folder (local or in a store), alone or with its text tower, and its parameters, f32.

    Raises FileNotFoundError, OSError, and ValueError, in one sentence, for a config or weights that cannot be used.
    """
    clip = Clip(read_clip_config(folder), dtype)
    names, tensors = published_names(clip.shapes(), clip.config.num_hidden_layers), SafeTensors(folder, FILES)
    here = functools.partial(canonical, prefix=prefix_of(tensors.entries))
    return clip, import_weights(tensors, names, clip.shapes(), here)


def published_names(params: Any, layers: int) -> Names:
    """The published name of each leaf, or those of its blocks."""
    return {path: _name(path, layers) for path in flatten(params)}


def _name(path: str, layers: int) -> str | tuple[str, ...]:
    if path in SINGLE:
        return PREFIX + SINGLE[path]
    stem, _, leaf = path.rpartition("/")
    leaf = "bias" if leaf == "bias" else "weight"
    if stem in SINGLE:
        return f"{PREFIX}{SINGLE[stem]}.{leaf}"
    part = INSIDE[stem.removeprefix("layers/")]
    return tuple(f"{PREFIX}encoder.layers.{i}.{part}.{leaf}" for i in range(layers))


def prefix_of(names: Iterable[str]) -> str:
    """What the names of a vision tower begin with: `vision_model.`, nothing where transformers 5 saved the tower alone,
    or more where it was part of another model."""
    first = SINGLE["class_embedding"]
    found = [name.removesuffix(first) for name in names if name.endswith(first)]
    return found[0] if len(found) == 1 else PREFIX


def canonical(name: str, prefix: str = PREFIX) -> str | None:
    """The published name of a tensor of a file whose vision tower has this prefix; None for a tensor that is not read:
    of the text tower, of what joins both, and a buffer."""
    if not name.startswith(prefix):
        return None if name.removeprefix(prefix.removesuffix(PREFIX)).startswith(OTHERS) else name
    inner = name.removeprefix(prefix)
    return None if inner == BUFFER or (not prefix and inner.startswith(OTHERS)) else PREFIX + inner


def read_clip_config(path: str | os.PathLike[str]) -> ClipConfig:
    """The `config.json` at `path`, or in the folder `path` (local or in a store): of the tower, or of a whole CLIP.

    Other fields are about its training or the text tower, and are ignored.
    Raises FileNotFoundError, OSError, and ValueError, in one sentence that lists all wrong fields, for JSON that is not
    sound, another architecture, and fields of another type or out of range.
    """
    path = epath.Path(path)
    path = path if path.name.endswith(".json") else path / "config.json"
    fields, where = read_json(path, limit=BYTES, what="config"), f"the config {shown(path)}"
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is no table of fields: fetch it anew")
    kinds, kind = fields.get("architectures", ["CLIPVisionModel"]), fields.get("model_type")
    known = isinstance(kinds, list) and len(kinds) == 1 and kinds[0] in ARCHITECTURES
    if not known or kind not in KINDS:
        raise ValueError(
            f"{where} is of architectures {shown(kinds)} and model_type {shown(kind)}: "
            f"known are {', '.join(ARCHITECTURES)}, of model_type {' or '.join(KINDS)}"
        )
    fields = fields.get("vision_config", fields)
    if not isinstance(fields, dict):
        raise ValueError(f"{where} has a vision_config that is no table of fields: fetch it anew")
    given = {name: fields.get(name, default) for name, (default, _, _) in FIELDS.items()}
    given["hidden_act"] = fields.get("hidden_act", "quick_gelu")
    if wrong := _wrong(given):
        raise ValueError(f"{where} cannot be used: {listed(wrong)}; give the config that belongs to the weights")
    return ClipConfig(**given)


def wrong_fields(fields: dict[str, Any], limits: dict[str, tuple[Any, int | float, int | float]]) -> list[str]:
    """What is wrong in the fields of a tower: a number of another kind or out of its limits, an unknown activation."""
    wrong = []
    for name, (default, low, high) in limits.items():
        whole = isinstance(default, int)
        if type(fields[name]) not in ((int,) if whole else (int, float)) or not low <= fields[name] <= high:
            kind = "a whole number" if whole else "a number"
            wrong.append(f"{name}={shown(fields[name])} is not {kind} from {low:g} to {high:g}")
    if fields["hidden_act"] not in ACTIVATIONS:
        wrong.append(f"hidden_act={shown(fields['hidden_act'])} is none of {', '.join(ACTIVATIONS)}")
    return wrong


def _wrong(fields: dict[str, Any]) -> list[str]:
    if wrong := wrong_fields(fields, FIELDS):
        return wrong
    width, size = fields["hidden_size"], fields["image_size"]
    for part, whole in (("num_attention_heads", "hidden_size"), ("patch_size", "image_size")):
        if fields[whole] % fields[part]:
            wrong.append(f"{part}={fields[part]} does not divide {whole}={fields[whole]}")
    total = fields["num_hidden_layers"] * width * (4 * width + 2 * fields["intermediate_size"])
    total += width * ((size // fields["patch_size"]) ** 2 + fields["num_channels"] * fields["patch_size"] ** 2)
    if total > PARAMETERS:
        wrong.append(f"these sizes make {total:.3g} parameters, more than {PARAMETERS:.3g}")
    return wrong
