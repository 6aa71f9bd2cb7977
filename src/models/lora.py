"""Low-rank adapters on the trunk (Hu et al. 2021, arXiv 2106.09685).

A linear layer with the kernel W `[I, O]` that is adapted computes

    y = x W + s · (x A) B,    s = alpha / rank,    A `[I, r]` ~ N(0, 1 / I),    B `[r, O]` = 0 at the start,

so that the first step starts at W exactly. A and B lie beside the kernel, as `lora_a` and `lora_b`, stacked over the
layers like it: what finds, splits, gathers and saves the parameters of a block finds them too. The sum is not formed
while training: the gradient of W is never needed (`train/trainable.py` freezes the trunk), and x A costs 2 I r a token
where W + s A B would cost that and the gradient of W. `merge` forms it, for export.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from src.common import tree
from src.interfaces import PyTree
from src.models.layers import product
from src.models.mixture_of_transformers import GROUP

A, B = "lora_a", "lora_b"
# All of the trunk but adapters, own parts of some fields, which exist to be trained whole, and what conditions a block
# on the time, which no language model has.
FROZEN = rf"^trunk/(?!layers/({GROUP}|modulation)/)(?!.*/lora_[ab]$)"


class Adapted(nnx.Linear):
    """`nnx.Linear` with an adapter, made of a plain one, whose parameters it takes over."""

    def __init__(self, linear: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        kernel = linear.kernel[...]
        *stack, d_in, d_out = kernel.shape
        self.kernel, self.bias = linear.kernel, linear.bias
        for name in ("in_features", "out_features", "use_bias", "dtype", "param_dtype", "precision", "dot_general",
                     "promote_dtype", "preferred_element_type"):  # fmt: skip
            setattr(self, name, getattr(linear, name))
        self.scale = alpha / rank
        self.lora_a = nnx.Param(jax.random.normal(rngs.params(), (*stack, d_in, rank), kernel.dtype) * d_in**-0.5)
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, d_out), kernel.dtype))

    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        """x W + s · (x A) B, and the bias if there is one."""
        narrow, a, b = self.promote_dtype((x, self.lora_a[...], self.lora_b[...]), dtype=self.dtype)
        last = (((x.ndim - 1,), (0,)), ((), ()))
        return super().__call__(x) + self.scale * product(product(narrow, a, last), b, last)


def adapt(trunk: nnx.Module, *, rank: int = 0, alpha: float = 16.0, targets: str = ".*", rngs: nnx.Rngs) -> None:
    """Gives adapters to the linear layers of all blocks whose path (`attention/q`, `mlp/down`, …) `targets` matches
    from its beginning to its end; rank 0 leaves the trunk as it is.

    Raises ValueError for a rank or alpha that means nothing, and when `targets` matches no layer.
    """
    if rank < 0 or (rank and alpha <= 0):
        raise ValueError(f"model.lora has rank={rank} and alpha={alpha}; rank is 0 or more, alpha above 0")
    if not rank:
        return
    found = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(trunk.layers)
        if isinstance(module, nnx.Linear) and path[0] not in (GROUP, "modulation")
    }
    try:
        chosen = [path for path in found if re.fullmatch(targets, path)]
    except re.error as error:
        raise ValueError(f"model.lora.targets={targets!r} is no regular expression: {error}") from error
    if not chosen:
        raise ValueError(f"model.lora.targets={targets!r} matches no layer; there are {', '.join(sorted(found))}")
    for path in sorted(chosen):
        *outer, last = path.split("/")
        place = trunk.layers
        for name in outer:
            place = getattr(place, name)
        least = min(found[path].kernel[...].shape[-2:])
        if rank > least:
            raise ValueError(f"model.lora.rank={rank} is above {least}, the rank of a whole {path}; lower it")
        setattr(place, last, Adapted(found[path], rank, alpha, rngs=rngs))


def frozen(rank: int) -> tuple[tuple[str, float], ...]:
    """The rule that freezes what adapters stand in for, to go before `optim.lr_multipliers`; none without adapters."""
    return ((FROZEN, 0.0),) if rank else ()


def is_adapter(path: str) -> bool:
    """Whether the parameter of this path belongs to an adapter."""
    return path.endswith((f"/{A}", f"/{B}"))


class Merged:
    """Leaves that are read block by block (`shapes` by path, `blocks(path)`) with the adapters among them merged, one
    layer of one kernel in memory at a time: `merge` for models that no host holds twice."""

    def __init__(self, leaves: Any, alpha: float):
        self._leaves, self._alpha = leaves, alpha
        self.shapes = {path: shape for path, shape in leaves.shapes.items() if not is_adapter(path)}

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """The layers of a stacked leaf, one after the other, or the whole of another one."""
        stem = path.removesuffix("kernel")
        if not path.endswith("/kernel") or stem + A not in self._leaves.shapes:
            yield from self._leaves.blocks(path)
            return
        for kernel, a, b in zip(*(self._leaves.blocks(p) for p in (path, stem + A, stem + B)), strict=True):
            grown = np.asarray(a, np.float32) @ np.asarray(b, np.float32)
            yield (np.asarray(kernel, np.float32) + self._alpha / a.shape[-1] * grown).astype(kernel.dtype)


def merge(params: PyTree, alpha: float) -> PyTree:
    """The parameters without adapters, with the same results: kernel + alpha / rank · A B, formed in f32.

    Trees without adapters come back as they are. What is left is what a published checkpoint of the same sizes has.
    """
    flat = tree.flatten(params)
    plain = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path in flat:
        if path.endswith(f"/{A}"):
            stem = path.removesuffix(A)
            a, b, kernel = flat[path], flat[stem + B], flat[f"{stem}kernel"]
            grown = jnp.einsum("...ir,...ro->...io", a, b, precision="highest", preferred_element_type=jnp.float32)
            plain[f"{stem}kernel"] = (kernel + alpha / a.shape[-1] * grown).astype(kernel.dtype)
    return tree.unflatten(plain)
