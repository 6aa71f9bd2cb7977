"""Grain pipelines: rows that depend on (seed, row number) alone, batches that depend on (seed, batch number) alone.

A task (`data/pipeline/reader.py`) turns a row index and a few uniform numbers into arrays. Training rows come from

    MapDataset.source(indices).seed(seed).shuffle().repeat().random_map(read) -> ElasticIterator -> build

which holds one integer, the number of rows consumed. Row r is the same for any number of processes, and process s of n
gets rows s·B/n .. (s+1)·B/n - 1 of each global batch of B: joining the processes in their order gives the very
batch that one process would get, so that the train step sees the same rows in the same places.
(ElasticIterator alone deals rows out like cards, process s gets rows s, s+n, ...; `_Contiguous` undoes this.)

A row that cannot be used (`BadRow`) stays in its place, as zeros without a target. So no other row moves, and no loss
counts it. A worker process that dies is replaced, and the stream goes on where it was.
"""

from __future__ import annotations

import errno
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from src.data.pipeline.bad_rows import Ledger
from src.data.pipeline.reader import Reader, Rows, read_batch, refused
from src.data.pipeline.stalls import Waits
from src.data.pipeline.workers import allow_workers, shared_memory_lacks
from src.interfaces import Batch

PREFETCH = 2  # batches
DIED = "terminated unexpectedly"  # in Grain's words
SIGBUS = "exit code -7"  # what was mapped is not there: a full /dev/shm, unless the system reserves its pages
DEATHS, DEATH_SECONDS = 3, 600.0  # a stream outlives so many deaths of workers within so long


class Stream:
    """Endless shuffled batches of one task's training split; its state is the number of rows consumed.

    `batch` counts the rows of all processes, `shard` is (this process, number of processes). `order` cuts a batch into
    equal blocks and lists them as the shards own them, those of shard 0 first; by default a shard's rows are
    consecutive. Grain is imported at the first batch. Prefetched batches are not counted in the state, so saving
    between any two batches is exact. `name` is what `ledger` and `waits` call it, who are told of bad rows and waiting.

    Raises ValueError if the processes cannot share the batch evenly; the next batch raises TooManyBadRowsError, and
    RuntimeError when workers die again and again.
    """

    def __init__(
        self,
        task: Rows,
        batch: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
        *,
        order: Sequence[int] = (0,),
        workers: int = 0,
        prefetch: int = PREFETCH,
        name: str = "data",
        ledger: Ledger | None = None,
        waits: Waits | None = None,
    ):
        _check_shard(batch, shard)
        if batch % len(order):
            raise ValueError(f"a batch of {batch} rows cannot be cut into {len(order)} blocks: use a multiple of that")
        task.rows("train")  # missing data are refused here, not at the first batch
        self._task, self._batch, self._seed, self._shard = task, batch, seed, shard
        self._order, self._workers, self._prefetch = tuple(order), workers, prefetch
        self._name, self._ledger, self._waits = name, ledger or Ledger(), waits or Waits()
        self._consumed = 0
        self._iterator: Any = None
        self._reader = Reader(task)
        self._deaths: list[float] = []

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        self._waits.begin(self._name, self._awaited)
        try:
            element = self._fetch()
        finally:
            self._waits.end()
        self._consumed += self._batch
        self._ledger.add(self._name, self._batch // self._shard[1], refused(element["index"], element["flaw"]))
        self._ledger.check()
        return self._task.build(element["row"])

    def _fetch(self) -> dict[str, Any]:
        while True:
            if self._iterator is None:
                self._iterator = self._open()
            try:
                return dict(next(self._iterator))
            except RuntimeError as error:
                if not self._workers or DIED not in str(error):
                    raise
                self._bury(error)
            except OSError as error:
                if not self._workers or error.errno != errno.ENOSPC:
                    raise
                raise RuntimeError(f"task {self._name}: {shared_memory_lacks(self._workers)}") from error

    def _bury(self, error: RuntimeError) -> None:
        now, reason = time.monotonic(), str(error).partition(". ")[0]
        self._deaths = [then for then in self._deaths if now - then < DEATH_SECONDS] + [now]
        if reason.endswith(SIGBUS) and len(self._deaths) > 1:
            raise RuntimeError(f"task {self._name}: {shared_memory_lacks(self._workers)} ({reason})") from error
        if len(self._deaths) > DEATHS:
            raise RuntimeError(
                f"task {self._name}: {len(self._deaths)} data workers died within {DEATH_SECONDS / 60:.0f} minutes"
                f" ({reason}): see whether the machine lacks memory, or lower data.workers"
            ) from error
        logging.warning("task %s: %s; its workers start again at row %d", self._name, reason, self._consumed)
        self.close()

    def _awaited(self) -> str:
        rows = f"rows {self._consumed} to {self._consumed + self._batch - 1} of the run"
        reading = [*self._reader.reading]
        return f"{rows} (row {reading[0]} of its data is being read)" if reading else rows

    def get_state(self) -> int:
        """Rows consumed so far, counted over all processes."""
        return self._consumed

    def set_state(self, consumed: int) -> None:
        """Continues after `consumed` rows; the batch size and number of processes may differ from the saved run's."""
        self.close()
        self._consumed = int(consumed)

    def close(self) -> None:
        """Stops the prefetch threads and worker processes; the next batch would start them again."""
        self._waits.close()
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self) -> Any:
        import grain

        rows = self._task.rows("train")
        dataset = grain.MapDataset.source(np.arange(rows)).seed(self._seed).shuffle().repeat()
        dataset = dataset.random_map(self._reader)
        if self._shard[1] > 1:
            # An endless range: `repeat` makes the real length as large as an index can be.
            places = grain.MapDataset.range(sys.maxsize - self._batch)
            phase = self._consumed % self._batch
            dataset = places.map(_Contiguous(dataset, self._batch, self._shard[1], phase, self._order))
        options = None
        if self._workers:
            allow_workers()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=self._prefetch)
        elastic = grain.experimental.ElasticIterator(
            dataset,
            self._batch,
            grain.sharding.ShardOptions(*self._shard),
            read_options=grain.ReadOptions(num_threads=1 if self._prefetch else 0, prefetch_buffer_size=self._prefetch),
            multiprocessing_options=options,
        )
        iterator = iter(elastic)
        iterator.set_state({"global_next_index": self._consumed})
        return iterator


class Mixture:
    """Batches of several tasks at once: yields {task: Batch}, with a fixed number of rows per task.

    `rows` counts the rows of all processes; `shard` and `order` are those of `Stream`. Every task is shuffled on its
    own, by `seed` and its name, so adding a task changes no other. `workers` processes are started per task when it is
    > 0 (each start takes seconds).

    Raises ValueError if the names of `tasks` and `rows` differ or the processes cannot share the rows evenly.
    """

    def __init__(
        self,
        tasks: Mapping[str, Rows],
        rows: Mapping[str, int],
        seed: int,
        shard: tuple[int, int] = (0, 1),
        *,
        order: Sequence[int] = (0,),
        workers: int = 0,
        prefetch: int = PREFETCH,
        ledger: Ledger | None = None,
    ):
        if set(tasks) != set(rows):
            raise ValueError(f"the mixture has tasks {sorted(tasks)} but rows per batch for {sorted(rows)}")
        self.ledger, self.waits, self._shard = ledger or Ledger(), Waits(), shard
        options = {"order": order, "workers": workers, "prefetch": prefetch, "ledger": self.ledger, "waits": self.waits}
        self._streams = {
            name: Stream(task, rows[name], _named_seed(seed, name), shard, name=name, **options)
            for name, task in tasks.items()
        }

    def __iter__(self) -> Mixture:
        return self

    def __next__(self) -> dict[str, Batch]:
        return {name: next(stream) for name, stream in self._streams.items()}

    def get_state(self) -> dict[str, int]:
        """Rows consumed by task; the same on every process, exact between any two batches."""
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues where `get_state` was called.

        Raises ValueError if the state is of other tasks.
        """
        if set(state) != set(self._streams):
            raise ValueError(
                f"the saved data state is of tasks {sorted(state)}, this run has {sorted(self._streams)}: "
                "resume with the same tasks or start anew"
            )
        for name, stream in self._streams.items():
            stream.set_state(state[name])

    def settle(self) -> dict[str, float]:
        """`Ledger.settle` of all tasks; every process calls it at the same steps."""
        return self.ledger.settle(self._shard[0])

    def get_counts(self) -> dict[str, dict[str, int]]:
        """`Ledger.get_state`; every process calls it at the same steps."""
        return self.ledger.get_state(self._shard[0])

    def set_counts(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on where `get_counts` was called."""
        self.ledger.set_state(counts)

    def close(self) -> None:
        """Stops the prefetch threads and worker processes."""
        self.ledger.save()
        for stream in self._streams.values():
            stream.close()


def ordered(task: Rows, split: str, batch: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """One pass over a split in order, without augmentation; also for "train".

    All batches have one shape: the last one is filled with copies of the last row without a target. Keep the first
    `task.rows(split)` outputs of the joined batches to leave the copies out of other measures.

    Raises ValueError if the processes cannot share the batch evenly, TooManyBadRowsError on the way.
    """
    _check_shard(batch, shard)
    return _pass(task, split, batch, shard, task.rows(split))


def _pass(task: Rows, split: str, batch: int, shard: tuple[int, int], rows: int) -> Iterator[Batch]:
    share, ledger = batch // shard[1], Ledger()
    for start in range(shard[0] * share, -(-rows // batch) * batch, batch):
        places = np.arange(start, start + share)
        found, bad = read_batch(task, split, np.minimum(places, rows - 1))
        for _, flaw in bad:
            logging.warning("split %s: %s", split, flaw)
        ledger.add(split, len(places), bad)
        ledger.check()
        yield without_targets(found, places >= rows)


def without_targets(batch: Batch, rows: np.ndarray) -> Batch:
    """The batch in which nothing of the rows where `rows` [B] is True is a target."""
    tokens = {}
    for name, part in batch.tokens.items():
        left = rows.reshape(-1, *[1] * (part.target.ndim - 1))
        tokens[name] = part.replace(target=part.target & ~left)
    return batch.replace(tokens=tokens)


def split_batch(batch: int, weights: Mapping[str, int | float], multiple: int = 1) -> dict[str, int]:
    """Rows of each task in a batch, by largest remainder from the weights, each a multiple > 0 of `multiple`.

    Give the number of processes (or data-parallel devices) as `multiple`, so that each gets the same rows of each task.

    Raises ValueError if a weight is not positive, or the batch is no multiple or too small for that many tasks.
    """
    if not weights or any(not w > 0 for w in weights.values()):
        raise ValueError(f"task weights must all be positive, got {dict(weights)}: leave out the tasks with weight 0")
    if batch % multiple or batch // multiple < len(weights):
        raise ValueError(
            f"a batch of {batch} rows cannot be split among {len(weights)} tasks in multiples of {multiple}: "
            f"give a multiple of {multiple} that is at least {multiple * len(weights)}"
        )
    units, total = batch // multiple, sum(weights.values())
    quotas = {name: units * weight / total for name, weight in weights.items()}
    shares = {name: max(1, int(quota)) for name, quota in quotas.items()}
    while sum(shares.values()) != units:
        # Raising the small ones to 1 may overshoot, so the way can be up or down; ties go to the first name given.
        step = 1 if sum(shares.values()) < units else -1
        able = [name for name in shares if shares[name] + step > 0]
        best = max(able, key=lambda name: step * (quotas[name] - shares[name]))
        shares[best] += step
    return {name: share * multiple for name, share in shares.items()}


class _Contiguous:
    """Row at place i, moved so that the cards dealt to shard s of n are the s-th n-th of each batch (see the top).

    With several blocks in `order`, they are the s-th n-th of those blocks.
    """

    def __init__(self, dataset: Any, batch: int, shards: int, phase: int, order: tuple[int, ...]):
        self._dataset, self._batch, self._shards, self._phase, self._order = dataset, batch, shards, phase, order

    def __call__(self, place: int | np.integer) -> Any:
        step, card = divmod(int(place) - self._phase, self._batch)
        share = self._batch // self._shards
        block, row = divmod(card % self._shards * share + card // self._shards, self._batch // len(self._order))
        row += self._order[block] * (self._batch // len(self._order))
        return self._dataset[self._phase + step * self._batch + row]


def _check_shard(batch: int, shard: tuple[int, int]) -> None:
    index, count = shard
    if not 0 <= index < count or batch < 1 or batch % count:
        raise ValueError(
            f"a batch of {batch} rows cannot be shared by process {index} of {count}: "
            "use a batch that is a multiple of the number of processes"
        )


def _named_seed(seed: int, name: str) -> int:
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
