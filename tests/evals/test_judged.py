"""The evaluator of values that their source judges: what is asked, in which mode, and the means."""

import types

import numpy as np
import pytest

from src.evals.judged import JudgedEvaluator


class Source:
    """A made value is right if it is the number that was asked for."""

    def judged(self, asked, made):
        return {"right": float(made[0] == asked["number"]), "made": float(made[0])}


class Numbers:
    """A task with three held-out questions."""

    source, fill = Source(), ("number",)

    def questions(self, count):
        return [{"number": number} for number in range(min(count, 3))]


class Always:
    """A pipeline that gives the asked number, or the one that a decoder stands for."""

    def __init__(self, host):
        self.host, self.seeds = host, []
        self.fields = {"number": types.SimpleNamespace(codec=types.SimpleNamespace(host=host))}

    def values(self, task, given, seed, decoders):
        self.seeds.append(seed)
        made = [each["number"] if decoders is None else decoders["number"] for each in given]
        return {"number": np.array(made)[:, None]}


def test_means_by_mode():
    pipeline = Always(object())
    evaluator = JudgedEvaluator({"numbers": Numbers()}, task="numbers", rows=6, modes={"one": 1, "two": 2}, prefix="a/")
    found = evaluator(pipeline, 5).scalars
    assert found == {"a/one/right": 2 / 6, "a/one/made": 1.0, "a/two/right": 2 / 6, "a/two/made": 2.0}
    assert pipeline.seeds == [5, 5]


def test_texts_are_decoded_and_the_config_may_decode():
    host = types.SimpleNamespace(eos=2, decode=lambda ids: [int(ids[0])])
    found = JudgedEvaluator({"numbers": Numbers()}, task="numbers", rows=3)(Always(host), 0).scalars
    assert found == {"right": 1.0, "made": 1.0}


def test_a_task_without_a_judge_is_refused():
    other = types.SimpleNamespace(source=object(), fill=("image",))
    tasks = {"digits": other, "numbers": Numbers()}
    for wrong in ({"task": "digits"}, {"task": "nothing"}, {"task": "numbers", "rows": 0}):
        with pytest.raises(ValueError, match=r"evaluator judged has task='\w+' and rows=\d+: .*\(numbers\)"):
            JudgedEvaluator(tasks, **wrong)
