"""Encodes pictures once: writes the moments of their latents (mean and log-variance, float16) as ArrayRecord shards.

python -m src.tools.latents --source=imagenet:ImageFolders --set=folder=data/train --set=names=data/names.json \\
    --vae=data/sd-vae --size=256 --out=data/imagenet256
python -m src.tools.latents --source=records:Shards --set=folder=data/shards --set=kind=classes --vae=… --out=…

The source is named as in `src.tools.prepare`, whose shards are one, too. All devices of this machine encode; the same
command goes on where it was stopped. A task reads the result with `records="data/imagenet256", size=32, channels=8`, as
long as `image_codec` is the autoencoder that made it.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from absl import flags

from src.tools import sources


def define() -> flags.FlagValues:
    """The flags."""
    values = sources.define()
    common = {"flag_values": values}
    flags.DEFINE_string("vae", None, "The folder of the autoencoder.", **common)
    flags.DEFINE_integer("size", 256, "Pixels: the centre of each picture, cut as for training.", 1, **common)
    flags.DEFINE_integer("batch", 8, "Pictures that a device encodes at a time.", 1, **common)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.", **common)
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "Threads that read pictures.", 1, **common)
    return values


def run(values: flags.FlagValues, config: Any) -> None:
    """Encodes what the flags say."""
    sources.open_source(values, config)  # refused before anything large is read
    if not values.vae:
        raise ValueError("give --vae=<folder>, the autoencoder with config.json and its weights")
    sources.write(values, config, plan(values))


def main(argv: list[str]) -> int:
    """The exit code."""
    return sources.main(argv, define(), run)


def plan(values: flags.FlagValues) -> Any:
    """How the pictures are encoded, on all devices of this machine."""
    import jax
    import jax.numpy as jnp

    from src.codecs.vae_files import read_vae
    from src.common.program_cache import use_program_cache
    from src.common.sharding import batch_sharding, make_mesh, replicated
    from src.data.moments import Encoding, Moments
    from src.data.pictures import pixels_of
    from src.data.records import pack

    use_program_cache()
    vae, params = read_vae(values.vae, values.dtype)
    if values.size % vae.config.factor:
        raise ValueError(f"--size={values.size} is no multiple of {vae.config.factor}, the autoencoder's factor")
    mesh = make_mesh({"data": -1})
    rows, side = values.batch * mesh.size, values.size // vae.config.factor
    moments = Moments(values.size, (side, side, 2 * vae.config.latent_channels), vae.latents_hash(params))
    params = jax.device_put(params, replicated(mesh))

    @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
    def encode(params: Any, pixels: Any) -> Any:
        return jnp.concatenate(vae.moments(params, pixels.astype(jnp.float32) / 127.5 - 1), axis=-1)

    return Encoding(
        moments,
        values.rows,
        rows,
        read=lambda example: pixels_of(example, (values.size, values.size, 3)),
        encode=lambda pixels: encode(params, jax.device_put(pixels, batch_sharding(mesh))),
        write=pack,
        threads=values.threads,
        precision=values.dtype,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
