"""The frozen vision encoder as a published `config.json` says it <-> `config.vision`.

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
NAMES = {"clip": "vision:Clip", "vae": "vision:Latents"}
# Of each encoder's args: our option, the value where neither says one, and the lowest and highest.
ARGS: dict[str, dict[str, tuple[str, int, int, int]]] = {
    "clip": {},
    "vae": {"patch_size": ("patch", 2, 1, 2**8), "resolution": ("size", 256, 1, 2**14)},
}


@dataclasses.dataclass(frozen=True)
class PublishedVision:
    """The encoder by its published name, where its weights were, and its args."""

    vision_encoder: str
    vision_encoder_path: str
    vision_encoder_args: Mapping[str, int]

    def about(self) -> dict[str, Any]:
        """The fields of `config.vision` that say the same, by dotted name; not the path, which may differ."""
        args = {ours: self.vision_encoder_args.get(theirs, usual)
                for theirs, (ours, usual, *_) in ARGS[self.vision_encoder].items()}  # fmt: skip
        return {f"vision.{name}": value for name, value in ({"name": NAMES[self.vision_encoder]} | args).items()}


def parse_vision(fields: Mapping[str, Any]) -> PublishedVision | list[str] | None:
    """What a `config.json` says, None where it has no encoder, or all that is wrong with it."""
    encoder, path, args = (fields.get(name) for name in FIELDS)
    if not encoder:
        return None
    if not isinstance(encoder, str) or encoder not in NAMES:
        return [f"vision_encoder={shown(encoder)} is none of {', '.join(NAMES)}"]
    args = {} if args is None else args
    wrong = [] if isinstance(path, str) and path else [f"vision_encoder_path={shown(path)} is no path"]
    if not isinstance(args, dict):
        return [*wrong, f"vision_encoder_args={shown(args)} is no table"]
    for name, (_, usual, low, high) in ARGS[encoder].items():
        value = args.get(name, usual)
        if type(value) is not int or not low <= value <= high:
            wrong.append(f"vision_encoder_args.{name}={shown(value)} is not a whole number from {low} to {high}")
    return wrong or PublishedVision(encoder, path, args)


def about_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Of `config.vision`, the fields that `PublishedVision.about` may name."""
    encoder = _encoder(vision)
    options = {ours: vision.get(ours, usual) for ours, usual, *_ in (ARGS[encoder].values() if encoder else ())}
    return {f"vision.{name}": value for name, value in ({"name": vision.get("name", "")} | options).items()}


def vision_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The three fields of config.json for `config.vision`; none for an encoder that is not published."""
    encoder = _encoder(vision)
    if encoder is None:
        return {}
    args = {theirs: vision.get(ours, usual) for theirs, (ours, usual, *_) in ARGS[encoder].items()}
    return dict(zip(FIELDS, (encoder, str(vision["path"]), args), strict=True))


def _encoder(vision: Mapping[str, Any]) -> str | None:
    return {ours: theirs for theirs, ours in NAMES.items()}.get(vision.get("name", ""))
