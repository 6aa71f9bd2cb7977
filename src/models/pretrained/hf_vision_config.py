"""The frozen vision encoder of a published `config.json` <-> the links of `config.fields.vision.codec`.

The official class builds its encoder of three fields: `vision_encoder` (clip | vae), `vision_encoder_path`, a folder or
a name of the hub, from which the encoder's own weights come, and `vision_encoder_args`, of a vae `patch_size` and
`resolution`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from src.common.files.paths import shown

FIELDS = ("vision_encoder", "vision_encoder_path", "vision_encoder_args")
CODEC = "fields.vision.codec"
# Of each encoder the links, by stage and option: those that are always so.
LINKS: dict[str, dict[str, str]] = {
    "clip": {"frozen.name": "clip_vision"},
    "vae": {
        "host.name": "pixels",
        "host.fit": "letterbox",
        "frozen.name": "vae_latents",
        "device.name": "patch",
    },
}
# For each encoder's args: our options, the default, and the lowest and highest value.
ARGS: dict[str, dict[str, tuple[tuple[str, ...], int, int, int]]] = {
    "clip": {},
    "vae": {
        "patch_size": (("device.size",), 2, 1, 2**8),
        "resolution": (("host.height", "host.width"), 256, 1, 2**14),
    },
}


@dataclasses.dataclass(frozen=True)
class PublishedVision:
    """The encoder by its published name, where its weights were, and its args."""

    vision_encoder: str
    vision_encoder_path: str
    vision_encoder_args: Mapping[str, int]

    def about(self) -> dict[str, Any]:
        """The same as options of a config, by dotted name; without the path, which may differ."""
        options: dict[str, Any] = dict(LINKS[self.vision_encoder])
        for name, (ours, usual, *_) in ARGS[self.vision_encoder].items():
            options |= dict.fromkeys(ours, self.vision_encoder_args.get(name, usual))
        return {f"{CODEC}.{option}": value for option, value in options.items()}


def parse_vision(fields: Mapping[str, Any]) -> PublishedVision | list[str] | None:
    """The encoder of a `config.json`, None where it has none, or a list of all errors."""
    encoder, path, args = (fields.get(name) for name in FIELDS)
    if not encoder:
        return None
    if not isinstance(encoder, str) or encoder not in LINKS:
        return [f"vision_encoder={shown(encoder)} is none of {', '.join(LINKS)}"]
    args = {} if args is None else args
    wrong = [] if isinstance(path, str) and path else [f"vision_encoder_path={shown(path)} is no path"]
    if not isinstance(args, dict):
        return [*wrong, f"vision_encoder_args={shown(args)} is no table"]
    for name, (_, usual, low, high) in ARGS[encoder].items():
        value = args.get(name, usual)
        if type(value) is not int or not low <= value <= high:
            wrong.append(f"vision_encoder_args.{name}={shown(value)} is not a whole number from {low} to {high}")
    return wrong or PublishedVision(encoder, path, args)


def vision_fields(links: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The three fields of config.json for the links of a codec by stage; none for an encoder that is not published."""
    stages = {f"{stage}.{key}": value for stage, link in links.items() for key, value in link.items()}
    stages |= {key: value.partition(":")[0] for key, value in stages.items() if key.endswith(".name")}
    for encoder, wanted in LINKS.items():
        sizes = {name: [stages.get(option) for option in ours] for name, (ours, *_) in ARGS[encoder].items()}
        square = all(len(set(values)) == 1 for values in sizes.values())
        if square and all(stages.get(option) == value for option, value in wanted.items()):
            args = {name: value for name, (value, *_) in sizes.items()}
            return dict(zip(FIELDS, (encoder, str(stages["frozen.path"]), args), strict=True))
    return {}
