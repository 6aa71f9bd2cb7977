"""A store that cannot append gets whole files, and what is there already is never lost."""

import json
import types

import numpy as np
from etils import epath
from test_writers import read_events

from src.common.files import store
from src.common.runtime.writers import JsonLinesWriter, Many, TensorBoard
from src.evals.grid import save_png


def steps(bucket):
    return [json.loads(line).get("step") for line in bucket.cat("gs://b/run/log.jsonl").decode().splitlines()]


def test_a_run_in_a_bucket_goes_on_in_its_files(bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    clock = 1000.0
    monkeypatch.setattr(store, "time", types.SimpleNamespace(monotonic=lambda: clock))
    run = epath.Path("gs://b/run")
    (run / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def write(step):
        writer.write_scalars(step, {"loss": float(step)})

    writer = Many([JsonLinesWriter(str(run / "log.jsonl")), TensorBoard(str(run / "tensorboard"))])
    bucket.down = True  # what is there cannot be read, so nothing may be written over it
    write(3)
    bucket.down = False
    assert steps(bucket) == [1, 2]
    write(4)
    assert steps(bucket) == [1, 2, 4]  # at once, so that a bucket that refuses is known early
    write(5)
    clock += 59
    write(6)
    assert steps(bucket) == [1, 2, 4]
    clock += 2
    bucket.down = True
    write(7)
    bucket.down = False
    write(8)
    assert steps(bucket) == [1, 2, 4]  # a failure waits too
    clock += 60
    write(9)
    assert steps(bucket) == [1, 2, 4, 5, 6, 7, 8, 9]
    write(10)
    writer.close()
    assert steps(bucket) == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    (events,) = bucket.ls("gs://b/run/tensorboard", detail=False)
    folder = tmp_path / "events"
    folder.mkdir()
    (folder / "events").write_bytes(bucket.cat(events))
    assert {s for s, _ in read_events(folder)} == {3, 4, 5, 6, 7, 8, 9, 10}
    warnings = [record.args[0] for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["JsonLinesWriter", "TensorBoard"]  # each warned once
    save_png(str(run / "samples" / "a.png"), np.zeros((2, 3, 3), np.uint8))
    assert bucket.ls("gs://b/run/samples", detail=False) == ["b/run/samples/a.png"]
    assert not list((tmp_path / "temporary").iterdir()) and not (tmp_path / "gs:").exists()

    writer = JsonLinesWriter(str(run / "log.jsonl"))
    writer.rewind(9)
    write(11)
    write(12)
    assert steps(bucket) == [1, 2, 4, 5, 6, 7, 8, 9, 11]  # the first flush sends
    writer.settle()  # as before a checkpoint
    assert steps(bucket) == [1, 2, 4, 5, 6, 7, 8, 9, 11, 12]
    write(13)
    bucket.down = True
    writer.close()  # the rest stays here, and a warning says where
    (rest,) = (tmp_path / "temporary").iterdir()
    assert str(rest) in caplog.text and '"step": 13' in (rest / "log.jsonl").read_text()
