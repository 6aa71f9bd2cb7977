"""Features over devices and processes: each computes its share, and all get the scores of one device."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.compiling import FLAGS
from tests.helpers.one_run import ROOT

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/dinov2"
# The evaluator, then the command, in one process or as one of two; how many images this one prepares is told.
SCRIPT = """
import json, pathlib, sys
from src.common.mesh import distributed
distributed.start()
distributed.start = lambda: None
from src.evals.image_scores import ImageScoresEvaluator
from src.evals.scores import networks
from src.tools import scores
from tests.evals.test_image_scores import OPTIONS, TASKS, Draws
weights, images, out, told = sys.argv[1:]
prepared, prepare = [], networks.prepare_for_dinov2
networks.prepare_for_dinov2 = lambda image: prepared.append(1) or prepare(image)
options = OPTIONS | {"network": "dinov2", "weights": weights, "metrics": ("fid", "kid", "precision_recall")}
found = ImageScoresEvaluator(TASKS, **options, reference="test")(Draws(), 3).scalars
pathlib.Path(told).write_text(json.dumps({"scalars": found, "prepared": len(prepared)}))
flags = [f"--images={images}/made.npz", f"--reference={images}/real.npz", "--metrics=fid,kid,precision_recall"]
flags += ["--network=dinov2", f"--weights={weights}", f"--json={out}.json", f"--write_statistics={out}.npz"]
sys.exit(scores.main(["scores", *flags]))
"""


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_two_processes_have_the_scores_of_one(tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "made.npz", random.integers(0, 256, (37, 10, 12, 3)).astype(np.uint8))
    np.savez(tmp_path / "real.npz", random.integers(0, 256, (30, 10, 12, 3)).astype(np.uint8))
    started = []

    def start(name, devices, **environment):
        plain = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        env = plain | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | environment
        env["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
        out = f"{tmp_path}/{name.partition('-')[0]}"
        words = [sys.executable, "-c", SCRIPT, str(GOLDEN), str(tmp_path), out, f"{tmp_path}/{name}.told"]
        with open(tmp_path / f"{name}.out", "w") as file:
            started.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT))

    def said(name):
        return json.loads((tmp_path / f"{name}.told").read_text())

    try:
        start("one", 1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
        for index in range(2):
            start(f"two-{index}", 2, JAX_PROCESS_ID=str(index), **shared)
        for process, name in zip(started, ("one", "two-0", "two-1"), strict=True):
            assert process.wait(300) == 0, (tmp_path / f"{name}.out").read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()
    one, *two = (said(name) for name in ("one", "two-0", "two-1"))
    assert one["scalars"].keys() == two[0]["scalars"].keys() and two[0]["scalars"] == two[1]["scalars"]
    for name, value in one["scalars"].items():
        assert two[0]["scalars"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert all(each["prepared"] < 0.6 * one["prepared"] for each in two), "each prepares its share"
    mine, ours = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert ours["scores"] == pytest.approx(mine["scores"], rel=1e-4, abs=1e-7)
    assert ours["images"]["count"] == 37 and {**ours, "scores": 0} == {**mine, "scores": 0}
    first, both = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    for name in ("mu", "sigma", "network"):
        np.testing.assert_allclose(both[name], first[name], rtol=1e-4, atol=1e-6 * np.abs(first[name]).max())
    assert "fd_dinov2" in (tmp_path / "two-0.out").read_text()
    assert "fd_dinov2" not in (tmp_path / "two-1.out").read_text(), "the first process tells it"
