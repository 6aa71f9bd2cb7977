"""The frozen encoder inside an exported understanding model, where the official class needs it there.

That class builds its encoder from `vision_encoder_path` and then loads the checkpoint over it. transformers 4.38, which
it is made for, draws linear layers anew that the checkpoint lacks, unless they came from transformers itself: a CLIP
stays what it was, and an autoencoder loses its attention. So an autoencoder's tensors are written, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from src.codecs.vae_files import published_names, read_vae
from src.common.files.paths import shown
from src.common.files.safetensors_writer import Tensor
from src.common.files.weight_mapping import export_weights
from src.common.tree import flatten

PREFIX = "vision_encoder.vision_tower."


def tower_tensors(fields: Mapping[str, Any], projector: bool) -> tuple[dict[str, Tensor], str]:
    """The encoder's tensors for a checkpoint with these fields of config.json, float32, and what is to be told.

    Raises as `read_vae` does where a folder is there and is no autoencoder.
    """
    if not projector:
        return {}, ""
    encoder, path = fields.get("vision_encoder"), fields.get("vision_encoder_path")
    if not encoder:
        return {}, "config.json names no vision_encoder (clip or vae): the official class leaves im_embedder out"
    if encoder not in INSIDE:
        return {}, ""
    if not epath.Path(path).is_dir():
        return {}, (
            f"vision_encoder_path {shown(path)} is no folder here, so the encoder is not in the checkpoint, and"
            " transformers 4.38 draws its attention anew: export again where it is"
        )
    arrays = INSIDE[encoder](path)
    return {PREFIX + name: Tensor(a.dtype, a.shape, lambda a=a: [a]) for name, a in arrays.items()}, ""


def _autoencoder(path: str) -> dict[str, Any]:
    params = read_vae(path)[1]
    return export_weights(params, published_names(flatten(params)))


INSIDE = {"vae": _autoencoder}
