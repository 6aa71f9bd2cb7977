"""The tool on emulated devices and, where libtpu is installed, with the real TPU compiler; its arithmetic by hand."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from configs import digits, imagenet256
from src.build import build_system
from src.tools import aot
from src.tools.compile import search, text
from src.tools.compile.chips import CHIPS, GIB
from src.tools.compile.hlo import Collective
from src.tools.compile.roofline import roofline
from src.tools.compile.topology import Topology
from src.train import saved_step
from src.train.flops import attention_flops, step_flops
from src.train.trainer import make_trainer
from tests.helpers.runs import config_of

ROOT = pathlib.Path(__file__).parents[2]


def run(monkeypatch, *flags):
    """The tool in this process; overrides of a config are looked up in sys.argv."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["aot", *flags])
    return aot.main(sys.argv)


@pytest.mark.faults
def test_a_train_step_that_does_not_fit(capsys, monkeypatch):
    flags = ["--config=configs/digits.py:debug", "--platform=cpu", "--topology=8", "--json", "--hbm=0.0001"]
    assert run(monkeypatch, *flags, "--config.mesh.fsdp=4") == 2
    report = json.loads(capsys.readouterr().out)
    memory, flops = report["memory"], report["flops"]
    assert report["mesh"]["data"] == 2 and report["mesh"]["fsdp"] == 4
    # nothing of the debug size is large enough to be split
    assert memory["parameters"] == memory["ema"] == 4 * report["parameters"]
    assert memory["optimizer"] == 8 * report["parameters"] + 8  # two moments and two counters
    kinds = ["parameters", "ema", "optimizer", "batch", "padding and other arguments", "outputs", "program"]
    assert memory["total"] == sum(memory[k] for k in [*kinds, "temporaries"])
    assert memory["shortfall"] == memory["total"] - memory["hbm"] > 0
    # the analytic count and the one from the compiled program agree: this config recomputes nothing
    system = build_system(config_of())
    masked_too = attention_flops(system, masked=False) - attention_flops(system)
    assert flops["program_per_device"] * 8 == pytest.approx(flops["model_per_step"] + masked_too, rel=0.05)
    assert any(c["kind"] == "all-reduce" and "data" in c["axes"] for c in report["collectives"])
    best, worst = report["predicted"]["best"], report["predicted"]["worst"]
    assert 0 < worst["mfu"] < best["mfu"] < 1 and worst["days"] > best["days"]
    assert "nothing fits" in report["suggestion"]
    shown = text.describe(report, "digits")
    assert "DOES NOT FIT" in shown and "mesh data=2, fsdp=4" in shown and "MFU" in shown


@pytest.mark.faults
def test_a_saved_step_is_that_of_a_run(capsys, monkeypatch, tmp_path):
    """On such devices, with the same config: the run finds all facts as they were, and needs no compiler."""
    flags = ["--config=configs/digits.py:debug", "--config.mesh.fsdp=2", "--platform=cpu", "--topology=8"]
    assert run(monkeypatch, *flags, "--json", f"--save={tmp_path}") == 0
    saved = json.loads(capsys.readouterr().out)["saved"]
    assert saved["path"] == str(tmp_path / saved_step.FILE) and saved["bytes"] > 10**5
    config = digits.get_config("debug")
    config.mesh.fsdp, config.compiled_step = 2, "on"
    trainer = saved_step.use_saved_step(make_trainer(build_system(config)), tmp_path)
    monkeypatch.setattr(trainer, "lower", lambda: pytest.fail("it was traced"))
    assert trainer.compile().memory_analysis().temp_size_in_bytes > 0


def test_a_saved_step_is_of_one_train_step(capsys, monkeypatch, tmp_path):
    for flag in ("--search", "--mode=sample"):
        assert run(monkeypatch, "--config=configs/digits.py:debug", "--platform=cpu", f"--save={tmp_path}", flag) == 1
        assert "is for one train step: leave out --search and --mode=sample" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_sampler(capsys, monkeypatch):
    flags = ["--config=configs/sit_digits.py:debug", "--platform=cpu", "--topology=2", "--mode=sample"]
    assert run(monkeypatch, *flags) == 0
    shown = capsys.readouterr().out
    assert "20 rows of label_to_image" in shown and "fits" in shown and "seconds per image" in shown


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        (["--config=configs/digits.py", "--config.mesh.fdsp=2"], "fdsp"),
        (["--config=configs/digits.py", "--topology=v9:2x2"], "there is no chip 'v9'; use one of v4, v5e"),
        (["--config=configs/digits.py:debug", "--platform=cpu", "--topology=8", "--config.mesh.fsdp=3"], "fsdp"),
        ([], "give --config="),
    ],
)
def test_mistakes_are_one_sentence(flags, match, capsys, monkeypatch):
    assert run(monkeypatch, *flags) == 1
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1


def slice_of(kind, sizes, slices=1):
    """Devices of a slice with their coordinates, and a mesh of data (slices) x fsdp (chips)."""
    places = list(np.ndindex(*sizes))
    devices = [SimpleNamespace(coords=(*p, 0)[:3], slice_index=s) for s in range(slices) for p in places]
    mesh = SimpleNamespace(axis_names=("data", "fsdp"), devices=np.array(devices, object).reshape(slices, len(places)))
    return Topology("", CHIPS[kind], sizes, slices, tuple(devices)), mesh


@pytest.mark.parametrize(
    ("kind", "sizes", "slices", "axes", "seconds"),
    [
        ("v5e", (8, 8), 1, ("fsdp",), 1 / 2 / 50e9),  # two lines of 50 GB/s links
        ("v5e", (16, 16), 1, ("fsdp",), 1 / 4 / 50e9),  # two rings
        ("v5p", (4, 4, 4), 1, ("fsdp",), 1 / 6 / 100e9),  # three rings
        ("v5e", (8, 8), 2, ("fsdp",), 1 / 2 / 50e9),
        ("v5e", (8, 8), 2, ("data",), 1 / 3.125e9),
        ("v5e", (8, 8), 2, ("data", "fsdp"), 1 / 2 / 50e9 + 1 / 64 / 3.125e9),  # reduced in each slice before
    ],
)
def test_the_network_by_hand(kind, sizes, slices, axes, seconds):
    topology, mesh = slice_of(kind, sizes, slices)
    times = roofline(
        2 * CHIPS[kind].flops, 3 * CHIPS[kind].hbm_rate, [Collective("all-gather", axes, 1, 5)], topology, mesh
    )
    assert times.network == pytest.approx(5 * seconds)
    assert (times.compute, times.hbm) == (2, 3)
    assert times.best == 3 and times.worst == pytest.approx(5 + 5 * seconds)


def test_the_paper_config_by_arithmetic():
    config = imagenet256.get_config()
    config.mesh = {"data": -1, "fsdp": 1}
    system, rows, length, patches = build_system(config), 1024, 291, 256
    d, m = 2048, 5632
    layer = 2 * d * d + 2 * d * 256 + 3 * d * m
    per_token = 22 * layer
    per_patch = 16 * d + d * 32  # into the trunk, out of the head
    per_image = 256 * d + d * d + 2 * d * d  # time, adaLN of the head
    pairs = length * (length + 1) // 2 + patches * (patches - 1) // 2  # causal, and all patches see each other
    attention = 12 * 22 * d * pairs
    needed = rows * (6 * (per_token * length + per_patch * patches + per_image) + attention)
    assert step_flops(system)["total"] == pytest.approx(needed, rel=1e-3)

    topology, _ = slice_of("v5e", (8, 8))
    found = search.candidates(config, topology, 16 * GIB)
    fits = [c.estimate <= 16 * GIB for c in found]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    assert all(math.prod((64, c.accumulate)) <= c.batch for c in found)
    whole = {c.estimate for c in found if c.fsdp == 1}
    assert min(whole) > 16 * GIB  # 1.1B parameters, 16 bytes each: a chip cannot hold them alone
    assert "--config.mesh.fsdp=" in search.suggestion(config, topology, 16 * GIB)
    changed = found[0].apply(config)
    assert (changed.mesh.fsdp, changed.accumulate) == (found[0].fsdp, found[0].accumulate)


def test_the_search_prints_what_it_compiled(monkeypatch, capsys):
    config = imagenet256.get_config()
    topology, _ = slice_of("v5e", (8, 8))
    times = {"compute": 0.1, "hbm": 0.2, "network": 0.3, "best": 0.3, "worst": 0.6}

    def report(config, topology, hbm, encoders):
        if config.mesh.fsdp == 16:
            raise ValueError("no")
        fits = config.mesh.fsdp > 4
        memory = {"fits": fits, "total": 2 * GIB}
        mfu = {"best": {"mfu": 0.5}, "worst": {"mfu": 0.25}}
        return {"memory": memory} | ({"roofline": times, "predicted": mfu} if fits else {})

    monkeypatch.setattr(search, "train_report", report)
    reports = list(search.search(config, topology, 16 * GIB, 200, ()))
    lines = text.table(reports).splitlines()
    assert len(lines) == len(reports) + 1 > 10
    assert {r["fsdp"] for r in reports} == {1, 2, 4, 8, 32, 64}
    assert "refused: no" in capsys.readouterr().err
    assert sum("300.0     600.0     25-50 %" in line for line in lines) == sum(r["memory"]["fits"] for r in reports) > 0


@pytest.mark.faults
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_real_tpu_compiler():
    flags = ["--config=configs/sit_digits.py:debug", "--topology=v5e:2x4", "--config.mesh.fsdp=2", "--json"]
    done = subprocess.run([sys.executable, "-m", "src.tools.aot", *flags], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["chips"], report["chip"]["name"]) == (8, "v5e")
    assert report["memory"]["fits"] and report["memory"]["total"] < 0.1 * GIB
    assert report["flops"]["program_per_device"] * 8 == pytest.approx(report["flops"]["model_per_step"], rel=0.1)
    assert all(c["bytes"] > 0 for c in report["collectives"]) and report["roofline"]["network"] > 0
