"""`bench --preset=accelerator`: parts that end badly are lines of the result; and its rehearsal on a CPU."""

import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.build import build_system
from src.sequence.mask import visible
from src.tools import bench as tool
from src.tools.benchmarks import accelerator, accelerator_parts, backends

ABOUT = {
    "where": {"machine": "a chip"},
    "platform": "gpu",
    "chip": "H100",
    "peak": 989e12,
    "memory": 80e9,
    "tiny": False,
}
FIGURES = {"rows": 32, "seconds": {"median": 0.5, "p10": 0.4, "p90": 0.6, "count": 3}, "mfu": 0.55}
SLOW = FIGURES | {"seconds": FIGURES["seconds"] | {"median": 0.8}}
SCRIPTS = {  # what the process of a part does
    "attention": "print('a library says this'); print('[1, 2]'); say(begins='cudnn'); os.kill(os.getpid(), 11)",
    "step": f"say(about={ABOUT}); say(begins='dots'); say(name='dots', figures={FIGURES})",
    "peer": f"say(name='eager', figures={SLOW}); say(begins='compiled'); sys.exit(3)",
    "drawing": f"say(name='guided', figures={FIGURES}); say(begins='plain'); time.sleep(600)",
    "decoding": "say(name='greedy', figures={'failed': 'out of memory'}); say(done=1); time.sleep(600)",
}


def command(part):
    begin = "import json, os, sys, time\ndef say(**line): print(json.dumps(line), flush=True)\n"
    return [sys.executable, "-S", "-c", begin + SCRIPTS[part]]


def test_what_ends_badly_is_a_line_and_the_rest_goes_on(monkeypatch):
    said = []
    monkeypatch.setitem(accelerator.LIMITS, "drawing", 1.0)
    began = time.monotonic()
    found = accelerator.measure(1, said.append, tuple(SCRIPTS), command)
    assert time.monotonic() - began < 20
    assert found["attention"]["cudnn"] == {"failed": "its process ended with SIGSEGV"}
    assert set(found["decoding"]) == {"greedy", "where"}
    assert found["step"]["dots"] == FIGURES
    assert (
        found["peer"]["eager"] == SLOW and found["peer"]["compiled"]["failed"] == "its process ended with exit code 3"
    )
    assert found["drawing"]["guided"] == FIGURES
    assert found["drawing"]["plain"] == {"failed": "not done within 1 s"}
    assert found["ratio"]["32 rows"] == {"slower_than_ours": 1.6}
    assert all(group["where"]["machine"] == "a chip" and group["where"]["chip"] == "H100" for group in found.values())
    assert "a chip: 989 TFLOP/s in bf16 as published" in said
    shown = accelerator.markdown(json.loads(json.dumps(found)), tool._number)
    assert "| | rows | seconds | mfu |\n|---|---|---|---|\n| dots | 32 | 0.5 | 0.55 |" in shown
    assert "- cudnn: failed: its process ended with SIGSEGV" in shown
    assert "- greedy: failed: out of memory" in shown


def test_parts_after_the_budget_are_named(monkeypatch):
    monkeypatch.setattr(accelerator, "LEAST", 60.0)
    found = accelerator.measure(0.01, lambda line: None, ("drawing", "step"), command)
    assert found["drawing"]["plain"] == {"failed": "not done within 1 s"}
    assert found["step"]["all"] == {"not_run": "the 0.01 minutes were over"}


@pytest.mark.parametrize(("flag", "match"), [("--only=speed", "--only=speed is no part"), ("--minutes=0", "no time")])
def test_mistakes_are_one_sentence(flag, match, capsys):
    assert tool.main(["bench", "--preset=accelerator", flag]) == 1
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1


@pytest.mark.faults
def test_an_error_is_the_line_of_its_figure(monkeypatch):
    """Also of a generator that fails itself, after which there is nothing more."""

    def parts(sizes):
        def full():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

        yield "a", full
        yield "b", lambda: {"rows": 1}
        raise ValueError("no such rows")

    monkeypatch.setattr(accelerator_parts, "measures", lambda: {"step": parts})
    lines = []
    accelerator_parts.run("step", accelerator_parts.PartSizes(True), lines.append)
    found = {line["name"]: line["figures"] for line in lines if "name" in line}
    assert found["a"]["failed"].startswith("out of memory (") and found["b"] == {"rows": 1}
    assert found["all"] == {"failed": "ValueError: no such rows"}


@pytest.mark.faults
def test_a_kernel_that_fails_leaves_the_step_to_dense_attention(monkeypatch):
    """Too little memory is no such failure."""
    tried = []

    def fails(system, devices):
        tried.append(system.config.model.trunk.attention)
        raise RuntimeError("RESOURCE_EXHAUSTED: no room" if len(tried) == 1 else "cuDNN: no plan")

    monkeypatch.setattr(accelerator_parts, "make_trainer", fails)
    monkeypatch.setattr(accelerator_parts, "TINY_TRIES", ((4, "none"), (4, "dots"), (8, "full")))
    lines = []
    accelerator_parts.run("step", accelerator_parts.PartSizes(True, calls=1), lines.append)
    assert tried == ["auto", "auto", "dense"]
    failed = {line["name"]: line["figures"]["failed"] for line in lines if "failed" in line.get("figures", ())}
    assert failed["4 rows, remat none"].startswith("out of memory (") and "no plan" in failed["8 rows, remat full"]


def test_backends_are_held_against_the_reference(monkeypatch):
    """One that computes something else is found."""
    monkeypatch.setattr(backends, "packed_rows", backends.rows_of_paper)
    monkeypatch.setattr(backends, "BACKENDS", ("dense", "cudnn"))
    sizes = accelerator_parts.PartSizes(True, calls=1)
    (_, dense), (_, cudnn), (_, other), _ = list(backends.measure_backends(sizes))
    right = dense()
    assert right["equal"] and 0 < right["forward_difference"] < 0.01 and 0 < right["backward_difference"] < 0.01
    assert cudnn() == {"skipped": "it runs on NVIDIA GPUs, not on cpu"}
    real = backends.attended
    exact = lambda made: jnp.dtype(made.dtype) == jnp.float32
    wrong = lambda name, made, layout: lambda batch, q, *rest: real(name, made, layout)(batch, 1.1 * q, *rest)
    monkeypatch.setattr(backends, "attended", lambda n, made, lo: (real if exact(made) else wrong)(n, made, lo))
    assert not other()["equal"]


@pytest.mark.faults
def test_the_rehearsal_on_a_cpu(tmp_path, capsys):
    """Every part in a process of its own; without PyTorch that one is skipped."""
    assert tool.main(["bench", "--preset=accelerator", f"--json={tmp_path}/new/chip.json"]) == 0
    captured = capsys.readouterr()
    assert "no accelerator here: tiny sizes on the CPU" in captured.err
    found = json.loads((tmp_path / "new" / "chip.json").read_text())
    assert set(found) == {*accelerator.LIMITS, "ratio"}
    assert not [each for group in found.values() for each in group.values() if "failed" in each or "not_run" in each]
    assert all(found["attention"][f"{n}, packed rows"]["equal"] for n in ("dense", "splash"))
    step = found["step"]["8 rows, remat full"]
    assert step["tokens_per_second"] == pytest.approx(8 * 71 / step["seconds"]["median"])
    assert "mfu" not in step and 0 < step["mfu_of_measured"] < 1
    assert found["drawing"]["guided"]["images_per_second"] > 0 and found["decoding"]["greedy"]["tokens"] == 16
    assert found["encoders"]["image in bfloat16"]["dtype"] == "bfloat16"
    assert (tmp_path / "new" / "chip.md").read_text() in captured.out


@pytest.mark.faults
def test_the_peer_has_our_shape_and_mask():
    pytest.importorskip("torch")
    from src.tools.benchmarks import torch_step
    from src.tools.benchmarks.peers._step import Denoiser, Training

    config, _ = accelerator_parts.paper_config(accelerator_parts.PartSizes(True))
    config.batch = 2
    system = build_system(config)
    shape, (plan,) = torch_step.shape_of(system), system.tasks.values()
    read, write, group = plan.layout.static_orders()
    spec = plan.layout.spec(plan.task.fake(1, 0)).replace(segment=np.ones(shape.length, np.int32))
    np.testing.assert_array_equal(Denoiser(shape, False).mask.numpy(), visible(spec, spec))
    assert shape.length == plan.layout.length == read.size == write.size == group.size
    training = Training(shape, 2, "cpu", True, False)
    before = training.parameters[1].detach().clone()
    training.step()
    assert (training.parameters[1] != before).any() and training.figures()["parameters"] > 0
    assert math.isfinite(float(training.average[0].sum()))


def test_a_config_is_asked_for(capsys):
    assert tool.main(["bench"]) == 1
    assert "or --preset=accelerator" in capsys.readouterr().err
