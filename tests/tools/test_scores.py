"""From a trained run to scores: draw, go on after a stop, and score, with the pixels as features."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from src.evals.frechet import frechet_distance
from src.evals.scores import suite
from src.evals.scores.image_sets import ImageSet
from src.evals.scores.networks import FeatureNetwork
from src.evals.scores.statistics import Statistics, read_samples, write_statistics
from src.tools import scores
from tests.helpers.one_run import ROOT, Process

RNG = np.random.default_rng(0)
MADE, REAL = (RNG.integers(0, 256, (40, 4, 6, 3)).astype(np.uint8) for _ in range(2))


def flat(images):
    return images.reshape(len(images), -1) / 255


def run(capsys, *flags):
    code = scores.main(["scores", "--network=pixels", *flags])
    return code, capsys.readouterr()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "real").mkdir()
    for number, image in enumerate(REAL):
        Image.fromarray(image).save(tmp_path / f"real/{number:02d}.png")
    np.savez(tmp_path / "made.npz", MADE)
    return tmp_path


def test_scores_carry_what_they_depend_on(folder, capsys):
    flags = [f"--images={folder}/made.npz", f"--reference={folder}/real", f"--json={folder}/s.json"]
    code, told = run(capsys, *flags, "--metrics=fid,kid,precision_recall")
    assert code == 0, told.err
    report = json.loads((folder / "s.json").read_text())
    assert report["scores"]["fid"] == pytest.approx(frechet_distance(flat(MADE), flat(REAL)), rel=1e-6)
    assert set(report["scores"]) == {"fid", "kid", "kid_std", "precision", "recall"}
    assert report["images"]["count"] == report["reference"]["count"] == 40
    assert any("fewer than 2,048" in line for line in report["warnings"])
    assert "warning: 40 images are fewer" in told.out and f"written to {folder}/s.json" in told.out


def test_moments_of_a_file_stand_for_its_images(folder, capsys):
    assert run(capsys, f"--images={folder}/real", f"--write_statistics={folder}/real.npz")[0] == 0
    code, told = run(capsys, f"--images={folder}/made.npz", f"--reference={folder}/real.npz")
    expected = frechet_distance(flat(MADE), flat(REAL))
    assert code == 0 and float(told.out.split()[1]) == pytest.approx(expected, abs=1e-3)
    assert "left out: precision_recall needs real images" in told.err, "nothing is left out in silence"
    whole = f"--write_statistics={folder}/whole.npz"
    assert run(capsys, f"--images={folder}/real", whole, "--with_images")[0] == 0
    np.testing.assert_array_equal(np.load(folder / "whole.npz")["arr_0"], REAL)
    found = []
    for reference in ("whole.npz", "real"):
        flags = f"--images={folder}/made.npz", f"--reference={folder}/{reference}", f"--json={folder}/s.json"
        assert run(capsys, *flags, "--metrics=fid,kid,precision_recall")[0] == 0
        found.append(json.loads((folder / "s.json").read_text())["scores"])
    assert found[0] == pytest.approx(found[1], rel=1e-9), "one file stands for the folder"
    other = Statistics(np.zeros(72), np.eye(72))
    write_statistics(folder / "other.npz", other)
    arrays = dict(np.load(folder / "other.npz")) | {"arr_0": REAL}
    np.savez(folder / "adm.npz", **arrays)  # its moments count, and its images where rows are needed
    flags = f"--images={folder}/made.npz", f"--reference={folder}/adm.npz", f"--json={folder}/s.json"
    assert run(capsys, *flags, "--metrics=fid,precision_recall")[0] == 0
    found = json.loads((folder / "s.json").read_text())["scores"]
    assert found["fid"] > 10 * expected and 0 <= found["precision"] <= 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give --images"),
        (["--images={f}/made.npz", "--metrics=fid"], "fid compares with real images: give --reference"),
        (["--images={f}/made.npz", "--metrics=fib"], "--metrics has 'fib'; give some of fid, sfid"),
        (["--images={f}/made.npz", "--metrics=is"], "is needs logits features, which the network 'pixels' does not"),
        (["--images={f}/none.npz"], "does not exist"),
        (["--images={f}/empty"], "has no images"),
        (["--images={f}/mixed"], "is not 6 x 4 as .*cut all of them alike"),
        (["--images={f}/made.npz", "--reference={f}/other.npz"], r"of another network: mu \[2\]"),
        (["--images={f}/made.npz", "--network=inception"], "give --weights"),
        (["--images={f}/made.npz", "--network=inception", "--weights={f}/x.pth"], "does not exist: download"),
        (["--images={f}/made.npz", "--network=inception", "--weights={f}/made.npz"], "archive without data.pkl"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder, capsys, flags, told):
    (folder / "empty").mkdir()
    (folder / "mixed").mkdir()
    Image.new("RGB", (4, 6)).save(folder / "mixed/1.png")
    Image.new("RGB", (5, 6)).save(folder / "mixed/2.png")
    write_statistics(folder / "other.npz", Statistics(np.zeros(2), np.eye(2)))
    code, said = run(capsys, *(flag.format(f=folder) for flag in flags))
    assert code == 1 and said.err.count("\n") == 1 + said.err.count("left out: ")
    error = said.err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(told, error)


def test_features_that_are_not_finite_end_it_with_the_number_of_the_image():
    network = FeatureNetwork({"name": "x"}, {"pool": 2}, lambda b: {"pool": np.where(b[:, 0, 0, :2] == 7, np.nan, 1.0)})
    images = ImageSet({}, lambda: iter([np.full((3, 1, 1, 3), value, np.uint8) for value in (1, 7)]))
    with pytest.raises(ValueError, match="features of image 3 are not finite: the network's file is damaged"):
        suite.look(images, network, ["fid"])


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_job_that_is_killed_goes_on_with_the_images_of_one_that_was_not(tmp_path):
    config = "configs/sit_digits.py:debug"
    with Process(tmp_path, "--config.steps=4", config=config) as trained:
        assert trained.wait() == 0, trained.said()
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "src.tools.draw", f"--config={config}", f"--workdir={trained.workdir}"]
    command += ["--count=50", "--rows=8", "--config.steps=4"]

    def draw(out, *more, stop=False):
        job = subprocess.Popen([*command, f"--out={tmp_path}/{out}", *more], cwd=ROOT, env=env, stderr=subprocess.PIPE)
        said = ""
        for line in job.stderr:
            said += line.decode()
            if stop and "16 of 50 images" in said:
                job.kill()
        return job.wait(), said

    assert draw("whole", f"--npz={tmp_path}/all.npz")[0] == 0
    code, _ = draw("parts", stop=True)
    assert code == -9 and not (tmp_path / "parts/00006.npz").exists()
    assert draw("parts")[0] == 0
    for number in range(7):
        whole, parts = (np.load(tmp_path / f"{name}/{number:05d}.npz") for name in ("whole", "parts"))
        np.testing.assert_array_equal(whole["arr_0"], parts["arr_0"])
        np.testing.assert_array_equal(whole["arr_1"], (np.arange(number * 8, min(number * 8 + 8, 50)) % 10))
    assert sum(map(len, read_samples(tmp_path / "all.npz"))) == 50
    code, said = draw("parts", "--config.guidance.scale=3")
    assert code == 1 and "holds other images (guidance" in said and "give another --out" in said

    # Two processes of one device each draw the same images together, but for roundings.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    both = [*command, f"--out={tmp_path}/both"]
    pair = [subprocess.Popen(both, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(index)}) for index in range(2)]
    assert [job.wait(300) for job in pair] == [0, 0]
    for number in range(7):
        whole, parts = (np.load(tmp_path / f"{name}/{number:05d}.npz") for name in ("whole", "both"))
        assert np.abs(whole["arr_0"].astype(int) - parts["arr_0"]).max() <= 1
        np.testing.assert_array_equal(whole["arr_1"], parts["arr_1"])
