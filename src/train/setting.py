"""What a score or an image was made with: the parameters by their checksum, and how values were generated."""

from __future__ import annotations

from typing import Any

from src.common.files.checksums import fingerprints
from src.common.tree import flatten
from src.interfaces import PyTree
from src.train.average import chosen
from src.train.checkpoints.config_changes import plain
from src.train.checkpoints.metadata import VERSION, checksum


def setting_of(config: Any, params: PyTree) -> dict[str, Any]:
    """JSON values for a system with this config whose parameters were these.

    version   of this framework
    ema       whether the parameters are an average; `decay` or `width`, unless it is the one of `ema.decay`
    weights   checksum of the parameters, the same for every sharding; every process calls this
    guidance, decode, samplers   how values are generated
    """
    named = chosen(config) if config.eval.ema else None
    return {
        "version": VERSION,
        "ema": bool(config.eval.ema),
        **({named[0]: named[1]} if named else {}),
        "weights": checksum(fingerprints(flatten(params))),
        "guidance": plain(config.guidance),
        "decode": plain(config.decode),
        "samplers": plain({name: group.get("step") for name, group in config.fields.items()}),
    }
