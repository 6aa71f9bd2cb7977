"""Reference statistics in the files that published scores are computed from.

| file | arrays | whose |
|---|---|---|
| `VIRTUAL_imagenet256_labeled.npz` and the like | mu, sigma, mu_s, sigma_s, arr_0 | ADM's evaluator: pool and spatial |
| moments | mu, sigma | pytorch-fid, and many repositories |
| moments | mu, sigma, mu_s, sigma_s, network uint8 [32], perhaps arr_0 | `src.tools.scores --write_statistics` |
| clean-fid | mu, sigma | clean-fid, whose resizing differs |
| samples | arr_0 uint8 [n, h, w, 3], perhaps labels arr_1 | ADM's evaluator |
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, UInt8

from src.common.files.npz import Npz, write_npz
from src.common.files.paths import shown
from src.common.files.store import write_named

SAMPLES, LABELS, NETWORK = "arr_0", "arr_1", "network"
ASYMMETRY = 1e-6  # of the largest value
BELOW = 1e-6  # smallest eigenvalue of a covariance, of the largest one: what rounding to float32 leaves


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def read_statistics(path: str | os.PathLike[str], features: int, *, spatial: bool = False) -> Statistics:
    """The moments in a file; with `spatial` those of the spatial features (sFID).

    Raises FileNotFoundError, and ValueError, in one sentence, for a file that is damaged or holds no moments, moments
    of another network than one of `features` numbers, or moments that none have (not finite, no covariance).
    """
    archive, where = Npz(path), f"the statistics {shown(os.fspath(path))}"
    names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    if not set(names) <= set(archive.names()):
        have = ", ".join(archive.names()) or "none"
        raise ValueError(f"{where} have no {' and '.join(names)}, only {have}: give a file of moments")
    mean, covariance = (np.asarray(archive.array(name), np.float64) for name in names)
    if mean.shape != (features,) or covariance.shape != (features, features):
        raise ValueError(
            f"{where} are of another network: {names[0]} {list(mean.shape)} and {names[1]} {list(covariance.shape)}"
            f" instead of [{features}] and [{features}, {features}]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{where} have values that are not finite: download the file again")
    _check_covariance(covariance, f"{names[1]} of {where}")
    return Statistics(mean, covariance)


def outputs_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The outputs that a file has moments of: "pool", "spatial", both, or none."""
    names = Npz(path).names()
    return tuple(output for output, name in (("pool", "mu"), ("spatial", "mu_s")) if name in names)


def check_network(path: str | os.PathLike[str], identity: Callable[[], str]) -> None:
    """Raises ValueError, in one sentence, for a file of moments that says that another network made it."""
    archive = Npz(path)
    if NETWORK in archive.names() and archive.array(NETWORK).tobytes().hex() != identity():
        raise ValueError(
            f"the statistics {shown(os.fspath(path))} were made with other weights of the network, or other resizing:"
            " give the weights that made them, or make them anew with --write_statistics"
        )


def write_statistics(
    path: str | os.PathLike[str],
    pool: Statistics,
    spatial: Statistics | None = None,
    identity: str = "",
    images: Callable[[], Iterator[UInt8[np.ndarray, "n h w 3"]]] | None = None,
) -> None:
    """A file of moments that `read_statistics`, pytorch-fid and ADM's evaluator read.

    identity  of the network, in hexadecimals
    images    reads those that the moments are of, where they are kept, too, as in ADM's references
    """
    arrays = {"mu": pool.mean, "sigma": pool.covariance}
    if identity:
        arrays[NETWORK] = np.frombuffer(bytes.fromhex(identity), np.uint8)
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if images is not None:
        count = sum(map(len, images()))
        shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        shapes[SAMPLES] = ((count, *next(images()).shape[1:]), np.dtype(np.uint8))
        write_npz(path, shapes, lambda name: images() if name == SAMPLES else [arrays[name]])
        return
    data = io.BytesIO()
    np.savez(data, **arrays)
    write_named(path, data.getvalue(), "the file of statistics")


def read_samples(path: str | os.PathLike[str], block: int = 256) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    """The images of a file of samples, in blocks. Raises ValueError for a file without images in 8 bits."""
    archive, where = Npz(path), f"the samples {shown(os.fspath(path))}"
    if SAMPLES not in archive.names():
        raise ValueError(f"{where} have no {SAMPLES}: write uint8 [n, h, w, 3] with numpy.savez(path, images)")
    for images in archive.blocks(SAMPLES, block):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"{where} are {images.dtype} {list(images.shape)} instead of uint8 [n, h, w, 3]")
        yield images


def _check_covariance(covariance: np.ndarray, where: str) -> None:
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * largest:
        raise ValueError(f"{where} is not symmetric, so that it is no covariance: download the file again")
    values = np.linalg.eigvalsh(covariance)
    if values[0] < -BELOW * max(values[-1], 0):
        raise ValueError(f"{where} has an eigenvalue of {values[0]:.3g}, so that it is no covariance")
