"""Compiled programs as files that another start, or another machine of the same kind, loads instead of compiling.

JAX's cache (`compilation_cache.py`) saves the compiler's work on one machine, but the program is traced and lowered
before it is looked up. A file here is found by facts that need no tracing, and lies in the run's own folder.

A file is a magic number, the length of a header (4 bytes), the header as JSON, and what
`jax.experimental.serialize_executable` gives. The header has the facts under which the program is the right one, a
checksum, and what its caller needs to know the structure of the results.

**A compiled program is code.** Whoever can write the file can run code on the machine that loads it; the checksum finds
damage, not intent. So only files of a folder that strangers cannot write may be loaded. What lies around the program is
a pickle, of which only the classes of `ALLOWED` are made, so that nothing but the program itself can be such code.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable

from src.common.files.store import write_whole
from src.common.files.strict_json import parse_json

MAGIC = b"JAXPROG1"
HEADER = 1 << 24  # most bytes of a header
LARGEST = 1 << 33  # most bytes of a file
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda13-plugin")
OPTIONS = ("jax_default_matmul_precision", "jax_disable_most_optimizations", "jax_enable_x64", "jax_debug_nans",
           "jax_numpy_dtype_promotion", "jax_threefry_partitionable", "jax_default_prng_impl")  # fmt: skip
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")  # the devices themselves are a fact

ALLOWED = {
    "jax": "P",
    "jax._src.core": "ManualAxisType MemorySpace ShapedArray",
    "jax._src.interpreters.pxla": "AllArgsInfo UnloadedMeshExecutable",
    "jax._src.layout": "AutoLayout Format Layout",
    "jax._src.linear_util": "DebugInfo",
    "jax._src.mesh": "AbstractDevice AbstractMesh AxisType Mesh",
    "jax._src.named_sharding": "NamedSharding _unpickle_named_sharding",
    "jax._src.partition_spec": "PartitionSpec",
    "jax._src.sharding_impls": "GSPMDSharding SingleDeviceSharding UnspecifiedValue",
    "jax._src.stages": "ArgInfo",
    "jaxlib._jax": "DeviceList GSPMDSharding NamedSharding PartitionSpec SingleDeviceSharding",
    "ml_dtypes": "bfloat16",
    "numpy": "dtype ndarray",
    "numpy._core.multiarray": "_reconstruct",
}


def machine_facts(devices: Sequence[Any]) -> dict[str, str]:
    """What a program for these devices depends on besides its source: compilers, devices in order, and options."""
    first = devices[0]
    found: dict[str, str] = {}
    for package in COMPILERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if first.platform != "tpu":
        found.pop("libtpu", None)
    found["device"] = f"{first.platform} {first.device_kind}"
    if first.platform == "cpu":
        found["processor"] = _processor()
    places = [(d.id, d.process_index, *getattr(d, "coords", ()), getattr(d, "slice_index", 0) or 0) for d in devices]
    found["devices"] = f"{len(devices)}, {digest(places)}"
    found |= {name: " ".join(COUNT.sub("", os.environ.get(name, "")).split()) for name in VARIABLES}
    return found | {name: str(jax.config.values.get(name)) for name in OPTIONS}


def digest(value: Any) -> str:
    """A short hash of a JSON value, or of bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _processor() -> str:
    """A CPU's name and a hash of its instruction sets, for which its programs are compiled."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 16).split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{values.get('model name', platform.machine())}, {digest(values.get('flags', values.get('Features', '')))}"


def write_program(path: Any, compiled: Any, facts: Mapping[str, str], about: Any) -> int:
    """Writes a compiled program with its facts, and `about` it a JSON value; gives back the bytes written.

    Raises ValueError or what the backend raises where a program cannot be serialized, OSError, or what a store raises.
    """
    data, _, _ = serialize_executable.serialize(compiled)
    header = {"facts": dict(facts), "about": about, "sha256": hashlib.sha256(data).hexdigest()}
    head = json.dumps(header).encode()
    write_whole(path, MAGIC + len(head).to_bytes(4, "big") + head + data)
    return len(data)


def read_program(path: Any, facts: Mapping[str, str]) -> tuple[bytes, Any]:
    """(serialized program, what was said about it) of a file with these facts.

    Raises FileNotFoundError, OSError or what a store raises, and ValueError, in a few words, for a file that is damaged
    or has other facts.
    """
    path = epath.Path(path)
    size = path.stat().length
    if size > LARGEST:
        raise ValueError(f"it has {size} bytes")
    data = path.read_bytes()
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "big")
    if not data.startswith(MAGIC) or length > HEADER or len(data) < start + length:
        raise ValueError("it is damaged or no such file")
    header = parse_json(data[start : start + length], "its header")
    if not isinstance(header, dict) or not isinstance(header.get("facts"), dict):
        raise ValueError("its header has no facts")
    theirs = header["facts"]
    other = [name for name in sorted({*facts, *theirs}) if facts.get(name) != theirs.get(name)]
    if other:
        told = ", ".join(f"{name} ({theirs.get(name)!r}, now {facts.get(name)!r})" for name in other[:3])
        raise ValueError(f"it is of another {told}")
    program = data[start + length :]
    if hashlib.sha256(program).hexdigest() != header.get("sha256"):
        raise ValueError("its checksum is wrong")
    return program, header.get("about")


def load_program(program: bytes, in_tree: Any, out_tree: Any, devices: Sequence[Any]) -> Any:
    """The compiled program (`jax.stages.Compiled`) on these devices, all of a mesh.

    in_tree, out_tree   structures of ((arguments…), {}) and of the results

    Raises ValueError for a class that is not `ALLOWED`, and what JAX raises for a program that it cannot load.
    """
    unpickler = _Unpickler(BytesIO(program), devices[0].client, tuple(devices))
    unloaded, arguments, no_kwargs = unpickler.load()
    info = in_tree.unflatten(arguments)
    return jax.stages.Compiled(unloaded.load(), [], info, out_tree, no_kwargs=no_kwargs)


class _Unpickler(serialize_executable._JaxPjrtUnpickler):
    """Makes the classes of `ALLOWED` alone."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, "").split():
            raise ValueError(f"it has the class {module}.{name}, which is not allowed there")
        return super().find_class(module, name)
