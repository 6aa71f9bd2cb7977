"""Networks that are used and not trained. They turn what the data deliver into what the step gets, in a program of
their own before it, so that steps, checks and tools see latents and features only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from src.codecs.buckets import Buckets
from src.common.mesh.sharding import batch_spec
from src.common.rng import stream
from src.common.tree import join_rows, split_rows
from src.interfaces import Batch, BucketField, ImageField, PyTree
from src.sequence.layout import Layout


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The codec of images that are drawn (`codecs/vae_latents.py`) and the encoder of those that are understood
    (`codecs/vision.py`), by the kind of segment; either may be absent, and then values stay as they are.

    buckets   those of the tasks that have some, in the units of what the data deliver
    """

    image: Any = None
    vision: Any = None
    buckets: Mapping[str, Buckets] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def nets(self) -> dict[str, Any]:
        """Those that there are."""
        return {kind: net for kind, net in (("image", self.image), ("vision", self.vision)) if net is not None}

    def read(self) -> dict[str, PyTree]:
        """Their parameters, of the host. Raises FileNotFoundError or ValueError when files are missing or others."""
        return {kind: net.params for kind, net in self.nets.items()}

    def shapes(self) -> dict[str, PyTree]:
        """Their parameters as abstract arrays. Raises as `read`."""
        return {kind: net.shapes() for kind, net in self.nets.items()}

    def needed(
        self, params: Mapping[str, PyTree], layouts: Mapping[str, Layout], delivered: Mapping[str, Batch]
    ) -> dict[str, PyTree]:
        """Those of the parameters that `encode` reads for batches like this (arrays or abstract arrays, both)."""
        seen: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in self.nets}
        _images(lambda task, name, kind, values: seen[kind].append(values.shape), self.nets, layouts, delivered)
        return {kind: net.needed(params[kind], seen[kind]) for kind, net in self.nets.items()}

    def sketch(self) -> tuple[Frozen, tuple[str, ...]]:
        """The same networks for shapes alone, and what was assumed of those whose folders are not there."""
        found = {kind: net.sketch() for kind, net in self.nets.items()}
        assumed = dict.fromkeys(told for _, told in found.values() if told)
        return dataclasses.replace(self, **{kind: net for kind, (net, _) in found.items()}), tuple(assumed)

    def fingerprints(self) -> dict[str, str]:
        """What identifies them in a checkpoint."""
        return {kind: net.fingerprint for kind, net in self.nets.items()}

    def check(self, task: str, latents_of: str | None) -> None:
        """Raises ValueError where a task's data are moments of the latents of a codec, and this is not that codec."""
        if latents_of is None:
            return
        if self.image is None:
            raise ValueError(f"the data of task {task} are moments of latents: set image_codec to their autoencoder")
        if latents_of != self.image.fingerprint:
            raise ValueError(
                f"the data of task {task} are latents of another autoencoder ({latents_of[:12]}…) than image_codec's"
                f" ({self.image.fingerprint[:12]}…): give the one that they were made with, or make them anew"
            )

    def spec(self, layouts: Mapping[str, Layout], delivered: Mapping[str, Batch]) -> dict[str, Batch]:
        """Abstract arrays of what `encode` gives for the abstract arrays of a batch; no file is read."""

        def encoded(kind: str, leaf: Any) -> jax.ShapeDtypeStruct:
            net, lead = self.nets[kind], leaf.shape[:-3]
            shape = net.shape(leaf.shape[-3:]) if kind == "image" else (net.tokens, net.features)
            return jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)

        return _images(lambda task, name, kind, values: encoded(kind, values), self.nets, layouts, delivered)

    def encode(
        self,
        params: Mapping[str, PyTree],
        layouts: Mapping[str, Layout],
        batch: Mapping[str, Batch],
        key: Array,
        ways: int = 1,
    ) -> dict[str, Batch]:
        """The batch `{task: {field: …}}` with every image encoded; `ways` devices have the rows.

        An image of a bucket is encoded in its own grid, and its latents travel as it did (`codecs/buckets.py`).
        """

        def encoded(task: str, name: str, kind: str, values: Array) -> Array:
            field, own = batch[task][name], stream(key, f"{task}/{name}/codec")
            buckets = self.buckets[task] if isinstance(field, BucketField) else None
            return self._values(kind, params[kind], field, own, ways, buckets)

        return _images(encoded, self.nets, layouts, batch)

    def shown(self, kind: str, values: Float[np.ndarray, "B h w C"]) -> Float[np.ndarray, "B ..."]:
        """Images as the network is shown them when nothing is drawn at random."""
        if kind not in self.nets:
            return values
        net = self.nets[kind]
        compute = lambda chunk: net.draw(self._jitted(kind, net.compute)(self._shared(kind), chunk), None)
        return _chunks(compute, values, net.rows)

    def pictures(self, values: Float[np.ndarray, "B h w C"]) -> Float[np.ndarray, "B H W C"]:
        """What was drawn, as pictures."""
        if self.image is None:
            return values
        net = self.image
        decode = lambda chunk: self._jitted("decode", net.decode)(self._shared("image"), chunk)
        return _chunks(decode, values, net.rows)

    def _values(
        self, kind: str, params: PyTree, field: ImageField, key: Array, ways: int, buckets: Buckets | None
    ) -> Array:
        net, lead = self.nets[kind], field.values.shape[:-3]
        values = field.values.reshape(-1, *field.values.shape[-3:])
        if buckets and net.encodes(values.shape[-1]):
            # Each device goes through its own rows: a program for all of them could not choose for each alone.
            found = _by_device(functools.partial(_in_buckets, net, buckets), ways, params, field.replace(values=values))
        else:
            rows = values.shape[0] // ways
            parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= net.rows)
            compute = functools.partial(net.compute, params)
            found = join_rows(jax.lax.map(compute, split_rows(values, parts))) if parts > 1 else compute(values)
        # What is random is drawn for all rows at once, so that it does not depend on the parts.
        found = net.draw(found, key)
        return found.reshape(*lead, *found.shape[1:])

    def _shared(self, kind: str) -> PyTree:
        """The parameters on the first device, from their first use on."""
        if kind not in self._placed:
            self._placed[kind] = jax.device_put(self.nets[kind].params)
        return self._placed[kind]

    @functools.cached_property
    def _placed(self) -> dict[str, PyTree]:
        return {}

    @functools.cached_property
    def _programs(self) -> dict[str, Any]:
        return {}

    def _jitted(self, name: str, function: Callable) -> Any:
        return self._programs.setdefault(name, jax.jit(function))


NOTHING = Frozen()


def _images(
    change: Callable[[str, str, str, Any], Any], kinds: Any, layouts: Mapping[str, Layout], batch: Mapping[str, Batch]
) -> dict[str, Batch]:
    """The batch with `change(task, field, kind, values)` for the values of images in segments of these kinds."""
    out = {}
    for task, fields in batch.items():
        kind_of = {s.name: s.kind for s in layouts[task].segments}
        out[task] = {
            name: field.replace(values=change(task, name, kind_of[name], field.values))
            if isinstance(field, ImageField) and kind_of[name] in kinds
            else field
            for name, field in fields.items()
        }
    return out


def _in_buckets(net: Any, buckets: Buckets, params: PyTree, field: BucketField) -> Array:
    valid = None if field.valid is None else field.valid.reshape(-1)
    return buckets.each(functools.partial(net.compute, params), field.values, field.grid.reshape(-1, 2), valid)


def _by_device(function: Callable[[PyTree, PyTree], Array], ways: int, params: PyTree, rows: PyTree) -> Array:
    """function(params, rows), run by each of the `ways` devices that have rows on its own ones."""
    if ways == 1:
        return function(params, rows)
    split = batch_spec(jax.sharding.get_abstract_mesh())
    return jax.shard_map(function, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False)(params, rows)


def _chunks(function: Callable[[Array], Array], values: Any, rows: int) -> np.ndarray:
    """`function` on some rows at a time, always as many, so that it is compiled once."""
    out = []
    for start in range(0, len(values), rows):
        pick = np.minimum(np.arange(start, start + rows), len(values) - 1)
        out.append(np.asarray(function(jnp.asarray(np.asarray(values)[pick]))))
    return np.concatenate(out)[: len(values)]
