"""What a folder of weights holds, for `src.tools.convert --info`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from src.codecs.clip_files import FILES as CLIP_FILES
from src.codecs.clip_files import read_clip_config
from src.codecs.vae_files import FILES as VAE_FILES
from src.codecs.vae_files import read_vae_config
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.models.pretrained.hf_config import read_config, unread_keys
from src.models.pretrained.initial_weights import Initial, is_initial, summary
from src.models.pretrained.llama_weights import IGNORED, Published, check_complete
from src.tools.conversion.tokenizer import chat_templates
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.read_params import CheckpointParams


def describe(source: Any) -> str:
    """Lines: what it is, its sizes, parameters and dtypes, and its tensors; those of all blocks in one line.

    Raises as the readers do.
    """
    lines, shapes = {"published": _published, "initial": _initial, "run": _run, "vae": _vae, "clip": _clip,
                     "dit": _dit, "tensors": _tensors}[source.kind](source.path)  # fmt: skip
    told = summary(shapes)
    dtypes = ", ".join(f"{name} {count:,}" for name, count in sorted(told["dtypes"].items()))
    lines += [f"{told['parameters']:,} parameters, {told['bytes']:,} bytes ({dtypes})", f"{len(shapes)} tensors:"]
    return "\n".join([*lines, *_table(shapes)])


def unread(tensors: SafeTensors) -> list[str]:
    """A line about the files of weights beside those that are read, if there are some."""
    names = tensors.beside()
    return [f"{tensors.path}: other files of weights are not read: {listed(names)}"] if names else []


def not_read(path: Any) -> list[str]:
    """Lines about what a published folder has and that is not read: files, tensors of a frozen encoder, keys of its
    config.json, and a template of chats."""
    config, tensors = read_config(path), SafeTensors(path)
    lines = unread(tensors)
    if (path / "ema").is_dir() and not (path / "ema/config.json").exists():
        lines.append(f"{path}: the folder ema has no config.json and is not read")
    folders = [each.name + "/" for each in sorted(path.iterdir()) if each.is_dir() and each.name != "ema"]
    if folders := [name for name in folders if not name.startswith(".")]:
        lines.append(f"{path}: folders beside the weights are not read: {listed(folders)}")
    if buffers := [name for name in tensors.entries if name.endswith(IGNORED)]:
        told = "are not read, since rotations are computed from rope_theta"
        lines.append(f"{path}: {len(buffers)} tensors such as {shown(buffers[0])} {told}")
    if towers := Published(tensors, config.tied, config.family).towers:
        lines.append(f"{path}: {len(towers)} tensors of a frozen encoder are left out, such as {shown(towers[0])}")
    fields = read_json(path / "config.json", what="config")
    if (beside := fields.get("rope_theta")) not in (None, config.rope_theta):
        lines.append(f"{path}: rope_theta={shown(beside)} is not read: its table of rotations has {config.rope_theta}")
    if keys := unread_keys(fields):
        plain = config.architecture.removesuffix("ForCausalLM")
        lines.append(f"{path}: keys of config.json that no plain {plain} has are not read: {listed(keys)}")
    if files := chat_templates(path):
        lines.append(
            f"{path}: the chat template of {listed(files)} is not used: chats of a run are <s> question answer </s>"
        )
    return lines


def _published(path: Any) -> tuple[list[str], Mapping[str, Any]]:
    config, tensors = read_config(path), SafeTensors(path)
    lines = [f"{config.architecture}, published", _fields(config)]
    try:
        check_complete(Published(tensors, config.tied, config.family), config)
    except ValueError as error:
        lines.append(f"NOT SOUND: {error}")
    if (path / "ema" / "config.json").exists():
        lines.append("beside it: ema/, its averaged weights")
    lines += not_read(path)
    return lines, tensors.entries


def _initial(path: Any) -> tuple[list[str], Mapping[str, Any]]:
    found = Initial(path)
    made_for = ", ".join(f"{name}={value}" for name, value in sorted(found.meta["about"].items()))
    lines = [f"initial weights, hash {found.hash}", f"for a model with {made_for}"]
    if is_initial(path / "ema"):
        lines.append(f"beside it: ema/, its averaged weights, hash {Initial(path / 'ema').hash}")
    return lines, found.shapes


def _run(path: Any) -> tuple[list[str], Mapping[str, Any]]:
    opened = Checkpointer(path, readonly=True)
    steps = sorted(opened.all_steps())
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {path}: train first, or correct --source")
    found = CheckpointParams(opened.directory / str(steps[-1]))
    trunk = ", ".join(f"{name}={value}" for name, value in sorted(found.config["model"]["trunk"].items()))
    lines = [f"a run with checkpoints of the steps {listed(steps)}; the last one:", f"trunk: {trunk}"]
    if found.config.get("weights"):
        lines.append(f"began from the initial weights {found.config['weights']}")
    return lines, found.shapes


def _vae(path: Any) -> tuple[list[str], Mapping[str, Any]]:
    return ["AutoencoderKL", _fields(read_vae_config(path))], SafeTensors(path, VAE_FILES).entries


def _clip(path: Any) -> tuple[list[str], Mapping[str, Any]]:
    return ["CLIP, of which the vision tower is read", _fields(read_clip_config(path))], SafeTensors(
        path, CLIP_FILES
    ).entries


def _dit(path: Any) -> tuple[list[str], Mapping[str, Any]]:
    return ["DiT or SiT, published without a config.json"], SafeTensors(path).entries


def _tensors(path: Any) -> tuple[list[str], Mapping[str, Any]]:
    return ["tensors without a config.json"], SafeTensors(path).entries


def _fields(config: Any) -> str:
    flat = {name: value for name, value in vars(config).items() if name not in ("architecture", "image", "vision")}
    for part in ("image", "vision"):
        flat |= vars(getattr(config, part)) if getattr(config, part, None) is not None else {}
    return ", ".join(f"{name}={value}" for name, value in flat.items())


def _table(shapes: Mapping[str, Any]) -> list[str]:
    """One line for all tensors of one shape and dtype whose names differ in a number alone."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, leaf in shapes.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((pattern, np.dtype(leaf.dtype).name, tuple(leaf.shape)), []).append(name)
    rows = [(names[0] if len(names) == 1 else key[0], len(names), *key[1:]) for key, names in groups.items()]
    width = max((len(name) for name, *_ in rows), default=0)
    return [f"  {name:<{width}}  {count:>4} x {kind} {list(shape)}" for name, count, kind, shape in rows]
