"""Messages about mistakes in flags and in a config, one sentence each, for every program with a flag `--config`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

CONFIGS = os.path.join(os.path.abspath(__file__ + "/../../../.."), "configs")


def parse(values: flags.FlagValues, argv: Sequence[str]) -> Any:
    """The config that the command line names, None without one; `values` have its flag `config` and are parsed.

    Raises ValueError, in one sentence, for a file that is not there, flags or fields that are unknown, words that are
    no flags, and for what a config file says of its variants.
    """
    answer_help(values, argv)
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = word.lstrip("-").partition("=")
        path = (value if equals else following).partition(":")[0]
        if word.startswith("-") and flag == "config" and not os.path.isfile(path):
            example = os.path.relpath(os.path.join(CONFIGS, "digits.py"))
            raise ValueError(f"there is no config file {path!r}; give one such as --config={example}")
    find_configs()
    try:
        words = values(list(argv))
        config = values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ImportError, SyntaxError, OSError) as error:
        if isinstance(error, KeyError | AttributeError):
            told = reason(error)
            told += "" if "did you mean" in told else "; flags change fields that the file has, add others there"
            raise ValueError(f"the config has no such field: {told}") from error
        raise ValueError(f"a flag is wrong: {reason(error)}") from error
    if words[1:]:
        raise ValueError(f"what is {words[1]!r}? flags begin with --, as in --config=…")
    return config


def find_configs() -> None:
    """Lets config files of any folder import `configs.common`, also where the working folder has its own `configs`."""
    package = importlib.import_module("configs")
    path = list(getattr(package, "__path__", ()))
    if CONFIGS not in path:
        package.__path__ = [*path, CONFIGS]  # what the working folder has comes first


def answer_help(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Prints what the program does and its flags, and leaves it, where the command line asks for that."""
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
