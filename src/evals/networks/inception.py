"""The Inception-v3 of the FID (Szegedy et al. 2015; Heusel et al. 2017): images -> features and class scores.

It is the network of TensorFlow's 2015 archive, whose average pooling leaves the padding out and whose last block pools
by the maximum. Layers have the names of its PyTorch files (`pt_inception-2015-12-05-6726825d.pth`);
`inception_graph.py` reads TensorFlow's own file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

SIDE = 299  # pixels of the images that it sees
POOL, LOGITS = 2048, 1008
SPATIAL_CHANNELS = 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS
EPSILON = 1e-3


class Conv(NamedTuple):
    """Convolution without bias, normalization with fixed moments, ReLU. `size`: height and width of the kernel."""

    name: str
    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """Pooling over 3 x 3 places: the maximum, or the average over the places inside of the image."""

    kind: str  # max | average
    stride: int = 1


def _conv(name: str, features: int, height: int = 1, width: int | None = None) -> Conv:
    return Conv(name, features, (height, width or height))


def _shrink(name: str, features: int) -> Conv:
    return Conv(name, features, (3, 3), 2, "VALID")


def _tower(name: str, *features: int) -> tuple[Conv, ...]:
    """Convolutions `<name>_1`, … of 1 x 1, 3 x 3, 3 x 3."""
    return tuple(_conv(f"{name}_{i}", n, 1 if i == 1 else 3) for i, n in enumerate(features, 1))


# A block is a tuple of branches, side by side; a branch is a tuple of layers, one after the other; a list in it is a
# set of layers side by side.
def _block_a(pooled: int) -> tuple:
    return (
        (_conv("branch1x1", 64),),
        (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)),
        _tower("branch3x3dbl", 64, 96, 96),
        (Pool("average"), _conv("branch_pool", pooled)),
    )


def _block_b() -> tuple:
    tower = (*_tower("branch3x3dbl", 64, 96), _shrink("branch3x3dbl_3", 96))
    return ((_shrink("branch3x3", 384),), tower, (Pool("max", 2),))


def _block_c(inner: int) -> tuple:
    short = (_conv("branch7x7_1", inner), _conv("branch7x7_2", inner, 1, 7), _conv("branch7x7_3", 192, 7, 1))
    long = [_conv("branch7x7dbl_1", inner)]
    for i in range(2, 6):
        long.append(_conv(f"branch7x7dbl_{i}", 192 if i == 5 else inner, *((7, 1) if i % 2 == 0 else (1, 7))))
    return ((_conv("branch1x1", 192),), short, tuple(long), (Pool("average"), _conv("branch_pool", 192)))


def _block_d() -> tuple:
    short = (_conv("branch3x3_1", 192), _shrink("branch3x3_2", 320))
    long = (_conv("branch7x7x3_1", 192), _conv("branch7x7x3_2", 192, 1, 7), _conv("branch7x7x3_3", 192, 7, 1))
    return (short, (*long, _shrink("branch7x7x3_4", 192)), (Pool("max", 2),))


def _block_e(pooling: str) -> tuple:
    fork = lambda name: [_conv(f"{name}a", 384, 1, 3), _conv(f"{name}b", 384, 3, 1)]
    return (
        (_conv("branch1x1", 320),),
        (_conv("branch3x3_1", 384), fork("branch3x3_2")),
        (_conv("branch3x3dbl_1", 448), _conv("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")),
        (Pool(pooling), _conv("branch_pool", 192)),
    )


STEM = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    _conv("Conv2d_2b_3x3", 64, 3),
    Pool("max", 2),
    _conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    Pool("max", 2),
)
BLOCKS = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64), "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160), "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(), "Mixed_7b": _block_e("average"), "Mixed_7c": _block_e("max"),
}  # fmt: skip
SPATIAL_LAYER = "Mixed_6d.branch1x1"  # `mixed_6/conv` of the TensorFlow graph


class Features(NamedTuple):
    """What the network says of B images.

    pool      the last features, averaged over places: FID, KID, precision and recall
    spatial   the first 7 channels of a middle layer at 17 x 17 places, places first: sFID
    logits    class scores without the bias: inception score, as ADM's evaluator and torch-fidelity compute it
    """

    pool: Float[Array, "B 2048"]
    spatial: Float[Array, "B 2023"]
    logits: Float[Array, "B 1008"]


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the published tensors by name, as PyTorch has them (kernels: out, in, height, width)."""
    found = {}
    for name, entry, layer in _convolutions():
        found[f"{name}.conv.weight"] = (layer.features, entry, *layer.size)
        found |= {f"{name}.bn.{part}": (layer.features,) for part in ("weight", "bias", "running_mean", "running_var")}
    return found | {"fc.weight": (LOGITS, POOL), "fc.bias": (LOGITS,)}


def prepare(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `features` from the published tensors; a normalization becomes a factor and a summand.

    Raises ValueError, in one sentence, for tensors that are missing or of another shape.
    """
    wanted = shapes()
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise ValueError(f"{len(missing)} tensors of the FID's Inception are missing, such as {missing[0]}")
    wrong = [name for name, shape in wanted.items() if tensors[name].shape != shape]
    if wrong:
        have = list(tensors[wrong[0]].shape)
        raise ValueError(f"{wrong[0]} has the shape {have}, and the FID's Inception {list(wanted[wrong[0]])}")
    params = {}
    for name, _, _ in _convolutions():
        get = lambda part, name=name: np.asarray(tensors[f"{name}.{part}"], np.float32)
        factor = get("bn.weight") / np.sqrt(get("bn.running_var") + EPSILON)
        kernel = get("conv.weight").transpose(2, 3, 1, 0)
        params[name] = {
            "kernel": kernel, "factor": factor, "summand": get("bn.bias") - get("bn.running_mean") * factor
        }  # fmt: skip
    params["fc"] = np.asarray(tensors["fc.weight"], np.float32).T
    return params


def features(params: Mapping[str, Any], images: UInt8[Array, "B h w 3"]) -> Features:
    """Features of images of any size, which are resized to 299 x 299 as TensorFlow 1 does, without anti-aliasing."""
    kept: dict[str, Array] = {}
    x = (resize(images.astype(jnp.float32), SIDE) - 128) / 128
    x = _chain(params, "", STEM, x, kept)
    for name, branches in BLOCKS.items():
        x = jnp.concatenate([_chain(params, f"{name}.", branch, x, kept) for branch in branches], axis=-1)
    pool = x.mean(axis=(1, 2))
    spatial = kept[SPATIAL_LAYER][..., :SPATIAL_CHANNELS]
    logits = jnp.matmul(pool, params["fc"], precision="highest")
    return Features(pool, spatial.reshape(len(images), -1), logits)


def resize(images: Float[Array, "B h w C"], side: int) -> Float[Array, "B s s C"]:
    """Bilinear, with the places of TensorFlow 1: output i lies at input i · h / side, and no anti-aliasing."""
    for axis in (1, 2):
        size = images.shape[axis]
        place = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = np.floor(place).astype(np.int32)
        shape = [1] * 4
        shape[axis] = side
        share = jnp.asarray(place - low).reshape(shape)
        below, above = (jnp.take(images, np.minimum(each, size - 1), axis=axis) for each in (low, low + 1))
        images = below + (above - below) * share
    return images


def _chain(params: Mapping[str, Any], prefix: str, layers: Any, x: Array, kept: dict[str, Array]) -> Array:
    for layer in layers:
        if isinstance(layer, list):
            x = jnp.concatenate([_chain(params, prefix, (each,), x, kept) for each in layer], axis=-1)
        elif isinstance(layer, Pool):
            x = _pooled(layer, x)
        else:
            name = prefix + layer.name
            x = _convolved(params[name], layer, x)
            if name == SPATIAL_LAYER:
                kept[name] = x
    return x


def _convolved(weights: Mapping[str, Array], layer: Conv, x: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (layer.stride, layer.stride)
    out = jax.lax.conv_general_dilated(
        x, weights["kernel"], strides, layer.padding, dimension_numbers=numbers, precision="highest"
    )
    return jax.nn.relu(out * weights["factor"] + weights["summand"])


def _pooled(pool: Pool, x: Array) -> Array:
    window, strides = (1, 3, 3, 1), (1, pool.stride, pool.stride, 1)
    padding = "SAME" if pool.stride == 1 else "VALID"
    if pool.kind == "max":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)
    total = lambda values: jax.lax.reduce_window(values, 0.0, jax.lax.add, window, strides, padding)
    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _convolutions() -> Iterator[tuple[str, int, Conv]]:
    """Name, channels that it reads, and sizes of every convolution."""
    channels = 3

    def walk(prefix: str, layers: Any, entry: int) -> Iterator[tuple[str, int, Conv]]:
        for layer in layers:
            if isinstance(layer, Conv):
                yield prefix + layer.name, entry, layer
                entry = layer.features
            elif isinstance(layer, list):
                for each in layer:
                    yield from walk(prefix, (each,), entry)

    for name, entry, layer in walk("", STEM, channels):
        yield name, entry, layer
        channels = layer.features
    for block, branches in BLOCKS.items():
        for branch in branches:
            yield from walk(f"{block}.", branch, channels)
        channels = sum(_width(branch, channels) for branch in branches)


def _width(branch: Any, entry: int) -> int:
    """Channels that a branch makes of `entry` channels."""
    for layer in branch:
        if isinstance(layer, Conv):
            entry = layer.features
        elif isinstance(layer, list):
            entry = sum(each.features for each in layer)
    return entry
