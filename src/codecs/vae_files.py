"""Published files of `AutoencoderKL` (config.json and diffusion_pytorch_model.safetensors) <-> a `Vae`."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from typing import Any

from etils import epath

from src.codecs.vae import Vae, VaeConfig
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.strict_json import read_json
from src.common.files.weight_mapping import Names, export_weights, import_weights, write_weights
from src.common.tree import flatten, listed

FILE = "diffusion_pytorch_model.safetensors"
FILES = (
    FILE,
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.fp16.safetensors.index.json",
)
BYTES = 1 << 20
PARAMETERS = 2**34
# Lowest and highest value; whole numbers where the bounds are.
RANGES: dict[str, tuple[int | float, int | float]] = {
    "layers_per_block": (1, 64),
    "norm_num_groups": (1, 2**12),
    "latent_channels": (1, 2**10),
    "in_channels": (1, 2**10),
    "out_channels": (1, 2**10),
    "scaling_factor": (1e-6, 1e6),
    "shift_factor": (-1e6, 1e6),
}
REAL = ("scaling_factor", "shift_factor")
SWITCHES = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
# What other autoencoders of that class have and this one has not.
FIXED: dict[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
UNUSED = ("sample_size", "force_upcast")  # the trained size, and a remark that float16 overflows
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # until diffusers 0.12
OLD_NAME = re.compile(r"(.*\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(\.(?:weight|bias))")


def read_vae(folder: str | os.PathLike[str], dtype: str = "float32") -> tuple[Vae, Any]:
    """The autoencoder in a folder (local or in a store) and its parameters, f32.

    Of several files the one of float32 is taken before float16; a file of safetensors that has another name is not.
    Raises FileNotFoundError, OSError, and ValueError, in one sentence, for a config or weights that cannot be used.
    """
    vae = Vae(read_vae_config(folder), dtype)
    names = published_names(flatten(vae.shapes()))
    return vae, import_weights(SafeTensors(folder, FILES), names, vae.shapes(), canonical)


def write_vae(folder: str | os.PathLike[str], vae: Vae, params: Any) -> None:
    """Writes config.json and the weights, with today's names, as diffusers reads them. Raises OSError."""
    config = dataclasses.asdict(vae.config)
    levels = len(vae.config.block_out_channels)
    config |= {"_class_name": "AutoencoderKL", "act_fn": "silu"} | {n: [kind] * levels for n, kind in BLOCKS.items()}
    newer = {"shift_factor": 0.0} | dict.fromkeys(SWITCHES, True)  # fields that diffusers 0.27 warns of
    config = {name: value for name, value in config.items() if name not in newer or value != newer[name]}
    write_weights(folder, FILE, export_weights(params, published_names(flatten(params))), config)


def published_names(paths: Iterable[str]) -> Names:
    """The published name of each of our paths.

    They differ in the dots, in what a leaf is called, and where the published net wraps a layer once more.
    """
    return {path: _name(path) for path in paths}


def _name(path: str) -> str:
    stem, _, leaf = path.replace("/", ".").rpartition(".")
    stem = re.sub(r"(samplers\.0)$", r"\1.conv", stem)
    stem = re.sub(r"to_out$", "to_out.0", stem)
    return f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"


def canonical(name: str) -> str:
    """Today's name of a tensor: the attention's were others until diffusers 0.12."""
    old = OLD_NAME.fullmatch(name)
    return f"{old[1]}{OLD[old[2]]}{old[3]}" if old else name


def read_vae_config(path: str | os.PathLike[str]) -> VaeConfig:
    """The `config.json` at `path`, or in the folder `path` (local or in a store).

    Raises FileNotFoundError, OSError, and ValueError, in one sentence that lists all wrong fields, for JSON that is not
    sound, another class, fields of another type or out of range, and any field that is not known here.
    """
    path = epath.Path(path)
    path = path if path.name.endswith(".json") else path / "config.json"
    fields, where = read_json(path, limit=BYTES, what="config"), f"the config {shown(path)}"
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is no table of fields: fetch it anew")
    if fields.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{where} is of _class_name {shown(fields.get('_class_name'))}: known is AutoencoderKL")
    fields = {n: v for n, v in fields.items() if not n.startswith("_") and n not in UNUSED}
    if fields.get("shift_factor", 0) is None:
        del fields["shift_factor"]
    if "block_out_channels" not in fields:
        raise ValueError(f"{where} cannot be used: block_out_channels is missing; fetch it anew")
    wrong = _wrong(fields)
    if not wrong:
        given = {n: v for n, v in fields.items() if n not in FIXED and n not in BLOCKS}
        config = VaeConfig(**given | {"block_out_channels": tuple(given["block_out_channels"])})
        wrong = _contradictions(config)
    if wrong:
        raise ValueError(f"{where} cannot be used: {listed(wrong)}; give the config that belongs to the weights")
    return config


def _wrong(fields: dict[str, Any]) -> list[str]:
    wrong = []
    for name, value in fields.items():
        if name in RANGES:
            low, high = RANGES[name]
            if type(value) not in ((int, float) if name in REAL else (int,)) or not low <= value <= high:
                wrong.append(
                    f"{name}={shown(value)} is not a {'' if name in REAL else 'whole '}number from {low:g} to {high:g}"
                )
        elif name in SWITCHES:
            wrong += [] if isinstance(value, bool) else [f"{name}={shown(value)} is not true or false"]
        elif name in FIXED:
            wrong += [] if value == FIXED[name] else [f"{name}={shown(value)}, here {FIXED[name]!r} only"]
        elif name == "block_out_channels":
            sound = isinstance(value, list) and 1 <= len(value) <= 8
            if not sound or not all(type(n) is int and 1 <= n <= 2**13 for n in value):
                wrong.append(f"{name}={shown(value)} is not a list of 1 to 8 whole numbers from 1 to {2**13}")
        elif name in BLOCKS:
            levels = fields["block_out_channels"]
            if not isinstance(levels, list) or value != [BLOCKS[name]] * len(levels):
                wrong.append(f"{name}={shown(value)}, here one {BLOCKS[name]} for each of block_out_channels only")
        else:
            wrong.append(f"{name}={shown(value)} is not known here and may change the function")
    return wrong


def _contradictions(config: VaeConfig) -> list[str]:
    groups, widths = config.norm_num_groups, config.block_out_channels
    wrong = [f"norm_num_groups={groups} does not divide the {n} of block_out_channels" for n in widths if n % groups]
    total = math.fsum(18.0 * n * n * (2 * config.layers_per_block + 1) for n in widths)
    if total > PARAMETERS:
        wrong.append(f"these sizes make about {total:.3g} parameters, more than {PARAMETERS:.3g}")
    return wrong
