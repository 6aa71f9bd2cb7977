"""How the next token is chosen can be set on the command line, by the flags that the pages show."""

import pathlib
import re
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import digits
from src.common.lookup import build
from src.common.runtime import config_flag
from src.common.runtime.config_keys import check_keys
from src.sampling.steps.next_token import Greedy, Sampled

ROOT = pathlib.Path(__file__).parents[2]
FLAG = "--config.decode.text.choose"


def chosen(monkeypatch, *words):
    """The part that chooses the next token under these flags."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    monkeypatch.setattr(sys, "argv", ["main", f"--config={digits.__file__}", *words])
    config = config_flag.parse(values, sys.argv)
    check_keys(config)
    return build("sampling/decoders", config.decode.text, where="decode.text").choose


@pytest.mark.parametrize("page", ["README.md", "docs/architecture/sampling.md"])
def test_the_flag_of_the_pages_sets_the_temperature(page, monkeypatch):
    shown = re.findall(rf'{FLAG}="[^"]*"', (ROOT / page).read_text())
    assert shown and all(
        chosen(monkeypatch, *shlex.split(flag)) == Sampled(temperature=0.7, top_k=50) for flag in shown
    )


@pytest.mark.parametrize(
    "options, part",
    [
        ("{'name': 'next_token:Greedy'}", Greedy()),
        ("{'name': 'next_token:Sampled'}", Sampled()),
        (
            "{'name': 'next_token:Sampled', 'temperature': 1.5, 'top_p': 0.9, 'top_k': None}",
            Sampled(temperature=1.5, top_p=0.9),
        ),
    ],
)
def test_every_choice_can_be_set(options, part, monkeypatch):
    assert chosen(monkeypatch, f"{FLAG}={options}") == part
    assert chosen(monkeypatch, f"{FLAG}.name=next_token:{type(part).__name__}") == type(part)()


def test_an_option_that_the_config_leaves_out_is_answered_with_the_flag_that_works(monkeypatch):
    with pytest.raises(ValueError, match=r"temperature in decode\.text\.choose") as told:
        chosen(monkeypatch, f"{FLAG}.name=next_token:Sampled", f"{FLAG}.temperature=0.7")
    assert """give the whole part, as --config.decode.text.choose="{'name': …, 'temperature': …}\"""" in str(told.value)
    with pytest.raises(ValueError, match="no such field") as told:
        chosen(monkeypatch, "--config.optim.qqq=1")
    assert "whole part" not in str(told.value)


def test_a_misspelt_option_in_the_flag_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"decode\.text\.choose: .*'temprature'.*did you mean temperature"):
        chosen(monkeypatch, f"{FLAG}={{'name': 'next_token:Sampled', 'temprature': 0.7}}")
