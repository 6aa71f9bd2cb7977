"""What the four modes do: train, evaluate, sample, doctor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import platform
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from src.build import build_system
from src.common.files.images import read_image as read_pixels
from src.common.files.paths import stem
from src.common.files.store import write_whole
from src.common.files.strict_json import read_json
from src.common.mesh.distributed import check_same, is_first
from src.common.runtime import stopping, watchdog
from src.common.runtime.compilation_cache import use_program_cache
from src.common.runtime.writers import JsonLinesWriter, Many, TensorBoard
from src.doctor.callback import make_doctor
from src.doctor.diagnostic import errors
from src.doctor.memory import check_state
from src.doctor.report import consult
from src.train import loop
from src.train.checkpoints import lock
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import check_config, fields, plain
from src.train.checkpoints.workdir import sweep
from src.train.trainer import Trainer, check_data, make_trainer

FLAGS = ("mode", "workdir", "prompt", "label", "image", "task", "count", "grid", "step")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def train(flags: Any, started: float) -> None:
    """Trains to the end, evaluates, and leaves metrics.json and pictures in the workdir."""
    use_program_cache()
    config, workdir = flags.config, epath.Path(flags.workdir)
    system = _build(flags)
    trainer = make_trainer(system)
    checkpoints = Checkpointer(flags.workdir, **config.checkpoint)
    _overview(trainer)
    with contextlib.ExitStack() as stack:
        release = stack.enter_context(lock.hold(checkpoints.workdir))
        stopping.before_leaving(release)
        sweep(checkpoints.workdir)
        stack.enter_context(watchdog.watching(**config.watchdog))
        check_data(system)
        writer = stack.enter_context(contextlib.closing(_writer(workdir)))  # a run that fails keeps its last lines
        state, facts = loop.train(trainer, checkpoints, _with_pictures(writer, workdir), started, make_doctor(trainer))
        logging.info("training is done after %.0f s; evaluating", time.monotonic() - started)
        scalars = loop.evaluate(system, state, _with_pictures(writer, workdir), int(state.step))
        checkpoints.score(int(state.step), scalars)
        stopping.busy()
        if "seconds_to_first_step" in facts:  # a finished run that is only evaluated again keeps the time that it took
            facts["seconds_total"] = time.monotonic() - started
        _report(workdir, scalars | facts)
        checkpoints.close()


def evaluate(flags: Any, started: float) -> None:
    """Evaluates the newest checkpoint of the workdir, or that of --step."""
    use_program_cache()
    system, state, workdir = _restored(flags)
    step = int(state.step)
    writer = _writer(workdir)
    scalars = loop.evaluate(system, state, _with_pictures(writer, workdir), step)
    writer.close()
    logging.info("evaluated after %.0f s", time.monotonic() - started)
    _report(workdir, scalars | {"steps": step}, None if flags.step == "latest" else step)


def sample(flags: Any, started: float) -> None:
    """Draws a prompt or label as a PNG, or writes text about an image or after a beginning."""
    use_program_cache()
    given = [name for name in ("prompt", "label", "image") if getattr(flags, name) is not None]
    if not given:
        raise ValueError('--mode=sample needs --prompt="…" or --label=… to draw, or --image=file.png to describe')
    if flags.count < 1:
        raise ValueError(f"--count={flags.count} images cannot be drawn; give at least 1")
    system, state, workdir = _restored(flags)
    params = state.ema if system.config.eval.ema else state.params
    predict = system.predictor.with_params(params)
    task = flags.task or _choose_task(system, flags)
    data, layout, name = predict.task(task)
    sees = bool(layout.named("image") or layout.named("vision"))
    _check_given(task, data, layout.segment(name).kind, given, sees)
    grid = _grid(flags.grid, task, data)
    if layout.segment(name).kind == "text":
        images = None if flags.image is None else _read_image(flags.image, system, data, layout)[None]
        words = None if flags.prompt is None else [flags.prompt]
        for text in predict.write(task, words=words, images=images, seed=system.config.seed):
            _say(text if flags.prompt is None else f"{flags.prompt} {text}")
        return
    from src.evals.grid import caption_grid, save_png

    what = {"words": [flags.prompt] * flags.count} if flags.label is None else {"labels": [flags.label] * flags.count}
    images = predict.draw(task, **what, seed=system.config.seed, grid=grid)
    title = flags.prompt if flags.label is None else f"class {flags.label}"
    bucket = "" if grid is None else "-{}x{}".format(*grid)
    path = flags.output or str(workdir / "samples" / f"{stem(title)}{bucket}.png")
    if is_first():
        save_png(path, caption_grid(images, [title] * len(images), columns=min(flags.count, 8)))
    _say(path)


def doctor(flags: Any, started: float) -> None:
    """Prints what the doctor says about the config, on this machine. Nothing is written, whatever the workdir.

    Raises ValueError when it found an error, or the model does not fit into the memory of this machine.
    """
    use_program_cache()
    check_state(build_system(flags.config))  # before files are looked for that only a large machine may have
    report = consult(_build(flags))
    _say(report.text)
    logging.info("the doctor took %.0f s", time.monotonic() - started)
    wrong = errors(report.findings)
    if wrong:
        raise ValueError(f"the doctor found {len(wrong)} error(s), listed above; the first: {wrong[0].text}")


def read_image(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """An image file as `[h, w, C]` in [-1, 1], scaled to the model's size.

    Raises FileNotFoundError, OSError, and ValueError for a file that is no image, damaged or too large.
    """
    from PIL import Image

    pixels = read_pixels(path, channels=shape[2])
    image = Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels)
    image = image.resize((shape[1], shape[0]), Image.Resampling.BOX)
    return np.asarray(image, np.float32).reshape(shape) / 127.5 - 1


def _read_image(path: str, system: Any, data: Any, layout: Any) -> np.ndarray:
    """An image file as the data of a task would deliver it."""
    if not layout.named("image"):
        return system.frozen.vision.preprocess(read_pixels(path, channels=system.frozen.vision.shape[2]))
    return read_image(path, system.predictor.shape if system.frozen.image else data.image_shape)


def _grid(given: str | None, task: str, data: Any) -> tuple[int, int] | None:
    """The bucket of --grid. Raises ValueError for one that the task does not have."""
    if given is None:
        return None
    grids = getattr(getattr(data, "buckets", None), "grids", ())
    names = [f"{rows}x{columns}" for rows, columns in grids]
    if given not in names:
        raise ValueError(f"--grid={given} is no bucket of task {task}; it has {', '.join(names) or 'none'}")
    return grids[names.index(given)]


def _check_given(task: str, data: Any, kind: str, given: list[str], sees: bool) -> None:
    """Raises ValueError when the flags are not what the task starts from."""
    if kind == "image":
        wanted = [["label"]] if data.classes is not None else [["prompt"]]
    else:
        wanted = [["image"], ["prompt", "image"]] if sees else [["prompt"]]
    if given not in wanted:
        needs = " or ".join(" and ".join(f"--{name}" for name in names) for names in wanted)
        raise ValueError(f"task {task} starts from {needs}, not {' and '.join(f'--{n}' for n in given)} (see --task)")


def _choose_task(system: Any, flags: Any) -> str:
    """The first task that makes an image of words or labels, or text about an image."""
    for name, (_, layout, generated) in system.predictor.tasks.items():
        kind = layout.segment(generated).kind
        if flags.image is None and kind == "image":
            return name
        if flags.image is not None and kind == "text" and (layout.named("image") or layout.named("vision")):
            return name
    wanted = "draws images" if flags.image is None else "describes images"
    raise ValueError(f"this system has no task that {wanted}; it has {', '.join(system.tasks)} (see --task)")


def _restored(flags: Any) -> tuple[Any, Any, epath.Path]:
    """System and state of a checkpoint, see --step; only what shapes the network must agree with the config."""
    workdir = epath.Path(flags.workdir)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"there is no checkpoint in {workdir}; train first, or correct --workdir")
    checkpoints = Checkpointer(flags.workdir, **flags.config.checkpoint, readonly=True)
    system = _build(flags)
    step = checkpoints.choose(flags.step)
    fixed = ("model", "patch", "text_codec", "process")
    identity = system.identity()
    free = tuple(k for k in identity if k not in (*fixed, "tokenizer", "frozen"))
    found = checkpoints.restore(make_trainer(system).abstract, lambda saved: check_config(saved, identity, free), step)
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint in {workdir}; train first, or correct --workdir")
    state = found[0]
    checkpoints.close()
    return system, state, workdir


def _build(flags: Any) -> Any:
    """The system. Raises ValueError when several processes were not started alike."""
    if jax.process_count() > 1:
        source = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(pathlib.Path(__file__).parent.rglob("*.py"))))
        facts = {f"--{name}": getattr(flags, name) for name in FLAGS} | {n: version(n) for n in PACKAGES}
        facts |= {"python": platform.python_version(), "the source code": source.hexdigest()[:16]}
        check_same(facts | fields(plain(flags.config), "config"))
    system = build_system(flags.config)
    check_same({"the tokenizer": system.identity()["tokenizer"]})
    return system


def _say(text: str) -> None:
    if is_first():
        print(text)


def _overview(trainer: Trainer) -> None:
    from clu import parameter_overview

    devices = trainer.mesh.devices.flatten()
    shape = ", ".join(f"{k}={v}" for k, v in trainer.mesh.shape.items())
    logging.info("%d %s device(s), mesh %s", len(devices), devices[0].platform, shape)
    table = parameter_overview.get_parameter_overview(trainer.abstract.params, include_stats=False)
    logging.info("parameters:\n%s", table)


def _writer(workdir: epath.Path) -> Many:
    return Many([JsonLinesWriter(str(workdir / "log.jsonl")), TensorBoard(str(workdir / "tensorboard"))])


def _with_pictures(writer: Many, workdir: epath.Path) -> Many:
    return Many([*writer.writers, Pictures(workdir / "samples")])


class Pictures:
    """A writer that keeps images as PNG files. One that cannot be written does not stop a run; the first is told."""

    def __init__(self, folder: epath.Path):
        self.folder, self.lost = folder, 0

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """One file for each name."""
        if not is_first():
            return
        from src.evals.grid import save_png

        for name, image in images.items():
            try:
                save_png(str(self.folder / f"{name.replace('/', '-')}-{step}.png"), image)
            except OSError as error:
                if not self.lost:
                    logging.warning("%s; the run goes on, and later pictures are tried", error)
                self.lost += 1

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Nothing."""

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _report(workdir: epath.Path, metrics: dict[str, float], step: int | None = None) -> None:
    """metrics.json, and the same as a table on the terminal; what was not measured again stays as it was.

    Of a checkpoint that was asked for by its `step` it is metrics-<step>.json.
    """
    if not is_first():
        return
    path = workdir / ("metrics.json" if step is None else f"metrics-{step}.json")
    try:
        metrics = (read_json(path, finite=False) if path.exists() else {}) | metrics
    except (ValueError, TypeError) as error:
        logging.warning("%s is written anew: %s", path, error)
    rounded = {k: round(float(v), 5) if isinstance(v, float) else int(v) for k, v in metrics.items()}
    write_whole(path, (json.dumps(rounded, indent=2) + "\n").encode())
    width = max(map(len, rounded))
    print("\n".join(f"{k:<{width}}  {v:,}" for k, v in rounded.items()))
    samples = workdir / "samples"
    print(f"written to {path}" + (f"; pictures are in {samples}" if samples.exists() else ""))
