"""Migration of the tasks of format 2, classes with all options, to sources and templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Group = dict[str, Any]

COLOURS = (1, 3)  # channels of images; others are moments of latents
PIECE = 3  # characters per token, for the length at which a chat was split
JOURNEYDB = "Please generate an image of {}"

# Names of the parts of a row: old -> new.
NAMES = {
    **{name: f"text.{name}" for name in ("prompt", "tail", "head", "caption", "sentence", "rest")},
    "picture": "vision",
}
# Options of templates: old -> new.
MADE = {"image_mode": "segment.blocks", "drop": "drop"}
PROMPT = MADE | {"length": "row_length", "text_loss": "text_loss"}
READ = {"image_mode": "blocks", "length": "row_length"}
CLASS = MADE | {"prompt_length": "length", "newline": "newline", "phrases": "phrases"}
CAPTIONS = {"length": "length", "too_long": "too_long", "text": "caption", "phrase": "phrase"}
TO_IMAGE = CAPTIONS | MADE | {"newline": "newline", "buckets": "buckets"}
TO_CAPTION = CAPTIONS | {"image_mode": "blocks"}
CHAT = {
    "length": "length",
    "too_long": "too_long",
    "train_on_source": "train_on_source",
    "template": "headers",
    "question": "question",
}
PACKED = {
    **{name: name for name in ("length", "images", "drop", "too_long", "buckets")},
    "pictures": "visions",
    "prompt": "prompt_length",
    "image_mode": "segment.blocks",
    "picture_mode": "vision_blocks",
}
# By class: source and its options, template and its options, with old names of options.
CANVAS = ("size", "most", "shift")
TASKS: dict[str, tuple[str, tuple[str, ...], str, dict[str, str]]] = {
    "digits:CaptionToImage": ("digits", ("shift",), "caption_to_image", PROMPT),
    "digits:ImageToCaption": ("digits", ("shift",), "image_to_caption", READ),
    "digits:NumberSentences": ("numbers", ("relations",), "text", {"length": "length"}),
    "labels:LabelToImage": ("digits", ("shift",), "class_label", MADE),
    "labels": ("digits", ("shift",), "class_label", MADE),
    "canvas:CanvasCaptionToImage": ("canvas", CANVAS, "caption_to_image", PROMPT),
    "canvas:CanvasImageToCaption": ("canvas", CANVAS, "image_to_caption", READ),
    "arrays:ClassToImage": ("arrays", ("folder",), "class_label", MADE),
    "arrays:ClassPromptToImage": ("arrays", ("folder",), "class_prompt", CLASS),
    "imagenet:ClassToImage": ("image_folders", ("folder",), "class_label", MADE),
    "imagenet:ClassPromptToImage": ("image_folders", ("folder",), "class_prompt", CLASS),
    "tfds:ClassToImage": ("tfds", ("folder", "split", "image", "label"), "class_label", MADE),
    "tfds:ClassPromptToImage": ("tfds", ("folder", "split", "image", "label"), "class_prompt", CLASS),
    "tfds:CaptionToImage": ("tfds", ("folder", "split", "image", "caption"), "caption_to_image", TO_IMAGE),
    "tfds:ImageToCaption": ("tfds", ("folder", "split", "image", "caption"), "image_to_caption", TO_CAPTION),
    "pictures:CaptionToImage": ("captions", ("folder",), "caption_to_image", TO_IMAGE),
    "pictures:ImageToCaption": ("captions", ("folder",), "image_to_caption", TO_CAPTION),
    "buckets:CaptionToImage": ("captions", ("folder",), "caption_to_image", TO_IMAGE),
    "tars:CaptionToImage": ("webdataset", ("folder",), "caption_to_image", TO_IMAGE),
    "tars:ImageToCaption": ("webdataset", ("folder",), "image_to_caption", TO_CAPTION),
    "journeydb:CaptionToImage": ("journeydb", ("annotations", "images"), "caption_to_image", TO_IMAGE),
    "journeydb:ImageToCaption": ("journeydb", ("annotations", "images"), "image_to_caption", TO_CAPTION),
    "chats:ChatToText": ("ultrachat", ("folder",), "chat", CHAT | {"turns": "turns"}),
    "llava:PictureChatToText": (
        "llava",
        ("annotations", "images"),
        "picture_chat",
        CHAT | {"head_length": "head_length", "marks": "marks"},
    ),
    "documents:Documents": ("documents", ("folder", "files"), "packed", PACKED),
    "documents:Chats": ("ultrachat", ("folder", "files"), "packed", PACKED),
    "buckets:Documents": ("documents", ("folder", "files"), "packed", PACKED),
}
SHARED = ("held_out", "names", "ambiguous")  # of every source that has them
RENAMED = {"files": "names"}
# Old defaults that differ from the present ones.
USUAL: dict[str, Group] = {
    "journeydb:CaptionToImage": {"text": "prompt", "phrase": JOURNEYDB},
    "journeydb:ImageToCaption": {"text": "caption"},
    "tfds:ClassToImage": {"label": "label"},
    "tfds:ClassPromptToImage": {"label": "label"},
    "tfds:CaptionToImage": {"caption": "captions/text"},
    "tfds:ImageToCaption": {"caption": "captions/text"},
}


def task_now(task: Mapping[str, Any], renamed: Callable[[str, Any], Any], latents: int) -> Group:
    """The present form of a group `tasks.<name>`.

    renamed   (prefix of old file names, group) -> the group with new file names
    latents   channels of the autoencoder's latents, 0 without one
    """
    new = {key: value for key, value in task.items() if key not in ("share", "data", "objectives")}
    new |= {"weight": task["share"]} if "share" in task else {}
    new |= _parts(dict(task.get("data") or {}), latents)
    objectives = task.get("objectives") or {}
    return new | {"objectives": {label: _objective(group, renamed) for label, group in objectives.items()}}


def _parts(data: Group, latents: int) -> Group:
    """Source and template of a task. An unknown class keeps its name, which then causes an error."""
    name = data.pop("name", "")
    if name not in TASKS:
        return {"source": {"name": name} | data, "template": {}}
    data = USUAL.get(name, {}) | data
    source, options, template, names = TASKS[name]
    channels = data.get("channels", 3)
    found: Group = {"name": source} | {RENAMED.get(key, key): data[key] for key in options if key in data}
    if data.get("records"):
        found = {"name": "records", "folder": data["records"]}
    elif source == "ultrachat" and data.get("too_long") == "split":
        found["split"] = PIECE * data["length"]
    moments = {"records": channels not in COLOURS, "arrays": bool(latents) and channels == 2 * latents}
    found |= {"moments": True} if moments.get(found["name"]) else {}
    found |= {key: data[key] for key in SHARED if key in data}
    if data.get("too_long") == "split":
        del data["too_long"]
    made: Group = {"name": template}
    for then, now in names.items():
        if then in data:
            _put(made, now, data[then])
    return {"source": found, "template": made}


def _put(group: Group, name: str, value: Any) -> None:
    *outer, last = name.split(".")
    for key in outer:
        group = group.setdefault(key, {})
    group[last] = value


def _objective(group: Mapping[str, Any], renamed: Callable[[str, str], Any]) -> Group:
    old = dict(group)
    if "field" not in old:
        names = old.pop("fields", ())
        names = [names] if isinstance(names, str) else names
        return old | {"names": [NAMES.get(name, name) for name in names]}
    weighting = renamed("weights:", old.pop("loss_weight", {"name": "weights:Constant"}))
    new = {"name": "diffusion", "names": [old.pop("field")], "timesteps": renamed("times:", old.pop("times"))}
    return old | new | {"loss": {"name": "squared_error", "weighting": weighting}}


def image_shape(data: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Height, width and channels of a task's images; None without images, or if unknown."""
    kind = str(data.get("name", "")).partition(":")[0]
    if kind in ("digits", "labels") and not str(data["name"]).endswith("NumberSentences"):
        return 8, 8, 1
    if kind == "canvas":
        return data.get("size", 16), data.get("size", 16), 1
    if kind == "arrays":
        return data["height"], data["width"], data["channels"]
    if data.get("size"):
        return data["size"], data["size"], data.get("channels", 3)
    return None
