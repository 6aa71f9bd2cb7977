"""`bench --compare`: figures of before and now, and what is worse."""

import copy
import json

import pytest

from src.tools import bench as tool
from src.tools.benchmarks import compare

SPREAD = {"median": 0.05, "p10": 0.04, "p90": 0.06, "count": 9}
WHERE = {"machine": "a", "jax": "1", "python": "3", "date": "x", "config": "c.py", "version": "0.1.0"}
OLD = {
    "peak": {"float32": {"flops_per_second": 1e12}, "where": WHERE},
    "step": {
        "seconds": SPREAD,
        "tokens": 1776,
        "tokens_per_second": 35_000.0,
        "mfu": 0.5,
        "peak_flops_per_second": 1e12,
        "memory_bytes": {"process_peak": 10**9},
        "where": WHERE,
    },
    "peer": {
        "step": {"ours": SPREAD, "eager": SPREAD, "slower_than_ours": {"eager": SPREAD | {"median": 1.2}}},
        "where": WHERE,
    },
}


def changed(**leaves):
    """Figures of a later run; leaves by path, with two underscores between."""
    new = json.loads(json.dumps(OLD))
    for path, value in leaves.items():
        *names, last = path.split("__")
        group = new
        for name in names:
            group = group[name]
        group[last] = value
    return new


@pytest.mark.parametrize(
    ("leaves", "worse"),
    [
        ({}, []),
        ({"step__seconds__median": 0.052, "step__mfu": 0.48}, []),  # 4 % each
        ({"step__seconds__median": 0.06}, ["step/seconds"]),
        ({"step__seconds__median": 0.03, "step__tokens_per_second": 60_000.0}, []),
        ({"step__mfu": 0.4, "step__memory_bytes__process_peak": 2 * 10**9}, ["step/mfu", "step/memory_bytes"]),
        ({"peer__step__slower_than_ours__eager__median": 0.9}, ["peer/step/slower_than_ours/eager"]),
        ({"peer__step__eager__median": 9.0, "peak__float32__flops_per_second": 1.0, "step__tokens": 9}, []),  # not ours
        ({"step": {"all": {"failed": "it fell over"}, "where": WHERE}}, ["step/seconds (failed: it fell over)"]),
    ],
)
def test_what_is_worse_is_named(leaves, worse, tmp_path, capsys):
    for name, figures in (("old", OLD), ("new", changed(**leaves))):
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    flags = [f"--compare={tmp_path}/old.json", f"--new={tmp_path}/new.json"]
    assert tool.main(["bench", *flags]) == (2 if worse else 0)
    shown = capsys.readouterr().out
    last = shown.splitlines()[-1]
    assert last.startswith("worse by more than 5%: ") == bool(worse)
    assert all(name in last for name in worse)
    if not leaves:
        line = next(line for line in shown.splitlines() if line.startswith("step/seconds"))
        assert line.split() == ["step/seconds", "0.05", "0.05", "1.000"]
    assert tool.main(["bench", *flags, "--worse=100"]) == (2 if "step" in leaves else 0)


def test_another_machine_config_or_version_is_told():
    new = copy.deepcopy(OLD)
    for group in new.values():
        group["where"] = WHERE | {"machine": "b", "version": "0.2.0", "date": "y"}
    notes = [line for line in compare.compare(OLD, new, 0.05, str).lines if line.startswith("note")]
    assert notes == [
        "note: the old figures are of another machine: a, not b",
        "note: the old figures are of another version: 0.1.0, not 0.2.0",
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "old.json"),
        ('{"step": {"sec', "is not sound JSON"),
        ("[1]", "has no figures of the bench: give one that bench --json wrote"),
        ('{"step": {"seconds": 1}}', "has no figures of the bench"),
    ],
)
def test_a_damaged_file_is_one_sentence_before_anything_is_measured(text, match, tmp_path, capsys):
    if text is not None:
        (tmp_path / "old.json").write_text(text)
    assert tool.main(["bench", "--preset=accelerator", f"--compare={tmp_path}/old.json"]) == 1
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1


def test_new_figures_need_old_ones(tmp_path, capsys):
    assert tool.main(["bench", f"--new={tmp_path}/new.json"]) == 1
    assert "add --compare=old.json" in capsys.readouterr().err
