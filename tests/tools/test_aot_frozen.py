"""Frozen networks in the report of a step and in the doctor: the bytes that live arrays have, times that add up."""

import contextlib
import gc
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from src.codecs.vision import Clip, Pixels

from configs import common, imagenet256
from src.build import build_system
from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import write_vae
from src.codecs.vae_latents import Latents
from src.common.tree import count_parameters
from src.doctor import memory
from src.tools import aot
from src.tools.compile import programs, text
from src.tools.compile import report as reports
from src.tools.compile.chips import GIB
from src.tools.compile.topology import open_topology
from src.train.trainer import Trainer, make_trainer, open_data

TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)  # one latent for 2 x 2 pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny autoencoder, and sixteen pictures with captions."""
    folder = tmp_path_factory.mktemp("frozen")
    draw = lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32)
    write_vae(folder / "vae", Vae(TINY), jax.tree.map(draw, Vae(TINY).shapes()))
    (folder / "pictures").mkdir()
    for i in range(16):
        Image.new("RGB", (20, 16), (i, 2 * i, 3 * i)).save(folder / "pictures" / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "caption": f"picture {i}"}) for i in range(16)]
    (folder / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    return folder


def config_of(folder, vae="vae", **codec):
    config = common.base()
    config.text_codec.name = "text:Bytes"
    data = {"name": "pictures:CaptionToImage", "folder": str(folder / "pictures"), "size": 16, "length": 16}
    config.tasks = {"draw": {"share": 1.0, "data": data, "objectives": {"diffusion": common.diffusion()}}}
    with config.unlocked():
        config.image_codec = {"name": "vae_latents", "path": str(folder / vae), "factor": 2, "rows": 2} | codec
    config = common.debug(config)
    config.batch = 16
    return config


@pytest.fixture(scope="module")
def trainer(folder):
    """One, so that the encoder compiles once: what is lowered ahead is the program that then runs."""
    return make_trainer(build_system(config_of(folder)))


def on_a_device(device):
    """Bytes of all arrays there; a part of an array that was looked at is an array, too."""
    gc.collect()
    shards = (s.data for a in jax.live_arrays() for s in a.addressable_shards if s.device == device)
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())


def test_the_report_has_the_bytes_of_live_arrays_and_the_time_of_both_programs(folder, trainer, monkeypatch):
    step = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))  # nothing slow to compile
    monkeypatch.setattr(Trainer, "lower", lambda self: step)
    monkeypatch.setattr(reports, "make_trainer", lambda system, devices: trainer)
    topology, encoders = open_topology("cpu", "8"), {}
    report = reports.train_report(config_of(folder), topology, GIB, encoders)
    part, held = report["encoding"]["memory"], report["memory"]
    for found in (part, held):
        assert found["total"] == sum(v for k, v in found.items() if k not in ("total", "hbm", "fits", "shortfall"))
    assert held["frozen networks"] == part["frozen networks"] and held["next batch"] == part["batch"]
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
    assert there == 2 * [part["frozen networks"] + part["batch"]]
    assert part["next batch, delivered"] == sum(np.asarray(a).nbytes for a in jax.tree.leaves(rows)) // 8
    assert part["frozen networks"] < sum(a.nbytes for a in jax.tree.leaves(trainer.system.frozen.read())), "no decoder"
    del batch
    again = reports.train_report(config_of(folder), topology, 2e-4 * GIB, encoders)
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
    assert report["memory"]["frozen networks"] == report["encoding"]["memory"]["frozen networks"] > 2**24
    assert report["fits"] and shown.count("roofline:") == 2


def test_networks_without_folders_are_those_that_were_published():
    codec, told = Latents("nowhere").sketch()
    shapes = codec.shapes()
    assert count_parameters(shapes) == 83_653_863 and "128, 256, 512, 512 channels" in told
    parts = [codec.needed(shapes, [(8, 256, 256, c)]) for c in (3, 8, 4)]
    assert [count_parameters(part) for part in parts] == [34_163_664, 0, 0]
    tower, told = Clip("nowhere").sketch()
    assert count_parameters(tower.needed(tower.shapes(), [(8, 224, 224, 3)])) == 303_179_776
    assert "24 blocks of 1024, patches of 14" in told and tower.needed(tower.shapes(), []) == {}
    assert Pixels(8, 4).sketch()[1] == ""
    with pytest.raises(ValueError, match=r"image_codec\.factor=6 is no power of two"):
        Latents("nowhere", factor=6).sketch()


def test_the_doctor_counts_them_too(trainer, monkeypatch):
    need = memory.check_encoding(trainer)
    own = sum(np.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(trainer.frozen_shapes()))
    state = sum(np.prod(leaf.shape, dtype=int) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract))
    assert need > own + state  # nothing so small is split
    monkeypatch.setattr(memory, "room", lambda: 8 * need - 1)
    with pytest.raises(ValueError, match=r"encoding images before a step takes .* lower image_codec\.rows"):
        memory.check_encoding(trainer)
    paper, pixels = (build_system(imagenet256.get_config(name)) for name in ("paper", "paper,pixels"))
    assert (paper.frozen_bytes(), pixels.frozen_bytes()) == (0, 4 * 34_163_664)
    with pytest.raises(ValueError, match=r"21\.9 GiB \(1\.0 of it frozen networks\)"):
        memory.check_state(pixels)
