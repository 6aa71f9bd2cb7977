"""Sweeps: what is varied, results that are kept, and what may not be mixed."""

import json
import sys

import numpy as np
import pytest

from configs import digits
from src.evals.grid import save_png
from src.tools import sweep
from src.tools.reports import plots, sweeping
from src.tools.reports.sweep_axes import Axis, changed, overrides, parse_axes, points_of, split_axes
from tests.helpers.one_run import ROOT, Process

CONFIG = digits.get_config("debug")


def test_words_name_fields_of_the_config():
    axes = parse_axes(
        ["guidance=1,1.25", "steps=2,5", "ema=0.995,last", "guidance.interval=(0.0,0.5),(0.0,1.0)"], CONFIG
    )
    assert axes[3].values == ((0.0, 0.5), (0.0, 1.0)) and axes[0] == Axis("guidance", (1, 1.25))
    points = points_of(axes)
    assert len(points) == 16 and list(points[0]) == [axis.name for axis in axes]
    assert [point["ema"] for point in points] == [0.995] * 8 + ["last"] * 8, "parameters change least"
    assert overrides({"guidance": 1, "steps": 5}, CONFIG) == {"guidance.scale": 1.0, "decode.image.steps": 5}
    last = changed(CONFIG, {"ema": "last", "sampler": "gaussian:Heun", "step": 8})
    assert not last.eval.ema and last.fields.image.step.name == "gaussian:Heun" and CONFIG.eval.ema
    assert changed(CONFIG, {"width": 0.1}).eval.to_dict() == CONFIG.eval.to_dict() | {"width": 0.1}
    assert split_axes(["sweep", "--config=a=b", "steps=2"]) == (["sweep", "--config=a=b"], ["steps=2"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing is varied"),
        (["guidence=1"], "did you mean guidance"),
        (["optim.rate=1"], "nor a field of the config"),
        (["guidance=1,1"], "different values"),
        (["guidance="], "different values"),
        (["guidance=1", "guidance=2"], "varied twice"),
        (["steps=two"], r"decode\.image\.steps is 2; give values of its kind"),
        (["steps=2.5"], "give values of its kind"),
        (["step=first"], "is no checkpoint"),
        (["ema=yes"], "give decays that the run keeps"),
    ],
)
def test_wrong_words_are_one_sentence(words, said):
    with pytest.raises(ValueError, match=said):
        parse_axes(words, CONFIG)


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """The tool with measurements that are made up; `call.seen` are the points that were measured."""
    newest = {"step": 8, "weights": 7}
    monkeypatch.setattr(sweeping, "about_of", lambda values, config: {"newest": newest, "seed": values.seed})

    def run(*words, stop=None):
        def measure(point):
            if len(run.seen) == stop:
                raise KeyboardInterrupt
            run.seen.append(point)
            return {"accuracy": point["guidance"] / 10, "fdpx": point["steps"] / 100}, {"step": 8, "weights": 7}

        monkeypatch.setattr(sweeping, "evaluator", lambda values, config: measure)
        argv = ["sweep", "--config=configs/digits.py:debug", f"--workdir={tmp_path}", *words]
        monkeypatch.setattr(sys, "argv", argv)
        code = sweep.main(argv)
        return code, capsys.readouterr()

    run.seen, run.newest = [], newest
    return run


def test_a_sweep_goes_on_and_shows_all_points(call, tmp_path):
    words = ("guidance=1,1.5,2", "steps=2,4")
    assert call(*words, stop=2)[0] == 130 and len(call.seen) == 2
    code, said = call(*words)
    assert code == 0 and len(call.seen) == 6 and "2 of 6 combinations are measured already" in said.err
    assert len({json.dumps(point) for point in call.seen}) == 6
    assert said.out.splitlines()[:3] == ["| guidance | steps | `accuracy` | `fdpx` |", "|---|---|---|---|",
                                         "| 1 | 2 | 0.1000 | 0.0200 |"]  # fmt: skip
    code, said = call("guidance=2,3", "steps=4", "--metrics=fdpx")
    assert code == 0 and call.seen[6:] == [{"guidance": 3, "steps": 4}] and "| 3 | 4 | 0.0400 |" in said.out
    assert (tmp_path / "sweep" / "sweep.png").exists() == plots.can_plot()
    told = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(told["points"]) == 7 and told["points"][0]["setting"] == {"step": 8, "weights": 7}
    code, said = call(*words, "--metrics=acuracy")
    assert code == 1 and "nothing measured acuracy; there are accuracy, fdpx" in said.err
    call.newest["weights"] = 8  # the run went on
    code, said = call(*words)
    assert code == 1 and "holds another sweep (newest differ): give another --out" in said.err and len(call.seen) == 7


def test_wrong_averages_and_flags_are_refused_before_anything_is_measured(call, monkeypatch):
    for words, said in (
        (["guidance=1", "ema=0.9"], "the run keeps the averages of decay 0.995"),
        (["ema=0.995", "width=0.1"], "name two averages"),
        (["guidance=1", "--reference=real.npz"], "--reference needs --weights"),
        (["guidance=1", "--moed=x"], "moed"),
        ([], "nothing is varied"),
    ):
        code, told = call(*words)
        assert code == 1 and said in told.err and told.err.count("\n") == 1 and not call.seen, words
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    code, told = call("guidance=1")
    assert code == 1 and "a sweep is one process" in told.err and not call.seen


def test_lines_have_points_that_differ_in_one_axis():
    axes = [Axis("guidance", (1, 2)), Axis("sampler", ("a", "b"))]
    rows = [({"guidance": g, "sampler": s}, {"x": g + (s == "b"), "y": -g}) for s in "ba" for g in (2, 1)]
    first, second = sweeping.panels(axes, rows, ["x", "y"])
    assert first.lines["sampler a"].x == (1, 2) and first.lines["sampler a"].y == (1, 2)
    assert first.lines["sampler b"].y == (2, 3) and (first.x, second.x, second.y) == ("guidance", "y", "x")
    assert second.lines["sampler b"].x == (-2, -1)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_run_is_swept_by_evaluators_and_by_drawn_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    keeps = ("--config.checkpoint.keep_every=4", "--config.ema.power=(0.05,0.1)", "--config.ema.more=(0.1,)")
    with Process(tmp_path, *keeps, "--config.eval.evaluators.digits.captions=0") as process:
        assert process.wait() == 0, process.said()
    base = ["sweep", "--config=configs/digits.py:debug", f"--workdir={tmp_path}/run", *keeps[1:]]

    def swept(*words):
        monkeypatch.setattr(sys, "argv", [*base, *words])
        assert sweep.main(sys.argv) == 0, capsys.readouterr().err
        return json.loads((tmp_path / "run" / "sweep" / "sweep.json").read_text())["points"]

    points = swept("ema=0.995,0.1,last", "step=4,8", "--config.eval.evaluators.digits.captions=0")
    assert len({each["setting"]["weights"] for each in points}) == 6
    assert [each["setting"]["step"] for each in points] == [4, 4, 4, 8, 8, 8]
    points = swept("width=0.05,0.07", "steps=2,3", "--config.eval.evaluators.digits.captions=0")[6:]
    assert [each["setting"]["width"] for each in points] == [0.05, 0.05, 0.07, 0.07]
    assert [each["setting"]["decode"]["image"]["steps"] for each in points] == [2, 3, 2, 3]
    for number in range(5):
        save_png(tmp_path / "real" / f"{number}.png", np.full((8, 8, 3), 50 * number, np.uint8))
    (tmp_path / "prompts.txt").write_text("seven\nthree\n")
    words = [f"--reference={tmp_path}/real", "--network=pixels", f"--prompts={tmp_path}/prompts.txt", "--count=6"]
    monkeypatch.setattr(sys, "argv", [*base, "guidance=1,2", f"--out={tmp_path}/drawn", *words])
    assert sweep.main(sys.argv) == 0, capsys.readouterr().err
    one, two = json.loads((tmp_path / "drawn" / "sweep.json").read_text())["points"]
    assert set(one["numbers"]) >= {"fid"} and one["numbers"] != two["numbers"]
    drawn = [each["setting"]["images"]["drawn"] for each in (one, two)]
    assert [each["guidance"]["scale"] for each in drawn] == [1.0, 2.0] and drawn[0]["count"] == 6
    assert drawn[0]["weights"] == drawn[1]["weights"]
