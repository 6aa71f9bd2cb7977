"""Mistakes on the command line and in own code that were told in words of Python, or not at all."""

import io
import sys

import numpy as np
import pytest

from src import main
from src.common.files.store import check_store
from src.data.example import BadRow
from src.data.splits import example_of
from src.data.templates.chat import Chat
from src.models.pretrained.initial_weights import read_meta
from src.tools import aot, convert, show_batch
from src.tools.datasets import sources
from src.train.checkpoints import retention
from src.train.checkpoints.checkpointer import Checkpointer


@pytest.mark.parametrize("uniforms", [None, np.array([0.5])])
def test_what_fails_in_an_own_source_is_told_with_its_class_row_and_reason(uniforms):
    class Each(list):
        draws = 1

        def drawn(self, number, uniforms):
            return self[number]

        def __getitem__(self, number):
            actions = (lambda: {}["k"], lambda: [][1], lambda: None.k, lambda: 1 / 0, lambda: "a" + 1)
            if number == 5:
                raise BadRow("no use", "row 5")
            return {"text": actions[number]()}

    for number, name in enumerate(("KeyError: 'k'", "IndexError: ", "AttributeError: ", "ZeroDivision", "TypeError: ")):
        with pytest.raises(RuntimeError, match=rf"^the source \S+Each fails at row {number} \({name}"):
            example_of(Each(), number, uniforms)
    with pytest.raises(BadRow, match="no use"):
        example_of(Each(), 5, uniforms)
    with pytest.raises(RuntimeError, match=r"Each fails at row 0 \(KeyError: 'k'\)"):
        Chat(64).check(Each(range(6)))


@pytest.mark.parametrize("address", ["file:///tmp/x", "ftp://host/x"])
def test_an_address_without_a_reader_is_one_sentence(address, capsys, monkeypatch):
    words = ["main", "--config=configs/digits.py:debug", f"--workdir={address}"]
    monkeypatch.setattr(sys, "argv", words)
    for name in ("config", "workdir", "mode"):
        main.FLAGS[name].unparse()
    main.FLAGS.unparse_flags()
    assert main.main(words) == 1
    kind = address.partition(":")[0]
    assert f"error: --workdir={address}: addresses {kind}:// cannot be read: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{kind}:// cannot be read"):
        read_meta(address)
    check_store("gs://bucket/run")
    check_store("a/b")


def test_initial_weights_that_are_not_there_and_those_that_are_none_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' do not exist: correct the path$"):
        read_meta(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"have no weights\.json"):
        read_meta(tmp_path)


@pytest.mark.parametrize("tool", [main, aot, show_batch], ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("wrong", ["confg.optim.lr", "cofnig", "configs.optim.lr"])
def test_a_misspelt_config_flag_gets_the_right_one(tool, wrong, capsys, monkeypatch):
    words = ["main", "--config=configs/digits.py:debug", f"--{wrong}=1"]
    monkeypatch.setattr(sys, "argv", words)
    assert tool.main(words) == 1
    assert capsys.readouterr().err == f"error: a flag is wrong: there is no --{wrong}; did you mean --config?\n"


class Closed(io.StringIO):
    """A pipe whose reader has gone: it shows that when it is written to, or only when it is flushed."""

    def __init__(self, at_once):
        super().__init__()
        self.at_once, self.flushed = at_once, False

    def write(self, text):
        if self.at_once:
            raise BrokenPipeError(32, "Broken pipe")
        return len(text)

    def flush(self):
        self.flushed = True
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_broken_pipe_ends_a_tool_quietly(at_once, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "run", lambda values: print("a line"))
    words = ["tool", "--config=configs/digits.py:debug"]
    monkeypatch.setattr(aot, "run", lambda values, config: print("a line") or 0)
    for ends in (
        lambda: aot.main(words),
        lambda: convert.main(["convert", f"--source={tmp_path}", "--info"]),
        lambda: sources.main(words, show_batch.define(), lambda values, config: print("a line")),
    ):
        monkeypatch.setattr(sys, "stdout", Closed(at_once))
        assert ends() == 0 and sys.stdout.flushed
    assert capsys.readouterr().err == ""


def test_a_best_checkpoint_that_is_never_known_is_told_at_the_start():
    told = retention.without_scores
    assert told("", [], 0) == told("acc", ["digits"], 2) == ""
    assert told("acc", [], 2).startswith("checkpoint.best.metric=acc is never known, because eval.evaluators is empty")
    assert "at the end of the run alone, because eval.every=0" in told("acc", ["digits"], 0)


def test_a_misspelt_metric_is_told_with_all_the_names_there_are(tmp_path, caplog):
    checkpoints = Checkpointer(tmp_path, best={"metric": "acuracy"})
    scalars = {f"accuracy_{number}": 1.0 for number in range(12)}
    checkpoints.score(2, scalars)
    checkpoints.score(4, {})
    checkpoints.close()
    first, second = [record.getMessage() for record in caplog.records if "acuracy" in record.getMessage()]
    assert all(name in first for name in scalars) and "is none of accuracy_0, " in first
    assert second.endswith("no evaluator gives one: step 4 does not count.")
