"""The command line, as a person uses it: train, resume, sample, and what it says when something is wrong."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from src import main, run
from src.tools import report
from src.train.checkpoints.read_params import CheckpointParams
from src.train.goodput import PARTS
from src.train.trainer import Trainer
from tests.helpers.compiling import ENVIRONMENT

ROOT = pathlib.Path(__file__).parents[1]


def command(*arguments, **environment):
    """A fresh process on one device, as a user has it; compiling takes longer than running here."""
    env = os.environ | ENVIRONMENT | environment
    return subprocess.run(
        [sys.executable, "-m", "src.main", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280
    )


def call(capsys, monkeypatch, *arguments):
    """The same in this process, on its eight devices: (exit code, standard error)."""
    argv = ["main", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", argv)  # config flags look for their overrides there
    for name in [n for n in main.FLAGS if n.startswith("config.")]:
        delattr(main.FLAGS, name)
    plain = "config workdir mode given prompt prompts image label task count output format step profile"
    for name in plain.split():
        main.FLAGS[name].unparse()
    main.FLAGS.unparse_flags()
    code = main.main(argv)
    return code, capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished debug run."""
    folder = tmp_path_factory.mktemp("run")
    result = command("--config=configs/digits.py:debug", f"--workdir={folder}", "--config.optim.lr=1e-3")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_training_leaves_metrics_pictures_and_logs(trained):
    folder, result = trained
    assert json.loads((folder / "cpu_devices.json").read_text())["cpu_devices"] >= 1, "for a run that goes on"
    metrics = json.loads((folder / "metrics.json").read_text())
    expected = "digit_accuracy caption_accuracy text_accuracy judge_accuracy frechet_distance frechet_floor"
    expected += " fdpx fdpx_at_held_out fdpx_floor_held_out fdpx_floor_patches"
    expected += " seconds_to_first_step seconds_total parameters steps goodput goodput/steps goodput/compile"
    assert set(expected.split()) <= set(metrics) and metrics["steps"] == 8
    for key in expected.split():
        assert key in result.stdout
    pictures = list((folder / "samples").glob("*.png"))
    assert pictures and all(Image.open(p).size[0] > 100 for p in pictures)
    assert list((folder / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    told = {"step": 8, "ema": True, "seed": 0, "config": "configs/digits.py:debug", "overrides": {"optim.lr": 1e-3}}
    how = metrics["how"]["digit_accuracy"]
    assert {name: how[name] for name in told} == told and "parameters" not in metrics["how"]
    assert how["guidance"]["scale"] == 1.5 and how["decode"]["image"]["steps"] == 2
    assert how["samplers"]["image"] == {"name": "gaussian:Euler"} and how["evaluators"]["digits"]["images"] == 20
    assert how["weights"] == CheckpointParams(folder / "checkpoints" / "8", average=True).weights
    assert [line["step"] for line in losses] == [1, 2, 4, 6, 8]
    assert {"loss/caption_to_image/diffusion/mse", "tokens_per_second", "images_per_second"} <= set(losses[0])
    assert all({"step_seconds", "process_memory_gib", "goodput", "goodput/steps"} <= set(line) for line in losses)
    assert sum(metrics[f"goodput/{part}"] for part in (*PARTS, "lost")) == pytest.approx(
        metrics["seconds_total"], rel=0.02
    )
    assert losses[0]["learning_rate"] == pytest.approx(5e-4), "an override on the command line counts"
    assert "step 8/8" in result.stderr and "left" in result.stderr
    said = [line for line in result.stderr.splitlines() if "doctor: " in line]
    assert len(said) == 2 and all(line.startswith("I") for line in said), "two notes on a healthy run, no warning"


def test_a_report_has_every_score_with_its_setting(trained, tmp_path):
    folder, _ = trained
    assert report.main(["report", f"--workdir={folder}", f"--out={tmp_path}"]) == 0
    (told,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    scores = {score["name"]: score for score in told["scores"]}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert scores["digit_accuracy"]["value"] == metrics["digit_accuracy"] and set(scores) == set(metrics["how"])
    last = told["facts"]["checkpoints"]["8"]
    assert all(score["setting"]["weights"] == last["average"] != last["last"] for score in told["scores"])
    assert told["samples"]["eval-samples"][0] == 8 and told["time"]["goodput/steps"] > 0
    assert [text for text in told["missing"] if "plots" not in text] == []


def test_sampling_writes_pictures_and_text(trained, tmp_path, capsys, monkeypatch):
    folder, _ = trained
    base = ["--config=configs/digits.py:debug", f"--workdir={folder}", "--mode=sample", "--config.optim.lr=1e-3"]
    picture = tmp_path / "three.png"
    assert call(capsys, monkeypatch, *base, "--prompt=a handwritten three", f"--output={picture}")[0] == 0
    eight = np.asarray(Image.open(picture))
    same = [*base, "--given=prompt=a handwritten three", "--task=caption_to_image", f"--output={picture}"]
    assert call(capsys, monkeypatch, *same)[0] == 0
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), eight)
    assert call(capsys, monkeypatch, *same, "--count=2")[0] == 0
    assert eight.std() > 0 and np.asarray(Image.open(picture)).shape[1] < eight.shape[1] / 3
    image = tmp_path / "digit.png"
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(image)
    assert call(capsys, monkeypatch, *base, f"--image={image}")[0] == 0
    assert call(capsys, monkeypatch, *base, f"--given=image={image}", "--given=prompt=a")[0] == 0


def test_mistakes_of_sampling_are_told_before_parameters_are_read(trained, tmp_path, capsys, monkeypatch):
    folder, _ = trained
    base = ["--config=configs/digits.py:debug", f"--workdir={folder}", "--mode=sample"]
    image = tmp_path / "digit.png"
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(image)
    monkeypatch.setattr(run, "restore_checkpoint", None)
    for wrong, said in (
        ([], "--mode=sample needs something to start from"),
        (["--prompt=a", "--count=0"], "--count=0"),
        (["--prompt=a", "--format=jpg"], "--format=jpg has 'jpg'"),
        (["--prompt=a", f"--prompts={image}"], "the prompt is given twice"),
        ([f"--prompts={image}"], "line 1 is no UTF-8 text"),
        (["--given=three"], "--given=three is no name=value"),
        (["--prompt=a", "--given=prompt=b"], "prompt is given twice"),
        (["--label=3"], "no task starts from --label: caption_to_image from --prompt"),
        (
            ["--task=number_sentences", f"--image={image}"],
            "number_sentences starts from --prompt and --given masked=…, not --image",
        ),
        (["--given=caption=3", f"--given=image={image}"], "task caption_to_image generates image"),
        (["--prompt=a", "--grid=2x8"], "--grid=2x8 is no bucket of task caption_to_image; it has none"),
        (["--task=poems", "--prompt=a"], "there is no task 'poems'"),
        (["--prompt=a handwritten Ω"], "'Ω'"),
        ([f"--image={folder / 'metrics.json'}"], "is not an image that can be read"),
    ):
        code, error = call(capsys, monkeypatch, *base, *wrong)
        assert code == 1 and said in error and "\n" not in error, error


@pytest.mark.parametrize(
    "arguments, match",
    [
        ([], "no config is given"),
        (["--config=configs/digits.py:debug"], "no workdir is given"),
        (["--config=configs/digits.py:debug", "--workdir="], "no workdir is given"),
        (["--config=configs/digits.py:debug", "--workdir= ", "--mode=eval"], "no workdir is given"),
        (["--config=configs/digit.py", "--workdir=x"], "there is no config file 'configs/digit.py'"),
        (["--config=configs/digits.py:debgu", "--workdir=x"], "config variant debgu is unknown"),
        (["--config=configs/digits.py:debug", "--workdir=x", "--config.optim.lrr=1"], "no such field: lrr"),
        (["--config=configs/digits.py:debug", "--workdir=x", "--config.sample.batch_size=0"], "batch_size=0; it must"),
        (["--config=configs/digits.py:debug", "--workdir=x", "--config.seed=-1"], "seed=-1; it must be at least 0"),
        (["--config=configs/digits.py:debug", "--workdir=x", "--config.optim.lr=fast"], "fast"),
        (["--config=configs/digits.py:debug", "--workdir={new}", "--profile=x:2"], "--profile=x:2 is no STEP or STEP:"),
        (["--config=configs/digits.py:debug", "--workdir={new}", "--profile=9"], "begins after the last step, 8"),
        (["--config=configs/digits.py:debug", "--workdir={run}", "--mode=eval", "--profile=3"], "is for --mode=train"),
        (["--config=configs/digits.py:debug", "--workdir=/proc/nowhere"], "workdir /proc/nowhere cannot be written"),
        (["--config=configs/digits.py:debug", "--workdir={file}"], "cannot be written"),
        (["--config=configs/digits.py:debug", "--workdir={new}", "--config.mesh.data=3"], "does not fit 8 cpu devices"),
        (["--config=configs/digits.py:debug", "--workdir={new}", "--mode=eval"], "there is no checkpoint in"),
        (["--config=configs/digits.py:debug", "--workdir={run}"], "optim.lr: 0.001 -> 0.004"),
        (
            ["--config=configs/digits.py:debug", "--workdir={run}", "--config.model.trunk.width=16"],
            "model.trunk.width: 32 -> 16",
        ),
        (
            [
                *("--config=configs/imagenet256.py:debug", "--workdir={new}"),
                "--config.tasks.class_prompt_to_image.source.folder=data/nowhere",
            ],
            "does not exist",
        ),
    ],
)
def test_each_mistake_is_one_sentence_and_nothing_is_overwritten(
    trained, tmp_path, capsys, monkeypatch, arguments, match
):
    folder, _ = trained
    (tmp_path / "file").write_text("not a folder")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    places = {"file": tmp_path / "file", "new": tmp_path / "new", "run": folder}
    code, error = call(capsys, monkeypatch, *[a.format(**places) for a in arguments])
    last = error.splitlines()[-1]
    assert code == 1 and match in last and last.startswith("error: "), error
    assert "Traceback" not in error
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.faults
def test_a_finished_run_is_evaluated_again_and_keeps_what_training_measured(trained):
    folder, _ = trained
    before = json.loads((folder / "metrics.json").read_text())
    result = command("--config=configs/digits.py:debug", f"--workdir={folder}", "--config.optim.lr=1e-3")
    assert result.returncode == 0, result.stderr
    after = json.loads((folder / "metrics.json").read_text())
    assert after == before


@pytest.mark.faults
def test_an_evaluation_with_overrides_says_so_beside_its_numbers(trained, capsys, monkeypatch):
    folder, _ = trained
    base = ["--config=configs/digits.py:debug", f"--workdir={folder}", "--config.optim.lr=1e-3", "--mode=eval"]
    assert call(capsys, monkeypatch, *base, "--config.guidance.scale=3.0", "--config.eval.ema=False")[0] == 0
    written = json.loads((folder / "metrics.json").read_text())
    told = written["how"]["digit_accuracy"]
    assert told["overrides"] == {"optim.lr": 1e-3, "guidance.scale": 3.0, "eval.ema": False}
    assert told["trained_with"] == {"eval.ema": True, "guidance.scale": 1.5} and not told["ema"]
    log = (folder / "log.jsonl").read_text().replace("\\", "")
    assert "seconds_total" in written and '"guidance.scale": 3.0' in log


def test_evaluators_of_image_scores_come_from_the_config(trained, tmp_path, capsys, monkeypatch):
    folder, _ = trained
    scores = {"name": "image_scores", "draw": "caption_to_image", "network": "pixels", "count": 12}
    (tmp_path / "scored.py").write_text(
        "from configs import digits\n\ndef get_config(name=None):\n    config = digits.get_config('debug')\n"
        f"    config.eval.evaluators = {{'pixels': {scores | {'reference': 'test'}}}}\n    return config\n"
    )
    base = [f"--config={tmp_path}/scored.py", f"--workdir={folder}", "--config.optim.lr=1e-3", "--mode=eval"]
    assert call(capsys, monkeypatch, *base)[0] == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    measured = metrics["how"]["fid"]["measured"]
    assert metrics["fid"] > 0 and measured["network"] == {"name": "pixels"} and measured["count"] == 12
    assert measured["reference"] == {"source": "Digits", "split": "test", "count": 360}
    assert "digit_accuracy" in metrics, "what was not measured again stays"
    monkeypatch.setattr(run, "restore_checkpoint", None)  # mistakes are told before parameters are read
    lost = f"--config.eval.evaluators.pixels.reference={tmp_path}/none.npz"
    code, error = call(capsys, monkeypatch, *base, lost)
    assert code == 1 and error.splitlines()[-1].startswith("error: eval.evaluators.pixels: the archive")


def test_the_launcher_takes_a_config_with_overrides():
    """Its defaults must not stand beside flags of the same name."""

    def words(*arguments):
        command = ["bash", str(ROOT / "launch" / "local.sh"), "--dry-run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return shlex.split(done.stdout.splitlines()[-1])[1:]

    assert words() == ["-m", "src.main", "--config=configs/digits.py", "--workdir=runs/digits"]
    assert words("--config=a.py", "--config.optim.lr=1")[2:] == [
        "--workdir=runs/digits",
        "--config=a.py",
        "--config.optim.lr=1",
    ]
    assert words("--workdir=x", "--config.seed=1")[2:] == [
        "--config=configs/digits.py",
        "--workdir=x",
        "--config.seed=1",
    ]


def test_tensorflow_and_torch_stay_out():
    code = "import src.main, src.run, sys; assert not {'tensorflow', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_doctor_finds_bad_data_before_anything_is_compiled_or_written(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "images.npy", np.full((16, 32, 32, 4), np.nan, np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(16, np.int64))
    before = sorted(tmp_path.iterdir())
    arguments = ["--config=configs/sit_xl2_imagenet256.py:arrays,debug", "--config.mesh.fsdp=1", "--config.batch=8"]
    arguments += [f"--config.tasks.class_to_image.source.folder={tmp_path}", "--mode=doctor"]
    monkeypatch.setattr(Trainer, "compile", None)
    code, error = call(capsys, monkeypatch, *arguments)
    said = "error: the doctor found 1 error(s), listed above; the first: image of task class_to_image has NaN"
    assert code == 1 and error.splitlines()[-1].startswith(said), error
    assert sorted(tmp_path.iterdir()) == before
