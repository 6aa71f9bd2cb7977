"""Compares the replicas of the train state on all devices of all processes.

Replicated arrays are computed on each device. A broken chip, another library version or a bug can make the replicas
differ without an error, and then every process saves shards of another model.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax

from src.common import tree
from src.common.files.checksums import copies
from src.common.mesh.distributed import gather_texts


def check_replicas(state: Any, data_state: Any, step: int) -> None:
    """Compares the fingerprints of all replicas of every leaf, and the positions in the data of all processes.

    Every process must call it. Raises RuntimeError on all processes, with the names of the leaves.
    """
    flat = {k: x for k, x in tree.flatten(state).items() if isinstance(x, jax.Array)}
    if jax.process_count() == 1 and all(len(x.sharding.device_set) == 1 for x in flat.values()):
        return
    mine = copies(flat) | {"the position in the data": [json.dumps(data_state, sort_keys=True, default=str)]}
    digests = gather_texts(str(zlib.crc32(json.dumps(mine).encode())))
    if len(set(digests)) == 1 and all(len(values) == 1 for values in mine.values()):
        return
    prints = [json.loads(text) for text in gather_texts(json.dumps(mine))]  # of all processes
    wrong = []
    for name in prints[0]:
        values = [each.get(name, []) for each in prints]
        if other := next((i for i, value in enumerate(values) if value != values[0] or len(value) != 1), None):
            wrong.append(f"{name} (process {other})")
        elif len(values[0]) != 1:
            wrong.append(f"{name} (devices of process 0)")
    raise RuntimeError(
        f"the copies of the train state differ at step {step} in {tree.listed(wrong)}: nothing was saved; run again to"
        " continue from the last checkpoint, and if it happens again, exclude that machine"
    )
