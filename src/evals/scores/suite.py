"""The scores of a set of images against a reference, each with what it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from src.evals.frechet import frechet_of_moments
from src.evals.scores import distances
from src.evals.scores.image_sets import ImageSet
from src.evals.scores.moments import FeatureMoments
from src.evals.scores.networks import OUTPUTS, FeatureNetwork
from src.evals.scores.statistics import Statistics

LEAST = 2048  # images, below which a covariance of 2048 features is singular
USUAL = 50_000


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric needs: an output of the network, and of the reference nothing, its `moments`, or its `rows`; or
    instead of a reference the `prompts` of the images."""

    output: str
    reference: str


METRICS = {
    "fid": Metric("pool", "moments"), "sfid": Metric("spatial", "moments"), "is": Metric("logits", ""),
    "kid": Metric("pool", "rows"), "precision_recall": Metric("pool", "rows"),
    "clip_score": Metric("embedding", "prompts"),
}  # fmt: skip


# What `scores` gives for a metric that is more than one number of its name.
PARTS = {"is": ("is", "is_std"), "kid": ("kid", "kid_std"), "precision_recall": ("precision", "recall")}


@dataclasses.dataclass
class Seen:
    """Features of all images of a set.

    moments   by output
    rows      by output, of the outputs that are needed whole: float32 [n, d]
    """

    count: int
    moments: dict[str, FeatureMoments]
    rows: dict[str, np.ndarray]


def check_metrics(
    names: Sequence[str],
    network: str,
    reference: str,
    moments: Collection[str] = (),
    prompts: bool = False,
    option: str = "--{}",
) -> None:
    """Raises ValueError, in one sentence, for an unknown metric, and for one that the network, the reference or the
    prompts cannot give.

    reference   "images", "moments", or "" for none
    moments     outputs that the reference has moments of
    prompts     whether they are known
    option      how the messages write an option
    """
    given = option.format("reference")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"{option.format('metrics')} has {name!r}; give some of {', '.join(METRICS)}")
        metric = METRICS[name]
        if metric.output not in OUTPUTS[network]:
            raise ValueError(f"{name} needs {metric.output} features, which the network {network!r} does not have")
        if metric.reference == "prompts":
            if not prompts:
                raise ValueError(f"{name} needs what the images were drawn from: give {option.format('prompts')}")
            continue
        if metric.reference and not reference:
            raise ValueError(f"{name} compares with real images: give {given}")
        if metric.reference == "moments" and reference == "moments" and metric.output not in moments:
            raise ValueError(
                f"{name} needs moments of {metric.output} features, which {given} does not have: give another file of"
                " moments, or a folder of images"
            )
        if metric.reference == "rows" and reference == "moments":
            raise ValueError(f"{name} needs real images, and {given} has moments only: give a folder of images")


def look(
    images: ImageSet, network: FeatureNetwork, names: Iterable[str], told: Callable[[int], None] = lambda count: None
) -> Seen:
    """Features of all images, as the metrics need them, in one pass; `told` is called with the number of images so far.

    Raises ValueError for features that are not finite.
    """
    names = list(names)
    of_moments = {METRICS[name].output for name in names if METRICS[name].reference == "moments"}
    of_rows = {METRICS[name].output for name in names if METRICS[name].reference != "moments"}
    moments = {output: FeatureMoments.none(network.outputs[output]) for output in of_moments}
    rows: dict[str, list[np.ndarray]] = {output: [] for output in of_rows}
    count = 0
    for block in images.blocks():
        found = network.compute(block)
        for output in of_moments | of_rows:
            _check_finite(found[output], count)
        for output in of_moments:
            moments[output] = moments[output].merge(FeatureMoments.of(found[output]))
        for output in of_rows:
            rows[output].append(found[output])
        count += len(block)
        told(count)
    return Seen(count, moments, {output: np.concatenate(parts) for output, parts in rows.items()})


def look_at_reference(
    images: ImageSet | None,
    moments: Mapping[str, Statistics],
    names: Sequence[str],
    network: FeatureNetwork,
    told: Callable[[int], None] = lambda count: None,
) -> tuple[Seen | None, dict[str, Statistics]]:
    """Features of the reference's images, as far as the metrics need more than the `moments` of its file, and moments
    by output of both; None where there are no images. Raises as `look`."""
    needed = [n for n in names if METRICS[n].reference == "rows"]
    needed += [n for n in names if METRICS[n].reference == "moments" and METRICS[n].output not in moments]
    if images is None:
        return None, dict(moments)
    real = look(images, network, needed, told)
    return real, dict(moments) | {output: statistics_of(real, output) for output in real.moments}


def _check_finite(features: np.ndarray, before: int) -> None:
    wrong = ~np.isfinite(features).all(axis=1)
    if wrong.any():
        raise ValueError(
            f"the features of image {before + int(np.argmax(wrong))} are not finite: the network's file is damaged"
        )


def statistics_of(seen: Seen, output: str) -> Statistics:
    """The moments of an output, as a reference. Raises ValueError for less than two images."""
    found = seen.moments[output]
    return Statistics(found.mean, found.covariance())


def scores(
    names: Sequence[str],
    made: Seen,
    reference: Mapping[str, Statistics],
    real: Seen | None,
    *,
    splits: int,
    seed: int,
    texts: np.ndarray | None = None,
) -> dict[str, float]:
    """The metrics by name.

    reference   moments by output
    real        features of the reference's images
    texts       embeddings of the images' prompts, in the order of the images

    Raises ValueError for too few images.
    """
    found: dict[str, float] = {}
    for name in names:
        output = METRICS[name].output
        if METRICS[name].reference == "moments":
            mine, other = statistics_of(made, output), reference[output]
            found[name] = frechet_of_moments(mine.mean, other.mean, mine.covariance, other.covariance)
        elif name == "is":
            score = distances.inception_score(made.rows[output], splits)
            found |= {"is": score.mean, "is_std": score.std}
        elif name == "kid":
            score = distances.kernel_distance(made.rows[output], real.rows[output], seed=seed)
            found |= {"kid": score.mean, "kid_std": score.std}
        elif name == "clip_score":
            found["clip_score"] = distances.clip_score(made.rows[output], texts)
        else:
            precision, recall = distances.precision_recall(real.rows[output], made.rows[output])
            found |= {"precision": precision, "recall": recall}
    return found


def named(found: Mapping[str, float], network: FeatureNetwork) -> dict[str, float]:
    """Scores as they are called with this network."""
    return {network.names.get(name, name): value for name, value in found.items()}


def warnings_of(names: Sequence[str], count: int, *sources: Any) -> list[str]:
    """What makes these numbers differ from published ones: few images, and what the sources and the network tell."""
    told = [source.warning for source in sources if source is not None and source.warning]
    if {"fid", "sfid"} & set(names) and count < LEAST:
        told.append(
            f"{count:,} images are fewer than {LEAST:,}: the covariance is singular, and the distance too large"
        )
    if count != USUAL and {"fid", "sfid", "is"} & set(names):
        told.append(f"published scores are of {USUAL:,} images, these of {count:,}: a distance falls with their number")
    return told
