"""The frozen networks of the fields' codecs for sampling, applied in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from src.common.mesh.distributed import to_host
from src.common.mesh.sharding import replicated
from src.common.runtime import stopping
from src.interfaces import PyTree
from src.sampling.rows import chunk, put, row_shards


class FrozenLinks:
    """Frozen links `nets` by field (`codecs/vae_latents.py`, `codecs/clip_vision.py`); values of other fields are
    returned unchanged. Rows are sharded over the mesh, and parameters placed at their first use."""

    def __init__(self, nets: Mapping[str, Any]):
        self.nets = dict(nets)
        self._params: dict[tuple[str, Mesh | None], PyTree] = {}
        self._programs: dict[tuple[str, str], Callable] = {}

    def encode(self, row: str, values: np.ndarray, mesh: Mesh | None) -> np.ndarray:
        """Raw values [n, …] as inputs of the device links; deterministic."""
        if row not in self.nets:
            return values
        net = self.nets[row]
        return self._run(row, "encode", lambda params, x: net.draw(net.compute(params, x), None), values, mesh)

    def decode(self, row: str, values: np.ndarray, mesh: Mesh | None) -> np.ndarray:
        """The (approximate) inverse of `encode`."""
        if row not in self.nets:
            return values
        return self._run(row, "decode", self.nets[row].decode, values, mesh)

    def _run(self, row: str, what: str, function: Callable, values: np.ndarray, mesh: Mesh | None) -> np.ndarray:
        if (row, mesh) not in self._params:
            where = None if mesh is None else replicated(mesh)
            self._params[row, mesh] = jax.device_put(self.nets[row].params, where)
        program = self._programs.setdefault((row, what), jax.jit(function))
        size, out = self.nets[row].rows * row_shards(mesh), []
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            for start in range(0, len(values), size):
                stopping.check()
                rows = put(chunk(np.asarray(values), start, size, mesh), mesh)
                out.append(to_host(program(self._params[row, mesh], rows)))
        return np.concatenate(out)[: len(values)]
