"""CLIP as a whole (Radford et al. 2021; transformers' `CLIPModel`): embeddings of images and of texts in one space.

The vision tower and the blocks are those of `codecs/clip.py`; here are the text tower, the two projections, and the
published files of both.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int

from src.codecs.clip import Clip, TowerBlock, run_blocks
from src.codecs.clip_files import BYTES, FILES, read_clip, wrong_fields
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.strict_json import read_json
from src.common.files.weight_mapping import import_weights
from src.common.tree import flatten, listed
from src.evals.networks.clip_tokens import ClipTokens, read_tokens

# What transformers takes where a field is absent, and lowest and highest value.
FIELDS: dict[str, tuple[Any, int | float, int | float]] = {
    "vocab_size": (49408, 3, 2**22),
    "hidden_size": (512, 1, 2**15),
    "intermediate_size": (2048, 1, 2**17),
    "num_hidden_layers": (12, 1, 2**10),
    "num_attention_heads": (8, 1, 2**10),
    "max_position_embeddings": (77, 2, 2**16),
    "layer_norm_eps": (1e-5, 1e-12, 0.1),
}
DIMENSION = 512
SINGLE = {
    "token_embedding": "text_model.embeddings.token_embedding.weight",
    "position_embedding": "text_model.embeddings.position_embedding.weight",
    "final_norm/scale": "text_model.final_layer_norm.weight",
    "final_norm/bias": "text_model.final_layer_norm.bias",
    "text_projection/kernel": "text_projection.weight",
    "visual_projection/kernel": "visual_projection.weight",
}
INSIDE = {f"{n}_proj": f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")}
INSIDE |= {n: f"mlp.{n}" for n in ("fc1", "fc2")} | {n: n for n in ("layer_norm1", "layer_norm2")}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of the text tower, in the names of transformers' `config.json`; `dimension` is that of both embeddings."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    dimension: int = DIMENSION


class TextTower(nnx.Module):
    """Tokens with learned positions, causal blocks `[L]`, a norm; and the projections of both towers."""

    def __init__(self, config: ClipTextConfig, vision_width: int, rngs: nnx.Rngs):
        width, normal = config.hidden_size, nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, width)))
        self.position_embedding = nnx.Param(normal(rngs.params(), (config.max_position_embeddings, width)))
        make = lambda keys: TowerBlock(config, jnp.float32, keys, causal=True)
        self.layers = nnx.split_rngs(splits=config.num_hidden_layers)(nnx.vmap(make))(rngs)
        self.final_norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        args = {"use_bias": False, "precision": jax.lax.Precision.HIGHEST, "rngs": rngs}
        self.text_projection = nnx.Linear(width, config.dimension, **args)
        self.visual_projection = nnx.Linear(vision_width, config.dimension, **args)

    def hidden(self, ids: Int[Array, "B S"], depth: int) -> Float[Array, "B S D"]:
        """States after `depth` blocks."""
        x = self.token_embedding[...][ids] + self.position_embedding[...][: ids.shape[1]]
        return run_blocks(self.layers, x, depth)


@dataclasses.dataclass(frozen=True)
class ClipPair:
    """Both towers as pure functions of their parameters, `{"vision": …, "text": …}`, nested dicts of f32 arrays.

    end   the id of the end of a text, where its state is read
    """

    vision: Clip
    text: ClipTextConfig
    end: int

    def images(self, params: Any, images: Float[Array, "B S S 3"]) -> Float[Array, "B E"]:
        """Embeddings of images that `codecs.clip.preprocess` prepared. Raises ValueError for another size."""
        return self._tower(params).visual_projection(self.vision.pooled(params["vision"], images))

    def hidden(self, params: Any, ids: Int[Array, "B S"], depth: int) -> Float[Array, "B S D"]:
        """States of texts after `depth` blocks."""
        return self._tower(params).hidden(ids, depth)

    def texts(self, params: Any, ids: Int[Array, "B S"]) -> Float[Array, "B E"]:
        """Embeddings of rows of ids: the state of the first end of each, behind the norm, projected."""
        tower = self._tower(params)
        states = tower.hidden(ids, self.text.num_hidden_layers)
        last = jnp.argmax(ids == self.end, axis=1)
        return tower.text_projection(tower.final_norm(states[jnp.arange(len(ids)), last]))

    def _tower(self, params: Any) -> TextTower:
        return nnx.merge(_abstract(self.text, self.vision.config.hidden_size)[0], nnx.State(params["text"]))


def read_clip_pair(folder: str | os.PathLike[str]) -> tuple[ClipPair, Any, ClipTokens]:
    """CLIP in a folder (config.json, model.safetensors, files of the tokenizer), its parameters, and its tokenizer.

    Raises FileNotFoundError, OSError, and ValueError, in one sentence, for files that cannot be used.
    """
    config, tokens = read_text_config(folder), read_tokens(folder)
    if max(tokens.vocab.values()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {shown(os.fspath(folder))} has ids up to {max(tokens.vocab.values())}, and the text"
            f" tower {config.vocab_size} tokens: give the tokenizer that belongs to the weights"
        )
    vision, params = read_clip(folder)
    like = _abstract(config, vision.config.hidden_size)[1]
    names = {path: _name(path, config.num_hidden_layers) for path in flatten(like)}
    text = import_weights(SafeTensors(folder, FILES), names, like, _of_text)
    return ClipPair(vision, config, tokens.end), {"vision": params, "text": text}, tokens


def read_text_config(folder: str | os.PathLike[str]) -> ClipTextConfig:
    """The sizes of the text tower in a folder's `config.json`.

    Raises FileNotFoundError, and ValueError, in one sentence, for a config without one, and for sizes that cannot be.
    """
    path = epath.Path(folder) / "config.json"
    fields, where = read_json(path, limit=BYTES, what="config"), f"the config {shown(path)}"
    text = fields.get("text_config") if isinstance(fields, dict) else None
    if not isinstance(text, Mapping):
        raise ValueError(f"{where} has no text_config: a score of texts needs a whole CLIP, not its vision tower alone")
    given = {name: text.get(name, default) for name, (default, _, _) in FIELDS.items()}
    given |= {"hidden_act": text.get("hidden_act", "quick_gelu")}
    wrong = wrong_fields(given, FIELDS)
    dimension = fields.get("projection_dim", DIMENSION)
    if type(dimension) is not int or not 1 <= dimension <= 2**15:
        wrong.append(f"projection_dim={shown(dimension)} is not a whole number from 1 to 32768")
    if not wrong and given["hidden_size"] % given["num_attention_heads"]:
        wrong.append(f"num_attention_heads={given['num_attention_heads']} does not divide {given['hidden_size']}")
    if wrong:
        raise ValueError(f"{where} cannot be used: {listed(wrong)}; give the config that belongs to the weights")
    return ClipTextConfig(**given, dimension=dimension)


def _name(path: str, layers: int) -> str | tuple[str, ...]:
    """The published name of a leaf, or those of its blocks."""
    if path in SINGLE:
        return SINGLE[path]
    stem, _, leaf = path.rpartition("/")
    part = f"{INSIDE[stem.removeprefix('layers/')]}.{'bias' if leaf == 'bias' else 'weight'}"
    return tuple(f"text_model.encoder.layers.{i}.{part}" for i in range(layers))


def _of_text(name: str) -> str | None:
    """The name of a tensor that is read beside the vision tower, None for others."""
    mine = name.startswith(("text_model.", "text_projection.", "visual_projection."))
    return name if mine and name != "text_model.embeddings.position_ids" else None


@functools.cache
def _abstract(config: ClipTextConfig, vision_width: int) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graph, state = nnx.split(nnx.eval_shape(lambda: TextTower(config, vision_width, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)
