"""Families of published decoders: the names of their tensors, the options of the trunk that they have, and what their
`config.json` may say. A family is a row of `FAMILIES`; no other code asks for one by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# The tensors of a block, behind `model.layers.<number>.`, and our leaves behind `trunk/layers/`.
LLAMA_BLOCK = {
    "self_attn.q_proj.weight": "attention/q/kernel",
    "self_attn.k_proj.weight": "attention/k/kernel",
    "self_attn.v_proj.weight": "attention/v/kernel",
    "self_attn.o_proj.weight": "attention/out/kernel",
    "mlp.gate_proj.weight": "mlp/gate/kernel",
    "mlp.up_proj.weight": "mlp/up/kernel",
    "mlp.down_proj.weight": "mlp/down/kernel",
    "input_layernorm.weight": "attention_norm/scale",
    "post_attention_layernorm.weight": "mlp_norm/scale",
}
QWEN2_BLOCK = LLAMA_BLOCK | {
    "self_attn.q_proj.bias": "attention/q/bias",
    "self_attn.k_proj.bias": "attention/k/bias",
    "self_attn.v_proj.bias": "attention/v/bias",
}
QWEN3_BLOCK = LLAMA_BLOCK | {
    "self_attn.q_norm.weight": "attention/q_norm/scale",
    "self_attn.k_norm.weight": "attention/k_norm/scale",
}
PLAIN = {"hidden_act": "silu"}
BIASES = {"attention_bias": False, "mlp_bias": False}
WINDOW = ("sliding_window", "layer_types")
SWITCHED = (*WINDOW, "use_sliding_window", "max_window_layers")


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers, or of MonoFormer.

    architecture  in `config.json`; without its head it is `<name>Model`
    model_type    the same, of all of the family
    block         names of a block's tensors -> our leaves
    trunk         options of the trunk with one value in the family; an option that is not here is free
    fixed         keys of `config.json` with one value that is read
    usual         keys -> what transformers takes where they are absent; every other number must be there
    windows       keys of `config.json` that tell of sliding windows
    images        whether it makes images
    """

    architecture: str
    model_type: str
    block: Mapping[str, str]
    trunk: Mapping[str, Any]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=lambda: PLAIN)
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: tuple[str, ...] = ()
    images: bool = False

    @property
    def bare(self) -> str:
        """The class of the trunk alone, as it saves itself."""
        return self.architecture.replace("ForCausalLM", "Model")

    def lacks(self, trunk: Mapping[str, Any]) -> list[str]:
        """Options of a trunk, by their dotted names, that the family has otherwise."""
        named = {f"model.trunk.{name}": value for name, value in self.trunk.items()}
        return [f"{n}={trunk[n]!r}, there {v!r} only" for n, v in named.items() if trunk.get(n, v) != v]


PLAIN_HEADS = {"qk_norm": False, "qkv_bias": False}
FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        LLAMA_BLOCK,
        PLAIN_HEADS | {"sliding_window": 0},
        fixed=PLAIN | BIASES,
    ),
    Family(
        "MonoFormerForCausalLM",
        "llama",
        LLAMA_BLOCK,
        PLAIN_HEADS | {"sliding_window": 0, "head_dim": 0},
        fixed=PLAIN | BIASES,
        images=True,
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        LLAMA_BLOCK,
        PLAIN_HEADS,
        usual={"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
        windows=WINDOW,
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        QWEN2_BLOCK,
        {"qk_norm": False, "qkv_bias": True},
        usual={"num_key_value_heads": 32, "rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 28},
        windows=SWITCHED,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        QWEN3_BLOCK,
        {"qk_norm": True, "qkv_bias": False},
        fixed=PLAIN | {"attention_bias": False},
        usual={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        windows=SWITCHED,
    ),
)
LLAMA, MONOFORMER = FAMILIES[:2]


def family_of(architecture: Any, model_type: Any = None) -> Family | None:
    """The family of an architecture, or of its trunk alone; None for an unknown one, or another `model_type`."""
    found = [f for f in FAMILIES if architecture in (f.architecture, f.bare)]
    return found[0] if found and model_type in (None, found[0].model_type) else None


def known_families() -> str:
    """The architectures and their model_type, for messages."""
    names = [f"{family.architecture} ({family.model_type})" for family in FAMILIES]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def nearest_family(trunk: Mapping[str, Any], images: bool, preferred: Any = None) -> Family:
    """The first family that has these options of a trunk, by their dotted names, the preferred architecture before the
    others; where none has them all, the one that lacks fewest."""
    fitting = [family for family in FAMILIES if family.images == images]
    return min(fitting, key=lambda family: (len(family.lacks(trunk)), family.architecture != preferred))
