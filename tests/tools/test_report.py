"""Reports: numbers of other steps or settings are never mixed, and what is missing is named."""

import json

import numpy as np
import pytest

from src.evals.grid import save_png
from src.tools import report
from src.tools.reports import plots
from src.tools.reports.run_files import read_curves
from src.tools.reports.scores import of_run, paired, scores_of

SETTING = {
    "step": 8, "ema": True, "seed": 0, "guidance": {"scale": 1.5}, "decode": {"image": {"steps": 25}},
    "samplers": {"image": {"name": "gaussian:Euler"}}, "evaluators": {"digits": {"images": 20}}, "weights": 7,
    "version": "0.1.0", "config": "configs/digits.py", "overrides": {},
}  # fmt: skip
DRAWN = {name: SETTING[name] for name in ("step", "ema", "guidance", "decode", "samplers", "weights", "version")}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def run_of(folder, accuracy, weights=7, **changes):
    """A workdir with an evaluation; `changes` of its setting."""
    how = {"accuracy": SETTING | {"weights": weights} | changes}
    write(folder / "metrics.json", {"accuracy": accuracy, "parameters": 10, "how": how})
    return folder


def images(folder, fid, place, weights=7, **changes):
    drawn = DRAWN | {"workdir": str(place), "weights": weights, "count": 50, "seed": 3} | changes
    told = {"path": "drawn", "drawn": drawn, "count": 50}
    reference = {"path": "real.npz", "sha256": "ab"}
    write(folder, {"scores": {"fid": fid}, "images": told, "reference": reference, "network": {"name": "pixels"}})


def made(tmp_path, *flags):
    code = report.main(["report", f"--workdir={tmp_path}/a", f"--out={tmp_path}/out", *flags])
    assert code == 0
    return (tmp_path / "out" / "report.md").read_text(), json.loads((tmp_path / "out" / "report.json").read_text())


def test_scores_of_other_settings_stand_apart(tmp_path, capsys):
    folder = run_of(tmp_path / "a", 0.5)
    write(folder / "metrics-4.json", {"accuracy": 0.25, "how": {"accuracy": SETTING | {"step": 4}}})
    write(folder / "metrics-2.json", {"accuracy": 0.125, "how": {"accuracy": {"step": 2, "ema": True, "seed": 0}}})
    images(folder / "scores.json", 12.5, folder)
    images(tmp_path / "elsewhere.json", 99.0, tmp_path / "other", weights=8)
    save_png(folder / "samples" / "eval-samples-8.png", np.zeros((2, 2, 3), np.uint8))
    text, told = made(tmp_path, f"--scores={tmp_path}/elsewhere.json")
    sections = text.split("### Setting ")[1:]
    assert len(sections) == 4 and sum("`accuracy`" in each for each in sections) == 3
    for step, value in ((8, "0.5"), (4, "0.25"), (2, "0.125")):
        (section,) = (each for each in sections if f"`accuracy` | {value} |" in each)
        assert f"step {step}, ema True" in section
    (drawn,) = (each for each in sections if "`fid` | 12.5 |" in each)
    for part in ("count 50", "gaussian:Euler", "scale 1.5", "steps 25", "sha256 ab", "weights 7", "seed 3"):
        assert part in drawn, part
    assert "99" not in [f"{score['value']:g}" for score in told["runs"][0]["scores"]]
    missing = " / ".join(told["runs"][0]["missing"])
    for part in (f"elsewhere.json is of another run ({tmp_path}/other, weights 8): left out", "no log.jsonl",
                 "metrics-2.json: not all were recorded", "there is no checkpoint", "no goodput.jsonl"):  # fmt: skip
        assert part in missing, part
    assert "![eval-samples](../a/samples/eval-samples-8.png)" in text
    assert "missing: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guidance": {"scale": 3.0}}, "guidance.scale 1.5 and 3.0"),
        ({"step": 6}, "step 8 and 6"),
        ({"ema": False}, "ema True and False"),
        ({"decode": {"image": {"steps": 50}}}, "decode.image.steps 25 and 50"),
        ({"samplers": {"image": {"name": "gaussian:Heun"}}}, "samplers.image.name gaussian:Euler and gaussian:Heun"),
        ({"evaluators": {"digits": {"images": 40}}}, "evaluators.digits.images 20 and 40"),
        ({"seed": 1, "weights": 9, "config": "x", "overrides": {"optim.lr": 1.0}, "version": "0.2"}, ""),
    ],
)
def test_two_runs_are_compared_only_where_they_were_measured_alike(tmp_path, change, said):
    run_of(tmp_path / "a", 0.5)
    run_of(tmp_path / "b", 0.75, **change)
    text, told = made(tmp_path, f"--compare={tmp_path}/b")
    if said:
        assert not told["compared"] and f"accuracy: {said}" in told["not_compared"][0] and said in text
    else:
        assert [each["difference"] for each in told["compared"]] == [0.25] and not told["not_compared"]
        assert "| 0.5 | 0.75 | +0.25 |" in text


def test_a_number_of_images_or_reference_that_differs_is_not_compared(tmp_path):
    for name, fid, changes in (("a", 1.0, {}), ("b", 2.0, {"count": 40})):
        images(tmp_path / name / "scores.json", fid, tmp_path / name, **changes)
    first, second = (scores_of(str(tmp_path / name))[0] for name in "ab")
    assert paired(first, first)[0][0].name == "fid"
    told = json.loads((tmp_path / "b" / "scores.json").read_text())
    told["images"]["count"] = 40
    write(tmp_path / "b" / "scores.json", told)
    assert paired(first, scores_of(str(tmp_path / "b"))[0]) == ([], ["fid: count 50 and 40"])
    told["images"]["count"], told["reference"]["sha256"] = 50, "cd"
    told["images"]["drawn"]["count"] = 50
    write(tmp_path / "b" / "scores.json", told)
    assert paired(first, scores_of(str(tmp_path / "b"))[0])[1] == ["fid: reference.sha256 ab and cd"]
    assert second and of_run(first, "elsewhere", [7]) == (first, [])


def test_language_reports_are_read(tmp_path):
    model = {"workdir": str(tmp_path), "step": 8, "ema": True, "weights": 7}
    results = {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1}}
    told = {"model": model, "setting": {"limit": 5}, "lm_eval": "0.4.13", "results": results}
    write(tmp_path / "a.json", told)
    write(tmp_path / "b.json", {"model": model, "setting": {"context": 1}, "perplexity": 2.0, "bits_per_byte": 1.0})
    write(tmp_path / "cpu_devices.json", {"cpu_devices": 2})
    found = {score.name: score for score in scores_of(str(tmp_path))[0]}
    assert {name: score.value for name, score in found.items()} == {
        "piqa/acc": 0.5,
        "perplexity": 2,
        "bits_per_byte": 1,
    }
    assert found["piqa/acc"].setting["limit"] == 5 and found["perplexity"].setting["context"] == 1


def test_curves_have_no_numbers_of_later_evaluations(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0}, {"step": 4, "eval/a": 0.1}, {"step": 4, "eval/text": "x"}, {"step": 5, "loss": 1.0},
        {"step": 8, "eval/a": 0.5, "eval/b": 1}, {"step": 8, "eval/c": 2.0},
        {"step": 8, "eval/a": 0.9, "eval/b": 3}, {"step": 8, "eval/c": 4.0}, {"step": 8, "eval/how": "{}"},
        {"step": 6, "eval/a": 0.7}, {"step": 6, "eval/how": "{}"}, {"step": 9, "loss": float("nan")},
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    found = {"loss": [(1, 2.0), (5, 1.0)], "eval/a": [(4, 0.1), (8, 0.5)], "eval/b": [(8, 1.0)], "eval/c": [(8, 2.0)]}
    assert read_curves(tmp_path) == found


def test_curves_are_drawn_where_matplotlib_is(tmp_path):
    run_of(tmp_path / "a", 0.5)
    (tmp_path / "a" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    text, told = made(tmp_path)
    assert ("![curves](report.png)" in text) == (tmp_path / "out" / "report.png").exists() == plots.can_plot()
    assert plots.can_plot() or plots.MISSING in told["runs"][0]["missing"]
    assert "| `loss` | 1 at step 2 |" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no workdir is given"),
        (["--workdir=nowhere"], "there is no run in nowhere"),
        (["--workdir={}/a", "--compare=nowhere"], "there is no run in nowhere"),
        (["--workdir={}/a", "--scores=nowhere.json"], "there is no file nowhere.json"),
        (["--workdir={}/a", "--scores={}/a/metrics.json"], "is no report of src.tools.scores"),
    ],
)
def test_what_is_no_run_is_one_sentence(flags, said, tmp_path, capsys):
    run_of(tmp_path / "a", 0.5)
    assert report.main(["report", *(flag.format(tmp_path) for flag in flags)]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
