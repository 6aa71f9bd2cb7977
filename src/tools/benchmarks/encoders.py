"""The part of the bench that measures the frozen encoders of a config, and the whole of `src.tools.latents`.

No files are needed: parameters are random, of the folders' networks or, without folders, of the published ones, and the
pictures are generated. Where the devices are CPUs, seconds are those of the processor, which other work on the machine
changes little; every call of a network has a matrix product beside it, against which it is held.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from src.tools.benchmarks import clock
from src.tools.compile.cost import matmul_flops
from src.train.system import System

ROWS = 2  # pictures of a call on a CPU, where more of them change nothing but the wait
PRODUCTS = 4  # matrix products beside a call; the fastest counts
HEIGHT, WIDTH = 375, 500  # of generated files, as those of ImageNet


def measure_encoders(
    system: System, seconds: float, steps: int, say: Callable[[str], None], size: int | None = None, files: int = 64
) -> dict[str, Any]:
    """Figures by field, and of making latents where its images are made as latents.

    seconds, steps   how long each network is measured, or how often; `size` is that of the matrix products
    files            pictures that are made latents without the network; with it some calls are enough

    Raises ValueError for a config without frozen encoders.
    """
    encoders, assumed = system.encoders.sketch()
    if not encoders.nets:
        raise ValueError(
            "this config has no frozen encoder: give the codec of a field one (fields.<name>.codec.frozen), or leave"
            " out --only=encode"
        )
    figures: dict[str, Any] = {"assumed": "; ".join(assumed) or "nothing"}
    for row, net in encoders.nets.items():
        shape = net.takes
        rows = min(net.rows, ROWS) if jax.default_backend() == "cpu" else net.rows
        say(f"encoder of the field {row}, {shape[0]} x {shape[1]}")
        figures[row] = measure_encoder(net, (rows, *shape), seconds, steps, size)
        if hasattr(net, "moments"):
            say("latents of generated files")
            figures[f"{row} latents"] = measure_latents(net, shape[0], rows, files, max(steps, 2))
    return figures


def random_params(net: Any) -> Any:
    """Normal numbers in the tree of a network's parameters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: 0.02 * rng.standard_normal(s.shape, dtype=np.float32), net.shapes())


def measure_encoder(
    net: Any, shape: tuple[int, ...], seconds: float, steps: int, size: int | None = None
) -> dict[str, Any]:
    """One network on pictures of `shape` (B, h, w, 3) on the first device: rates, and the share of the matmul peak.

    `seconds` and images_per_second are of the wall, `seconds_per_image` those of the processor.
    """
    params = jax.device_put(net.needed(random_params(net), [shape[1:]]))
    pictures = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, shape), jnp.float32)
    compiled = jax.jit(net.compute).lower(params, pictures).compile()
    flops = matmul_flops(compiled.as_text()) / shape[0]
    size = size or clock.PEAK_SIZES.get(jax.default_backend(), 2048)
    dtype = getattr(net, "dtype", "float32")
    factor = jnp.full((size, size), 0.5, jnp.float32 if jax.default_backend() == "cpu" else dtype)
    multiply, shares = jax.jit(jnp.matmul), []
    taken: list[tuple[float, float]] = []
    for call in (lambda: multiply(factor, factor), lambda: compiled(params, pictures)):
        jax.block_until_ready(call())
    while len(taken) < steps if steps else (sum(wall for wall, _ in taken) < seconds or len(taken) < 3):
        product = min(_clocks(lambda: multiply(factor, factor))[1] for _ in range(PRODUCTS))
        taken.append(_clocks(lambda: compiled(params, pictures)))
        shares.append(flops * shape[0] / taken[-1][1] / (2 * size**3 / product))
    own = statistics.median(busy for _, busy in taken) / shape[0]
    stats = compiled.memory_analysis()
    return {
        "dtype": dtype,
        "rows": shape[0],
        "flops_per_image": flops,
        "seconds": clock.spread([wall for wall, _ in taken]),
        "images_per_second": shape[0] / statistics.median(wall for wall, _ in taken),
        "seconds_per_image": own,
        "share_of_matmul_peak": clock.spread(shares),
        "temporary_bytes_per_image": None if stats is None else stats.temp_size_in_bytes // shape[0],
    }


def measure_latents(net: Any, size: int, batch: int, files: int, calls: int) -> dict[str, Any]:
    """`src.tools.latents` on generated JPEG files: reading, decoding, the crop, the network and writing.

    With the network `calls` batches are made, and `files` pictures with zeros in its place; what is missing then is the
    network's own.
    """
    from src.codecs.vae_files import write_vae
    from src.data.prepare import prepare
    from src.tools import latents

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_vae(folder / "vae", net.network, random_params(net))
        values = latents.define()
        values(["latents", f"--vae={folder}/vae", f"--size={size}", f"--dtype={net.dtype}", f"--batch={batch}"])
        plan = latents.plan(values)
        zeros = np.zeros((plan.batch, *plan.moments.shape), np.float32)
        np.asarray(plan.encode(np.zeros((plan.batch, size, size, 3), np.uint8)))  # compiles
        bare = dataclasses.replace(plan, encode=lambda pixels: zeros)
        found, sources = {}, {count: GeneratedImages(count) for count in (files, calls * plan.batch)}
        for label, used, count in (("without", bare, files), ("whole", plan, calls * plan.batch)):
            found[label] = _clocks(lambda used=used, n=count, to=label: prepare(sources[n], folder / to, used))
        (_, bare_busy), (wall, busy) = found["without"], found["whole"]
    images, bare_busy, busy = calls * plan.batch, bare_busy / files, busy / (calls * plan.batch)
    return {
        "files": f"JPEG of {WIDTH} x {HEIGHT}, {sources[files].bytes / files / 1e3:.0f} kB",
        "images": images,
        "images_per_second": images / wall,
        "seconds_per_image": busy,
        "seconds_per_image_without_network": bare_busy,
        "images_per_second_without_network": 1 / bare_busy,
        "share_of_network": 1 - bare_busy / busy,
    }


class GeneratedImages:
    """A source of generated JPEG files in memory; some of them again and again."""

    kind = "classes"
    classes = ({"id": "c0", "name": "noise"},)
    different = 16

    def __init__(self, count: int):
        self._count = count
        self._files = [_jpeg(photograph(i, HEIGHT, WIDTH)) for i in range(min(count, self.different))]

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(len(self._files[i % len(self._files)]) for i in range(self._count))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        from src.data.example import Example

        return Example({"label": 0, "image": self._files[index % len(self._files)]}, f"picture {index}")


def photograph(seed: int, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels whose spectrum falls as that of photographs, so that a JPEG of them has as many bytes."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) + 1 / width
    waves = rng.standard_normal((3, height, width)) + 1j * rng.standard_normal((3, height, width))
    field = np.fft.ifft2(waves / frequency**1.35).real
    field = (field - field.mean((1, 2), keepdims=True)) / field.std((1, 2), keepdims=True)
    return (128 + 50 * field).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def _jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def _clocks(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until the action's arrays are there, by the wall, and of the processor (of accelerators the wall's)."""
    began, busy = time.perf_counter(), time.process_time()
    jax.block_until_ready(action())
    wall = time.perf_counter() - began
    return wall, time.process_time() - busy if jax.default_backend() == "cpu" else wall
