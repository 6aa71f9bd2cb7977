"""Several processes as one run: how they find each other, which rows each one reads, and how they agree.

The launcher's environment names the participants. Either all three of

    JAX_COORDINATOR_ADDRESS   host:port of process 0
    JAX_NUM_PROCESSES         how many there are
    JAX_PROCESS_ID            which one this is, from 0

or JAX_DISTRIBUTED=auto where JAX finds out by itself (Cloud TPU, GKE, Slurm, Open MPI); with neither the run is one
process. Two more are optional, in seconds: JAX_INITIALIZATION_TIMEOUT (300), how long to wait for the others at the
start, and JAX_HEARTBEAT_TIMEOUT (100), after how long without a sign of life a process counts as dead. The others then
end with an error; a process that leaves because of an error is noticed at once or after the same time.
"""

from __future__ import annotations

import atexit
import glob
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from src.common import tree
from src.common.mesh.emulation import emulated, ordered
from src.common.mesh.sharding import batch_sharding

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TIMEOUTS = {"initialization_timeout": ("JAX_INITIALIZATION_TIMEOUT", 300),
            "heartbeat_timeout_seconds": ("JAX_HEARTBEAT_TIMEOUT", 100)}  # fmt: skip
FAREWELL = 10  # seconds that a failed process waits for the others to fail too


# --------------------------------------------------------------------------- start and end


def start(stoppable: bool = False) -> None:
    """Joins the processes that the environment names; call it before the first use of JAX's devices.

    With `stoppable`, JAX's preemption service takes SIGTERM, and has to be polled (`common/runtime/stopping.py`).

    Raises ValueError when the environment contradicts itself, RuntimeError when JAX cannot start. Where the others do
    not come in time, JAX aborts the process.
    """
    skip_absent_tpu()
    given, flags = _from_environment(os.environ), os.environ.get("XLA_FLAGS", "")
    several = emulated(flags) > 1 or jax.config.jax_num_cpu_devices > 1
    if (jax.config.jax_platforms == "cpu" and given) or several:
        os.environ["XLA_FLAGS"] = ordered(flags)
    if given is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", stoppable)  # it swallows SIGTERM
    atexit.register(_leave)  # runs before JAX's own farewell, which waits long for processes that will not come
    # Logged beforehand: without an answer JAX aborts the process.
    who = "process {process_id} of {num_processes} at {coordinator_address}" if "process_id" in given else "a process"
    who = who.format(**given)
    logging.info("%s waits up to %d s for the others", who, given["initialization_timeout"])
    try:
        jax.distributed.initialize(**given)
    except Exception as error:
        raise RuntimeError(
            f"{who} could not join the others ({' '.join(str(error).split())[:200]}): start all of them, and check that"
            " they can reach the address of process 0"
        ) from error


def skip_absent_tpu() -> None:
    """Has JAX use the CPU where libtpu is installed and no TPU is; call it before the first use of JAX's devices."""
    if _compiles_only():
        jax.config.update("jax_platforms", "cpu")


def _compiles_only() -> bool:
    """Whether libtpu is installed on a machine without accelerators, where JAX would look for a TPU long and loudly."""
    return importlib.util.find_spec("libtpu") is not None and not _chips() and not jax.config.jax_platforms


def has_accelerator() -> bool:
    """Whether JAX would look for an accelerator: one may be there, and its plugin is installed. Asks no device."""
    plugins = any(importlib.util.find_spec(name) is not None for name in ("libtpu", "jax_plugins"))
    return plugins and (_chips() or sys.platform != "linux")


def _chips() -> bool:
    """Whether the system has an accelerator."""
    patterns = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    return any(glob.glob(pattern) for pattern in patterns)


def is_named(environment: Mapping[str, str]) -> bool:
    """Whether the environment names participants of a run, of which this process is one."""
    return any(environment.get(name) for name in ("JAX_DISTRIBUTED", *NAMES))


def is_first() -> bool:
    """Whether this is process 0, the one that logs and writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_shared() -> bool:
    """Whether other processes may take part in the run."""
    return jax.distributed.is_initialized()


def stop() -> None:
    """Waits until every process is done, then disconnects; nothing in a single process."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`, or None for a single process."""
    mode, have = environment.get("JAX_DISTRIBUTED", ""), [n for n in NAMES if environment.get(n)]
    if mode not in ("", "auto"):
        raise ValueError(f"JAX_DISTRIBUTED={mode!r} is unknown; set it to 'auto', or set {', '.join(NAMES)} instead")
    if not have and not mode:
        return None
    times = {option: _number(environment, name, default, 1) for option, (name, default) in TIMEOUTS.items()}
    if mode:
        if have:
            raise ValueError(f"JAX_DISTRIBUTED=auto is set beside {', '.join(have)}; unset the one or the other")
        return times
    missing = [name for name in NAMES if name not in have]
    if missing:
        raise ValueError(
            f"{', '.join(have)} is set without {', '.join(missing)}; set all three, or none for a single process"
        )
    address = environment["JAX_COORDINATOR_ADDRESS"]
    count, index = (_number(environment, name, None, least) for name, least in zip(NAMES[1:], (1, 0), strict=True))
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r} is no host:port; give e.g. 10.0.0.1:1234")
    if index >= count:
        raise ValueError(f"JAX_PROCESS_ID={index} is not below JAX_NUM_PROCESSES={count}; number them from 0")
    # Without "deactivate" JAX would take the devices of each process from a cluster's variables, if there are any.
    who = {"coordinator_address": address, "num_processes": count, "process_id": index}
    return who | {"cluster_detection_method": "deactivate"} | times


def _number(environment: Mapping[str, str], name: str, default: int | None, least: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{name}={text!r} is no whole number of at least {least}; correct it")
    return int(text)


def _leave() -> None:
    """At the end of a process that failed: one that stands alone with its error must not wait for the others."""
    if not jax.distributed.is_initialized():
        return
    farewell = threading.Thread(target=_quietly_stop, daemon=True)
    farewell.start()
    farewell.join(FAREWELL)
    if farewell.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the others see the connection break


def _quietly_stop() -> None:
    try:
        stop()
    except Exception:  # the error that ended the run has been logged
        return


# --------------------------------------------------------------------------- rows of a batch


def row_blocks(mesh: Mesh) -> tuple[list[tuple[int, ...]], int]:
    """Which blocks of a batch's rows each group of processes holds, and the group of this process.

    A batch is cut into data x fsdp equal blocks. Processes whose devices have the same places on these two axes (they
    differ in the others) are one group and need the same rows. The groups are disjoint and equal in size; where the
    mesh does not allow that, there is one group, and every process reads the whole batch.
    """
    fsdp = mesh.shape.get("fsdp", 1)
    held: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        at = dict(zip(mesh.axis_names, place, strict=True))
        held.setdefault(device.process_index, set()).add(at.get("data", 0) * fsdp + at.get("fsdp", 0))
    groups = sorted({tuple(sorted(blocks)) for blocks in held.values()})
    ways = fsdp * mesh.shape.get("data", 1)
    if len({len(g) for g in groups}) > 1 or sum(map(len, groups)) != ways:
        return [tuple(range(ways))], 0
    return groups, groups.index(tuple(sorted(held[jax.process_index()])))


def data_shard(mesh: Mesh) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The share of each batch that this process reads, (index, count), and the blocks in the order of the shares."""
    groups, mine = row_blocks(mesh)
    return (mine, len(groups)), tuple(block for group in groups for block in group)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A host batch as global device arrays, rows split over `data` and `fsdp`.

    Leaves are numpy arrays `[B / count, …]`, the rows of this process's blocks (all rows when its share is the whole);
    the result has `[B, …]`. Raises ValueError when B does not divide over the devices.
    """
    sharding = batch_sharding(mesh)
    groups, mine = row_blocks(mesh)
    ways = sum(map(len, groups))
    local = {block: at for at, block in enumerate(groups[mine])}

    def put(path: Sequence[Any], leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        rows = leaf.shape[0] * len(groups) if leaf.ndim else 0
        if not rows or rows % ways:
            raise ValueError(
                f"the batch's {tree.path_string(path)!r} of shape {leaf.shape} has {rows} rows in all, which do not"
                f" divide over {ways} devices (data x fsdp): set the batch size to a multiple of {ways}"
            )
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        size = rows // ways

        def cut(index: tuple[slice, ...]) -> np.ndarray:
            at = local[(index[0].start or 0) // size] * size
            return leaf[at : at + size]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, cut)

    return jax.tree_util.tree_map_with_path(put, batch)


# --------------------------------------------------------------------------- agreement


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, by process; every process must call it, with no computation of its own in flight."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def agree(reason: str) -> str:
    """Why some process cannot go on, the same text on all of them; "" when none has a reason."""
    told = gather_texts(reason)
    which = next((i for i, text in enumerate(told) if text), None)
    return "" if which is None else told[which] if len(set(told)) == 1 else f"on process {which}: {told[which]}"


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises ValueError, on every process, unless all have the same facts (JSON values by name)."""
    told = [json.loads(text) for text in gather_texts(json.dumps(dict(facts), sort_keys=True, default=str))]
    names = sorted({name for each in told for name in each})
    wrong = []
    for name in names:
        values = [each.get(name) for each in told]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            wrong.append(f"{name} ({values[0]!r} on process 0, {values[other]!r} on process {other})")
    if wrong:
        raise ValueError(f"the processes differ in {tree.listed(wrong)}: start all with the same command and packages")


def to_host(x: Any) -> np.ndarray:
    """The whole of an array, on every process; every process must call it when the array lies on several."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
