"""One checkpoint, several ways to write: answers that a source can judge, by decoder, and bounds of the perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from src.data.splits import example_of, numbers_of, rows_of
from src.evals.language.elbo import Elbo, options_of
from src.evals.language.likelihood import log_likelihoods
from src.evals.language.network import TextNetwork
from src.evals.result import Result, bullets, check_counts, spread
from src.interfaces import row_of

Pair = tuple[list[int], list[int]]


class TextModesEvaluator:
    """Evaluates the answers to held-out questions of the tasks `tasks`, in each of the `modes`, and how likely the
    held-out texts are.

    modes      decoders by name, in place of the config's (`sampling/decoders`)
    answers    questions of each task and mode, repeated where there are fewer; 0: none
    texts      held-out texts of each task whose likelihood is measured; 0: none
    draws      of the bound of each text (`language/elbo.py`)
    timed      repetitions of all answers, after the first one, for `tokens_per_second`; 0: it is not measured

    By task and mode (`<task>/<mode>/…`): `valid`, the share of right answers; `tokens_per_call`, tokens made (with the
    end of text) by pass of the network, each row by itself; `tokens_per_second` of the fastest repetition, on the batch
    of the pipeline. By task: `perplexity_next`, exact under next-token prediction, and `perplexity_bound` under
    diffusion with its standard error `…_error`, both by token of the same texts with their end, and behind what the
    template says is given.

    Raises ValueError for a task that is missing or whose source judges no answers.
    """

    PARTS: ClassVar[dict[str, str]] = {"modes": "sampling/decoders"}

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        names: tuple[str, ...],
        modes: Mapping[str, Any],
        answers: int = 300,
        texts: int = 100,
        draws: int = 64,
        timed: int = 0,
    ):
        check_counts("text_modes", answers=answers, texts=texts, draws=draws, timed=timed)
        for name in names:
            source = getattr(tasks.get(name), "source", None)
            if not hasattr(source, "right"):
                raise ValueError(
                    f"evaluator text_modes has names={names}, but {name!r} is no task whose source judges answers:"
                    f" choose among {', '.join(n for n, t in tasks.items() if hasattr(t.source, 'right')) or 'none'}"
                )
        self.modes = dict(modes)
        self.tasks = {name: tasks[name] for name in names}
        self.answers, self.texts, self.draws, self.timed = answers, texts, draws, timed

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Runs all parts; `seed` decides what is drawn."""
        result = Result({})
        for name, task in self.tasks.items():
            if self.texts:
                result.scalars.update({f"{name}/{k}": v for k, v in self._likelihood(pipeline, task, seed).items()})
            for mode, decoder in self.modes.items() if self.answers else ():
                self._answers(pipeline, name, mode, decoder, seed, result)
        return result

    def _answers(self, pipeline: Any, name: str, mode: str, decoder: Any, seed: int, result: Result) -> None:
        task, made = self.tasks[name], self.tasks[name].fill[0]
        asked = task.source.asked("test")
        asked = [asked[number % len(asked)] for number in range(self.answers)]
        given, decoders = [{"prompt": one.prompt} for one in asked], {row_of(made): decoder}
        ids, calls = pipeline.counted(name, given, seed, decoders=decoders)
        seconds = []
        for _ in range(self.timed):
            start = time.perf_counter()
            pipeline.counted(name, given, seed, decoders=decoders)
            seconds.append(time.perf_counter() - start)
        said = [pipeline.fields[row_of(made)].codec.host.decode(each) for each in ids[made]]
        right = [task.source.right(one.prompt, text) for one, text in zip(asked, said, strict=True)]
        tokens = sum(len(each) + 1 for each in ids[made])
        found = {"valid": float(np.mean(right)), "tokens_per_call": tokens / max(int(calls.sum()), 1)}
        if seconds:
            found["tokens_per_second"] = tokens / min(seconds)
        kinds = {kind: [] for kind in sorted({getattr(one, "kind", "") for one in asked} - {""})}
        for one, good in zip(asked, right, strict=True):
            if kinds:
                kinds[one.kind].append(good)
        found |= {f"valid_{kind}": float(np.mean(goods)) for kind, goods in kinds.items()}
        result.scalars.update({f"{name}/{mode}/{key}": value for key, value in found.items()})
        lines = [
            f"{one.prompt} **{text.strip()}**{'' if good else ' (wrong)'}"
            for one, text, good in zip(asked, said, right, strict=True)
        ]
        result.texts[f"{name}/{mode}"] = bullets([lines[number] for number in spread(min(len(lines), 40), 12)])

    def _likelihood(self, pipeline: Any, task: Any, seed: int) -> dict[str, float]:
        """Perplexities of held-out texts."""
        made = task.fill[0]
        field, segment = pipeline.fields[row_of(made)], task.layout.segment(made)
        network = TextNetwork(pipeline.bind, field, pipeline.params, pipeline.dtype, segment.length, self.draws)
        pairs = list(self._pairs(task, field.codec.host, segment.length))
        tokens, found = sum(len(after) for _, after in pairs), {}
        if segment.blocks == 1:
            nats = -math.fsum(total for total, _ in log_likelihoods(network, pairs))
            found["perplexity_next"] = math.exp(nats / tokens)
        if segment.role != "clean":
            bounds = Elbo(options_of(segment), self.draws, seed=seed)(network, pairs)
            bound = math.exp(math.fsum(each.nats for each in bounds) / tokens)
            error = math.fsum(each.error**2 for each in bounds) ** 0.5 / tokens
            found |= {"perplexity_bound": bound, "perplexity_bound_error": bound * error}
            found["perplexity_bound_draws"] = float(self.draws * len(bounds))
        return found

    def _pairs(self, task: Any, codec: Any, length: int) -> list[Pair]:
        """<s> with what is given of a held-out text, and the rest with its </s>."""
        count = rows_of(task.source, "test")
        numbers = numbers_of(task.source, "test", spread(count, self.texts))
        examples = [example_of(task.source, int(number)) for number in numbers]
        pairs = []
        for example in examples:
            ids = [*codec.encode(example[task.template.value]), codec.eos][: length - 1]
            given = len(codec.encode(example[task.template.given])) if task.template.given else 0
            pairs.append(([codec.bos, *ids[:given]], ids[given:]))
        return pairs
