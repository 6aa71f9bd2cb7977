"""How long a checkpoint holds up the training, how fast it is written, and how much memory that takes on the host."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from src.common.mesh.distributed import gather_texts
from src.common.mesh.sharding import ShardingRules
from src.train.checkpoints.checkpointer import Checkpointer

COUNT = 3
LEAF = 2**24  # bytes
EVERY = 0.002  # seconds between two looks at the memory


class PeakMemory:
    """The highest resident memory of this process in bytes, above that at the start, while it is open (Linux)."""

    def __enter__(self) -> PeakMemory:
        self.start, self.highest, self._open = resident(), 0, True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while self._open:
            self.highest = max(self.highest, resident() - self.start)
            time.sleep(EVERY)

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._thread.join()
        self.highest = max(self.highest, resident() - self.start)


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def random_state(gigabytes: float, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """So many bytes (times 2^30) that no compressor shortens, in leaves of 16 MiB, split over `mesh.fsdp`."""
    count, shape = max(1, round(gigabytes * 2**30 / LEAF)), (LEAF // 4 // 1024, 1024)
    names = [f"leaf{i}" for i in range(count)]
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.uint32) for name in names}
    shardings = ShardingRules().shardings(abstract, mesh)
    make = jax.jit(lambda key: jax.random.bits(key, shape, jnp.uint32), out_shardings=shardings[names[0]])
    with jax.set_mesh(mesh):
        return {name: make(jax.random.key(i)) for i, name in enumerate(names)}


def measure_saves(state: Any, folder: str | None = None, count: int = COUNT) -> dict[str, Any]:
    """Saves of a state, waited for; the first one, which starts Orbax, is left out.

    blocking_seconds   until the next step may use up the state
    seconds            until all of it is on disk
    peak_extra_bytes   the highest resident memory of this process above that before the save; `peak_share` is that over
                       the bytes of the whole state, `local_share` what this process holds of them (a replica once)
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    local = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards if s.replica_id == 0)
    place = gather_texts(tempfile.mkdtemp(dir=folder, prefix="bench-save-"))[0]
    checkpointer, taken = Checkpointer(place, keep=1), []
    try:
        for step in range(1, count + 2):
            with PeakMemory() as watch:
                began = time.perf_counter()
                if not checkpointer.save(step, state, {}, {}):
                    raise OSError(f"nothing could be saved in {place}")
                blocked = time.perf_counter() - began
                checkpointer.wait()
                taken.append((blocked, time.perf_counter() - began, watch))
    finally:
        checkpointer.close()
        shutil.rmtree(place, ignore_errors=True)
    blocked, total, peaks = zip(*[(b, t, w.highest) for b, t, w in taken[1:]], strict=True)
    return {
        "state_bytes": size,
        "blocking_seconds": float(np.median(blocked)),
        "seconds": float(np.median(total)),
        "bytes_per_second": size / float(np.median(total)),
        "peak_extra_bytes": max(peaks),
        "peak_share": max(peaks) / size,
        "local_share": local / size,
    }
