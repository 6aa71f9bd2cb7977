"""Mistakes in the flags of any program are one short sentence."""

import os
import sys

import pytest

from src import main
from src.tools import aot, bench, bench_data, prepare, show_batch

TOOLS = (main, aot, bench, bench_data, prepare, show_batch)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__.rpartition(".")[2])
def test_a_config_that_is_not_there_or_wrong_is_one_sentence(tool, capsys, monkeypatch):
    for words, told in (
        (["--config=configs/nowhere.py:debug"], "there is no config file 'configs/nowhere.py'; give one such as "),
        (["--config", "configs/nowhere.py"], "there is no config file 'configs/nowhere.py'; give one such as "),
        (["--config=configs/digits.py:debgu"], "config variant debgu is unknown; there are official, debug"),
        (["--config=configs/digits.py:debug", "--config.optim.lrr=1"], "no such field: lrr; did you mean lr"),
        (["--config=configs/digits.py:debug", "seed=1"], "what is 'seed=1'? flags begin with --"),
        (["--what=1"], "a flag is wrong: Unknown command line flag what"),
    ):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *words])  # where ml_collections looks for fields
        assert tool.main(sys.argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and told in error and error.count("\n") == 1 and len(error) < 130, error


@pytest.mark.parametrize("flag", ["--config={}", "--config={}:debug", "--config {}", "--flagfile={}", "--flagfile {}"])
def test_a_file_of_flags_that_is_no_plain_short_file_is_not_read(tmp_path, capsys, monkeypatch, flag):
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "link.py").symlink_to("/dev/zero")
    (tmp_path / "long.py").write_bytes(b"#" * (1 << 20) + b"\n")
    what = "config file" if "config" in flag else "file of flags"
    told = dict.fromkeys(("pipe.py", "link.py"), "is not a plain file: give the path of one")
    for name, why in (told | {"long.py": "has more than 1,048,576 bytes, which no such file needs"}).items():
        words = ["main", *flag.format(tmp_path / name).split()]
        monkeypatch.setattr(sys, "argv", words)
        assert main.main(words) == 1
        error = capsys.readouterr().err
        assert f"error: the {what} '{tmp_path / name}' {why}" in error and error.count("\n") == 1, error


def test_a_config_that_is_no_text_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.py").write_bytes(b"x = 1\0")
    words = ["main", f"--config={tmp_path}/a.py"]
    monkeypatch.setattr(sys, "argv", words)
    assert main.main(words) == 1
    assert f"error: {tmp_path}/a.py: SyntaxError: source code string cannot" in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS[1:])
def test_help_tells_the_flags(tool, capsys):
    with pytest.raises(SystemExit) as left:
        tool.main(["tool", "--help"])
    assert left.value.code == 0 and "--config" in capsys.readouterr().out
