"""The `config.json` beside published weights of a known family: typed fields, within ranges, nothing executed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from src.common.files.paths import shown
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.models.pretrained.families import Family, family_of, known_families
from src.models.pretrained.hf_rope import TABLES, parse_rope
from src.models.pretrained.hf_vision_config import FIELDS as VISION
from src.models.pretrained.hf_vision_config import PublishedVision, parse_vision

BYTES = 1 << 20
PARAMETERS = 2**42  # of the trunk and both tables, about 4.4e12
# Lowest and highest value; whole numbers where the bounds are.
RANGES: dict[str, tuple[int | float, int | float]] = {
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**19),
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**10),
    "num_key_value_heads": (1, 2**10),
    "vocab_size": (1, 2**22),
    "max_position_embeddings": (1, 2**24),
    "rms_norm_eps": (1e-12, 0.1),
    "rope_theta": (1.0, 1e12),
}
HEAD_DIM = (1, 2**12)
KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
IMAGE_RANGES = {"image_size": (1, 2**14), "patch_size": (1, 2**8), "in_channels": (1, 2**10)}
WHOLE = ({*RANGES} - {"rms_norm_eps", "rope_theta"}) | {*IMAGE_RANGES, "head_dim", "sliding_window"}
TIED = {"tie_word_embeddings": False}
# Keys that change nothing here: names of tokens and files, and settings of training and of transformers.
PLAIN = (
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "attention_dropout"),
    *("image_token_index", "tokenizer_max_length", "tokenizer_padding_side", "use_flash_attn", "hidden_dropout"),
    *(
        "head_dim",
        "tie_word_embeddings",
        "hidden_act",
        "decoder_t_embed",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "add_pos_embed_each_layer",
        "use_hybrid_attn_mask",
    ),
    *("is_llama_config", "neftune_noise_alpha", "max_sequence_length", "transformers.js_config"),
)
TIMES = ("add_before_image_tokens", "adaln_before_decoder")
SWITCHES = ("learn_sigma", "use_pos_embed", "use_adaln_final_layer", "use_bi_attn_img_tokens")


@dataclasses.dataclass(frozen=True)
class PublishedImage:
    """MonoFormer's own fields: `image_size` in pixels, `patch_size` in latents, `in_channels` of a latent."""

    image_size: int
    patch_size: int
    in_channels: int
    learn_sigma: bool
    use_pos_embed: bool
    use_adaln_final_layer: bool
    use_bi_attn_img_tokens: bool
    decoder_t_embed: str


@dataclasses.dataclass(frozen=True)
class PublishedConfig:
    """The network of a `config.json`, in the names of transformers; `image` is None for a language model, and `vision`
    where nothing understands images; `rope_scaling` is that of the trunk; `tied`: the head is the embedding; `head_dim`
    is hidden_size / num_attention_heads where the file says nothing; `sliding_window`: 0 for none.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    head_dim: int
    image: PublishedImage | None
    vision: PublishedVision | None = None
    rope_scaling: tuple[Any, ...] = ()
    tied: bool = False
    sliding_window: int = 0

    @property
    def family(self) -> Family:
        """The row of the table of families."""
        return family_of(self.architecture)


def read_config(path: str | os.PathLike[str]) -> PublishedConfig:
    """The `config.json` at `path`, or in the folder `path` (local or in a store).

    Raises FileNotFoundError, OSError, and ValueError, in one sentence that lists all wrong fields, for JSON that is not
    sound, another architecture, fields that are missing, of another type or out of range, and what the model lacks.
    """
    path = epath.Path(path)
    path = path if path.name.endswith(".json") else path / "config.json"
    return parse_config(read_json(path, limit=BYTES, what="config"), f"the config {shown(path)}")


def parse_config(fields: Any, where: str) -> PublishedConfig:
    """The same, of what a `config.json` holds; `where` begins the messages."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is no table of fields: fetch it anew")
    family = _family(fields, where)
    theta, scaling, wrong, lacking = parse_rope(fields)
    fields = _defaults(fields, family) | {"rope_theta": theta}
    ranges, vision = dict(RANGES), None
    if family.images:
        ranges |= IMAGE_RANGES
        given = {name: fields.get(name) for name in SWITCHES}
        wrong += [f"{n}={shown(v)} is not true or false" for n, v in given.items() if not isinstance(v, bool)]
        if fields.get("decoder_t_embed") not in TIMES:
            wrong.append(f"decoder_t_embed={shown(fields.get('decoder_t_embed'))} is none of {', '.join(TIMES)}")
        vision = parse_vision(fields)
        wrong += vision if isinstance(vision, list) else []
    if not isinstance(fields["tie_word_embeddings"], bool):
        wrong.append(f"tie_word_embeddings={shown(fields['tie_word_embeddings'])} is not true or false")
    wrong = [text for name, bounds in ranges.items() if (text := _range(name, fields.get(name), *bounds))] + wrong
    wrong += [text for size in [fields.get("head_dim")] if size and (text := _range("head_dim", size, *HEAD_DIM))]
    window, unlike = _window(fields, family) if not wrong else (0, [])
    lacking += _lacking(fields, family) + unlike
    wrong = wrong or ([] if lacking else _contradictions(fields))
    if wrong or lacking:
        advice = "give the config that belongs to the weights" if wrong else "give other weights (docs/weights.md)"
        raise ValueError(f"{where} cannot be used: {listed(wrong + lacking)}; {advice}")
    image = None
    if family.images:
        image = PublishedImage(**{field.name: fields[field.name] for field in dataclasses.fields(PublishedImage)})
    more = {"image": image, "vision": vision, "rope_scaling": scaling, "tied": fields["tie_word_embeddings"]}
    more |= {"head_dim": _head_dim(fields), "sliding_window": window}
    return PublishedConfig(family.architecture, **{name: fields[name] for name in RANGES}, **more)


def _family(fields: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises ValueError, with those that are known, for another."""
    kinds = fields.get("architectures")
    one = kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else None
    if (family := family_of(one, fields.get("model_type"))) is None:
        raise ValueError(
            f"{where} is of architectures {shown(kinds)} and model_type {shown(fields.get('model_type'))}: "
            f"known are {known_families()}"
        )
    return family


def unread_keys(fields: Mapping[str, Any]) -> list[str]:
    """What a `config.json` says that is not read and may matter: its keys with their values, those that are empty, none
    or false left out."""
    family = family_of(*(fields.get("architectures") or [None])[:1])
    read = {*RANGES, *IMAGE_RANGES, *SWITCHES, *TABLES, *VISION, *PLAIN}
    read |= {*family.fixed, *family.windows} if family else set()
    told = {n: v for n, v in fields.items() if n not in read and not n.startswith("_") and v not in (None, False, "")}
    return [f"{name}={shown(value, 40)}" for name, value in told.items() if value not in ([], {})]


def _defaults(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """With what transformers takes where a field is absent."""
    given = {name: value for name, value in fields.items() if not (name == "num_key_value_heads" and value is None)}
    given |= {"hidden_act": "silu"} if fields.get("hidden_act") == "swish" else {}  # another name of the same
    usual = {n: v for n, v in family.usual.items() if not (n == "num_key_value_heads" and n in fields)}
    return {"num_key_value_heads": fields.get("num_attention_heads"), **TIED, **family.fixed} | usual | given


def _head_dim(fields: Mapping[str, Any]) -> int:
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def _window(fields: Mapping[str, Any], family: Family) -> tuple[int, list[str]]:
    """The slots that a query sees, 0: all before it; and what this model lacks of it."""
    window, kinds = fields.get("sliding_window"), fields.get("layer_types")
    switched = "use_sliding_window" in family.windows
    if not family.windows or not window or (switched and not fields.get("use_sliding_window")):
        return 0, []
    depth, first = fields["num_hidden_layers"], fields.get("max_window_layers", 0)
    if not isinstance(kinds, list):
        full = min(max(first, 0), depth) if type(first) is int and switched else 0
        kinds = ["full_attention"] * full + ["sliding_attention"] * (depth - full)
    if len(kinds) != depth or any(kind != kinds[0] for kind in kinds):
        return 0, [
            "full and sliding attention in one model (layer_types, max_window_layers), here all blocks are alike"
        ]
    if kinds[0] not in KINDS_OF_LAYERS:
        return 0, [f"layers of type {shown(kinds[0])}, here {' and '.join(KINDS_OF_LAYERS)} only"]
    if kinds[0] == "full_attention" and switched:
        return 0, []
    wrong = _range("sliding_window", window, 1, 2**24)
    return (0, [wrong]) if wrong else (window, [])


def _range(name: str, value: Any, low: int | float, high: int | float) -> str:
    """What is wrong with a number, or nothing."""
    if type(value) not in ((int,) if name in WHOLE else (int, float)) or not low <= value <= high:
        kind = "a whole number" if name in WHOLE else "a number"
        return f"{name}={shown(value)} is not {kind} from {low:g} to {high:g}"
    return ""


def _lacking(fields: Mapping[str, Any], family: Family) -> list[str]:
    wanted = dict(family.fixed) | {"add_pos_embed_each_layer": False, "use_hybrid_attn_mask": None}
    lacking = [f"{n}={shown(fields[n])}, here {v!r} only" for n, v in wanted.items() if n in fields and fields[n] != v]
    size, heads, width = (fields.get(name) for name in ("head_dim", "num_attention_heads", "hidden_size"))
    if size is not None and "head_dim" in family.trunk and (type(heads) is not int or size * heads != width):
        lacking.append(f"head_dim={shown(size)}, here hidden_size / num_attention_heads only")
    return lacking


def _contradictions(fields: Mapping[str, Any]) -> list[str]:
    width, heads, groups = (fields[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    wrong, size = [], _head_dim(fields)
    if not fields.get("head_dim") and (width % heads or size % 2):
        wrong.append(f"hidden_size={width} is no even multiple of num_attention_heads={heads}")
    elif size % 2:
        wrong.append(f"head_dim={size} is odd, and rotations are of pairs")
    if heads % groups:
        wrong.append(f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}")
    block = width * (2 * heads * size + 2 * size * groups + 3 * fields["intermediate_size"])
    total = fields["num_hidden_layers"] * block + 2 * fields["vocab_size"] * width
    if total > PARAMETERS:
        wrong.append(f"these sizes make {total:.3g} parameters, more than {PARAMETERS:.3g}")
    return wrong
