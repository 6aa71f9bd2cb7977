"""Messages about mistakes in flags and in a config, one sentence each, for every program with a flag `--config`."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from src.common.files.paths import at_home, read_bounded
from src.common.lookup import nearest
from src.common.runtime import terminal
from src.common.runtime.config_dict import UnknownKeyError
from src.common.runtime.config_keys import CONFIGS

BYTES = 1 << 20  # of a config file
TEXTS = ("prompt", "task", "step", "grid", "config")  # flags with text that is no path


def parse(values: flags.FlagValues, argv: Sequence[str]) -> Any:
    """The config that the command line names, None without one; `values` have its flag `config` and are parsed.

    A `~` at the beginning of a flag's path is the home folder. Raises ValueError, in one sentence, for a file that is
    not there, is a pipe or device or is longer than `BYTES`, flags or fields that are unknown, words that are no flags,
    and for what goes wrong in a config file; OSError for a file that cannot be read.
    """
    answer_help(values, argv)
    _check_flagfiles(argv)
    argv, file = _config_at_home(argv)
    find_configs()
    try:
        words = values(list(argv))
        config = values["config"].value
        if file and not isinstance(config, ConfigDict):
            _ = getattr(config, "tasks", None)  # what could not be read says so here
            raise TypeError(f"get_config gives {type(config).__name__}, and must return the config")
    except Exception as error:  # a config file is a program
        raise ValueError(_told(error, file)) from error
    if words[1:]:
        raise ValueError(f"what is {words[1]!r}? flags begin with --, as in --config=…")
    flags_at_home(values)
    return config


def parse_plain(values: flags.FlagValues, argv: Sequence[str], example: str) -> None:
    """Reads the flags of a program without a config. `example` is one of its flags, for the message.

    Raises ValueError, in one sentence, for flags that do not exist, wrong values, and words that are no flags.
    """
    answer_help(values, argv)
    _check_flagfiles(argv)
    try:
        words = values(list(argv))
    except flags.Error as error:
        raise ValueError(f"a flag is wrong: {' '.join(str(error).split())}") from error
    if words[1:]:
        raise ValueError(f"what is {words[1]!r}? flags begin with --, as in --{example}=…")
    flags_at_home(values)


def name_of(values: flags.FlagValues) -> str:
    """The config file and its variants, as the command line has them."""
    return config_flags.get_config_filename(values["config"])


def variants(values: flags.FlagValues) -> list[str]:
    """The words after the colon of `--config`."""
    return name_of(values).partition(":")[2].split(",")


def overrides(values: flags.FlagValues) -> dict[str, Any]:
    """What the command line set in the config, by dotted path."""
    return dict(config_flags.get_override_values(values["config"]))


def flags_at_home(values: flags.FlagValues) -> None:
    """Replaces `~` at the beginning of the paths that flags have. Raises ValueError, naming the flag."""
    for name in values:
        value = values[name].value
        if name in TEXTS or not isinstance(value, str) or not value.startswith("~"):
            continue
        try:
            values[name].value = at_home(value)
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from error


def _config_at_home(argv: Sequence[str]) -> tuple[list[str], str]:
    """The words, with the config's path as the system has it, and that path, "" without one.

    Raises ValueError where there is no such file, or one that is no config: a pipe, a device, more than `BYTES`.
    """
    words, found = list(argv), ""
    for place, (word, following) in enumerate(zip(argv, [*argv[1:], ""], strict=True)):
        flag, equals, value = word.lstrip("-").partition("=")
        path, colon, name = (value if equals else following).partition(":")
        if not word.startswith("-") or flag != "config":
            continue
        found = at_home(path)
        if not os.path.exists(found) or os.path.isdir(found):
            example = os.path.relpath(os.path.join(CONFIGS, "digits.py"))
            raise ValueError(f"there is no config file {path!r}; give one such as --config={example}")
        read_bounded(found, BYTES, "config file")  # before Python reads it whole, however long it is
        if equals:
            words[place] = f"--config={found}{colon}{name}"
        else:
            words[place + 1] = f"{found}{colon}{name}"
    return words, found


def _check_flagfiles(argv: Sequence[str]) -> None:
    """Raises ValueError or OSError for a file of flags that is no plain file, or longer than `BYTES`: absl reads it
    whole."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and flag == "flagfile":
            read_bounded(at_home(value if equals else following), BYTES, "file of flags")


def _told(error: Exception, file: str) -> str:
    """What went wrong in the flags, or in the config file, with its line."""
    told, line = reason(error), _line(error, file)
    first = getattr(error, "flagname", "").partition(".")[0] if isinstance(error, flags.UnrecognizedFlagError) else ""
    if first not in ("", "config") and nearest(first, ["config"]):
        return f"a flag is wrong: there is no --{error.flagname}; did you mean --config?"
    unknown = any(isinstance(each, UnknownKeyError) for each in (error, *error.args))
    if unknown or (not line and isinstance(error, KeyError | AttributeError)):
        if file and "has no attribute get_config" in told:
            return f"{file} has no function get_config, which must return the config"
        if not line and "did you mean" not in told:
            part = re.search(r"(\w+) in ([\w.]+); there are (?:.*, )?name\b", told)
            told += "; flags change fields that the file has, add others there"
            if part:
                option, place = part.groups()
                told += f""", or give the whole part, as --config.{place}="{{'name': …, '{option}': …}}\""""
        return f"{line}the config has no such field: {told}"
    if not line or told.startswith("config variant"):
        return f"a flag is wrong: {told}"
    kind = "" if isinstance(error, flags.Error | TypeError | ValueError) else f"{type(error).__name__}: "
    return f"{line}{kind}{told}"


def _line(error: Exception, file: str) -> str:
    """`my.py, line 7: `, the last line of a config file that an error came through; "" where it came through none."""
    if not file:
        return ""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: " if error.filename else f"{file}: "
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'File "([^"]+)", line (\d+)', str(error).replace("\\n", "\n").replace('\\"', '"'))
    lines = [line for name, line in frames if os.path.abspath(name) == os.path.abspath(file)]
    return f"{file}, line {lines[-1]}: " if lines else ""


def find_configs() -> None:
    """Lets config files of any folder import `configs.common`, also where the working folder has its own `configs`."""
    package = importlib.import_module("configs")
    path = list(getattr(package, "__path__", ()))
    if CONFIGS not in path:
        package.__path__ = [*path, CONFIGS]  # what the working folder has comes first


def answer_help(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Prints what the program does and its flags, and leaves it, where the command line asks for that.

    Every program calls this first, so what its terminal cannot show is escaped from here on.
    """
    terminal.escape()
    if any(word.lstrip("-") in ("help", "h", "helpfull", "helpshort") for word in argv if word.startswith("-")):
        print(f"{sys.modules['__main__'].__doc__ or ''}\n{values.get_help()}")
        raise SystemExit(0)


def reason(error: Exception) -> str:
    """One line of an error that may hold a whole traceback, or the quoted text of another error."""
    text = str(error).replace("\\n", "\n").replace("\\", "").replace('"', "").replace("'", "").strip()
    last = text.splitlines()[-1]
    if "Traceback" in text:
        return last.partition("Error: ")[2] or last
    return re.sub(r"(?<=\w) Did you mean", "; did you mean", " ".join(text.split()))
