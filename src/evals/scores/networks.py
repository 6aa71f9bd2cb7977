"""Networks whose features are compared, each read from a file that users download."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from src.codecs.clip import preprocess
from src.codecs.clip_files import FILES
from src.common.files.safetensors import SafeTensors
from src.common.files.torch_tensors import read_tensors
from src.common.files.weight_mapping import content_hash
from src.common.mesh.distributed import to_host
from src.common.mesh.sharding import batch_sharding, make_mesh, replicated
from src.common.tree import flatten
from src.evals.networks import inception
from src.evals.networks.clip_pair import ClipPair, read_clip_pair
from src.evals.networks.dinov2 import Dinov2, read_dinov2
from src.evals.networks.dinov2 import preprocess as prepare_for_dinov2
from src.evals.networks.inception_graph import read_inception_graph

# What the file that scores are published with begins with, as its name says.
PUBLISHED = "6726825d"
MOST_VALUES = 64 * 64 * 3  # of an image whose pixels are features
# By name, what is to be downloaded.
NETWORKS = {
    "inception": f"pt_inception-2015-12-05-{PUBLISHED}.pth", "dinov2": "dinov2-large",
    "clip": "clip-vit-large-patch14", "pixels": "",
}  # fmt: skip
# By name, what it says of images.
OUTPUTS = {
    "inception": ("pool", "spatial", "logits"), "dinov2": ("pool",), "clip": ("embedding",), "pixels": ("pool",)
}  # fmt: skip
# What is done with 8-bit images before the network sees them.
RESIZING = {
    "inception": "299 x 299, bilinear as TensorFlow 1, not rounded", "dinov2": "224 x 224, bicubic as Pillow, rounded",
    "clip": "shorter side to the network's, bicubic as Pillow, rounded, middle square",
}  # fmt: skip
OF_DINOV2 = {
    "fid": "fd_dinov2", "kid": "kd_dinov2", "kid_std": "kd_dinov2_std", "precision": "precision_dinov2",
    "recall": "recall_dinov2",
}  # fmt: skip
REGISTERS = "the network has registers, and published distances of DINOv2 are of one without"
TEXTS = 64  # whose embeddings are computed at a time
ROWS, MOST_ROWS = 64, 1024  # images of a device at a time, and of all


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """Features of images.

    about     name and file, for the report
    outputs   numbers of each output
    compute   images of one size -> by output, float32 [n, numbers]; see `by_rows` for several devices and processes
    warning   what may change a score, or ""
    names     what its scores are called, where that is not the metric's name
    identity  a digest of its parameters and of how it resizes images, which statistics made with it keep; "" where
              there are no parameters
    texts     of networks that read words, too: texts -> float32 [n, numbers] beside the output "embedding"
    """

    about: dict[str, Any]
    outputs: Mapping[str, int]
    compute: Callable[[UInt8[np.ndarray, "n h w 3"]], dict[str, Float[np.ndarray, "n d"]]]
    warning: str = ""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    identity: Callable[[], str] = str
    texts: Callable[[Sequence[str]], Float[np.ndarray, "n d"]] | None = None


def open_network(name: str, weights: str | None, height: int, width: int) -> FeatureNetwork:
    """The network `name` of `NETWORKS` from its file, for images of height x width pixels.

    Raises FileNotFoundError, and ValueError, in one sentence, without a file that it needs, and for one that is none of
    its.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; give one of {', '.join(NETWORKS)}")
    if name == "pixels":
        return pixels(height, width)
    check_file(name, weights)
    return {"inception": fid_inception, "dinov2": dinov2, "clip": clip}[name](os.fspath(weights))


def check_file(name: str, weights: str | None, option: str = "--{}") -> None:
    """Raises ValueError without the file of a network that needs one, FileNotFoundError where it is not there;
    `option`: how the messages write an option."""
    if name == "pixels":
        return
    if not weights:
        raise ValueError(f"give {option.format('weights')}={NETWORKS[name]} (docs/scores.md says where to get it)")
    if not os.path.exists(weights):
        raise FileNotFoundError(f"{weights} does not exist: download {NETWORKS[name]} (docs/scores.md says where)")


def pixels(height: int, width: int) -> FeatureNetwork:
    """The pixels themselves, in [0, 1]: for small images, and for trying the tools.

    Raises ValueError for images of more than `MOST_VALUES` values, whose covariance would fill the memory.
    """
    count = height * width * 3
    if count > MOST_VALUES:
        raise ValueError(
            f"images of {height} x {width} pixels have a covariance of {count:,} x {count:,} numbers: give"
            " --network=inception and its file"
        )
    compute = lambda images: {"pool": images.reshape(len(images), -1).astype(np.float32) / 255}
    return FeatureNetwork({"name": "pixels"}, {"pool": count}, compute)


def rows_at_once() -> int:
    """Images whose features are computed at a time."""
    return min(ROWS * jax.device_count(), MOST_ROWS)


def whole(params: Any) -> Any:
    """Parameters, equal on all processes, on every device of all of them."""
    if jax.device_count() == 1:
        return jax.device_put(params)
    sharding = replicated(make_mesh({"data": -1}))

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, params)


def by_rows(
    run: Callable[[Any], Any], rows: np.ndarray, prepare: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
) -> Any:
    """The arrays of `run(prepare(rows))` on the host, `run` being compiled with parameters of `whole`.

    Rows are equal on all processes, which must all call it. Each device computes its share of them, which its process
    alone prepares, and every process gets all results.
    """
    count, devices = len(rows), jax.device_count()
    if devices == 1:
        return jax.tree.map(np.asarray, run(prepare(rows)))
    padded = np.minimum(np.arange(-(-count // devices) * devices), count - 1)
    shape = (len(padded), *prepare(rows[:1]).shape[1:])
    share = lambda index: prepare(rows[padded[index[0]]])
    placed = jax.make_array_from_callback(shape, batch_sharding(make_mesh({"data": -1})), share)
    return jax.tree.map(lambda array: to_host(array)[:count], run(placed))


def fid_inception(path: str) -> FeatureNetwork:
    """The Inception of the FID, from `pt_inception-2015-12-05-6726825d.pth`, the same tensors as safetensors, or
    TensorFlow's own `classify_image_graph_def.pb`.

    Raises FileNotFoundError, and ValueError, in one sentence, for a file without its tensors.
    """
    check_file("inception", path)
    readers = {".safetensors": lambda name: dict(SafeTensors(name)), ".pb": read_inception_graph}
    ending = os.path.splitext(path)[1]
    params = whole(inception.prepare(readers.get(ending, read_tensors)(path)))
    run = jax.jit(inception.features)
    outputs = {"pool": inception.POOL, "spatial": inception.SPATIAL, "logits": inception.LOGITS}
    digest = sha256(path)
    known = digest.startswith(PUBLISHED) or ending == ".pb"  # whose digest is not in its name
    told = "" if known else f"{path} is not the published file (its sha256 begins with {digest[:8]}, not {PUBLISHED})"

    def compute(images: np.ndarray) -> dict[str, np.ndarray]:
        return by_rows(lambda rows: run(params, rows), images)._asdict()

    about = {"name": "inception", "file": os.path.basename(path), "sha256": digest, "resizing": RESIZING["inception"]}
    return FeatureNetwork(about, outputs, compute, told, identity=_identity("inception", params))


def dinov2(folder: str) -> FeatureNetwork:
    """DINOv2 in a folder as transformers has it, with registers or without: config.json and model.safetensors. Raises
    as `read_dinov2`."""
    network, params = read_dinov2(folder)
    params = whole(params)
    prepare = lambda images: np.stack([prepare_for_dinov2(each) for each in images])

    def compute(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"pool": by_rows(lambda rows: dinov2_features(network, params, rows), images, prepare)}

    outputs, about = {"pool": network.config.hidden_size}, _about("dinov2", folder)
    told = REGISTERS if network.config.num_register_tokens else ""
    return FeatureNetwork(about, outputs, compute, told, OF_DINOV2, _identity("dinov2", params))


# Compiled once for all networks of the same sizes, however often their files are opened.
dinov2_features = jax.jit(Dinov2.features, static_argnums=0)
clip_images = jax.jit(ClipPair.images, static_argnums=0)
clip_texts = jax.jit(ClipPair.texts, static_argnums=0)


def clip(folder: str) -> FeatureNetwork:
    """A whole CLIP in a folder as transformers has it: config.json, model.safetensors, and the tokenizer's files.

    Images are prepared as CLIP's own are: the shorter side to its size (bicubic), the middle square. Of a text that is
    too long the beginning is read. Raises as `read_clip_pair`.
    """
    pair, params, tokens = read_clip_pair(folder)
    params, size = whole(params), pair.vision.config.image_size
    prepare = lambda images: np.stack([preprocess(each, size) for each in images])

    def compute(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"embedding": by_rows(lambda rows: clip_images(pair, params, rows), images, prepare)}

    def texts(lines: Sequence[str]) -> np.ndarray:
        rows = tokens.rows(lines, pair.text.max_position_embeddings)
        run = lambda some: clip_texts(pair, params, some)
        return np.concatenate([by_rows(run, rows[i : i + TEXTS]) for i in range(0, len(rows), TEXTS)])

    return FeatureNetwork(_about("clip", folder), {"embedding": pair.text.dimension}, compute, texts=texts)


def _about(name: str, folder: str) -> dict[str, Any]:
    """What the report says of a network in a folder."""
    last = os.path.basename(os.path.normpath(folder))
    return {"name": name, "folder": last, "sha256": sha256(_file(folder)), "resizing": RESIZING[name]}


def _identity(name: str, params: Any) -> Callable[[], str]:
    return functools.cache(lambda: content_hash(flatten(params), {"name": name, "resizing": RESIZING[name]}))


def _file(folder: str) -> str:
    """The file of a folder's weights, or their index."""
    return next(path for path in (os.path.join(folder, name) for name in FILES) if os.path.exists(path))


def sha256(path: str | os.PathLike[str]) -> str:
    """The digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
