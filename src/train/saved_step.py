"""The compiled train step as a file, so that a run that starts again neither traces nor compiles it.

`<workdir>/compiled/train_step` is the step for the devices that the run had last (`common/runtime/executables.py`), for
starts on new machines. Runs in a local workdir have their steps in the cache of programs of this machine, a file for
each digest of what the step depends on. A step is loaded if everything that it depends on is as it was; else a line
tells what differs, the step is compiled, and the file is written anew. A failure here never stops a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
from absl import logging
from etils import epath

from src.common import tree
from src.common.files.store import is_remote
from src.common.mesh.distributed import is_first
from src.common.runtime import background, executables
from src.interfaces import LossTerm
from src.train.checkpoints.config_changes import fields, plain
from src.train.step import StepMetrics
from src.train.trainer import Trainer

FILE = "compiled/train_step"
FOLDER = "train_steps"  # in the cache of programs
KEPT = 16  # files there, at most
HIT = "/jax/compilation_cache/cache_hits"
CHOICES = ("auto", "on", "off")
# Options that the step does not depend on.
OUTSIDE = ("seed", "init_from", "log", "eval", "checkpoint", "watchdog", "doctor", "sample", "decode",
           "guidance", "compiled_step", "data")  # fmt: skip
PACKAGES = ("flax", "optax", "numpy")


class SavedStep:
    """The compiled step of a trainer, from the workdir where there is one."""

    level = logging.INFO  # of lines that say why there is no step

    def __init__(self, trainer: Trainer, workdir: Any):
        self.trainer, self.path = trainer, epath.Path(workdir) / FILE

    def compile(self) -> Any:
        """The compiled step: loaded, or compiled and then written in the background."""
        facts = step_facts(self.trainer)
        try:
            return self.load(facts)
        except FileNotFoundError:
            logging.log(self.level, "there is no compiled step in %s yet", self.path)
        except Exception as error:  # of any kind: the step can be compiled
            told = " ".join(str(error).split())[:300] or type(error).__name__
            logging.warning("the compiled step in %s is not used, because %s: compiling", self.path, told)
        with _cache_hits() as hits:
            compiled = self.trainer.lower().compile()
        if hits:  # written again, such a program lacks functions (jaxlib 0.10.2 on CPU)
            told = "the compiled step is not written to %s, since it came from JAX's cache of programs"
            logging.log(self.level, told, self.path)
        elif is_first():
            background.begin(lambda: self.save(compiled, facts), "saved step")
        return compiled

    def load(self, facts: Mapping[str, str]) -> Any:
        """The step of the file. Raises as `executables.read_program` and `load_program` do."""
        began = time.monotonic()
        program, about = executables.read_program(self.path, facts)
        batch = self.trainer.batch()
        given = jax.tree.structure(((self.trainer.abstract, batch), {}))
        made = jax.tree.structure((self.trainer.abstract, _metrics(about)))
        step = executables.load_program(program, given, made, self.trainer.mesh.devices.flatten())
        logging.info("the compiled step was read from %s in %.1f s", self.path, time.monotonic() - began)
        return step

    def save(self, compiled: Any, facts: Mapping[str, str]) -> None:
        """Writes the step; what fails is a warning."""
        try:
            size = self.write(compiled, facts)
            logging.info("the compiled step is in %s (%.1f MB)", self.path, size / 1e6)
        except Exception as error:  # a backend that cannot, or a disk
            told = " ".join(str(error).split())[:300] or type(error).__name__
            logging.warning("the compiled step was not written to %s: %s", self.path, told)

    def write(self, compiled: Any, facts: Mapping[str, str]) -> int:
        """Writes the step, and gives back its bytes. Raises as `executables.write_program` does, and ValueError for
        results that `load` would not know."""
        about = _about(compiled, self.trainer.abstract)
        return executables.write_program(self.path, compiled, facts, about)


class CachedStep(SavedStep):
    """The compiled step of a trainer, from the cache of programs of this machine: one of `KEPT` steps."""

    level = logging.DEBUG

    def __init__(self, trainer: Trainer, folder: Any):
        self.trainer, self.folder = trainer, epath.Path(folder)
        self.path = self.folder / executables.digest(step_facts(trainer))

    def write(self, compiled: Any, facts: Mapping[str, str]) -> int:
        """As `SavedStep.write`; of too many files the oldest go."""
        size = super().write(compiled, facts)
        files = sorted(self.folder.iterdir(), key=lambda file: file.stat().mtime)
        for file in files[:-KEPT]:
            file.unlink(missing_ok=True)
        return size


def use_saved_step(trainer: Trainer, workdir: Any) -> Trainer:
    """The trainer, which takes its compiled step from a file if `compiled_step` of the config says so: "on" from the
    workdir, "auto" from a workdir in a store, else from the cache of programs, where there is one.

    Raises ValueError for another word.
    """
    choice = trainer.system.config.get("compiled_step", "auto")
    if choice not in CHOICES:
        raise ValueError(f"compiled_step={choice!r} is unknown; use one of {', '.join(CHOICES)}")
    kept, cache = choice == "on" or is_remote(workdir), jax.config.jax_compilation_cache_dir
    # Processes that share a cache may see a file or not: each must do what the others do.
    if choice == "off" or not (kept or (cache and jax.process_count() == 1)):
        return trainer
    if own := own_packages(trainer.system.config):
        if kept:
            logging.info("the compiled step is not kept, since %s may change without being seen", tree.listed(own))
        return trainer
    saved = SavedStep(trainer, workdir) if kept else CachedStep(trainer, epath.Path(cache) / FOLDER)
    trainer.compile = saved.compile
    return trainer


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Gets an entry for each program that this thread finds in JAX's cache."""
    hits: list[str] = []
    thread = threading.get_ident()

    def listen(event: str, **_: Any) -> None:
        if event == HIT and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def own_packages(config: Any) -> list[str]:
    """Names of parts that come from packages outside of `src`, whose source is not among the facts."""
    names = {value for key, value in fields(plain(config)).items() if key.rpartition(".")[2] == "name"}
    return sorted(name for name in names if isinstance(name, str) and "." in name.partition(":")[0])


def step_facts(trainer: Trainer) -> dict[str, str]:
    """All that the compiled step depends on, by name; found without tracing."""
    system = trainer.system
    options = {name: value for name, value in system.config.to_dict().items() if name not in OUTSIDE}
    options["codecs"] = {name: field.codec.fingerprint for name, field in system.fields.items()}
    arrays = {"state": trainer.abstract, "batch": trainer.batch()}
    shapes = {
        path: [leaf.shape, str(leaf.dtype), str(leaf.sharding.spec)] for path, leaf in tree.flatten(arrays).items()
    }
    source = b"".join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")))
    found = {f"config {name}": executables.digest(plain(value)) for name, value in options.items()}
    found |= {"arrays": executables.digest(shapes), "source code": hashlib.sha256(source).hexdigest()[:16]}
    found["mesh"] = ", ".join(f"{axis}={size}" for axis, size in trainer.mesh.shape.items())
    found |= {package: version(package) for package in PACKAGES}
    return found | executables.machine_facts(trainer.mesh.devices.flatten())


def _about(compiled: Any, state: Any) -> dict[str, Any]:
    """What the structure of the results is, as JSON. Raises ValueError where `_metrics` would not give it back."""
    metrics = jax.tree.unflatten(compiled.out_tree, range(compiled.out_tree.num_leaves))[1]
    about = {
        "terms": {name: term.trained for name, term in metrics.terms.items()},
        "squares": {name: list(values) for name, values in metrics.squares.items()},
        "guard": list(metrics.guard),
    }
    if jax.tree.structure((state, _metrics(about))) != compiled.out_tree:
        raise ValueError("its results have an unknown structure")
    return about


def _metrics(about: Any) -> StepMetrics:
    """Metrics of that structure, with zeros."""
    terms = {name: LossTerm(0, 0, bool(trained)) for name, trained in about["terms"].items()}
    squares = {name: dict.fromkeys(paths, 0) for name, paths in about["squares"].items()}
    return StepMetrics(terms, squares, dict.fromkeys(about["guard"], 0))
