"""The model that weights are made for: options of a config by their dotted paths (`weights.json`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.common.lookup import lookup
from src.common.tree import listed
from src.models.pretrained.hf_config import PublishedConfig
from src.models.pretrained.hf_vision_config import CODEC, LINKS
from src.sequence.segment import MODES

# Fields of a config that no published checkpoint has otherwise.
ONLY: dict[str, Any] = {
    "model.trunk.norm": "rms",
    "model.trunk.mlp": "swiglu",
    "model.trunk.bias": False,
    "model.trunk.rope": True,
    "model.trunk.final_norm": True,
}
TRUNK = {
    "model.trunk.width": "hidden_size",
    "model.trunk.depth": "num_hidden_layers",
    "model.trunk.heads": "num_attention_heads",
    "model.trunk.kv_heads": "num_key_value_heads",
    "model.trunk.mlp_width": "intermediate_size",
    "model.trunk.norm_epsilon": "rms_norm_eps",
    "model.trunk.rope_theta": "rope_theta",
}
QK_NORM, QKV_BIAS, HEAD_DIM, WINDOW, SCALING = (
    f"model.trunk.{name}" for name in ("qk_norm", "qkv_bias", "head_dim", "sliding_window", "rope_scaling")
)
TIED = "fields.text.head.tied"
# Told only where they are not these; those of `EQUAL` must be these then, and no shape shows it.
OPTIONS: dict[str, Any] = {QKV_BIAS: False, HEAD_DIM: 0, WINDOW: 0, SCALING: [], TIED: False}
EQUAL = (WINDOW, SCALING)
RESERVED = "fields.text.codec.host.reserved"  # only where there are some
HEAD, ORDER, CHANNELS = (f"fields.image.head.{name}" for name in ("name", "order", "channels"))
VARIANCE, LEARNED = "fields.image.process.variance", "learned_range"
USUAL: dict[str, Any] = {
    ORDER: "crs",
    VARIANCE: "fixed_small",
    QK_NORM: False,
    **OPTIONS,
    RESERVED: 0,
}  # where a config does not have the field
BIDIRECTIONAL = "use_bi_attn_img_tokens"  # of config.json: the tokens of an image that is made see each other both ways
OWNERS = {"codec": "embed", "process": "head"}  # of a row: whose parameters are made for a group without own ones

# Format 1 of `weights.json` had other names, below `model` or, for the encoder, of its own.
ENCODERS_1 = {"vision:Clip": "clip", "vision:Latents": "vae"}
NAMES_1 = {
    "image_head.order": (ORDER,),
    "vision.size": (f"{CODEC}.host.height", f"{CODEC}.host.width"),
    "vision.patch": (f"{CODEC}.device.size",),
}


def about(config: PublishedConfig) -> dict[str, Any]:
    """The fields that weights with this config.json are made for."""
    fields = ONLY | {ours: getattr(config, theirs) for ours, theirs in TRUNK.items()}
    trunk = config.family.trunk
    fields |= {QK_NORM: trunk["qk_norm"]}
    usual = config.head_dim * config.num_attention_heads == config.hidden_size
    found = {QKV_BIAS: trunk["qkv_bias"], HEAD_DIM: 0 if usual else config.head_dim, WINDOW: config.sliding_window}
    found |= {SCALING: list(config.rope_scaling), TIED: config.tied}
    fields |= {name: value for name, value in found.items() if value != OPTIONS[name]}
    if config.image is not None:
        fields |= {HEAD: "adaln", ORDER: "rsc", CHANNELS: config.image.in_channels}
        fields |= {VARIANCE: LEARNED} if config.image.learn_sigma else {}
    return fields | (config.vision.about() if config.vision else {})


def about_run(config: Mapping[str, Any], images: bool) -> dict[str, Any]:
    """The same, of a run with this config; `images`: it makes some."""
    fields = {name: value_of(config, name) for name in (*ONLY, QK_NORM, *TRUNK, *((HEAD, ORDER) if images else ()))}
    found = {name: value_of(config, name) for name in OPTIONS}
    heads = fields["model.trunk.heads"]  # None in a config without a trunk
    if found[HEAD_DIM] and heads and found[HEAD_DIM] * heads == fields["model.trunk.width"]:
        found[HEAD_DIM] = OPTIONS[HEAD_DIM]
    return fields | {name: value for name, value in found.items() if value not in (None, OPTIONS[name])}


def made_blocks(config: Mapping[str, Any]) -> list[Any]:
    """How the tokens of the images that a run's tasks make see each other: 0 both ways, 1 causal, or other blocks."""
    found = []
    for task in (config.get("tasks") or {}).values():
        objectives = (task.get("objectives") or {}).values()
        names = {str(name).partition(".")[0] for objective in objectives for name in objective.get("names") or ()}
        blocks = (task["template"].get("segment") or {}).get("blocks", 0)
        blocks = MODES.get(blocks, blocks) if isinstance(blocks, str) else blocks
        found += [blocks] if "image" in names and blocks not in found else []
    return found


def made_at_once(config: Mapping[str, Any], otherwise: bool) -> bool:
    """BIDIRECTIONAL of a run; `otherwise` where it makes no images. Raises ValueError for several or other blocks."""
    blocks = made_blocks(config)
    if len(blocks) > 1 or not all(one in (0, 1) for one in blocks):
        raise ValueError(
            f"the run cannot be published: its images have the blocks {listed([repr(one) for one in blocks])}, and "
            "those of MonoFormer are all bidirectional or all causal"
        )
    return not blocks[0] if blocks else otherwise


def other_attention(published: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What is to be told of a run that starts from weights whose images see each other otherwise, or nothing."""
    there = published.get(BIDIRECTIONAL)
    wanted = 0 if there else 1
    other = [one for one in made_blocks(config) if one != wanted]
    if not isinstance(there, bool) or not other:
        return ""
    words = {number: word for word, number in MODES.items()}
    return (
        f"the initial weights were trained with {words[wanted]} images ({BIDIRECTIONAL}={str(there).lower()}), and this"
        f" run makes some with blocks={words.get(other[0], other[0])!r}: set blocks={words[wanted]!r} in "
        "tasks.<name>.template.segment to use the weights as they were trained"
    )


def value_of(config: Mapping[str, Any], name: str, otherwise: Any = None) -> Any:
    """The field of a config, of a part's name its file alone; `otherwise` where its row or group is absent, and for a
    name that no field has."""
    first, *groups = name.split(".")
    last = groups.pop() if groups else ""
    node = config.get(first, {}).get(groups[0]) if groups else None
    if node is None:
        return otherwise
    for key in groups[1:]:
        inner = node.get(key) or {} if isinstance(node, Mapping) else {}
        node = links_of(inner) if key == "codec" else inner
    if not isinstance(node, Mapping):
        return otherwise
    value = node.get(last, USUAL.get(name, otherwise if first == "model" else None))
    value = list(value) if isinstance(value, tuple) else value
    return value.partition(":")[0] if last == "name" and isinstance(value, str) else value


def key_of(config: Mapping[str, Any], name: str) -> str:
    """Where a config has the field: the link of a codec is a stage, a place in a list, or the group `codec` itself."""
    first, *groups = name.split(".")
    codec = config.get(first, {}).get(groups[0], {}).get("codec") if len(groups) == 4 and groups[1] == "codec" else None
    link = links_of(codec).get(groups[2]) if codec else None
    if link is None or groups[3] == "name":  # another link altogether
        return name
    place = next((f"[{number}]" for number, each in enumerate(codec) if each is link), "")
    return f"{first}.{groups[0]}.codec{place}.{groups[3]}" if place or link is codec else name


def links_of(codec: Any) -> dict[str, Mapping[str, Any]]:
    """The links of a group `codec` by their stage, `host`, `frozen` or `device`."""
    if isinstance(codec, Mapping) and "name" not in codec:
        return dict(codec)
    found: dict[str, Mapping[str, Any]] = {}
    for link in codec if isinstance(codec, list | tuple) else [codec]:
        found.setdefault(lookup("codecs", link["name"]).where, link)
    return found


def parameters_of(name: str) -> str:
    """The beginning of the paths of the parameters that an option of the config is about."""
    first, *groups = name.split(".")
    if len(groups) < 2:
        return ""
    row, group = groups[:2]
    return f"{row}/" if first == "model" else f"fields/{row}/{OWNERS.get(group, group)}/"


def renamed(told: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of format 1 of `weights.json` with the names of today; `published` is the config.json beside it."""
    fields: dict[str, Any] = {}
    for name, value in told.items():
        if name == "vision.name":
            encoder = ENCODERS_1.get(value) if isinstance(value, str) else None
            links = LINKS[encoder] if encoder else {"frozen.name": value}
            fields |= {f"{CODEC}.{option}": setting for option, setting in links.items()}
        elif name == "image_head.variance":
            fields |= {VARIANCE: LEARNED} if value == "learned" else {}
        else:
            fields |= dict.fromkeys(NAMES_1.get(name, (f"model.{name}",)), value)
    if fields.get(ORDER) == "rsc":
        channels = published.get("in_channels")
        fields |= {HEAD: "adaln"} | ({CHANNELS: channels} if isinstance(channels, int) else {})
    return fields
