"""Reads Llama and MonoFormer checkpoints (safetensors) into our parameter tree, without torch or transformers.

Linear layers are stored `[out, in]` there and `[in, out]` here; the trunk's blocks are stacked along a leading axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from src.common.safe_tensors import SafeTensors
from src.common.tree import flatten, listed, unflatten

BLOCK = {
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
SINGLE = {
    "model.embed_tokens.weight": "text/table/embedding",
    "model.norm.weight": "trunk/final_norm/scale",
    "lm_head.weight": "text_head/linear/kernel",
    "x_embedder": "image/linear",
    "t_embedder.mlp.0": "time/first",
    "t_embedder.mlp.2": "time/second",
    "t_projector.0": "conditioning/first",
    "t_projector.2": "conditioning/second",
    "adaLN_module.1": "conditioning/linear",
    "final_layer.adaLN_modulation.1": "image_head/adaln",
    "final_layer.linear": "image_head/linear",
}
FLOATS = ("float64", "float32", "float16", "bfloat16")
IGNORED = ("rotary_emb.inv_freq",)  # a buffer that older Llama files carry


def place_of(name: str) -> tuple[str, int | None] | None:
    """Our path of a published tensor, and its block (None outside the blocks); None when the name is unknown."""
    if name.startswith("model.layers."):
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        number = re.fullmatch("0|[1-9][0-9]{0,3}", index)  # what `int` takes is more: "01", "+1", other scripts
        return (f"trunk/layers/{BLOCK[rest]}", int(index)) if rest in BLOCK and number else None
    if name in SINGLE:
        return SINGLE[name], None
    stem, _, leaf = name.rpartition(".")
    return (f"{SINGLE[stem]}/{'kernel' if leaf == 'weight' else 'bias'}", None) if stem in SINGLE else None


def from_published(tensors: Mapping[str, Array | np.ndarray]) -> dict[str, Array]:
    """Published tensors by name -> our leaves by path, blocks stacked.

    Raises ValueError listing unknown names, or leaves whose blocks are not 0, 1, 2, … of one shape.
    """
    out: dict[str, Any] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name.endswith(IGNORED):
            continue
        place = place_of(name)
        if place is None:
            unknown.append(name)
            continue
        path, block = place
        tensor = tensor.T if path.endswith("kernel") else tensor
        if block is None:
            out[path] = tensor
        else:
            out.setdefault(path, {})[block] = tensor
    if unknown:
        raise ValueError(f"the checkpoint has tensors that no Llama or MonoFormer has: {listed(sorted(unknown))}")
    stacks = {path: blocks for path, blocks in out.items() if isinstance(blocks, dict)}
    uneven = [p for p, b in stacks.items() if max(b) >= len(b) or len({x.shape for x in b.values()}) > 1]
    if uneven:
        raise ValueError(f"the checkpoint lacks blocks, or has blocks of several shapes, of {listed(uneven)}")
    for path, leaf in out.items():  # copied, because on a CPU `asarray` would keep a mapped file in use
        out[path] = jnp.stack([leaf[i] for i in range(len(leaf))]) if path in stacks else jnp.array(leaf)
    return out


def read_checkpoint(path: str | Path, like: Any) -> Any:
    """Parameters of a safetensors checkpoint in the tree `like` (arrays or abstract arrays), in its dtypes.

    `path` is a file, an index of several, or the folder with one (see `SafeTensors`). Names, shapes and dtypes are
    compared before any data is read. Raises FileNotFoundError, and ValueError listing every missing, extra or misshaped
    tensor, or why a file is not sound.
    """
    tensors = SafeTensors(path)
    integers = [f"{name} is {entry.dtype}" for name, entry in tensors.entries.items() if entry.dtype.name not in FLOATS]
    if integers:
        raise ValueError(f"{path} does not hold weights as floats of 16 bits or more: {listed(sorted(integers))}")
    shapes = {name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in tensors.entries.items()}
    found = jax.eval_shape(from_published, shapes)
    wanted = flatten(like)
    wrong = [f"{p} is missing" for p in wanted if p not in found]
    wrong += [f"{p} is not in this model" for p in found if p not in wanted]
    wrong += [
        f"{p} has shape {found[p].shape}, the model {leaf.shape}"
        for p, leaf in wanted.items()
        if p in found and found[p].shape != leaf.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {listed(wrong)}")
    found = from_published(tensors)
    return unflatten({p: jnp.asarray(found[p], leaf.dtype) for p, leaf in wanted.items()})
