"""FID and its kin of images that a task draws, against real images, with all that the numbers depend on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from src.codecs.pixels import scaled
from src.common.runtime import stopping
from src.common.tree import listed
from src.evals.given import text_value, title
from src.evals.grid import caption_grid
from src.evals.result import Result
from src.evals.scores import networks, suite
from src.evals.scores.distances import NEIGHBOURS
from src.evals.scores.image_sets import ImageSet, open_reference
from src.evals.scores.reconstruction import check_source, source_images
from src.evals.tasks import count_classes, starts
from src.interfaces import Field, row_of

SPLITS = ("train", "test")  # a reference that is the task's own data
REAL = 50_000  # images of a split, at most
SHOWN, COLUMNS = 24, 8


class ImageScoresEvaluator:
    """Draws `count` images by the task `draw` and compares them with a reference, as `src.tools.scores` does it.

    metrics     of fid, sfid, is, kid, precision_recall, and, of drawings from words, clip_score
    network     whose features are compared, and `weights`, its file (docs/scores.md)
    reference   a file of moments, a folder or file of images, or `train` or `test`: that split of the task's own source
    rows        images that are drawn and scored at a time
    splits      parts of the images for the inception score
    prefix      begins the names of the numbers, where two evaluators have the same

    Classes are balanced; of prompts, those of the held-out split are drawn in turn. Each block of `rows` has noise of
    its own. An image with a value that is not finite makes all numbers NaN.
    Picture: `samples`, the first drawings.

    Raises ValueError for a task that is missing or makes no images, metrics that the network or the reference cannot
    give, and counts that are too small. Files are looked at by `check`.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        draw: str,
        metrics: Sequence[str] = ("fid",),
        network: str = "inception",
        weights: str = "",
        reference: str = "",
        count: int = 2048,
        rows: int = 256,
        splits: int = 10,
        prefix: str = "",
    ):
        if draw not in tasks:
            raise ValueError(f"draw={draw!r} is no task of the config, which has {listed(list(tasks)) or 'none'}")
        if len(tasks[draw].fill) != 1:
            raise ValueError(f"draw={draw!r} makes {', '.join(tasks[draw].fill)} and not one image: name another task")
        if count < 2 or rows < 1 or splits < 1 or not metrics:
            raise ValueError(f"count={count}, rows={rows}, splits={splits}, metrics={metrics}: give 2 images and more")
        if ("is" in metrics and count < splits) or ("precision_recall" in metrics and count <= NEIGHBOURS):
            raise ValueError(f"count={count} is too small for {listed(list(metrics))} with {splits} splits: draw more")
        if network not in networks.NETWORKS:
            raise ValueError(f"network={network!r} is unknown; give one of {', '.join(networks.NETWORKS)}")
        prompts = text_value(tasks[draw]) in starts(tasks[draw])
        suite.check_metrics(metrics, network, "images" if reference else "", (), prompts, option="{}")
        if reference in SPLITS:
            check_source(tasks[draw].source, f"tasks.{draw}.source")
        self.draw, self.task, self.metrics, self.network = draw, tasks[draw], tuple(metrics), network
        self.weights, self.reference, self.count, self.rows = weights, reference, count, rows
        self.splits, self.prefix = splits, prefix
        self._real: tuple[dict[str, Any], suite.Seen | None, dict[str, Any]] | None = None

    def check(self, fields: Mapping[str, Field]) -> None:
        """Opens the network and the reference. Raises FileNotFoundError, and ValueError, in one sentence, for files
        that are missing, damaged or of something else, and for a field whose codec has no images."""
        size = self._size(fields)
        networks.check_file(self.network, self.weights, option="{}")
        network = networks.open_network(self.network, self.weights, *size)
        if not self.reference or self.reference in SPLITS:
            return
        images, moments = open_reference(self.reference, network)
        kind = "images" if images else "moments"
        suite.check_metrics(self.metrics, self.network, kind, moments, True, option="{}")
        found = next(images.blocks()).shape[1:3] if images else size
        if found != size and self.network == "pixels":
            raise ValueError(
                f"the images of reference={self.reference!r} are {found[0]} x {found[1]} pixels, and the drawn ones"
                f" {size[0]} x {size[1]}: cut them alike"
            )

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Draws and scores; `seed` decides the noise of the drawings."""
        field = self._field(pipeline.fields)
        network = networks.open_network(self.network, self.weights, *self._size(pipeline.fields))
        shown: list[np.ndarray] = []
        examples = self._examples(pipeline.fields)
        names = [part for metric in self.metrics for part in suite.PARTS.get(metric, (metric,))]
        try:
            drawn = ImageSet({}, lambda: self._drawn(pipeline, field, examples, seed, shown))
            made = suite.look(drawn, network, self.metrics)
        except FloatingPointError as error:
            logging.warning("%s: %s are NaN", error, ", ".join(names))
            return Result(
                self._named(dict.fromkeys(names, float("nan")), network), how=self._how(network, {}, pipeline)
            )
        about, real, moments = self._referred(network, field)
        options = {"splits": self.splits, "seed": seed, "texts": self._texts(network, examples)}
        found = suite.scores(self.metrics, made, moments, real, **options)
        warnings = suite.warnings_of(self.metrics, made.count, network)
        how = self._how(network, about, pipeline) | ({"warnings": warnings} if warnings else {})
        captions = [title(examples[i % len(examples)]) for i in range(len(shown))]
        picture = caption_grid(scaled(np.stack(shown)), captions, COLUMNS)
        return Result(self._named(found, network), {f"{self.prefix}samples": picture}, how=how)

    def _drawn(
        self, pipeline: Any, field: Field, examples: list[dict[str, Any]], seed: int, shown: list[np.ndarray]
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """The drawings in blocks; `shown` gets the first. Raises FloatingPointError for a value that is not finite,
        ValueError for images of several shapes."""
        for number, start in enumerate(range(0, self.count, self.rows)):
            given = [examples[i % len(examples)] for i in range(start, min(start + self.rows, self.count))]
            noise = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            values = pipeline.values(self.draw, given, noise)[self.task.fill[0]]
            if isinstance(values, list):
                raise ValueError(f"task {self.draw} draws images of several shapes, and those of one are scored")
            if not np.isfinite(values).all():
                raise FloatingPointError(f"a drawing of task {self.draw} has values that are not finite")
            images = field.codec.host.decode(values)
            images = images.repeat(3, axis=3) if images.shape[3] == 1 else images
            shown += list(images)[: SHOWN - len(shown)]
            yield images

    def _examples(self, fields: Mapping[str, Field]) -> list[dict[str, Any]]:
        """What the drawings start from, in turn: each class, or held-out prompts with one text each."""
        if starts(self.task) == ("label",):
            return [{"label": number} for number in range(count_classes(fields, self.task))]
        found, words = [dict(example) for example in self.task.questions(self.count)], text_value(self.task)
        for number, example in enumerate(found):
            if isinstance(example.get(words), list | tuple):
                example[words] = example[words][number % len(example[words])]
        return found

    def _texts(self, network: networks.FeatureNetwork, examples: list[dict[str, Any]]) -> np.ndarray | None:
        """Embeddings of what each drawing was drawn from, where a metric needs them."""
        if "clip_score" not in self.metrics:
            return None
        found = network.texts([str(example[text_value(self.task)]) for example in examples])
        return found[np.arange(self.count) % len(examples)]

    def _referred(self, network: networks.FeatureNetwork, field: Field) -> tuple[Any, Any, dict[str, Any]]:
        """What is told of the reference, features of its images (or None), and moments by output; read once."""
        if self._real is None:
            images, moments = None, {}
            if self.reference in SPLITS:
                blocks = lambda: _rgb(source_images(self.task.source, field, self.reference, REAL))
                images = ImageSet({"source": type(self.task.source).__name__, "split": self.reference}, blocks)
            elif self.reference:
                images, moments = open_reference(self.reference, network)
            goes_on = lambda count: stopping.check()
            real, moments = suite.look_at_reference(images, moments, self.metrics, network, goes_on)
            about: dict[str, Any] = {"path": self.reference} if images is None else dict(images.about)
            if os.path.isfile(self.reference):
                about |= {"path": self.reference, "sha256": networks.sha256(self.reference)}
            if real is not None:
                about["count"] = real.count
            self._real = about, real, moments
        return self._real

    def _named(self, found: Mapping[str, float], network: networks.FeatureNetwork) -> dict[str, float]:
        return {self.prefix + name: value for name, value in suite.named(found, network).items()}

    def _how(self, network: networks.FeatureNetwork, reference: Mapping[str, Any], pipeline: Any) -> dict[str, Any]:
        decoder = pipeline.decoders.get(row_of(self.task.fill[0]))
        told = {"task": self.draw, "count": self.count, "guidance": float(pipeline.guidance.scale)}
        told |= {"steps": getattr(decoder, "steps", None), "rounding": "nearest"}
        return told | {"network": network.about, "reference": dict(reference)}

    def _field(self, fields: Mapping[str, Field]) -> Field:
        return fields[row_of(self.task.fill[0])]

    def _size(self, fields: Mapping[str, Field]) -> tuple[int, int]:
        """Height and width of the drawings. Raises ValueError where the task makes something else."""
        field = self._field(fields)
        shape = field.codec.delivered
        if len(shape) != 3 or shape[2] not in (1, 3):
            raise ValueError(f"draw={self.draw!r} makes {field.name} and not an image: name another task")
        return shape[0], shape[1]


def _rgb(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block.repeat(3, axis=3) if block.shape[3] == 1 else block
