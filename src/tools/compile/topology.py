"""Devices that are not there: TPU slices described by libtpu, or emulated CPU devices in their place."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import sys
from typing import Any

from src.tools.compile.chips import CHIPS, Chip

NO_LIBTPU = "libtpu, the TPU compiler, is not installed: run pip install -r requirements-aot.txt"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice (or several) of chips, and JAX's devices for it."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]  # chips in each dimension of one slice
    slices: int
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.sizes) * self.slices

    @property
    def share(self) -> float:
        """The part of a chip that one device is: 1, or 1/2 where a chip is two devices."""
        return self.chips / len(self.devices)


def prepare(platform: str, topology: str) -> None:
    """Sets the environment for `open_topology`; call it before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is only described; nothing runs on it
    if platform == "cpu" and topology.isdigit() and "jax" not in sys.modules:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology}"
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    nowhere = {  # libtpu need not ask the network which machine this is
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in (quiet | nowhere).items():
        os.environ.setdefault(name, value)


def open_topology(platform: str, topology: str, slices: int = 1, chip: str | None = None) -> Topology:
    """`v5e:8x8` of platform tpu, or a number of emulated devices of platform cpu taken for chips of the kind `chip`.

    Raises ValueError, in one sentence, for names that mean nothing, and ImportError when libtpu is missing.
    """
    kind, _, shape = topology.partition(":")
    if platform == "tpu" and chip not in (None, kind):
        raise ValueError(f"--chip={chip} does not go with --topology={topology}: it is for --platform=cpu")
    kind = chip or (kind if platform == "tpu" else "v5e")
    if kind not in CHIPS:
        raise ValueError(f"there is no chip {kind!r}; use one of {', '.join(CHIPS)}")
    sizes = tuple(int(n) if n.isdigit() else 0 for n in (shape if platform == "tpu" else topology).split("x"))
    if not all(sizes) or slices < 1:
        example = "v5e:8x8" if platform == "tpu" else "8"
        raise ValueError(f"--topology={topology} --slices={slices} means nothing on {platform}; give e.g. {example}")
    import jax

    if platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < sizes[0]:
            raise ValueError(f"JAX already runs with {len(devices)} emulated devices; --topology={topology} needs more")
        return Topology(topology, CHIPS[kind], sizes, 1, tuple(devices[: sizes[0]]))
    from jax.experimental import topologies

    options: dict[str, Any] = dict(CHIPS[kind].options) | ({"num_slices": slices} if slices > 1 else {})
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # the plug-in raises several kinds
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(NO_LIBTPU) from error
        raise ValueError(f"the TPU compiler knows no slice {topology}: {str(error).splitlines()[0]}") from error
    return Topology(topology, CHIPS[kind], sizes, slices, tuple(devices))
