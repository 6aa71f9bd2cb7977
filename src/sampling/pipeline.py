"""The trained model as a person meets it: words in, images out; images or words in, text out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from src.common.mesh.distributed import to_host
from src.common.rng import stream
from src.common.runtime import stopping
from src.interfaces import ImageField, LabelField, PyTree, Task, TokenField
from src.sampling.generate import ImageSampler, TextSampler, generate
from src.sequence.layout import Layout
from src.sequence.view import clean_view


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Everything of a system that sampling needs; `with_params` makes it usable.

    bind      parameters -> the network
    tasks     by name: (data task, its layout in the model, the segment that it generates)
    encode    pixels or latents `[B, h, w, C]` -> patches, `decode` the inverse
    shaped    grid (rows, columns) -> what `decode` is for images in such a bucket
    shape     (h, w, C) of the images that `draw` gives
    shown     (kind of segment, images as the data deliver them) -> as the network is shown them
    pictures  what `decode` gives -> pictures, in [-1, 1]
    rows      rows of one call of the network; more are done in turns, fewer are filled up
    longest   most tokens of a generated text
    """

    bind: Callable[[PyTree], Any]
    tasks: Mapping[str, tuple[Task, Layout, str]]
    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]
    codec: Any
    image: ImageSampler | None
    text: TextSampler | None
    shape: tuple[int, int, int] | None = None
    shown: Callable[[str, np.ndarray], np.ndarray] = lambda kind, images: images
    pictures: Callable[[np.ndarray], np.ndarray] = lambda images: images
    shaped: Callable[[tuple[int, int]], Callable[[Array], Array]] | None = None
    rows: int = 128
    longest: int = 16
    params: PyTree = None

    def with_params(self, params: PyTree) -> Predictor:
        """The predictor of these parameters."""
        return dataclasses.replace(self, params=params)

    def draw(
        self,
        task: str,
        *,
        words: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Images `[n, h, w, C]`, one for each prompt or label, guided as the config says.

        grid    rows and columns of patches, for a model that has learned buckets of aspect ratios

        Raises ValueError for words that the tokenizer does not know or that do not fit, and for a grid that has another
        number of patches.
        """
        data, layout, name = self.task(task, "image")
        if (labels is None) != (data.classes is None) or (words is None) == (labels is None):
            raise ValueError(f"task {task} draws from {'a class label' if data.classes else 'words'}; give that alone")
        strange = [label for label in labels or () if not 0 <= label < data.classes]
        if strange:
            raise ValueError(f"task {task} has the classes 0 to {data.classes - 1}; {strange[0]} is none of them")
        if words is not None:
            fields = _stack([data.encode_prompt(w) for w in words])
            empty = _stack([data.encode_prompt("")] * len(words))
            prompt = layout.named("text")[0]
            given, null = {prompt: fields}, {prompt: empty}
        else:
            given = {"label": LabelField(np.asarray(labels, np.int32))}
            null = {"label": LabelField(np.full(len(labels), data.classes, np.int32))}
        decode, more = (self.decode, {}) if grid is None else (self.shaped(grid), {"grid": grid})
        patches = self._run(layout, name, given, null if self.image.guidance.scale != 1 else None, seed, **more)
        return np.asarray(self.pictures(np.asarray(decode(jnp.asarray(patches)))))

    def write(
        self,
        task: str,
        *,
        words: Sequence[str] | None = None,
        images: np.ndarray | None = None,
        seed: int = 0,
    ) -> list[str]:
        """The text that follows each beginning (`words`), or each image, without the beginning."""
        data, layout, name = self.task(task, "text")
        seen = [*layout.named("image"), *layout.named("vision")]
        if (images is None) == bool(seen):
            raise ValueError(
                f"task {task} writes {'about an image; give one' if images is None else 'without an image'}"
            )
        count = len(words) if words is not None else len(images)
        starts = _stack([data.encode_prompt(w) for w in words] if words is not None else [data.encode_prompt()] * count)
        longest = int(starts.valid.sum(axis=1).max())
        given: dict[str, Any] = {name: jax.tree.map(lambda a: a[:, :longest], starts)}
        segment = layout.segment(name)
        wider = dataclasses.replace(segment, length=longest + self.longest)
        layout = Layout(tuple(wider if s.name == name else s for s in layout.segments))
        if images is not None:
            shown = self.shown(layout.segment(seen[0]).kind, np.asarray(images, np.float32))
            given[seen[0]] = ImageField(shown)
            head = data.fixed_texts()
            given |= {k: jax.tree.map(lambda a: np.repeat(a, count, axis=0), v) for k, v in head.items()}
        ids = self._run(layout, name, given, None, seed)
        return [self.codec.decode(_until(row, self.text.stop)) for row in ids.tolist()]

    def task(self, task: str, kind: str | None = None) -> tuple[Any, Layout, str]:
        """Data task, layout and generated segment. Raises ValueError when there is none, or of another kind."""
        if task not in self.tasks:
            raise ValueError(f"there is no task {task!r}; this system has {', '.join(self.tasks)}")
        data, layout, name = self.tasks[task]
        if kind is not None and layout.segment(name).kind != kind:
            raise ValueError(f"task {task} generates {layout.segment(name).kind}, not {kind}")
        return data, layout, name

    def _run(
        self,
        layout: Layout,
        name: str,
        given: PyTree,
        null: PyTree | None,
        seed: int,
        grid: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Rows in chunks of one size, so that one compilation serves any number of them."""
        count = len(jax.tree.leaves(given)[0])
        out = []
        for start in range(0, count, self.rows):
            pick = np.minimum(np.arange(start, start + self.rows), count - 1)
            chunk = jax.tree.map(lambda a, pick=pick: a[pick], (given, null))
            stopping.check()
            key = stream(jax.random.key(seed), name, start)
            shape = () if grid is None else (np.asarray(grid, np.int32),)
            out.append(to_host(_generate(self._static(layout, name), self.params, *chunk, key, *shape)))
        return np.concatenate(out)[:count]

    def _static(self, layout: Layout, name: str) -> _Static:
        return _Static(self.bind, layout, name, self.encode, self.image, self.text)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a compiled generation depends on besides arrays."""

    bind: Callable[[PyTree], Any]
    layout: Layout
    name: str
    encode: Callable[[Array], Array]
    image: ImageSampler | None
    text: TextSampler | None


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    static: _Static, params: PyTree, given: PyTree, null: PyTree | None, key: Array, grid: Array | None = None
) -> Array:
    net = static.bind(params)
    view = clean_view(static.layout, given, static.encode, generated=(static.name,))
    free = None if null is None else clean_view(static.layout, null, static.encode, generated=(static.name,))
    if grid is not None:
        grids = {static.name: jnp.broadcast_to(grid, (len(jax.tree.leaves(given)[0]), 2))}
        view, free = (v and v.replace(grids=grids) for v in (view, free))
    out = generate(
        net, static.layout, view, key, generated=(static.name,), text=static.text, image=static.image, null=free
    )
    return out[static.name]


def _stack(fields: Sequence[TokenField]) -> TokenField:
    return jax.tree.map(lambda *a: np.concatenate(a), *fields)


def _until(row: list[int], stop: int) -> list[int]:
    return row[: row.index(stop)] if stop in row else row
