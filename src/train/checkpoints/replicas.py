"""Whether all copies of the train state are the same, on the devices of one process and of several.

What is replicated over devices is computed on each of them. A broken chip, another library or a bug lets the copies
drift apart silently, and every process then saves its own piece of another model.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array

from src.common import tree
from src.common.files.checksums import on_device
from src.common.mesh.distributed import gather_texts


def check_replicas(state: Any, data_state: Any, step: int) -> None:
    """Compares the fingerprints of all copies of every leaf, and where the processes are in the data.

    Every process must call it. Raises RuntimeError, on every process, which names the leaf.
    """
    flat = {k: x for k, x in tree.flatten(state).items() if isinstance(x, jax.Array)}
    if jax.process_count() == 1 and all(len(x.sharding.device_set) == 1 for x in flat.values()):
        return
    mine = _prints(flat) | {"the position in the data": [json.dumps(data_state, sort_keys=True, default=str)]}
    digests = gather_texts(str(zlib.crc32(json.dumps(mine).encode())))
    if len(set(digests)) == 1 and all(len(values) == 1 for values in mine.values()):
        return
    told = [json.loads(text) for text in gather_texts(json.dumps(mine))]  # a process sees only its own copies differ
    wrong = []
    for name in told[0]:
        values = [each.get(name, []) for each in told]
        if other := next((i for i, value in enumerate(values) if value != values[0] or len(value) != 1), None):
            wrong.append(f"{name} (process {other})")
        elif len(values[0]) != 1:
            wrong.append(f"{name} (devices of process 0)")
    raise RuntimeError(
        f"the copies of the train state differ at step {step} in {tree.listed(wrong)}: nothing was saved; run again to"
        " go on from the last checkpoint, and if it happens again leave that machine out"
    )


def _prints(flat: Mapping[str, Array]) -> dict[str, list[int]]:
    """By leaf the different fingerprints that the devices of this process have, sorted: one where all agree."""
    prints = jax.block_until_ready(on_device(dict(flat)))
    shards = jax.device_get({path: [s.data for s in x.addressable_shards] for path, x in prints.items()})
    return {path: sorted({int(value) for value in values}) for path, values in shards.items()}
