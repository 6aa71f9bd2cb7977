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
from src.common.files.paths import stem
from src.common.mesh.distributed import check_same, is_first
from src.common.runtime import config_flag, stopping, streams, watchdog, work_unit
from src.common.runtime.compilation_cache import use_program_cache
from src.common.runtime.tracing import Tracer, parse_steps
from src.common.runtime.tracker import Tracker, tracker_classes
from src.common.runtime.writers import JsonLinesWriter, Many, TensorBoard
from src.doctor.callback import make_doctor
from src.doctor.diagnostic import errors
from src.doctor.memory import check_state
from src.doctor.report import diagnose
from src.evals.given import asked_of, choose_task, example_of, grid_of, title
from src.evals.metrics_file import merge_metrics
from src.evals.samples import SampleFiles, formats_of, is_image, name_of
from src.interfaces import row_of
from src.sampling.steps.next_token import Greedy
from src.train import loop
from src.train.average import check_chosen, used_params
from src.train.checkpoints import lock
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import fields, plain
from src.train.checkpoints.retention import without_scores
from src.train.checkpoints.workdir import sweep
from src.train.goodput import FILE, Goodput
from src.train.restored import restore_checkpoint
from src.train.saved_step import use_saved_step
from src.train.setting import setting_of
from src.train.state import with_extras
from src.train.trainer import Trainer, check_data, check_evaluators, make_trainer

FLAGS = ("mode", "workdir", "given", "prompt", "label", "image", "task", "count", "grid", "step")
FLAGS += ("prompts", "format", "profile")
COUNT = 8  # images of one prompt of --mode=sample
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def train(flags: Any, started: float) -> None:
    """Trains to the end, evaluates, and leaves metrics.json and pictures in the workdir."""
    use_program_cache(named=flags.profile is not None)
    config, workdir = flags.config, epath.Path(flags.workdir)
    check_chosen(config)
    trackers = tracker_classes(config.log.trackers)
    system = _build(flags)
    trainer = make_trainer(system)
    if flags.profile is None:  # a trace shows the names of the code of now, which a kept program may lack
        trainer = use_saved_step(trainer, flags.workdir)
    checkpoints = Checkpointer(flags.workdir, **config.checkpoint)
    if told := without_scores(config.checkpoint.best.metric, config.eval.evaluators, config.eval.every):
        logging.warning("%s", told)
    _overview(trainer)
    with contextlib.ExitStack() as stack:
        release = stack.enter_context(lock.hold(checkpoints.workdir))
        stopping.before_leaving(release)
        work_unit.announce(flags.workdir, "train")
        sweep(checkpoints.workdir)
        stack.enter_context(watchdog.watching(**config.watchdog))
        check_data(system)
        check_evaluators(system)
        writer = stack.enter_context(contextlib.closing(_writer(flags, trackers)))  # a failed run keeps its last lines
        goodput = stack.enter_context(contextlib.closing(Goodput(workdir / FILE, started)))
        tracer = Tracer(workdir, parse_steps(flags.profile) if flags.profile is not None else None)
        pictures = _with_pictures(writer, workdir)
        state, facts = loop.train(trainer, checkpoints, pictures, started, make_doctor(trainer), goodput, tracer)
        logging.info("training is done after %.0f s; evaluating", time.monotonic() - started)
        with goodput.during("evaluate"):
            measured: dict[str, Any] = {}
            scalars = loop.evaluate(system, state, pictures, int(state.step), measured)
        checkpoints.score(int(state.step), scalars)
        stopping.busy()
        if "seconds_to_first_step" in facts:  # a finished run that is only evaluated again keeps the time that it took
            facts["seconds_total"] = time.monotonic() - started
        checkpoints.check_there()
        goodput.record(int(state.step))
        facts |= goodput.scalars()
        _report(workdir, scalars | facts, _how(flags, scalars, state, {}, measured))
        checkpoints.close()


def evaluate(flags: Any, started: float) -> None:
    """Evaluates the newest checkpoint of the workdir, or that of --step."""
    use_program_cache()
    trackers = tracker_classes(flags.config.log.trackers)
    workdir, system = _workdir(flags), _build(flags)
    check_evaluators(system)
    work_unit.announce(flags.workdir, "eval")
    changed: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    state = restore_checkpoint(system, str(workdir), flags.step, changed)
    step = int(state.step)
    writer = _writer(flags, trackers)
    scalars = loop.evaluate(system, state, _with_pictures(writer, workdir), step, measured)
    how = _how(flags, scalars, state, changed, measured)
    writer.write_texts(step, {"eval/how": json.dumps(next(iter(how.values()), {}))})  # the curves alone do not tell
    writer.close()
    logging.info("evaluated after %.0f s", time.monotonic() - started)
    _report(workdir, scalars | {"steps": step}, how, None if flags.step == "latest" else step)


def sample(flags: Any, started: float) -> None:
    """Completes examples of what is given: images as files, texts on the terminal, and JSON about them. All mistakes
    are told before parameters are read."""
    use_program_cache()
    asked = asked_of(flags.given, flags.prompts, prompt=flags.prompt, label=flags.label, image=flags.image)
    if flags.count is not None and flags.count < 1:
        raise ValueError(f"--count={flags.count} cannot be made; give at least 1")
    check_same({"what is given (--prompts)": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]})
    workdir = _workdir(flags)
    system = _build(flags)
    pipeline = system.pipeline
    name = choose_task(pipeline.tasks, asked[0], flags.task)
    task = pipeline.tasks[name]
    codecs = {made: system.fields[row_of(made)].codec for made in task.fill}
    rates = {made: codec.host.rate for made, codec in codecs.items() if hasattr(codec.host, "rate")}
    pictured = any(len(codec.delivered) == 3 for made, codec in codecs.items() if made not in rates)
    formats = formats_of(flags.format, pictured, name)
    bucket = grid_of(task, name, flags.grid)
    examples = [example_of(task, system.fields, values) | bucket for values in asked]
    for line, example in enumerate(examples, 1):
        try:
            pipeline.check(name, [example])
        except ValueError as error:
            raise ValueError(f"--prompts={flags.prompts}, line {line}: {error}") if flags.prompts else error from None
    count = flags.count or (COUNT if pictured and not flags.prompts else 1)
    rows = [row_of(made) for made in task.fill if count > 1 and not pictured]
    if greedy := [row for row in rows if isinstance(getattr(pipeline.decoders.get(row), "choose", None), Greedy)]:
        told = "--count=%d makes the same text each time, the most likely one: add --config.decode.%s.choose.name=%s"
        logging.warning(told, count, greedy[0], "next_token:Sampled")
    state = restore_checkpoint(system, str(workdir), flags.step)
    params = with_extras(state, used_params(state, system.config))
    given = [example for example in examples for _ in range(count)]
    found = pipeline.with_params(params)(name, given, system.config.seed)
    about = {
        "task": name,
        "step": int(state.step),
        "seed": int(system.config.seed),
        "config": config_flag.name_of(flags),
    }
    about |= {"guidance": float(pipeline.guidance.scale), "overrides": plain(config_flag.overrides(flags))}
    file = stem(pathlib.Path(flags.prompts).stem) if flags.prompts else name_of(asked[0])
    path = flags.output or str(workdir / "samples" / f"{file}{f'-{flags.grid}' if flags.grid else ''}")
    asked = [values for values in asked for _ in range(count)]
    _keep(SampleFiles(path, formats), found, given, asked, about, flags, rates)


def _keep(
    files: SampleFiles, found: list[Any], given: list[Any], asked: list[Any], about: Any, flags: Any, rates: Any
) -> None:
    """Writes the files of generated rows, prints the paths of images and sounds, and the texts behind their given
    beginnings."""
    paths: list[str] = []
    if is_first():
        paths, single = files.write_images(found, [title(example) for example in given])
        paths += files.write_sounds(found, rates, single)
        try:
            if "json" in files.formats:
                files.write_json(found, asked, about, paths, single)
                logging.info("what was given and made is in %s", files.json)
        except OSError as error:
            if flags.format is not None:
                raise
            logging.warning("%s", error)
    for path in paths:
        _mention(path, path)
    for name in found[0]:
        for row, example, values in zip(found, given, asked, strict=True):
            if isinstance(row[name], str) and "prompt" in example:
                _say(f"{values['prompt']} {row[name]}")
            elif not is_image(row[name]) and name not in rates:
                _say(str(row[name]))


def doctor(flags: Any, started: float) -> None:
    """Prints what the doctor says about the config, on this machine. Nothing is written, whatever the workdir.

    Raises ValueError when it found an error, or the model does not fit into the memory of this machine.
    """
    use_program_cache()
    check_state(build_system(flags.config))  # before files are looked for that only a large machine may have
    report = diagnose(_build(flags))
    _say(report.text)
    logging.info("the doctor took %.0f s", time.monotonic() - started)
    wrong = errors(report.findings)
    if wrong:
        raise ValueError(f"the doctor found {len(wrong)} error(s), listed above; the first: {wrong[0].text}")


def _workdir(flags: Any) -> epath.Path:
    """The folder of a run. Raises FileNotFoundError where it has no checkpoints."""
    workdir = epath.Path(flags.workdir)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"there is no checkpoint in {workdir}; train first, or correct --workdir")
    return workdir


def _build(flags: Any) -> Any:
    """The system. Raises ValueError when several processes were not started alike."""
    if jax.process_count() > 1:
        source = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(pathlib.Path(__file__).parent.rglob("*.py"))))
        facts = {f"--{name}": getattr(flags, name) for name in FLAGS} | {n: version(n) for n in PACKAGES}
        facts |= {"python": platform.python_version(), "the source code": source.hexdigest()[:16]}
        check_same(facts | fields(plain(flags.config), "config"))
    system = build_system(flags.config)
    check_same({f"the codec of the field {row}": prints for row, prints in system.identity()["codecs"].items()})
    return system


def _say(text: str) -> None:
    """What is nowhere else. Raises OSError where it cannot be shown."""
    if is_first():
        streams.say(text)


def _mention(text: str, path: Any) -> None:
    """What is in the file `path`, too: where it cannot be shown, that is a warning."""
    try:
        _say(text)
    except OSError as error:
        logging.warning("%s; it is in %s", error, path)


def _overview(trainer: Trainer) -> None:
    from clu import parameter_overview

    devices = trainer.mesh.devices.flatten()
    shape = ", ".join(f"{k}={v}" for k, v in trainer.mesh.shape.items())
    logging.info("%d %s device(s), mesh %s", len(devices), devices[0].platform, shape)
    table = parameter_overview.get_parameter_overview(trainer.abstract.params, include_stats=False)
    logging.info("parameters:\n%s", table)


def _writer(flags: Any, trackers: list[type[Tracker]]) -> Many:
    workdir = epath.Path(flags.workdir)
    writers = [JsonLinesWriter(str(workdir / "log.jsonl")), TensorBoard(str(workdir / "tensorboard"))]
    told = {"config": config_flag.name_of(flags)} | fields(plain(flags.config))
    return Many([*writers, *(tracker(workdir, told) for tracker in trackers)])


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


def _how(
    flags: Any, scalars: Any, state: Any, changed: dict[str, Any], measured: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What was evaluated, and how, for each of the numbers of evaluators.

    changed    what differs from the config of the checkpoint
    measured   by number, what an evaluator says that it depends on
    """
    config = flags.config
    told = {"step": int(state.step), "seed": int(config.seed)} | setting_of(config, used_params(state, config))
    told |= {"evaluators": plain(config.eval.evaluators)}
    told |= {"config": config_flag.name_of(flags), "overrides": plain(config_flag.overrides(flags))}
    if changed:
        told["trained_with"] = plain({field: was for field, (was, _) in sorted(changed.items())})
    return {name: told | ({"measured": measured[name]} if name in measured else {}) for name in scalars}


def _report(workdir: epath.Path, metrics: dict[str, float], how: dict[str, Any], step: int | None = None) -> None:
    """metrics.json, and the same as a table on the terminal; what was not measured again stays as it was.

    how   by number, what was evaluated (`evals/metrics_file.py`)

    Of a checkpoint that was asked for by its `step` it is metrics-<step>.json.
    """
    if not is_first():
        return
    path = workdir / ("metrics.json" if step is None else f"metrics-{step}.json")
    rounded = merge_metrics(path, metrics, how)
    width = max(map(len, rounded))
    samples = workdir / "samples"
    told = [f"{k:<{width}}  {v:,}" for k, v in rounded.items()]
    told.append(f"written to {path}" + (f"; pictures are in {samples}" if samples.exists() else ""))
    _mention("\n".join(told), path)
