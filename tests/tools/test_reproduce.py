"""The ablations: means with standard errors, what is no difference, and a command that repeats nothing."""

import json
import math

import numpy as np
import pytest

from configs import ablations_digits
from src.build import build_system
from src.common.files.lazy_arrays import LazyArrays
from src.models.pretrained.initial_weights import Initial
from src.models.pretrained.llama_weights import TABLE
from src.tools import reproduce
from src.tools.conversion import convert as conversion
from src.tools.reports import ablations, jobs, plots
from src.tools.reports.ablations import ARMS
from src.tools.reports.run_files import read_curves
from src.train.checkpoints.config_changes import fields, plain
from tests.helpers import published
from tests.helpers.one_run import ROOT

LOWER, HIGHER = ablations.Measure("x", "x", False), ablations.Measure("x", "x", True)


def test_a_difference_is_one_above_two_standard_errors():
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, second = rng.normal(0, 1, 3), rng.normal(rng.uniform(-4, 4), 1, 3)
        found = ablations.compare(LOWER, first.tolist(), second.tolist(), ("one", "two"))
        error = math.sqrt(first.var(ddof=1) / 3 + second.var(ddof=1) / 3)
        assert math.isclose(found.error, error) and math.isclose(found.difference, first.mean() - second.mean())
        apart = abs(found.difference) > 2 * error
        better = "one" if found.difference < 0 else "two"
        assert found.verdict == (f"{better} is better" if apart else "no difference")
    same = ablations.compare(HIGHER, [1.0, 1.0], [1.0, 1.0], ("one", "two"))
    assert same.verdict == "no difference" and ablations.compare(HIGHER, [2.0, 2.1], [1.0, 1.1], "ab").verdict[0] == "a"
    assert ablations.compare(HIGHER, [1.0], [0.0], ("one", "two")).verdict == "one seed"


def test_an_arm_differs_from_the_base_in_one_thing():
    def options(variant):
        return fields(plain(ablations_digits.get_config(variant)))

    base = options("")
    apart = {arm: {k: v for k, v in options(variant).items() if base.get(k) != v} for arm, variant in ARMS.items()}
    assert apart == {
        "base": {},
        "pretrained": {"init_from.path": "runs/ablations/text-0/initial"},
        "causal": {
            "tasks.caption_to_image.template.segment.blocks": "causal",
            "tasks.image_to_caption.template.blocks": "causal",
        },
        "dead": {"model.conditioning.init": "official"},
    }
    text = options("text")
    assert {key: text[key] for key in base if key.startswith("model.")} == {k: base[k] for k in base if "model." in k}
    assert not [key for key in text if "image" in key and not key.startswith(("decode.", "eval.", "model.mot_fields"))]
    layouts = [build_system(ablations_digits.get_config(v)).tasks["caption_to_image"].layout for v in ("", "causal")]
    assert [layout.segments[1].blocks for layout in layouts] == [0, 1]


def test_what_is_known_of_one_arm_alone_is_not_compared():
    run = ablations.FinishedRun({"digit_accuracy": 0.5}, {})
    start = ablations.COMPARISONS[0]
    full = ablations.FinishedRun({"digit_accuracy": 0.9, "fdpx": 1.0}, {ablations.MSE.name: [(1, 2.0), (5, 1.0)]})
    found = ablations.compared(start, {"base": [full, full], "pretrained": [full, run]})
    assert [row.measure.name for row in found] == ["digit_accuracy"]
    assert ablations.compared(start, {"base": [full]}) == []
    line = ablations.mean_curves(
        [full, ablations.FinishedRun({}, {ablations.MSE.name: [(5, 3.0)]})], ablations.MSE.name
    )
    assert line.x == [5] and line.y == [2.0] and math.isclose(line.spread[0], 1.0)


@pytest.fixture
def started(monkeypatch):
    """The commands that were started; each leaves what a run leaves."""
    found = []

    def start(words, job, log):
        found.append(words)
        if words[0] == "src.tools.convert":
            return iter(())
        jobs.os.makedirs(job.workdir, exist_ok=True)
        score = {"base": 0.8, "dead": 0.8, "causal": 0.5, "pretrained": 0.9}.get(job.arm, 0.0) + job.seed / 100
        with open(jobs.os.path.join(job.workdir, "metrics.json"), "w") as file:
            json.dump({"digit_accuracy": score, "text_accuracy": score, "how": {}}, file)
        with open(jobs.os.path.join(job.workdir, "log.jsonl"), "w") as file:
            file.write("".join(json.dumps({"step": s, ablations.MSE.name: 1 / s}) + "\n" for s in (1, 2)) + "torn {")
        return iter([(0.5, "step 1 of 2")])

    monkeypatch.setattr(jobs, "_started", start)
    return found


def test_one_command_makes_the_table_and_repeats_nothing(tmp_path, started, monkeypatch, capsys):
    flags = ["reproduce", f"--workdir={tmp_path}/runs", "--seeds=0,1,2"]
    original = jobs._started

    def broken(words, job, log):
        if job.name == "causal-1":
            raise KeyboardInterrupt
        return original(words, job, log)

    monkeypatch.setattr(jobs, "_started", lambda *words: iter(()))  # as a run that is asked to stop, and saves
    assert reproduce.main(flags) == 1 and "text-0 was stopped before its end" in capsys.readouterr().err
    monkeypatch.setattr(jobs, "_started", broken)
    assert reproduce.main(flags) == 130
    done = len(started)
    monkeypatch.setattr(jobs, "_started", original)
    assert reproduce.main(flags) == 0
    assert len(started) == 3 * 6 and len(set(started)) == 18 and started[done][2].endswith("causal-1")
    assert all("initial" in word for words in started if "pretrained" in words[1] for word in words[-1:])
    out, said = capsys.readouterr()
    assert "8 of 15 runs are done already" in said
    assert "| `digit_accuracy` (higher is better) | 0.9100 ± 0.0058 | 0.8100 ± 0.0058 | +0.1000 ± 0.0082 |" in out
    assert "text-pretrained is better |" in out and "bidirectional is better |" in out
    assert out.count("no difference |") == 1 + 3  # the time token; and the curve, which all arms share
    told = json.loads((tmp_path / "runs" / "ablations.json").read_text())
    assert len(told["runs"]) == 15
    np.testing.assert_allclose(told["runs"]["base-2"]["numbers"]["digit_accuracy"], 0.82)
    assert (tmp_path / "runs" / "curves.png").exists() == plots.can_plot()
    assert reproduce.main(flags) == 0 and len(started) == 18
    assert reproduce.main([*flags, "--steps=7"]) == 1 and len(started) == 18
    assert "has a run of other settings: give another --workdir" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--seeds=a", "--seeds=1,1", "--seeds=", "--workdir=gs://b/x"])
def test_wrong_flags_are_refused_before_anything_runs(flag, tmp_path, started, capsys):
    assert reproduce.main(["reproduce", f"--workdir={tmp_path}", flag]) == 1 and not started
    assert capsys.readouterr().err.startswith(f"error: {flag[: flag.index('=')]}")


def test_a_run_becomes_initial_weights_as_it_is(tmp_path, monkeypatch, capsys):
    leaves = {"trunk/final_norm/scale": np.arange(3, dtype="f4"), TABLE: np.ones((2, 3), "f4")}

    class Trained(LazyArrays):
        config, step = {"model": {"trunk": {"qk_norm": True}}, "fields": {}}, 7

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(conversion, "find_trained", lambda source, options: Trained(leaves))
    code, out, _ = published.run(capsys, source=tmp_path / "run", out=tmp_path / "init", initial=True)
    first = Initial(tmp_path / "init")
    assert code == 0 and f"9 parameters of step 7, hash {first.hash}" in out
    assert first.meta["about"]["model.trunk.qk_norm"] is True
    published.same(dict(first.tensors), leaves)
    code, _, error = published.run(capsys, source=tmp_path / "init", out=tmp_path / "again", initial=True)
    assert code == 1 and "--initial is for the workdir of a run" in error


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_debug_runs_are_trained_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "runs"
    assert reproduce.main(["reproduce", f"--workdir={workdir}", "--seeds=3", "--debug"]) == 0
    assert "**(d) Time token**" in capsys.readouterr().out
    for arm in ablations.ARMS:
        curves = read_curves(workdir / f"{arm}-3")
        assert all(curves[measure.name][-1][0] == 8 for measure in ablations.CURVES)
    told = json.loads((workdir / "ablations.json").read_text())
    assert [len(each["measures"]) for each in told["comparisons"]] == [4, 4, 6, 4]
    starts = {arm: read_curves(workdir / f"{arm}-3")["loss/number_sentences/text/nll"][0][1] for arm in ablations.ARMS}
    assert starts["pretrained"] < starts["base"] == starts["dead"] == starts["causal"]
