"""Frozen networks in the report of a step and in the doctor: the bytes that live arrays have, times that add up."""

import contextlib
import gc
import json
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet256
from src.build import build_system
from src.codecs.clip_vision import ClipVision
from src.codecs.vae_latents import VaeLatents
from src.common.tree import count_parameters
from src.doctor import memory
from src.tools import aot
from src.tools.compile import programs, text
from src.tools.compile import report as reports
from src.tools.compile.chips import GIB
from src.tools.compile.topology import open_topology
from src.train.trainer import Trainer, make_trainer, open_data
from tests.helpers.autoencoder import config_of, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("frozen"), 16)


@pytest.fixture(scope="module")
def trainer(folder):
    """One, so that the encoder compiles once: what is lowered ahead is the program that then runs."""
    return make_trainer(build_system(config_of(folder, 16)))


def on_a_device(device):
    """Bytes of all arrays there; a part of an array that was looked at is an array, too."""
    gc.collect()
    shards = (s.data for a in jax.live_arrays() for s in a.addressable_shards if s.device == device)
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())


@pytest.mark.faults
def test_the_report_has_the_bytes_of_live_arrays_and_the_time_of_both_programs(folder, trainer, monkeypatch):
    step = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))  # nothing slow to compile
    monkeypatch.setattr(Trainer, "lower", lambda self: step)
    monkeypatch.setattr(reports, "make_trainer", lambda system, devices: trainer)
    topology, encoders = open_topology("cpu", "8"), {}
    report = reports.train_report(config_of(folder, 16), topology, GIB, encoders)
    part, held = report["encoding"]["memory"], report["memory"]
    for found in (part, held):
        assert found["total"] == sum(v for k, v in found.items() if k not in ("total", "hbm", "fits", "shortfall"))
    assert held["frozen encoders"] == part["frozen encoders"] and held["next batch"] == part["batch"]
    assert part["optimizer"] == held["optimizer"] > 0 and part["temporaries"] > 0
    assert part["padding and other arguments"] <= 64, "its arguments are the networks and the batch"
    best, worst = (sum(p["roofline"][case] for p in programs.programs(report)) for case in ("best", "worst"))
    assert report["predicted"]["best"]["images_per_second"] == pytest.approx(16 / best)
    assert report["predicted"]["worst"]["days"] == pytest.approx(report["steps"] * worst / 86_400)
    work = report["encoding"]["flops"]
    assert work["passes_per_device"] == 6 * work["program_per_device"] > 0

    with contextlib.closing(open_data(trainer)) as data:
        rows = next(data)
    devices = jax.devices()[0], jax.devices()[3]
    before = [on_a_device(device) for device in devices]
    batch = trainer.place(rows, 0)
    there = [on_a_device(device) - bytes for device, bytes in zip(devices, before, strict=True)]
    assert there == 2 * [part["frozen encoders"] + part["batch"]]
    assert part["next batch, raw"] == sum(np.asarray(a).nbytes for a in jax.tree.leaves(rows)) // 8
    assert part["frozen encoders"] < sum(a.nbytes for a in jax.tree.leaves(trainer.system.encoders.read())), (
        "no decoder"
    )
    del batch
    again = reports.train_report(config_of(folder, 16), topology, 2e-4 * GIB, encoders)
    assert len(encoders) == 1 and not programs.fits(again) and report["memory"]["fits"]
    assert programs.peak(again) == max(part["total"], held["total"]) and "DOES NOT FIT" in text.describe(again, "")


@pytest.mark.faults
def test_the_tool_without_the_folder(capsys):
    root = pathlib.Path(__file__).parents[2] / "configs" / "imagenet256.py"
    flags = [f"--config={root}:pixels,debug", "--platform=cpu", "--topology=8", "--json"]
    assert aot.main(["aot", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    shown = text.describe(report, "")
    assert "no folder 'data/sd-vae': an AutoencoderKL of 128, 256 channels is assumed" in shown
    assert report["memory"]["frozen encoders"] == report["encoding"]["memory"]["frozen encoders"] > 2**24
    assert report["fits"] and shown.count("roofline:") == 2


def test_networks_without_folders_are_those_that_were_published():
    pixels = SimpleNamespace(shape=(256, 256, 3))
    codec, told = VaeLatents("nowhere", pixels).sketch()
    shapes = codec.shapes()
    assert count_parameters(shapes) == 83_653_863 and "128, 256, 512, 512 channels" in told
    parts = [codec.needed(shapes, [shape]) for shape in ((256, 256, 3), (32, 32, 8), (32, 32, 4))]
    assert [count_parameters(part) for part in parts] == [34_163_664, 0, 0]
    tower, told = ClipVision("nowhere").sketch()
    assert count_parameters(tower.needed(tower.shapes(), [(224, 224, 3)])) == 303_179_776
    assert "24 blocks of 1024, patches of 14" in told and tower.needed(tower.shapes(), []) == {}
    with pytest.raises(ValueError, match=r"vae_latents has factor=6, no power of two"):
        VaeLatents("nowhere", SimpleNamespace(shape=(252, 252, 3)), factor=6).sketch()


def test_the_doctor_counts_them_too(trainer, monkeypatch):
    need = memory.check_encoding(trainer)
    own = sum(np.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(trainer.encoder_shapes()))
    state = sum(np.prod(leaf.shape, dtype=int) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract))
    assert need > own + state  # nothing so small is split
    monkeypatch.setattr(memory, "free_memory", lambda: 8 * need - 1)
    with pytest.raises(
        ValueError, match=r"encoding before a step takes .* lower fields\.image\.codec\.frozen\.rows, or batch"
    ):
        memory.check_encoding(trainer)
    paper, pixels = (build_system(imagenet256.get_config(name)) for name in ("paper", "paper,pixels"))
    assert (paper.encoder_bytes(), pixels.encoder_bytes()) == (0, 4 * 34_163_664)
    with pytest.raises(ValueError, match=r"21\.9 GiB \(1\.0 of it frozen encoders\)"):
        memory.check_state(pixels)
