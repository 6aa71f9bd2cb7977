"""Migration of the config of a checkpoint of format 2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from src.models.pretrained.old_paths import path_now
from src.train.checkpoints.migrations_tasks_2 import COLOURS, image_shape, task_now

Group = dict[str, Any]

GONE = ("patch", "text_codec", "image_codec", "vision", "process", "sample", "tokenizer", "frozen")
PARTS = ("text", "text_head", "image", "image_head", "vision", "labels")  # of `model`, which are now rows of `fields`
FILES = {"times:": "timesteps:", "weights:": "weighting:", "tokens:": "next_token:"}
SAMPLERS = {"gaussian:Ancestral": "ancestral"}
RULES = ("lr_multipliers", "decays", "weight_decay")
# Parts of paths in regular expressions: old -> new. `text` alone may mean embedder and head.
PIECES = (
    (r"(?<=layers/)image(?=/|$|\))", "mot"),
    (r"(?<![\w/])(text|image)_head(?!\w)", r"fields/\1/head"),
    (r"(?<![\w/])(text|image|vision)(?=[/|)])", r"fields/\1/embed"),
    (r"(?<![\w/])labels(?!\w)", "fields/label/embed"),
    (r"(?<![\w/])(text|image|vision)$", r"fields/\1"),
)


def config_now(old: Group, leaves: Mapping[str, Any]) -> Group:
    """The present form of a config of format 2 with its identity; other dicts are returned unchanged.

    leaves   of the checkpoint, by their old paths
    """
    if "model" not in old or "tasks" not in old:
        return old
    params = {path.removeprefix("params/"): leaf for path, leaf in leaves.items() if path.startswith("params/")}
    fields = {row: FIELDS[row](old, params) for row in _rows(old, params)}
    prints = {row: _prints(old, row, field) for row, field in fields.items()}
    latents = _latents(old)
    new = {key: value for key, value in old.items() if key not in GONE}
    new["fields"], new["codecs"] = fields, {row: found for row, found in prints.items() if found}
    new["model"], new["optim"] = _model(old["model"]), _optim(old.get("optim") or {})
    new["tasks"] = {name: task_now(task, renamed, latents) for name, task in old["tasks"].items()}
    new |= _made(old.get("sample") or {}, (old.get("patch") or {}).get("size", 1))
    if "sharding" in old:
        new["sharding"] = old["sharding"] | {"tensor": _rules(old["sharding"].get("tensor", ()))}
    if "init_from" in old:
        new["init_from"] = old["init_from"] | {"skip": [_path(rule) for rule in old["init_from"].get("skip", ())]}
    return new


def _latents(old: Group) -> int:
    """Channels of the latents of generated images; 0 for pixels."""
    codec = old.get("image_codec") or {}
    return codec.get("channels", 4) if codec.get("name") else 0


def renamed(then: str, part: Any) -> Any:
    """A group with the file of its `name` renamed if it begins with `then`; also inner groups."""
    if not isinstance(part, Mapping):
        return part
    new = {key: renamed(then, value) for key, value in part.items()}
    name = new.get("name")
    return new | ({"name": FILES[then] + name.removeprefix(then)} if str(name).startswith(then) else {})


def _rows(old: Group, params: Iterable[str]) -> list[str]:
    """The fields of a run."""
    found = {path_now(path).split("/")[1] for path in params if path_now(path).startswith("fields/")}
    if not found:  # the parameters are unknown
        found |= {"text"} if (old.get("text_codec") or {}).get("name") else set()
        found |= {"vision"} if (old.get("vision") or {}).get("name") else set()
        found |= {"image"} if any(image_shape(task.get("data") or {}) for task in old["tasks"].values()) else set()
    return [row for row in FIELDS if row in found]


def _text(old: Group, params: Mapping[str, Any]) -> Group:
    codec, model = old["text_codec"], old["model"]
    cls = codec["name"].partition(":")[2]
    kept = {"Llama": ("name", "path", "pieces"), "Bytes": ("name",)}.get(cls, ("name", "path", "vocab_size", "folder"))
    head = {"chunk": 8192} | model.get("text_head", {})
    return {
        "codec": {key: codec[key] for key in kept if key in codec},
        "embed": {"name": "tokens"} | model.get("text", {}),
        "head": {"name": "categorical"} | head,
    }


def _image(old: Group, params: Mapping[str, Any]) -> Group:
    head = {"order": "crs", "variance": "none"} | old["model"].get("image_head", {})
    order, variance = head.pop("order"), head.pop("variance")
    codec = _image_codec(old)
    if order != "crs":
        head |= {"order": order, "channels": _latents(old) or codec["host"].get("channels")}
    head |= {"unused_variance": True} if variance == "unused" else {}
    new = {
        "codec": codec,
        "embed": {"name": "patches"} | old["model"].get("image", {}),
        "process": old["process"],
        "head": {"name": "adaln"} | head,
        "time_token": True,
    }
    sampler = ((old.get("sample") or {}).get("image") or {}).get("sampler")
    return new | ({"step": sampler | {"name": SAMPLERS.get(sampler["name"], sampler["name"])}} if sampler else {})


def _image_codec(old: Group) -> Group:
    """The links of the image codec: pixels, the autoencoder if any, patches. Image sizes were options of tasks, in
    pixels or latents."""
    codec = dict(old.get("image_codec") or {})
    shapes = [image_shape(task.get("data") or {}) for task in old["tasks"].values()]
    height, width, channels = next((shape for shape in shapes if shape), (None, None, None))
    if codec.get("name") and channels not in COLOURS and height:
        factor = codec.get("factor", 8)
        height, width, channels = height * factor, width * factor, 3
    sizes = {"height": height, "width": width, "channels": channels} if height else {}
    links: Group = {"host": {"name": "pixels"} | sizes, "device": {"name": "patch"} | (old.get("patch") or {})}
    if codec.get("name"):
        links["frozen"] = codec | {"name": "vae_latents" if codec["name"].startswith("latents") else codec["name"]}
    return links


def _vision(old: Group, params: Mapping[str, Any]) -> Group:
    """`Clip` was a network only; the others had a square image before it and patches after it."""
    options = dict(old["vision"])
    cls = options.pop("name").partition(":")[2]
    links: Group
    if cls == "Clip":
        links = {"frozen": {"name": "clip_vision"} | options}
    else:
        size = options.pop("size", 256)
        host = {"name": "pixels", "height": size, "width": size, "fit": "letterbox"}
        patch = {"name": "patch", "size": options.pop("patch", 2)}
        if cls == "Latents":
            links = {"host": host, "frozen": {"name": "vae_latents"} | options, "device": patch}
        else:
            colours = {"channels": options["channels"]} if "channels" in options else {}
            links = {"host": host | colours, "device": patch}
    init = {"init": "lecun_normal"} | old["model"].get("vision", {})
    return {"codec": links, "embed": {"name": "features"} | init, "time_token": True}


def _label(old: Group, params: Mapping[str, Any]) -> Group:
    count = params["labels/table/embedding"]["shape"][0] - 1
    return {"codec": {"name": "classes", "count": count}, "embed": {"name": "classes"} | old["model"].get("labels", {})}


FIELDS = {"text": _text, "image": _image, "vision": _vision, "label": _label}


def _model(old: Group) -> Group:
    trunk = {key: value for key, value in old["trunk"].items() if key != "copies"}
    trunk["mot"] = old["trunk"].get("copies", [])
    new = {key: value for key, value in old.items() if key not in PARTS}
    return new | {"trunk": trunk, "mot_fields": ["image", "vision"]}


def _prints(old: Group, row: str, field: Group) -> Group:
    """The fingerprints of a field's codec, by class."""
    frozen = old.get("frozen") or {}
    if row == "text":
        cls = field["codec"]["name"].partition(":")[2] or "SentencePiece"
        return {cls: old["tokenizer"]} if old.get("tokenizer") else {}
    link = field["codec"].get("frozen", {}).get("name", "")
    cls = {"clip_vision": "ClipVision", "vae_latents": "VaeLatents"}.get(link)
    return {cls: frozen[row]} if cls and row in frozen else {}


def _made(sample: Group, patch: int) -> Group:
    """The groups `sample`, `decode` and `guidance`."""
    image, new = sample.get("image") or {}, {}
    new["sample"] = {"batch_size": sample["rows"]} if "rows" in sample else {}
    words = {"max_new_tokens": sample["longest"]} if "longest" in sample else {}
    words |= {"choose": renamed("tokens:", sample["text"])} if "text" in sample else {}
    steps = {"steps": image["steps"]} if "steps" in image else {}
    new["decode"] = {"text": {"name": "left_to_right"} | words, "image": {"name": "blocks"} | steps}
    guidance = dict(image.get("guidance") or {})
    features = (guidance.pop("channels", 0) or 0) * patch**2
    return new | {"guidance": guidance | {"features": features}}


def _optim(old: Group) -> Group:
    names = {"max_norm": "grad_clip", "multipliers": "lr_multipliers"}
    new = {names.get(key, key): value for key, value in old.items()}
    return new | {key: _rules(new[key]) for key in RULES if isinstance(new.get(key), list | tuple)}


def _rules(rules: Iterable[Any]) -> list[list[Any]]:
    """Rules (regular expression on paths, value)."""
    return [[_path(pattern), *values] for pattern, *values in rules]


def _path(pattern: str) -> str:
    """A regular expression on old paths, for new paths, if it names whole parts of them."""
    for piece, now in PIECES:
        pattern = re.sub(piece, now, pattern)
    return pattern
