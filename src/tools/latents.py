"""Encodes images once: writes the moments of their latents (mean and log-variance, float16) as ArrayRecord shards.

python -m src.tools.latents --source=image_folders --set=folder=data/train --set=names=data/names.json \\
    --vae=data/sd-vae --size=256 --out=data/imagenet256
python -m src.tools.latents --source=records --set=folder=data/shards --vae=… --out=…

python -m src.tools.latents --source=… --vae=… --size=256 --buckets=256x256,128x512,512x128 --out=…

The source is named as in `src.tools.prepare`, whose shards are one, too. All devices of this machine encode; the same
command goes on where it was stopped. A task reads the result with the source `records`, its `folder` and moments=True,
as long as the field's autoencoder is the one that made it. With buckets of aspect ratios each image is cut to the
nearest one and encoded in it; with --config they are those of its task. Only a task of these buckets reads the result.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from src.tools.datasets import sources


def define() -> flags.FlagValues:
    """The flags."""
    values = sources.define()
    common = {"flag_values": values}
    flags.DEFINE_string("vae", None, "The folder of the autoencoder.", **common)
    flags.DEFINE_integer("size", 256, "Pixels: the centre of each image, cut as for training.", 1, **common)
    about = "Pixels, height x width, of buckets of aspect ratios, the first size x size; --config: else the task's."
    flags.DEFINE_list("buckets", [], about, **common)
    flags.DEFINE_integer("batch", 8, "Pictures that a device encodes at a time.", 1, **common)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.", **common)
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "Threads that read images.", 1, **common)
    return values


def run(values: flags.FlagValues, config: Any) -> None:
    """Encodes what the flags say."""
    sources.open_source(values, config)  # refused before anything large is read
    if not values.vae:
        raise ValueError("give --vae=<folder>, the autoencoder with config.json and its weights")
    sources.write(values, config, plan(values, task_buckets(values, config)))


def main(argv: list[str]) -> int:
    """The exit code."""
    return sources.main(argv, define(), run)


def task_buckets(values: flags.FlagValues, config: Any) -> Any:
    """The buckets of the images that the config's task makes (`codecs.buckets.Buckets`) and whether they are of
    moments, or None."""
    if config is None:
        return None
    columns = sources.task_of(config, values.task)[1].template.columns
    made = next((column for column in columns if getattr(column, "buckets", None)), None)
    return made and (made.buckets, made.holds == "moments")


def sides_of(values: flags.FlagValues, factor: int, told: Any) -> Any:
    """Height and width of the images in each bucket, as `codecs.buckets.Buckets` of single pixels; None without any.

    `told` is what `task_buckets` gives. Raises ValueError for sides that are none, are no multiples of `factor`, or
    whose first ones are not those of --size.
    """
    from src.codecs.buckets import Buckets

    if values.buckets:
        pairs = [side.split("x") for side in values.buckets]
        if not all(len(pair) == 2 and all(side.isdecimal() for side in pair) for pair in pairs):
            raise ValueError(f"--buckets={','.join(values.buckets)} is no list of sides: write 256x256,128x512")
        sides = tuple((int(height), int(width)) for height, width in pairs)
    elif told:
        scale = factor if told[1] else 1
        sides = tuple((scale * height, scale * width) for height, width in map(told[0].pixels, told[0].grids))
    else:
        return None
    if sides[0][0] != sides[0][1] or (values["size"].present and sides[0][0] != values.size):
        raise ValueError(f"the first of the buckets is {sides[0][0]} x {sides[0][1]} pixels: give --size={sides[0][0]},"
                         " and a first bucket with sides of this size")  # fmt: skip
    wrong = [pair for pair in sides if pair[0] % factor or pair[1] % factor]
    if wrong:
        raise ValueError(f"a bucket of {wrong[0][0]} x {wrong[0][1]} pixels is no multiple of {factor}, the"
                         " autoencoder's factor: give other --buckets")  # fmt: skip
    return Buckets(sides, 1)


def reader(size: int, buckets: Any) -> Callable[[str, Any], list[Any]]:
    """How an example's images are read: the centre of `size` x `size` pixels, or of the nearest of the buckets; those
    that a document only has read stay files."""
    from src.codecs.pixels import crop
    from src.data.files.shards import SEVERAL, images_of
    from src.data.images import fitted
    from src.data.record import file_of
    from src.data.templates._spans import document

    def fit(pixels: Any) -> Any:
        return crop(pixels, *(buckets.nearest(*pixels.shape[:2]) if buckets else (size, size)))

    def read(kind: str, example: Any) -> list[Any]:
        images = images_of(example, kind) or [None]
        made = [True] * len(images)
        if kind in SEVERAL:
            parts = [part for part in document(example)[0] if part.kind != "text"]
            images, made = [part.value for part in parts], [part.kind == "image" for part in parts]
        return [
            fitted(image, example.where, 3, fit) if encoded else file_of(image, example.where)
            for image, encoded in zip(images, made, strict=True)
        ]

    return read


def plan(values: flags.FlagValues, told: Any = None) -> Any:
    """How the images are encoded, on all devices of this machine; `told` is what `task_buckets` gives."""
    import jax
    import jax.numpy as jnp

    from src.codecs.vae_files import read_vae
    from src.common.mesh.distributed import skip_absent_tpu
    from src.common.mesh.sharding import batch_sharding, make_mesh, replicated
    from src.common.runtime.compilation_cache import use_program_cache
    from src.data.files.latent_shards import Encoding, Moments
    from src.data.files.shards import SEVERAL, pack, values_of

    skip_absent_tpu()
    use_program_cache()
    vae, params = read_vae(values.vae, values.dtype)
    factor, buckets = vae.config.factor, sides_of(values, vae.config.factor, told)
    size = buckets.grids[0][0] if buckets else values.size
    if size % factor:
        raise ValueError(f"--size={size} is no multiple of {factor}, the autoencoder's factor")
    mesh = make_mesh({"data": -1})
    rows, side = values.batch * mesh.size, size // factor
    shapes = tuple((height // factor, width // factor) for height, width in buckets.grids) if buckets else ()
    moments = Moments(size, (side, side, 2 * vae.config.latent_channels), vae.latents_hash(params), shapes)
    params = jax.device_put(vae.encoding(params), replicated(mesh))

    @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
    def encode(params: Any, pixels: Any) -> Any:
        return jnp.concatenate(vae.moments(params, pixels.astype(jnp.float32) / 127.5 - 1), axis=-1)

    return Encoding(
        moments,
        values.rows,
        rows,
        read=reader(size, buckets),
        encode=lambda pixels: encode(params, jax.device_put(pixels, batch_sharding(mesh))),
        write=lambda kind, example, images: pack(values_of(example, kind), *images, sized=kind in SEVERAL),
        threads=values.threads,
        precision=values.dtype,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
