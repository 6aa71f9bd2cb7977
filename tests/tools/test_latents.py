"""Moments in shards: those that the autoencoder gives, resumed after a stop, read back, and refused by another one."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from src.build import build_system
from src.codecs.pixels import Pixels
from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import read_vae, write_vae
from src.common.files.images import read_image
from src.data import prepare
from src.data.example import BadRow
from src.data.sources.image_folders import ImageFolders
from src.data.sources.records import Records
from src.tools import latents
from src.tools import prepare as prepare_tool
from src.train.trainer import make_trainer, open_data
from tests.helpers import formats

TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)  # one latent for 2 x 2 pixels
SIZE = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tiny autoencoders, 20 pictures of which one is broken, and their moments."""
    folder = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for seed in (0, 1):
            write_vae(folder / f"vae{seed}", Vae(TINY), Vae(TINY).init(jax.random.key(seed)))
        images, names = formats.make_imagenet(folder)
        (images / "n02012849" / "n02012849_1.JPEG").write_bytes(b"broken")
        flags = ["latents", "--source=image_folders", f"--set=folder={images}", f"--set=names={names}"]
        flags += [f"--vae={folder}/vae0", f"--size={SIZE}", "--rows=8", "--batch=1", f"--out={folder}/moments"]
        # The second shard fails once, as if the process had been ended there.
        part, failed = prepare._part, []

        def ending(*arguments):
            if arguments[-1] == 1 and not failed:
                failed.append(1)
                raise OSError("ended")
            return part(*arguments)

        patch.setattr(prepare, "_part", ending)
        assert latents.main(flags) == 1 and (folder / "moments" / "parts").is_dir()
        before = (folder / "moments" / "00000.arrayrecord").stat().st_mtime_ns
        assert latents.main(flags) == 0
        assert (folder / "moments" / "00000.arrayrecord").stat().st_mtime_ns == before, "a finished shard stays"
        yield folder


def test_moments_are_those_of_the_autoencoder(files):
    manifest = json.loads((files / "moments" / "manifest.json").read_text())
    vae, params = read_vae(files / "vae0")
    image = {"size": SIZE, "format": "moments", "dtype": "float16", "shape": [4, 4, 8]}
    assert manifest["schema"]["image"] == image | {"codec": vae.latents_hash(params)}
    assert (manifest["rows"], manifest["bad_rows"]) == (19, 1)
    assert "n02012849_1.JPEG" in (files / "moments" / "skipped.jsonl").read_text()
    images = ImageFolders(files / "train", names=files / "names.json")
    seen, made, place = [], Records(files / "moments", moments=True), 0
    for number in range(len(images)):
        try:
            want = images[number]
            pixels = Pixels(SIZE, SIZE).encode(read_image(want["image"], channels=3))
        except (BadRow, ValueError, OSError):
            continue
        have = made[place]
        moments = np.concatenate(vae.moments(params, jnp.asarray(pixels[None] / 127.5 - 1, jnp.float32)), axis=-1)
        found = np.frombuffer(have["image"], "<f2").reshape(4, 4, 8)
        np.testing.assert_allclose(found, moments[0], atol=2e-3 * np.abs(moments).max())
        assert have["label"] == want["label"]
        seen.append(have["image"])
        place += 1
    assert place == len(made) and len(set(seen)) == place


def config_of(files, codec="vae0", moments=True):
    config = common.base()
    image = common.image(SIZE, SIZE, 3)
    if codec:
        image["codec"]["frozen"] = {"name": "vae_latents", "path": str(files / codec), "factor": 2}
    config.fields = {"image": image, "label": common.label(5)}
    config.tasks = {
        "draw": {
            "weight": 1.0,
            "source": {"name": "records", "folder": str(files / "moments"), "moments": moments},
            "template": {"name": "class_label"},
            "objectives": {"diffusion": common.diffusion()},
        }
    }
    config = common.debug(config)
    config.batch, config.mesh.data = 8, 1
    return config


def test_training_draws_from_moments_and_refuses_those_of_another_codec(files):
    trainer = make_trainer(build_system(config_of(files)), jax.devices()[:1])
    data = open_data(trainer)
    rows = next(data)
    first, second = (np.asarray(trainer.place(rows, step)["draw"].tokens["image"].value) for step in (0, 1))
    assert first.shape == (8, 4, 4, 4) and np.abs(first - second).max() > 1e-3
    data.close()
    with pytest.raises(ValueError, match="latents of another autoencoder"):
        open_data(make_trainer(build_system(config_of(files, "vae1")), jax.devices()[:1]))
    with pytest.raises(ValueError, match=r"tasks\.draw.*fields\.image\.codec"):
        build_system(config_of(files, ""))
    with pytest.raises(ValueError, match=r"tasks\.draw.*moments"):
        open_data(make_trainer(build_system(config_of(files, moments=False)), jax.devices()[:1]))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--vae="], "give --vae"),
        (["--size=7"], "--size=7 is no multiple of 2"),
        (["--vae=nowhere"], "nowhere"),
        (["--buckets=8x8,4x"], "--buckets=8x8,4x is no list of sides: write"),
        (["--buckets=4x16,8x8"], "the first of the buckets is 4 x 16 pixels: give"),
        (["--size=8", "--buckets=16x16,8x32"], "the first of the buckets is 16 x 16 pixels: give --size=16"),
        (["--buckets=6x6,4x9"], "a bucket of 4 x 9 pixels is no multiple of 2"),
        (["--buckets=8x8,4x8"], "with one product"),
    ],
)
def test_what_cannot_be_encoded_is_one_sentence(files, tmp_path, capsys, flags, words):
    source = ["--source=image_folders", f"--set=folder={files}/train", f"--set=names={files}/names.json"]
    given = [*source, f"--vae={files}/vae0", f"--out={tmp_path}/out", *flags]
    assert latents.main(["latents", *given]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and words in said
    assert not pathlib.Path(tmp_path, "out", "manifest.json").exists()


def test_the_report_ends_with_the_files(files, tmp_path, capsys):
    source = ["--source=image_folders", f"--set=folder={files}/train", f"--set=names={files}/names.json"]
    assert prepare_tool.main(["prepare", *source, f"--out={tmp_path}/out", "--processes=1"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"; 1 bad row is in {tmp_path}/out/skipped.jsonl\n  1 file: the image cannot be read\n"), said


def test_what_was_begun_in_another_precision_or_holds_other_files_is_not_mixed(files, tmp_path, capsys, monkeypatch):
    def stopped(*arguments):
        raise OSError("ended")

    monkeypatch.setattr(prepare, "_part", stopped)
    source = ["--source=image_folders", f"--set=folder={files}/train", f"--set=names={files}/names.json"]
    given = ["latents", *source, f"--vae={files}/vae0", f"--size={SIZE}", "--batch=1"]
    for flags, words in (
        ([f"--out={tmp_path}/out"], "ended"),
        ([f"--out={tmp_path}/out", "--dtype=bfloat16"], "begun with another precision ('float32', now 'bfloat16')"),
        ([f"--out={tmp_path}/out", "--dtype=float32"], "ended"),
        ([f"--out={files}/train"], "has other files already (n01440764"),
        ([f"--out={files}/moments"], "has shards already"),
    ):
        before = sorted(files.rglob("*"))
        assert latents.main([*given, *flags]) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and words in said
        assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize("tool, flags", [(latents, ["--vae={}/vae0", "--size=8"]), (prepare_tool, ["--nocheck"])])
def test_moments_are_not_encoded_or_written_anew(files, tmp_path, capsys, tool, flags):
    source = ["--source=records", f"--set=folder={files}/moments", "--set=moments=true"]
    given = [*source, f"--out={tmp_path}/out", *(flag.format(files) for flag in flags)]
    assert tool.main(["tool", *given]) == 1
    assert "has moments of latents, which are shards already" in capsys.readouterr().err
