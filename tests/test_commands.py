"""Every command of the pages is one that its program understands: flags, values, config files, variants and fields."""

import ast
import importlib
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags

from src import main
from src.common.runtime import config_flag
from src.common.runtime.config_keys import check_keys
from src.tools.reports import sweep_axes

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
START = re.compile(r"(?:(?:[A-Z_]+=\S+|nice|-n \d+) )*(?:(?:\.venv/bin/|\S*/bin/)?python(?:3\S*)? -m |bash )")
EXAMPLE = "configs/digits.py"  # stands for a config that a page does not name
OTHERS = ("mine/", "configs/mine.py")  # configs that a reader writes
SLOW = ("tests/",)  # configs that write their data as they are read


def commands(text):
    """The commands of a page: lines of its blocks, joined where they go on, and what stands between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line.strip() for line in (*lines, *inline) if START.match(line.strip())]


def parsed(command):
    """(program, its words) of a command, None for a program of others."""
    words = shlex.split(command, comments=True)
    words = words[next(i for i, word in enumerate(words) if word in ("-m", "bash")) + 1 :]
    ends = [i for i, word in enumerate(words) if word in ("&", "&&", "|", ";", ">", "2>&1")]
    program, words = words[0], words[1 : min(ends, default=None)]
    if program == "launch/local.sh":
        return "src.main", ["--config=configs/digits.py", "--workdir=runs/digits", *words]
    if program == "launch/local_processes.sh" and words[1:]:
        return "src.main", words[1:]  # behind the number of processes
    return (program, words) if program.startswith("src.") else None


def flags_of(program):
    """The flags of a program, unparsed."""
    module = importlib.import_module(program)
    if program == "src.main":
        return main.FLAGS
    return module.define() if hasattr(module, "define") else module.FLAGS


def check(command, monkeypatch):
    """Reads the command as its program would. Raises ValueError."""
    found = parsed(command)
    if found is None or "--help" in found[1]:
        return
    program, words = found
    values = flags_of(program)
    words = [word.replace("…", "x") for word in words if word not in ("…", "...")]
    words, axes = sweep_axes.split_axes(["", *words]) if program == "src.tools.sweep" else (["", *words], [])
    words = words[1:]
    named = [word for word in words if word.startswith("--config=")]
    own = not named or any(word.removeprefix("--config=").startswith((*OTHERS, *SLOW, "x")) for word in named)
    words = [f"--config={EXAMPLE}" if own and word in named else word for word in words]
    if own:
        words = [word for word in words if not word.startswith("--config.")]
    if "config" in values:
        monkeypatch.setattr(sys, "argv", [program, *words])  # where ml_collections looks for fields
        for name in [name for name in values if name.startswith("config.")]:
            delattr(values, name)  # of the command before
        config = config_flag.parse(values, sys.argv)
        if config is not None:
            check_keys(config)
            if axes:
                sweep_axes.parse_axes(axes, config)
    else:
        config_flag.parse_plain(values, [program, *words], "out")


@pytest.fixture(autouse=True)
def flags_as_before():
    """The flags of `src.main` are those of the whole process."""
    yield
    for name in ("mode", "workdir", "given", "step", "profile"):
        main.FLAGS[name].unparse()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for command in commands(page.read_text()):
        try:
            check(command, monkeypatch)
        except (ValueError, flags.Error) as error:
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)


def test_every_command_of_a_programs_own_text_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong, count = [], 0
    for path in (ROOT / "src" / "main.py", *(ROOT / "src" / "tools").glob("*.py"), *(ROOT / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for command in commands(f"```\n{text}\n```\n"):
            count += 1
            try:
                check(command, monkeypatch)
            except (ValueError, flags.Error) as error:
                wrong.append(f"{path.name}: {command}\n    {error}")
    assert not wrong and count > 40, "\n".join(wrong)


@pytest.mark.parametrize(
    "command, said",
    [
        ("python -m src.main --config=configs/digits.py --workdir=x --moed=eval", "moed"),
        ("python -m src.main --config=configs/nowhere.py --workdir=x", "no config file"),
        ("python -m src.main --config=configs/digits.py:nothing", "variant"),
        ("python -m src.main --config=configs/digits.py --config.optim.rate=3", "rate"),
        ("python -m src.main --config=configs/digits.py --config.steps=few", "few"),
        ("bash launch/local.sh --mode=paint", "paint"),
        (".venv/bin/python -m src.tools.goodput --workdri=x", "workdri"),
        ("python -m src.tools.scores --splits=0", "splits"),
        ("python -m src.tools.sweep --config=configs/digits.py guidence=1", "did you mean guidance"),
        ("python -m src.tools.nothing --splits=0", "nothing"),
    ],
)
def test_wrong_commands_are_found(command, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands(f"text `{command}` text\n```sh\n{command} \\\n  --x\n```\n") == [f"{command} --x", command]
    with pytest.raises((ValueError, ImportError), match=said):
        check(command, monkeypatch)


def test_other_names_of_the_pages_are_there():
    """Scripts of launch/, and test files that pytest is called with."""
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"(?<![\w/.-])((?:launch|tests|configs)/[\w/]+\.(?:sh|py))", text):
            assert (ROOT / path).exists() or path.startswith(OTHERS), f"{page.name}: {path}"
