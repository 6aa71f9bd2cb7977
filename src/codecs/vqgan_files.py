"""Published tensors of convolutional tokenizers (one file of safetensors, no config) <-> a `Vqgan`.

Three layouts of names are known, told apart by the names themselves:

    taming     encoder.down.0.block.0, decoder.up.0 is the highest resolution (VQGAN, IBQ)
    magvit     the same, with quant_conv inside encoder and decoder (MAGVIT-v2 as in Show-o)
    llamagen   encoder.conv_blocks.0.res.0, decoder.conv_blocks.0 is the lowest resolution
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from src.codecs.vqgan import Vqgan, VqganConfig, VqLevel
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.weight_mapping import Names, import_weights
from src.common.tree import flatten

FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
CODES = "quantize.embedding.weight"
UNUSED = re.compile(r"quantize\..*|loss\..*")  # the table of codes is read by `codebook.py`; buffers, discriminators
MIDDLE = {"taming": ("block_1", "attn_1", "block_2"), "llamagen": ("0", "1", "2")}
MOST = 64  # levels, and resnets of one
Shapes = Mapping[str, tuple[int, ...]]


def read_vqgan(path: str | os.PathLike[str], dtype: str = "float32") -> tuple[Vqgan, Any]:
    """The tokenizer's networks in a folder with model.safetensors, and their parameters, f32.

    Raises FileNotFoundError, OSError, and ValueError, in one sentence, for tensors of no known layout, or that do not
    fit together.
    """
    tensors = SafeTensors(path, FILES)
    layout, config = find_config(tensors)
    vqgan = Vqgan(config, dtype)
    names = vqgan_names(flatten(vqgan.shapes()), layout, len(config.decoder))
    used = lambda name: None if UNUSED.fullmatch(name) else name
    return vqgan, import_weights(tensors, names, vqgan.shapes(), used)


def find_config(tensors: SafeTensors) -> tuple[str, VqganConfig]:
    """The layout's name and the sizes, from names and shapes alone. Raises ValueError for no known layout."""
    shapes = {name: entry.shape for name, entry in tensors.entries.items()}
    layout = "llamagen" if any(".conv_blocks." in name for name in shapes) else "taming"
    layout = "magvit" if "encoder.quant_conv.weight" in shapes else layout
    inside = layout == "magvit"
    needed = (
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "encoder.quant_conv.weight" if inside else "quant_conv.weight",
        "decoder.post_quant_conv.weight" if inside else "post_quant_conv.weight",
    )
    if missing := [name for name in needed if len(shapes.get(name, ())) != 4]:
        raise ValueError(
            f"{shown(tensors.path)} is no tokenizer of a known layout (VQGAN, LlamaGen, MAGVIT-v2): it has no"
            f" {missing[0]}; give its safetensors with the published names"
        )
    encoder, decoder = (_levels(shapes, layout, side) for side in ("encoder", "decoder"))
    if not encoder or len(encoder) != len(decoder):
        raise ValueError(
            f"{shown(tensors.path)} has {len(encoder)} resolutions in its encoder and {len(decoder)} in its decoder:"
            " give the file of a whole tokenizer"
        )
    stem, latent, quant, back = (shapes[name] for name in needed)
    return layout, VqganConfig(encoder, decoder, stem[0], latent[0], back[0], quant[0], stem[1])


def _levels(shapes: Shapes, layout: str, side: str) -> tuple[VqLevel, ...]:
    """Levels in the order in which they are run."""
    levels = []
    for i in range(MOST):
        stem = _level(layout, side, i)
        res = "res" if layout == "llamagen" else "block"
        blocks = [j for j in range(MOST) if f"{stem}.{res}.{j}.conv1.weight" in shapes]
        if not blocks:
            break
        width = shapes[f"{stem}.{res}.0.conv1.weight"][0]
        levels.append(VqLevel(width, len(blocks), f"{stem}.attn.0.q.weight" in shapes))
    return tuple(levels[::-1] if side == "decoder" and layout != "llamagen" else levels)


def _level(layout: str, side: str, index: int) -> str:
    if layout == "llamagen":
        return f"{side}.conv_blocks.{index}"
    return f"{side}.{'down' if side == 'encoder' else 'up'}.{index}"


def vqgan_names(paths: Iterable[str], layout: str, levels: int) -> Names:
    """The published name of each of our paths; `levels` of the decoder."""
    return {path: _name(path, layout, levels) for path in paths}


def _name(path: str, layout: str, levels: int) -> str:
    parts, leaf = path.split("/")[:-1], path.rsplit("/", 1)[1]
    if parts[0] in ("quant_conv", "post_quant_conv"):
        side = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}[parts[0]]
        stem = (side if layout == "magvit" else "") + parts[0]
    elif parts[1] == "levels":
        index = int(parts[2])
        if parts[0] == "decoder" and layout != "llamagen":
            index = levels - 1 - index
        inner = {"res": "res" if layout == "llamagen" else "block", "attn": "attn"}
        resized = {"down": "downsample.conv", "up": "upsample.conv"}
        rest = [inner.get(parts[3], resized.get(parts[3], parts[3])), *parts[4:]]
        stem = ".".join([_level(layout, parts[0], index), *rest])
    elif parts[1] == "mid":
        places = MIDDLE["llamagen" if layout == "llamagen" else "taming"]
        place = places[("first", "attention", "second").index(parts[2])]
        stem = ".".join([parts[0], "mid", place, *parts[3:]])
    else:
        stem = ".".join(parts)
    stem = stem.replace("conv_shortcut", "nin_shortcut")
    return f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"
