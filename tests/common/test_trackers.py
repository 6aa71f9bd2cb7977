"""Trackers: what is written arrives, a resumed run goes on in the same one, and no service delays or stops a run."""

import json
import threading

import jax
import numpy as np
import pytest

from src.common.runtime import tracker
from src.common.runtime.tracker import Tracker, tracker_classes
from src.common.runtime.writers import History, MetricWriter

CONFIG = {"optim.lr": 0.004, "tasks.a.names": ["x", "y"], "init_from.path": ""}


class Service(Tracker):
    """A service in memory, which `trouble` can spoil."""

    NAME, PACKAGE = "service", "json"
    trouble = staticmethod(lambda values: None)

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.opened, self.got, self.ended = [], [], 0

    def open(self, run):
        self.opened.append(run)
        return self, run or "fresh"

    def send(self, handle, kind, step, values):
        self.trouble(values)
        self.got.append((kind, step, values))

    def end(self, handle):
        self.ended += 1


def test_everything_arrives_in_order_and_a_resumed_run_is_the_same(tmp_path):
    service = Service(tmp_path / "run", CONFIG)
    assert isinstance(service, MetricWriter) and not isinstance(service, History) and not (tmp_path / "run").exists()
    service.write_scalars(1, {"loss": np.float32(0.5)})
    service.write_images(1, {"grid": np.zeros((2, 2, 3)), "rows": np.ones((2, 4, 4, 1))})
    service.write_texts(2, {"said": "three"})
    service.close()
    kinds = [(kind, step, [*values]) for kind, step, values in service.got]
    assert kinds == [("scalars", 1, ["loss"]), ("images", 1, ["grid", "rows/0", "rows/1"]), ("texts", 2, ["said"])]
    assert service.got[1][2]["rows/1"].dtype == np.uint8 and service.got[1][2]["rows/1"].max() == 255
    assert json.loads((tmp_path / "run/trackers.json").read_text()) == {"service": "fresh"} and service.ended == 1
    service.write_scalars(3, {"loss": 0.25})  # a closed one opens again
    service.close()
    assert service.opened == [None, "fresh"]
    (tmp_path / "run/trackers.json").write_text("{")
    broken = Service(tmp_path / "run", CONFIG)
    broken.write_scalars(3, {"loss": 0.25})
    broken.close()
    assert broken.opened == [None] and json.loads((tmp_path / "run/trackers.json").read_text()) == {"service": "fresh"}


@pytest.mark.parametrize("error", [RuntimeError("no network"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_a_service_that_fails_is_told_once_and_opened_again(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(tracker, "PAUSE", 0.0)
    service = Service(tmp_path, CONFIG)

    def trouble(values):
        if values["loss"] < 2:
            raise error

    service.trouble = trouble
    for step in range(4):
        service.write_scalars(step, {"loss": step})
    service.close()
    assert [step for _, step, _ in service.got] == [2, 3] and service.opened == [None, "fresh", "fresh"]
    assert caplog.text.count("service failed") == 1


def test_a_service_that_hangs_delays_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracker, "FAREWELL", 0.2)
    service, go = Service(tmp_path, CONFIG), threading.Event()
    ended = []
    service.trouble = lambda values: ended.append(go.wait(60))
    for step in range(tracker.ROOM + 50):
        service.write_scalars(step, {"loss": step})
    assert service.lost >= 49  # one is on its way
    service.close()
    assert not ended and "did not take everything" in caplog.text
    go.set()


def test_only_process_0_tells_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    service = Service(tmp_path, CONFIG)
    service.write_scalars(1, {"loss": 1.0})
    service.close()
    assert service.opened == [] and not (tmp_path / "trackers.json").exists()


def test_what_cannot_work_is_one_sentence(monkeypatch):
    own = "tests.common.test_trackers:Service"
    assert [cls.NAME for cls in tracker_classes(f"{own}, {own}")] == ["service"] * 2 and tracker_classes(()) == []
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(ValueError, match=rf"has '{name}', but the package {name} is not installed: run pip"):
            tracker_classes((name,))
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI is not set"):
        tracker_classes(["mlflow"])
    with pytest.raises(ValueError, match=r"did you mean wandb\?"):
        tracker_classes(("wandbb",))
    with pytest.raises(ValueError, match="is no Tracker"):
        tracker_classes(("src.common.runtime.progress:Progress",))


def told(kind, folder, steps):
    """Runs a tracker on this workdir, as a part of a run."""
    writer = kind(folder, CONFIG | {"steps": steps[-1]})
    for step in steps:
        writer.write_scalars(step, {"loss/text": 1 / step, "bad": float("nan")})
    writer.write_images(steps[-1], {"eval/digits": np.zeros((8, 8, 3), np.uint8)})
    writer.write_texts(steps[-1], {"eval/how": "<b> & so on"})
    writer.close()
    assert writer.lost == 0


def leveldb_records(data, header=7, block=1 << 15):
    """The records of a log in LevelDB's form, which W&B's files have behind a header: pieces that no block splits, each
    with a checksum (4 bytes), its length (2) and its kind (whole, first, middle, last)."""
    at, record = header, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.faults
def test_wandb_offline(tmp_path, monkeypatch, caplog):
    """Two parts of one run, the second of which repeats a step, read back from the files of W&B."""
    pytest.importorskip("wandb", reason="W&B is not installed: requirements-trackers.txt")
    from wandb.proto import wandb_internal_pb2

    from src.common.runtime.trackers.wandb import STEP, WandB

    monkeypatch.setenv("WANDB_MODE", "offline")
    told(WandB, tmp_path, (1, 2))
    told(WandB, tmp_path, (2, 3))
    assert "failed" not in caplog.text
    (run,) = json.loads((tmp_path / "trackers.json").read_text()).values()
    found, config, images = [], {}, 0
    for path in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{run}.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
            items = {each.key or each.nested_key[0]: each.value_json for each in record.history.item}
            if "loss/text" in items:
                found.append((int(items[STEP]), float(items["loss/text"])))
            images += "eval/digits" in items
    assert found == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)] and images == 2
    assert config["optim.lr"] == 0.004 and config["tasks.a.names"] == ["x", "y"] and config["steps"] == 3


@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_files(tmp_path, monkeypatch, caplog):
    """The same, with the file store of MLflow in place of a server."""
    pytest.importorskip("mlflow", reason="MLflow is not installed: requirements-trackers.txt")
    from mlflow import MlflowClient

    from src.common.runtime.trackers.mlflow import MLflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    told(MLflow, tmp_path / "digits", (1, 2))
    told(MLflow, tmp_path / "digits", (2, 3))
    assert "failed" not in caplog.text
    (run,) = json.loads((tmp_path / "digits/trackers.json").read_text()).values()
    client = MlflowClient()
    data = client.get_run(run).data
    assert [(m.step, m.value) for m in client.get_metric_history(run, "loss/text")] == [
        (1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3),
    ]  # fmt: skip
    assert data.params["optim.lr"] == "0.004" and data.params["steps"] == "2" and data.tags["now.steps"] == "3"
    assert client.get_run(run).info.status == "FINISHED" and client.get_run(run).info.run_name == "digits"
    assert client.list_artifacts(run, "images") and client.list_artifacts(run, "texts/eval")
