"""Published DiT and SiT (Peebles & Xie 2023, arXiv 2212.09748; Ma et al. 2024, arXiv 2401.08740) -> our leaves by path.

Both have the same tensors and no config.json. Kernels are `[out, in]` there; queries, keys and values are one matrix,
and patches are a convolution. DiT reads the number of a step and predicts noise (`schedules:LinearBetas`, `eps`). SiT's
time runs from noise to data: its weights are turned so that they read our t, which is 1 - t there, and give our
velocity, which has the other sign. That is exact: cos((1 - t) f) and sin((1 - t) f) are sums of cos(t f) and sin(t f).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from src.common.files.lazy_arrays import is_stacked
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.tree import listed
from src.models.layers import sincos_2d
from src.models.pretrained.about import CHANNELS, HEAD, ORDER, VARIANCE
from src.models.pretrained.llama_weights import FLOATS, IMAGE, TIME_FEATURES

NETWORKS = ("dit", "sit")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: S, B, L and XL
PATCHES, CLASSES, POSITIONS = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"
TIME, LAST = "time/first/kernel", f"{IMAGE}/head/linear"
# Of each of our layers theirs, and which third of it.
BLOCK: dict[str, tuple[str, int | None]] = {
    "attention/q": ("attn.qkv", 0),
    "attention/k": ("attn.qkv", 1),
    "attention/v": ("attn.qkv", 2),
    "attention/out": ("attn.proj", None),
    "mlp/up": ("mlp.fc1", None),
    "mlp/down": ("mlp.fc2", None),
    "modulation/linear": ("adaLN_modulation.1", None),
}
SINGLE = {
    f"{IMAGE}/embed/linear": "x_embedder.proj",
    "time/first": "t_embedder.mlp.0",
    "time/second": "t_embedder.mlp.2",
    f"{IMAGE}/head/adaln": "final_layer.adaLN_modulation.1",
    LAST: "final_layer.linear",
}
TABLE = "fields/label/embed/table/embedding"


class DiTSizes(NamedTuple):
    """Of the network, from the shapes of its tensors."""

    width: int
    depth: int
    mlp_width: int
    channels: int
    patch: int
    classes: int  # with the one for "no class"
    outputs: int


def is_dit(names: Mapping[str, Any]) -> bool:
    """Whether these are the tensors of a DiT or SiT."""
    return {PATCHES, CLASSES, "blocks.0.attn.qkv.weight"} <= {*names}


class PublishedDiT:
    """Its tensors as `Leaves`, a block at a time.

    network   dit or sit, which no file says
    heads     of the attention, which no file says; None: those of the published size with this width

    Raises ValueError, in one sentence, for a network or heads that are not known, and with the list of all tensors that
    are missing, extra, of another shape or no floats, or where positions are not the fixed ones.
    """

    def __init__(self, tensors: SafeTensors, network: str | None, heads: int | None = None):
        self.tensors, self.network, where = tensors, network, shown(tensors.path)
        if network not in NETWORKS:
            raise ValueError(f"{where} has the tensors of a DiT or a SiT, which are alike: give --network=dit or sit")
        self.sizes = _sizes(tensors.entries)
        self.heads = heads or HEADS.get(self.sizes.width)
        if not self.heads or self.sizes.width % self.heads:
            raise ValueError(
                f"{where} is a network of width {self.sizes.width}, and its attention has {self.heads or 'unknown'} "
                "heads: give --heads, which divide the width"
            )
        self._wanted = _wanted(self.sizes)
        self._check(where)
        self.shapes = {path: self._shape(path) for path in self._paths()}

    def about(self) -> dict[str, Any]:
        """The options of a config that the weights are made for (`about.py`)."""
        size, double = self.sizes, self.sizes.outputs == 2 * self.sizes.channels
        trunk = {"width": size.width, "depth": size.depth, "heads": self.heads, "kv_heads": self.heads}
        trunk |= {"mlp_width": size.mlp_width, "norm": "layer", "norm_epsilon": 1e-6, "final_norm": False}
        trunk |= {"mlp": "gelu", "bias": True, "qk_norm": False, "rope": False}
        told = {f"model.trunk.{name}": value for name, value in trunk.items()}
        told |= {HEAD: "adaln", ORDER: "rsc", CHANNELS: size.channels}
        if self.network == "dit":
            return (
                told
                | {"fields.image.process.parameterization": "eps"}
                | ({VARIANCE: "learned_range"} if double else {})
            )
        process = {"parameterization": "velocity", "schedule.time_scale": 1.0}
        told |= {f"fields.image.process.{name}": value for name, value in process.items()}
        return told | ({"fields.image.head.unused_variance": True} if double else {})

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """See `Leaves`."""
        stem, _, leaf = path.rpartition("/")
        if path == TABLE:
            yield self._read(CLASSES)
        elif is_stacked(path):
            theirs, third = BLOCK[stem.removeprefix("trunk/layers/")]
            for number in range(self.sizes.depth):
                tensor = self._read(f"blocks.{number}.{theirs}.{_theirs(leaf)}")
                tensor = tensor if third is None else np.split(tensor, 3)[third]
                yield tensor.T if leaf == "kernel" else tensor
        else:
            tensor = self._read(f"{SINGLE[stem]}.{_theirs(leaf)}")
            tensor = tensor.reshape(len(tensor), -1).T if leaf == "kernel" else tensor
            yield self._turned(path, tensor) if self.network == "sit" else tensor

    def _read(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def _turned(self, path: str, values: np.ndarray) -> np.ndarray:
        """Of a SiT, for our time and our velocity."""
        wide = values.astype(np.float64)
        if path == TIME:
            half = TIME_FEATURES // 2
            frequency = 10_000.0 ** (-np.arange(half) / half)[:, None]
            cos, sin = np.cos(frequency), np.sin(frequency)
            wide = np.concatenate([cos * wide[:half] + sin * wide[half:], sin * wide[:half] - cos * wide[half:]])
        elif path.startswith(f"{LAST}/"):
            velocity = np.arange(self.sizes.outputs) < self.sizes.channels
            wide = wide * np.tile(np.where(velocity, -1.0, 1.0), values.shape[-1] // self.sizes.outputs)
        return wide.astype(values.dtype)

    def _paths(self) -> list[str]:
        stems = [*SINGLE, *(f"trunk/layers/{name}" for name in BLOCK)]
        return [TABLE, *(f"{stem}/{leaf}" for stem in stems for leaf in ("kernel", "bias"))]

    def _shape(self, path: str) -> jax.ShapeDtypeStruct:
        stem, _, leaf = path.rpartition("/")
        theirs, third = BLOCK.get(stem.removeprefix("trunk/layers/"), (SINGLE.get(stem), None))
        lead = "blocks.0." if is_stacked(path) else ""
        name = CLASSES if path == TABLE else f"{lead}{theirs}.{_theirs(leaf)}"
        shape = self._wanted[name]
        shape = shape if third is None else (shape[0] // 3, *shape[1:])
        shape = (int(np.prod(shape[1:])), shape[0]) if leaf == "kernel" else shape
        return jax.ShapeDtypeStruct((self.sizes.depth, *shape) if is_stacked(path) else shape, self._dtype(name))

    def _dtype(self, name: str) -> np.dtype:
        kind = self.tensors.entries[name].dtype
        return np.dtype(np.float32) if kind.name == "float64" else kind

    def _check(self, where: str) -> None:
        entries = self.tensors.entries
        wrong = [f"{name} is missing" for name in self._wanted if name not in entries]
        for name, entry in entries.items():
            if name != POSITIONS and name not in self._wanted:
                wrong.append(f"{shown(name)} is not in this model")
            elif name != POSITIONS and entry.shape != self._wanted[name]:
                wrong.append(f"{name} has shape {list(entry.shape)}, and {list(self._wanted[name])} would fit")
            elif entry.dtype.name not in FLOATS:
                wrong.append(f"{name} is {entry.dtype.name}, no float of 16 bits or more")
        kinds = {entry.dtype.name for name, entry in entries.items() if name.startswith("blocks.")}
        wrong += [f"the blocks are of {listed(sorted(kinds))}, and one dtype is read"] if len(kinds) > 1 else []
        if not wrong and POSITIONS in entries and not _fixed(self._read(POSITIONS), self.sizes.width):
            wrong.append(f"{POSITIONS} has other numbers than the fixed sin-cos positions of a square")
        if wrong:
            raise ValueError(f"the checkpoint {where} is no whole DiT or SiT: {listed(wrong, 100)}")


def _theirs(leaf: str) -> str:
    return "weight" if leaf == "kernel" else leaf


def _sizes(entries: Mapping[str, Any]) -> DiTSizes:
    width, channels, patch = (*entries[PATCHES].shape, 0, 0, 0)[:3]
    first = lambda name, otherwise: next(iter(getattr(entries.get(name), "shape", ())), otherwise)
    depth = 0
    while f"blocks.{depth}.attn.qkv.weight" in entries:
        depth += 1
    outputs = first("final_layer.linear.bias", 0) // max(patch**2, 1)
    outputs = outputs if outputs in (channels, 2 * channels) else channels
    mlp_width = first("blocks.0.mlp.fc1.bias", 4 * width)
    return DiTSizes(width, depth, mlp_width, channels, patch, first(CLASSES, 0), outputs)


def _wanted(sizes: DiTSizes) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its published name."""
    width, inner, features = sizes.width, sizes.mlp_width, sizes.outputs * sizes.patch**2
    linears = {"t_embedder.mlp.0": (width, TIME_FEATURES), "t_embedder.mlp.2": (width, width)}
    linears |= {"final_layer.adaLN_modulation.1": (2 * width, width), "final_layer.linear": (features, width)}
    block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "adaLN_modulation.1": (6 * width, width)}
    block |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    linears |= {f"blocks.{i}.{name}": shape for i in range(sizes.depth) for name, shape in block.items()}
    linears["x_embedder.proj"] = (width, sizes.channels, sizes.patch, sizes.patch)
    wanted: dict[str, tuple[int, ...]] = {CLASSES: (sizes.classes, width)}
    for name, shape in linears.items():
        wanted |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return wanted


def _fixed(positions: np.ndarray, width: int) -> bool:
    """Whether `[1, side², D]` are the positions that our embedder adds."""
    side = int(positions.size / max(width, 1)) ** 0.5
    if positions.shape != (1, int(side) ** 2, width) or width % 4:
        return False
    return np.allclose(positions[0].astype(np.float32), sincos_2d(int(side), int(side), width), atol=1e-2)
