"""What the tools that read data in files have in common: flags that name a source, how it is opened, and progress."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from src.common.files.paths import at_home
from src.common.lookup import check_arguments, lookup
from src.common.runtime import command, config_flag


def flags_of_config(about: str) -> flags.FlagValues:
    """The flag of a config, and that of whole tracebacks."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, about, flag_values=values)
    flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.", flag_values=values)
    return values


def define() -> flags.FlagValues:
    """The flags that name a source, where its shards go, and how many rows may be bad."""
    values = flags_of_config("The config whose data are read.")
    common = {"flag_values": values}
    flags.DEFINE_string("task", None, "--config: the task; needed where there are several.", **common)
    flags.DEFINE_string("source", None, "A source of src/data/sources, e.g. image_folders.", **common)
    flags.DEFINE_multi_string("set", [], "--source: an option, name=value.", **common)
    flags.DEFINE_string("out", None, "The folder of the shards.", **common)
    flags.DEFINE_integer("rows", 5000, "Rows of the source for each shard.", 1, **common)
    flags.DEFINE_float("max_bad_share", 0.05, "Stop when a larger share of the rows is bad, …", 0, 1, **common)
    flags.DEFINE_integer("max_bad_least", 10, "… and at least so many.", 0, **common)
    return values


def main(argv: list[str], values: flags.FlagValues, run: Callable[[flags.FlagValues, Any], Any]) -> int:
    """The exit code of `run(values, config)`; errors that a person can mend are one sentence on standard error."""

    def work() -> None:
        run(values, config_flag.parse(values, argv))

    return command.run(work, values, "interrupted; the same command goes on from there")


def write(values: flags.FlagValues, config: Any, plan: Any, processes: int = 1) -> None:
    """Writes the shards of the source that the flags name, by a plan of `data.prepare`, and prints what was done.

    Raises ValueError when too many rows are bad, and as `data.prepare.prepare` does.
    """
    from src.data.pipeline.bad_rows import Ledger, TooManyBadRowsError
    from src.data.prepare import prepare
    from src.data.record import classes_of, kind_of

    name, source = open_source(values, config)
    classes = classes_of(source, kind_of(source))
    if classes and not all(c["name"] for c in classes):
        print(
            "the classes have ids and no names: a task that is prompted by names will need the file of names, here"
            " (--set=names=…) or in training (source.names)", file=sys.stderr,
        )  # fmt: skip
    out, ledger = values.out, Ledger(values.out, share=values.max_bad_share, least=values.max_bad_least)
    try:
        manifest = prepare(source, out, plan, name=name, processes=processes, ledger=ledger, say=ProgressBar())
    except TooManyBadRowsError as error:
        said = str(error).replace("data.max_bad.share", "--max_bad_share")
        raise ValueError(said.replace("mend the data,", "mend the data and give another --out,")) from error
    flawed = manifest["bad_rows"]
    bad = f"; {flawed:,} bad row{'s are' if flawed > 1 else ' is'} in {out}/skipped.jsonl" if flawed else ""
    size, count = sum(shard["bytes"] for shard in manifest["shards"]), len(manifest["shards"])
    shards = f"{count:,} shard{'s' if count > 1 else ''}"
    print(f"{manifest['rows']:,} rows in {shards}, {size / 1e9:.3g} GB, in {out}{bad}")
    for line in ledger.summary():
        print(f"  {line}")


def open_source(values: flags.FlagValues, config: Any) -> tuple[str, Any]:
    """Name of the source that the flags name, and the source. Raises ValueError, also for an --out with files."""
    if not values.out or (config is None) == (values.source is None):
        raise ValueError("give --out=<folder>, and either --config=<file> or --source=<file>")
    check_out(values.out)
    return of_config(config, values.task) if config is not None else of_source(values.source, values.set)


def check_out(out: str) -> None:
    """Raises ValueError where a folder has files and no shards were finished or begun there, as that of a source."""
    from etils import epath

    from src.common.tree import listed
    from src.data.files.shards import MANIFEST
    from src.data.prepare import PLAN

    path = epath.Path(out)
    if not path.exists() or (path / MANIFEST).exists() or (path / PLAN).exists():  # which `prepare` judges
        return
    found = sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else [path.name]
    if found:
        raise ValueError(f"--out={out} has other files already ({listed(found, 3)}): give a new folder for the shards")


def of_config(config: Any, task: str | None) -> tuple[str, Any]:
    """Name of a task, and its source. Raises as `task_of`."""
    name, found = task_of(config, task)
    return name, found.source


def task_of(config: Any, task: str | None) -> tuple[str, Any]:
    """Name of the task of a config whose files are read, the only one where none is named, and the task.

    Raises ValueError for a task that is not there or does not read files.
    """
    from src.build import build_system
    from src.data.sources._files import FileSource

    tasks = {name: plan.task for name, plan in build_system(config).tasks.items()}
    tasks = {name: found for name, found in tasks.items() if isinstance(found.source, FileSource)}
    if task is None and len(tasks) == 1:
        task = next(iter(tasks))
    if task not in tasks:
        raise ValueError(f"--task={task} is none that can be prepared; this config has {', '.join(tasks) or 'none'}")
    return task, tasks[task]


def of_source(name: str, options: Sequence[str]) -> tuple[str, Any]:
    """Name of a source, and the source.

    Raises ValueError for an unknown source or option.
    """
    cls, given = lookup("data/sources", name), {}
    parameters = inspect.signature(cls.__init__).parameters
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--set={option} has no value: write --set=name=value")
        kind = str(parameters[key].annotation) if key in parameters else ""
        convert = {"int": int, "bool": lambda text: {"true": True, "false": False}[text.lower()]}
        try:
            given[key] = convert.get(kind, at_home)(value)
        except (ValueError, KeyError) as error:
            told = f"--set={option} is no {kind}: write --set={key}=1, or true" if kind in convert else str(error)
            raise ValueError(told) from error
    check_arguments(cls, given, where=f"--source={name}")
    return name, cls(**given)


class ProgressBar:
    """Says how far it is: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self):
        self._began, self._last, self._first = time.monotonic(), time.monotonic(), None
        self._bar: Any = None

    def __call__(self, done: int, shards: int, rows: int) -> None:
        now = time.monotonic()
        if self._first is None:  # what an earlier start has done
            self._first = done, rows
            if sys.stderr.isatty():
                from tqdm import tqdm

                self._bar = tqdm(total=shards, initial=done, unit="shard", dynamic_ncols=True)
            elif done:
                print(f"{done} of {shards} shards are there already", file=sys.stderr, flush=True)
            return
        rate = (rows - self._first[1]) / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rows:,} rows, {rate:,.0f} rows/s", refresh=False)
            self._bar.update(done - self._bar.n)
            if done == shards:
                self._bar.close()
        elif now - self._last >= 10 or done == shards:
            self._last = now
            left = (now - self._began) / max(done - self._first[0], 1) * (shards - done)
            print(
                f"{done} of {shards} shards, {rows:,} rows, {rate:,.0f} rows/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
