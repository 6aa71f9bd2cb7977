"""The `config.json` beside published weights of Llama and MonoFormer: typed fields, within ranges, nothing executed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from src.common.files.paths import shown
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.models.pretrained.hf_rope import TABLES, parse_rope
from src.models.pretrained.hf_vision_config import FIELDS as VISION
from src.models.pretrained.hf_vision_config import PublishedVision, parse_vision

ARCHITECTURES = ("LlamaForCausalLM", "MonoFormerForCausalLM")
BARE = "LlamaModel"  # a Llama that was saved without its head
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
IMAGE_RANGES = {"image_size": (1, 2**14), "patch_size": (1, 2**8), "in_channels": (1, 2**10)}
WHOLE = ({*RANGES} - {"rms_norm_eps", "rope_theta"}) | {*IMAGE_RANGES}
# What other Llamas have and this model has not; a tied head is read, and is then a head of its own.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
# Keys that change nothing here: names of tokens and files, and settings of training and of transformers.
PLAIN = (
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "attention_dropout"),
    *("image_token_index", "tokenizer_max_length", "tokenizer_padding_side", "use_flash_attn", "hidden_dropout"),
    *("head_dim", "decoder_t_embed", "partial_rotary_factor", "add_pos_embed_each_layer", "use_hybrid_attn_mask"),
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
    """The network of a `config.json`, in the names of transformers; `image` is None for a Llama,
    and `vision` where nothing understands images; `rope_scaling` is that of the trunk; `tied`: the head is the
    embedding.
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
    image: PublishedImage | None
    vision: PublishedVision | None = None
    rope_scaling: tuple[Any, ...] = ()
    tied: bool = False


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
    kinds = fields.get("architectures")
    kinds = [ARCHITECTURES[0]] if kinds == [BARE] else kinds
    known = isinstance(kinds, list) and len(kinds) == 1 and kinds[0] in ARCHITECTURES
    if not known or fields.get("model_type", "llama") != "llama":
        raise ValueError(
            f"{where} is of architectures {shown(kinds)} and model_type {shown(fields.get('model_type', 'llama'))}: "
            f"known are {' and '.join(ARCHITECTURES)}, of model_type 'llama'"
        )
    theta, scaling, wrong, lacking = parse_rope(fields)
    fields = _defaults(fields) | {"rope_theta": theta}
    ranges, vision = dict(RANGES), None
    if kinds[0] == "MonoFormerForCausalLM":
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
    lacking += _lacking(fields)
    wrong = wrong or ([] if lacking else _contradictions(fields))
    if wrong or lacking:
        advice = "give the config that belongs to the weights" if wrong else "give other weights (docs/weights.md)"
        raise ValueError(f"{where} cannot be used: {listed(wrong + lacking)}; {advice}")
    image = None
    if kinds[0] == "MonoFormerForCausalLM":
        image = PublishedImage(**{field.name: fields[field.name] for field in dataclasses.fields(PublishedImage)})
    more = {"image": image, "vision": vision, "rope_scaling": scaling, "tied": fields["tie_word_embeddings"]}
    return PublishedConfig(kinds[0], **{name: fields[name] for name in RANGES}, **more)


def unread_keys(fields: Mapping[str, Any]) -> list[str]:
    """What a `config.json` says that is not read and may matter: its keys with their values, those that are empty, none
    or false left out."""
    read = {*RANGES, *IMAGE_RANGES, *FIXED, *SWITCHES, *TABLES, *VISION, *PLAIN}
    told = {n: v for n, v in fields.items() if n not in read and not n.startswith("_") and v not in (None, False, "")}
    return [f"{name}={shown(value, 40)}" for name, value in told.items() if value not in ([], {})]


def _defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With what transformers takes where a field is absent."""
    given = {name: value for name, value in fields.items() if not (name == "num_key_value_heads" and value is None)}
    given |= {"hidden_act": "silu"} if fields.get("hidden_act") == "swish" else {}  # another name of the same
    return {"num_key_value_heads": fields.get("num_attention_heads"), **FIXED} | given


def _range(name: str, value: Any, low: int | float, high: int | float) -> str:
    """What is wrong with a number, or nothing."""
    if type(value) not in ((int,) if name in WHOLE else (int, float)) or not low <= value <= high:
        kind = "a whole number" if name in WHOLE else "a number"
        return f"{name}={shown(value)} is not {kind} from {low:g} to {high:g}"
    return ""


def _lacking(fields: Mapping[str, Any]) -> list[str]:
    wanted = FIXED | {"add_pos_embed_each_layer": False, "use_hybrid_attn_mask": None}
    del wanted["tie_word_embeddings"]
    lacking = [f"{n}={shown(fields[n])}, here {v!r} only" for n, v in wanted.items() if n in fields and fields[n] != v]
    size, heads, width = (fields.get(name) for name in ("head_dim", "num_attention_heads", "hidden_size"))
    if size is not None and (type(size) is not int or type(heads) is not int or size * heads != width):
        lacking.append(f"head_dim={shown(size)}, here hidden_size / num_attention_heads only")
    return lacking


def _contradictions(fields: Mapping[str, Any]) -> list[str]:
    width, heads, groups = (fields[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    wrong = []
    if width % heads or width // heads % 2:
        wrong.append(f"hidden_size={width} is no even multiple of num_attention_heads={heads}")
    if heads % groups:
        wrong.append(f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}")
    block = width * (2 * width + 2 * width // heads * groups + 3 * fields["intermediate_size"])
    total = fields["num_hidden_layers"] * block + 2 * fields["vocab_size"] * width
    if total > PARAMETERS:
        wrong.append(f"these sizes make {total:.3g} parameters, more than {PARAMETERS:.3g}")
    return wrong
