"""Fully sharded data parallelism: the sharding of parameters, gathers in front of layers, scattered gradients.

The train step is written per device over the mesh axes `data` and `fsdp` (`jax.shard_map`), so that what crosses the
network is written down and not guessed: a parameter that is split over `fsdp` is gathered just before its layer uses
it, in the dtype of the computation, and the transpose of that gather is a reduce-scatter of its gradient (Rajbhandari
et al. 2020, ZeRO stage 3). The axes `tensor` and `context` are left to the compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from src.common import tree
from src.common.mesh.sharding import BATCH_AXES

GATHERED = "gathered weights"  # their name in rematerialization policies


@dataclasses.dataclass(frozen=True)
class Placement:
    """`specs`: where each parameter lies, by path; `dtype`: of the computation, and of what is gathered."""

    specs: Mapping[str, PartitionSpec]
    dtype: Any

    def fetch(self, params: Any, prefix: str = "", stacked: bool = False) -> Any:
        """Parameters as a layer uses them: whole over `fsdp`, still split over `tensor`.

        `prefix` is the path of the tree `params`; with `stacked` its leaves are one layer of a stack.
        """
        mesh = jax.sharding.get_abstract_mesh()
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        # XLA's compiler for CPUs aborts on a reduce-scatter in bfloat16, the transpose of this gather.
        narrow = mesh.axis_names and mesh.abstract_device is not None and mesh.abstract_device.platform != "cpu"

        def one(path: Any, leaf: Any) -> Any:
            spec = self.specs[prefix + tree.path_string(path)]
            entries = [spec[i] if i < len(spec) else None for i in range(leaf.ndim + stacked)][int(stacked) :]
            whole = PartitionSpec(*[None if entry == "fsdp" else entry for entry in entries])
            kept = leaf.dtype
            if "fsdp" in entries:
                leaf = leaf.astype(self.dtype) if narrow else leaf
                if kinds["fsdp"] == AxisType.Manual:
                    leaf = _gather(leaf, entries.index("fsdp"), whole if "tensor" in entries else None)
            if "tensor" in entries or ("fsdp" in entries and kinds["fsdp"] == AxisType.Auto):
                leaf = jax.lax.with_sharding_constraint(leaf, whole)
            # Back to f32 in name, so that an embedding's gradients are added in f32; the compiler drops it elsewhere.
            return checkpoint_name(leaf, GATHERED).astype(kept) if "fsdp" in entries else leaf

        return jax.tree_util.tree_map_with_path(one, params)

    def local(self, function: Callable[..., Any], params: Any, rows: Any, fixed: Any = None) -> Any:
        """function(params, rows, add) -> (gradients, sums), run by every device on its part of both.

        params   the parameters; inside, each is the device's own piece (see `fetch`)
        rows     a tree of arrays `[B, …]`; inside, they hold the device's rows
        add      sums over the devices that have other rows
        fixed    if given, more parameters, by their paths, that get no gradient; `function` takes them last

        Gradients come back where their parameters lie, summed over all rows; `sums` must be added up by `function`.
        """
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)
        more = () if fixed is None else (fixed,)
        if not axes:
            return function(params, rows, lambda x: x, *more)

        def add(x: Any) -> Any:
            return jax.lax.psum(x, axes)

        def body(params: Any, rows: Any, *more: Any) -> Any:
            grads, sums = function(params, rows, add, *more)

            def reduce(path: Any, grad: Any) -> Any:
                # The gather's transpose has summed over fsdp already.
                done = ("fsdp",) if "fsdp" in self.specs[tree.path_string(path)] else ()
                rest = tuple(axis for axis in axes if axis not in done)
                return jax.lax.psum(grad, rest) if rest else grad

            return jax.tree_util.tree_map_with_path(reduce, grads), sums

        def pieces(path: Any, _: Any) -> PartitionSpec:
            spec = self.specs[tree.path_string(path)]
            return PartitionSpec(*[entry if entry == "fsdp" else None for entry in spec])

        where, *wheres = (jax.tree_util.tree_map_with_path(pieces, each) for each in (params, *more))
        split = jax.shard_map(
            body,
            in_specs=(where, PartitionSpec(axes), *wheres),
            out_specs=(where, PartitionSpec()),
            axis_names=set(axes),
            check_vma=False,  # sums over devices are written out above
        )
        return split(params, rows, *more)


def _gather(leaf: Any, axis: int, split: PartitionSpec | None) -> Any:
    """The pieces of all fsdp devices, concatenated; `split` is the spec of the result over `tensor`."""

    def gather(piece: Any) -> Any:
        return jax.lax.all_gather(piece, "fsdp", axis=axis, tiled=True)

    if split is None:
        return gather(leaf)
    # The compiler would first gather over `tensor`: it does not partition collectives that are written by hand.
    return jax.shard_map(gather, in_specs=split, out_specs=split, axis_names={"tensor"}, check_vma=False)(leaf)
