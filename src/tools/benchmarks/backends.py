"""The attention backends against the reference on this device: values, gradients and seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from src.common.mesh.constraints import platform
from src.interfaces import Batch, Layout, Packing, SequenceSpec, Tokens
from src.models.attention import Sizes, find_backend, prepare_attention
from src.sequence.layout import FixedLayout
from src.sequence.packed import PackedLayout
from src.sequence.segment import Segment
from src.tools.benchmarks import clock

BACKENDS = ("dense", "cudnn", "splash")
TOLERANCE = 0.02  # of the largest value of the reference, in bf16


def rows_of_paper(tiny: bool) -> tuple[Layout, Batch]:
    """Rows of the paper: prompt, time token, image, tail, with padding behind the prompt."""
    prompt, image, rows = (8, 30, 2) if tiny else (32, 256, 16)
    layout = FixedLayout(
        (Segment("text", prompt), Segment("image", image, "bidirectional", lead=1), Segment("tail", 2))
    )
    tokens = {s.name: np.ones((rows, s.length), bool) for s in layout.segments}
    tokens["text"][:, prompt // 2 :] = np.arange(rows)[:, None] % 2
    return layout, Batch({name: Tokens(flags, flags, flags) for name, flags in tokens.items()})


def packed_rows(tiny: bool) -> tuple[Layout, Batch]:
    """Packed rows: examples of words and an image one after the other, and padding behind them."""
    slots, image, most, rows = (256, 30, 3, 1) if tiny else (2048, 256, 5, 2)
    layout = PackedLayout(
        (Segment("text", slots), Segment("image", image, "bidirectional", lead=1)), slots, (("image", most),)
    )
    begins, example = np.full((rows, most), -1, np.int32), np.zeros((rows, slots), np.int32)
    length = slots // most - 8
    for number in range(most):
        first = number * length
        begins[:, number], example[:, first : first + length] = first + length - image - 4, number + 1
    there, valid = example > 0, np.repeat(begins[..., None] >= 0, image, axis=2)
    tokens = {"text": Tokens(there, there, there), "image": Tokens(valid, valid, valid)}
    return layout, Batch(tokens, packing=Packing(example, {"image": begins}))


def measure_backends(sizes: Any) -> Any:
    """For each backend and kind of rows the largest differences to the dense backend in float32, as a share of the
    largest value, in bf16, forward and backward; `equal`: at most `TOLERANCE`."""
    heads, kv_heads, head = (2, 1, 16) if sizes.tiny else (32, 4, 64)
    for kind, make in (("rows of the paper", rows_of_paper), ("packed rows", packed_rows)):
        layout, batch = make(sizes.tiny)
        batch = jax.tree.map(jnp.asarray, batch)
        rows, length = jax.eval_shape(layout.valid, batch).shape
        made = Sizes(rows, length, length, heads, kv_heads, head, jnp.bfloat16, platform())
        keys = jax.random.split(jax.random.key(0), 4)
        counts = (heads, kv_heads, kv_heads, heads)
        arrays = [
            jax.random.normal(k, (rows, length, n, head), jnp.bfloat16) for k, n in zip(keys, counts, strict=True)
        ]
        known: dict[str, Any] = {}

        def one(name: str, made=made, layout=layout, batch=batch, arrays=arrays, known=known) -> dict[str, Any]:
            if reason := find_backend(name).refusal(made):
                return {"skipped": f"it {reason}"}
            if not known:
                exact = [a.astype(jnp.float32) for a in arrays]
                with jax.default_matmul_precision("highest"):
                    known["wanted"] = attended("dense", made._replace(dtype=jnp.float32), layout)(batch, *exact)
            run = attended(name, made, layout)
            found = run(batch, *arrays)
            far = [difference(a, b) for a, b in zip(found, known["wanted"], strict=True)]
            taken = clock.spread(clock.repeat(lambda: run(batch, *arrays), sizes.seconds / 3, sizes.calls))
            return {"rows": made.rows, "length": made.queries, "forward_difference": far[0],
                    "backward_difference": max(far[1:]), "equal": max(far) <= TOLERANCE, "seconds": taken}  # fmt: skip

        for name in BACKENDS:
            yield f"{name}, {kind}", lambda name=name, one=one: one(name)


def attended(name: str, sizes: Sizes, layout: Layout) -> Callable[..., tuple[Array, ...]]:
    """(rows, q, k, v, weight) -> output on the tokens that are no padding, and the gradients of q, k and v."""

    @jax.jit
    def run(batch: Batch, q: Array, k: Array, v: Array, weight: Array) -> tuple[Array, ...]:
        spec: SequenceSpec = layout.spec(batch)
        there = (spec.segment > 0)[..., None, None]
        attend = prepare_attention(name, spec, spec, sizes)
        out, back = jax.vjp(attend, q, k, v)
        return jnp.where(there, out, 0), *back(jnp.where(there, weight, 0).astype(out.dtype))

    return run


def difference(found: Array, wanted: Array) -> float:
    """Largest difference, as a share of the largest value that is wanted."""
    found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
