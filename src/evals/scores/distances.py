"""Scores of generated images by the features and class scores of a network."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

SUBSETS, SUBSET = 100, 1000  # of the kernel distance, as published
NEIGHBOURS = 3  # of precision and recall, as published
BLOCK = 4096  # rows whose distances to all others are held at once


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over parts of the data, and the standard deviation of the parts."""

    mean: float
    std: float


def inception_score(logits: Float[np.ndarray, "n K"], splits: int = 10) -> Score:
    """exp of the mean KL divergence of each image's class distribution from that of its part of the images (Salimans et
    al. 2016, section 4). The `splits` parts are consecutive, so that the rows should be in no order of class.

    Raises ValueError for fewer rows than parts.
    """
    if len(logits) < splits:
        raise ValueError(f"an inception score of {splits} parts needs as many images, not {len(logits)}")
    logits = np.asarray(logits, np.float64)
    logp = logits - logits.max(axis=1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(logp, splits):
        p = np.exp(part)
        overall = p.mean(axis=0)
        with np.errstate(divide="ignore"):
            log_overall = np.where(overall > 0, np.log(overall), 0.0)
        scores.append(float(np.exp((p * (part - log_overall)).sum(axis=1).mean())))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m d"],
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET,
    seed: int = 0,
) -> Score:
    """KID: the squared maximum mean discrepancy with the kernel (x·y/d + 1)³, unbiased, over random subsets (Bińkowski
    et al. 2018, section 4). `size` is at most n and m. It may be below 0.

    Raises ValueError for subsets of less than two rows.
    """
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 rows on each side, not {len(x)} and {len(y)}")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        mine = np.asarray(x[rng.choice(len(x), size, replace=False)], np.float64)
        other = np.asarray(y[rng.choice(len(y), size, replace=False)], np.float64)
        found.append(discrepancy(mine, other))
    return Score(float(np.mean(found)), float(np.std(found)))


def discrepancy(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"]) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy with the kernel of `kernel_distance`."""
    n, m = len(x), len(y)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def clip_score(images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]) -> float:
    """The mean of max(100 cos, 0) over pairs of embeddings, of an image and its text (Hessel et al. 2021, with 100 in
    place of 2.5)."""
    images, texts = (np.asarray(each, np.float64) for each in (images, texts))
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return float(np.maximum(100 * (images * texts).sum(axis=1) / lengths, 0).mean())


def precision_recall(
    real: Float[np.ndarray, "n d"],
    made: Float[np.ndarray, "m d"],
    *,
    neighbours: int = NEIGHBOURS,
    block: int = BLOCK,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2): the share of the generated rows that lie
    in the manifold of the real ones, and the reverse. A manifold is the union of the balls around its rows whose radius
    is the distance of the row to its `neighbours`-th nearest other row.

    Distances of `block` rows to all others are held at once: 8 · block · max(n, m) bytes.

    Raises ValueError for no more rows than neighbours.
    """
    if min(len(real), len(made)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more rows than that, not {len(real)} real and"
            f" {len(made)} generated ones"
        )
    real, made = np.asarray(real, np.float64), np.asarray(made, np.float64)
    precision = _covered(made, real, _radii(real, neighbours, block), block).mean()
    recall = _covered(real, made, _radii(made, neighbours, block), block).mean()
    return float(precision), float(recall)


def _radii(rows: np.ndarray, neighbours: int, block: int) -> np.ndarray:
    """Squared distance [n] of each row to its `neighbours`-th nearest other one."""
    found = []
    for start in range(0, len(rows), block):
        apart = _squared(rows[start : start + block], rows)
        here = np.arange(len(apart))
        apart[here, start + here] = 0.0  # itself, free of rounding
        found.append(np.partition(apart, neighbours, axis=1)[:, neighbours])
    return np.concatenate(found)


def _covered(rows: np.ndarray, centres: np.ndarray, radii: np.ndarray, block: int) -> Bool[np.ndarray, " n"]:
    """Whether each row lies in one of the balls."""
    found = []
    for start in range(0, len(rows), block):
        found.append((_squared(rows[start : start + block], centres) <= radii).any(axis=1))
    return np.concatenate(found)


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [n, m]."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    return np.maximum(squares - 2 * (a @ b.T), 0.0)
