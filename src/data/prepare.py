"""Turns a source into shards, in several processes; what is finished stays when it is stopped or killed.

Shard k holds the source's rows k · n to (k + 1) · n - 1, without the bad ones, so that its bytes depend on the source
alone. Beside the shards lie, until all are done, `plan.json` (of what and how) and `parts/<k>.json` (a finished shard),
and for good `skipped.jsonl`, the list of bad rows, and `manifest.json` (see `files/shards.py`), which comes last.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import numpy as np
from etils import epath

from src.common.files.paths import shown
from src.common.files.store import is_remote, write_whole
from src.common.files.strict_json import read_json
from src.data.example import BadRow, Source
from src.data.files.array_record import write_shard
from src.data.files.latent_shards import Encoding
from src.data.files.shards import MANIFEST, values_of, write_manifest
from src.data.pipeline.bad_rows import Ledger
from src.data.pipeline.reader import die_with_parent
from src.data.record import classes_of, kind_of, record_of
from src.data.splits import example_of

PLAN = "plan.json"
PARTS = "parts"
PROBES = 64  # examples by which a source is known again


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """What is written.

    rows      rows of the source for each shard
    size      images are cut to their centre of so many pixels and stored as PNG, which a task of that size reads as
              it would read the original; 0: the files stay as they are
    check     images are decoded, so that those that cannot be read are left out now (with a size they always are)
    """

    rows: int = 5000
    size: int = 0
    check: bool = True

    def __post_init__(self):
        if self.rows < 1 or self.size < 0:
            raise ValueError(
                f"rows={self.rows}, size={self.size} is not possible: use at least 1 row, and no size below 0"
            )

    def told(self) -> dict[str, Any]:
        """What must be the same when the work goes on."""
        return dataclasses.asdict(self)

    def image(self) -> Any:
        """What the manifest says of the images."""
        return {"size": self.size, "format": "PNG"} if self.size else "the files as they were"

    def records(self, source: Source, kind: str, rows: Sequence[int]) -> Iterator[tuple[int, bytes | BadRow]]:
        """The records of some rows, in their order."""
        classes = len(classes_of(source, kind)) or None
        for row in rows:
            try:
                yield row, record_of(example_of(source, row), kind, classes, size=self.size, check=self.check)
            except BadRow as flaw:
                yield row, flaw


def prepare(
    source: Source,
    out: str | os.PathLike[str],
    plan: ShardPlan | Encoding,
    *,
    name: str = "source",
    processes: int = 1,
    ledger: Ledger | None = None,
    say: Callable[[int, int, int], None] = lambda done, shards, rows: None,
) -> dict[str, Any]:
    """Writes the shards of a source, which is pickled to other processes, and returns the manifest.

    Finished shards of an earlier start are kept. `ledger` counts bad rows of `name` and raises TooManyBadRowsError;
    `say` hears of shards done, all shards, and rows written or left out. Raises FileExistsError where the folder has a
    manifest already or another run is writing, ValueError where it was begun with other settings or another source, and
    for a source of moments of latents.
    """
    target = epath.Path(out)
    if (target / MANIFEST).exists():
        raise FileExistsError(f"{os.fspath(target)!r} has shards already: give another folder")
    target.mkdir(parents=True, exist_ok=True)
    ledger = ledger or Ledger(target)
    if getattr(source, "moments", None):
        raise ValueError(f"{name} has moments of latents, which are shards already: give the images that they are of")
    with _alone(target):
        _agree(target, plan, source, name)
        count = -(-len(source) // plan.rows)
        parts = {k: told for k in range(count) if (told := _finished(target, k))}
        rows = sum(_note(ledger, name, told) for told in parts.values())
        say(len(parts), count, rows)
        ledger.check()
        todo = [k for k in range(count) if k not in parts]
        for k, told in _run(functools.partial(_part, target, plan), source, todo, processes):
            write_whole(target / PARTS / f"{k:05d}.json", json.dumps(told).encode())
            parts[k] = told
            rows += _note(ledger, name, told)
            say(len(parts), count, rows)
            ledger.check()
        ledger.save()
        return _finish(target, plan, source, name, [parts[k] for k in range(count)])


def _finish(
    target: epath.Path, plan: ShardPlan | Encoding, source: Source, name: str, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    kind = kind_of(source)
    schema = {"kind": kind, "image": plan.image(), "classes": classes_of(source, kind)}
    shards = [{key: part[key] for key in ("name", "rows", "bytes", "sha256")} for part in parts if part["rows"]]
    bad = sum(len(part["bad"]) for part in parts)
    if not shards:
        raise ValueError(
            f"{name} has no row that can be used, of {len(source)}: see skipped.jsonl in {os.fspath(target)!r}"
        )
    manifest = write_manifest(target, shards, schema=schema, source=name, source_rows=len(source), bad_rows=bad)
    (target / PARTS).rmtree()
    (target / PLAN).unlink()
    return manifest


def _note(ledger: Ledger, name: str, part: dict[str, Any]) -> int:
    bad = [(b["row"], BadRow(b["reason"], b["where"], b["detail"])) for b in part["bad"]]
    ledger.add(name, part["rows"] + len(bad), bad)
    return part["rows"] + len(bad)


def _agree(target: epath.Path, plan: ShardPlan | Encoding, source: Source, name: str) -> None:
    """Writes down what is made, or compares it with what an earlier start began. Raises ValueError."""
    probe = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)) if len(source) else ():
        try:
            example = example_of(source, int(index))
            probe.update(json.dumps([example.where, values_of(example, kind_of(source))]).encode())
        except BadRow as flaw:
            probe.update(str(flaw).encode())
    if not len(source):
        raise ValueError(f"{name} has no rows: give a source that has some")
    told = plan.told() | {"source": name, "source_rows": len(source), "probe": probe.hexdigest()[:16]}
    path = target / PLAN
    if path.exists():
        before = read_json(path, what="plan")
        before = before if isinstance(before, dict) else {}
        other = [key for key in told if before.get(key) != told[key]]
        if other:
            was, now = shown(before.get(other[0])), shown(told[other[0]])
            raise ValueError(
                f"{os.fspath(target)!r} was begun with another {other[0]} ({was}, now {now}): go on as it was begun, or"
                " give another folder"
            )
    # A store has no empty folders.
    elif target.exists() and any(file.name.endswith(".arrayrecord") for file in target.iterdir()):
        raise FileExistsError(f"{os.fspath(target)!r} holds shards that were not begun here: give another folder")
    write_whole(path, json.dumps(told).encode())


def _finished(target: epath.Path, k: int) -> dict[str, Any] | None:
    """What is known of a finished shard, if it is still there."""
    try:
        told = read_json(target / PARTS / f"{k:05d}.json", limit=1 << 28, what="note of a shard")
        if not told["rows"] or (target / told["name"]).stat().length == told["bytes"]:
            return told
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _part(target: epath.Path, plan: ShardPlan | Encoding, source: Source, k: int) -> dict[str, Any]:
    """Writes shard k, if it has rows, and says what is in it and what is not."""
    bad: list[dict[str, Any]] = []

    def packed() -> Iterator[bytes]:
        for row, found in plan.records(
            source, kind_of(source), range(k * plan.rows, min((k + 1) * plan.rows, len(source)))
        ):
            if isinstance(found, bytes):
                yield found
                continue
            flaw = BadRow.unpack(found.pack())  # cut as everywhere
            bad.append({"row": row, "reason": flaw.reason, "where": flaw.where, "detail": flaw.detail})

    name = f"{k:05d}.arrayrecord"
    folder = tempfile.mkdtemp(prefix="monoformer-jax-") if is_remote(target) else os.fspath(target)
    draft = pathlib.Path(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        told = {"name": name} | write_shard(draft, packed()) | {"bad": bad}
        if told["rows"] and is_remote(target):
            epath.Path(draft).copy(target / name, overwrite=True)
        elif told["rows"]:
            draft.replace(target / name)
    finally:
        draft.unlink(missing_ok=True)
        if is_remote(target):
            shutil.rmtree(folder, ignore_errors=True)
    return told


Part = Callable[[Source, int], dict[str, Any]]


def _run(part: Part, source: Source, todo: Sequence[int], processes: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """`part` of each k, as they come; two for each process are under way at a time."""
    if processes <= 1:
        yield from ((k, part(source, k)) for k in todo)
        return
    context = multiprocessing.get_context("spawn")
    waiting, running = iter(todo), dict[Future, int]()
    with ProcessPoolExecutor(processes, context, _begin, (source, part)) as pool:
        try:
            while True:
                while len(running) < 2 * processes and (k := next(waiting, None)) is not None:
                    running[pool.submit(_one, k)] = k
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_HERE: dict[str, Any] = {}  # of a worker process


def _begin(source: Source, part: Part) -> None:
    die_with_parent()
    _HERE.update(source=source, part=part)


def _one(k: int) -> dict[str, Any]:
    return _HERE["part"](_HERE["source"], k)


class _alone:
    """Holds a local folder for this process. Raises FileExistsError when another one has it."""

    _lock = threading.Lock()

    def __init__(self, target: epath.Path):
        self._target, self._file = target, None

    def __enter__(self) -> None:
        if is_remote(self._target):
            return
        import fcntl  # not on every system

        self._file = open(self._target / ".lock", "w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise FileExistsError(
                f"another run is writing to {os.fspath(self._target)!r}: wait for it, or give another folder"
            ) from error
        except OSError:  # some network disks have no locks
            return
        for rest in pathlib.Path(self._target).glob(".*.tmp"):  # of a run that was killed
            rest.unlink()

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            pathlib.Path(self._target, ".lock").unlink(missing_ok=True)
            self._file.close()
