"""The model `monoformer` of lm-eval (EleutherAI, version 0.4.13); this file alone imports it.

lm-eval has no list of models of other packages: it knows the name once this module is imported. `src.tools.lm_eval`
does that, and so does a program that calls `lm_eval.simple_evaluate(model="monoformer", model_args={…})` itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
from datasets.exceptions import DatasetsError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tqdm import tqdm

from src.common.lookup import nearest
from src.common.runtime import config_flag
from src.common.runtime.errors import brief
from src.evals.language.text_model import TextModel
from src.sampling.steps.next_token import Sampled
from src.tools.datasets.sources import flags_of_config
from src.tools.language.opened import open_run, open_weights

NEW = 256  # tokens that are made where a task does not say it, as in lm-eval's `hf`
CHOSEN = ("do_sample", "temperature", "top_k", "top_p")
IGNORED = ("num_beams", "use_cache", "early_stopping")  # of tasks that were written for transformers


@register_model("monoformer")
class HarnessModel(TemplateLM):
    """A run of this project, or a folder of weights, as lm-eval asks it.

    config, workdir, step, ema   a run: its config file, its folder, its checkpoint, averaged parameters or not
    weights, tokenizer           instead: a folder of published, exported or converted weights (`open_weights`)
    field                        whose texts are scored, where there are several
    batch_size, max_length       rows of a call; tokens of a row
    max_gen_toks                 tokens that are made where the task does not say it
    add_bos_token                whether texts begin with `<s>`. True, because every row of training does, and because
                                 that is what lm-eval's `hf` does with a Llama
    headers                      whether chats have "### Human: " and "### Assistant: ", as in training
    seed                         of draws with a temperature
    likelihood, draws            "elbo": bounds under the diffusion of a run, from so many draws each; their standard
                                 errors are in `get_model_info`
    model                        a `TextModel` that is open already, in place of all of them

    All processes compute the same requests together, each some rows. Raises ValueError, in one sentence.
    """

    def __init__(
        self,
        config: str = "",
        workdir: str = "",
        step: str | int = "latest",
        ema: bool | None = None,
        weights: str = "",
        tokenizer: str = "",
        field: str = "",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = NEW,
        add_bos_token: bool = True,
        headers: bool | None = None,
        dtype: str = "float32",
        seed: int = 0,
        likelihood: str = "exact",
        draws: int = 64,
        model: TextModel | None = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size={batch_size} is not known here: give a number of rows")
        shared = {"length": max_length, "batch_size": int(batch_size), "add_bos": add_bos_token}
        if model is None and bool(config and workdir) == bool(weights):
            raise ValueError("model_args need a run (config=…,workdir=…) or a folder of weights (weights=…)")
        if likelihood not in ("exact", "elbo") or (likelihood == "elbo" and weights):
            raise ValueError(f"likelihood={likelihood} is not possible: give exact, or elbo for a run with diffusion")
        if model is None and weights:
            model = open_weights(weights, tokenizer=tokenizer, headers=bool(headers), dtype=dtype, **shared)
        elif model is None:
            parsed = config_flag.parse(flags_of_config("The config."), ["lm_eval", f"--config={config}"])
            shared["draws"] = int(draws) if likelihood == "elbo" else 0
            model = open_run(parsed, workdir, str(step), ema=ema, field=field, headers=headers, **shared)
        self.text, self.seed, self._new = model, seed, max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.text.codec.eos

    @property
    def prefix_token_id(self) -> int:
        """The id that begins a text."""
        return self.text.codec.bos

    @property
    def max_length(self) -> int:
        """Tokens of a row."""
        return self.text.network.length

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are made where a task does not say it."""
        return self._new

    @property
    def batch_size(self) -> int:
        """Rows of a call."""
        return self.text.network.batch_size

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its cache of requests with."""
        return f"monoformer-{self.text.about.get('tokenizer')}"

    def get_model_info(self) -> dict[str, Any]:
        """What the scores depend on, for the harness's report."""
        about = self.text.about | self.text.uncertainty()
        return {f"monoformer_{name}": value for name, value in about.items()}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """See `TextModel.encode`."""
        return self.text.encode(string, add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], **kwargs: Any) -> str:
        """The text of ids."""
        return self.text.codec.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness writes into its report. Raises ValueError for a template by name: there is one."""
        if isinstance(chat_template, str):
            raise ValueError(f"there is no chat template {chat_template!r}: leave the name out, there is one alone")
        form = "<s>### Human: … ### Assistant: …</s>" if self.text.headers else "<s>… …</s>"
        return form if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See `TextModel.chat`."""
        return self.text.chat(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with _bar(len(requests), "log-likelihoods", disable_tqdm) as told:
            found = self.text.log_likelihoods([(before, after) for _, before, after in requests], told)
        for (texts, *_), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The sum of log p over the tokens of each text. As in lm-eval's `hf` these are all that `tok_encode` gives:
        with `add_bos_token` a text's own `<s>` is scored, too, behind the one that every text is read after."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        with _bar(None, "windows", disable_tqdm) as told:
            found = [total for total, _ in self.text.whole(texts, told=told)]
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first stop string. Raises ValueError for options that are not known."""
        groups = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            until, new = options.pop("until", None) or [], options.pop("max_gen_toks")
            until = [until] if isinstance(until, str) else until
            choose = _choice(options)
            with _bar(len(numbers), "texts", disable_tqdm) as told:
                prompts = [requests[number].args[0] for number in numbers]
                made = self.text.go_on(prompts, new, until, choose, self.seed, told)
            for number, text in zip(numbers, made, strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found


def _choice(options: dict[str, Any]) -> Any:
    """The choice of the next token that options of a task ask for; None: the most likely one."""
    unknown = [name for name in options if name not in CHOSEN + IGNORED]
    if unknown or options.get("num_beams", 1) != 1:
        raise ValueError(f"texts cannot be made with {', '.join(unknown) or 'num_beams'}: give some of {CHOSEN}")
    if not options.get("do_sample"):
        return None
    cut = {name: options[name] for name in ("top_k", "top_p") if options.get(name)}
    return Sampled(temperature=float(options.get("temperature") or 1.0), **cut)


class _bar:
    """A bar of progress on the first process, as a function that takes how many are done."""

    def __init__(self, total: int | None, name: str, disable: bool):
        self.bar = tqdm(total=total, desc=name, disable=disable or jax.process_index() > 0)

    def __enter__(self):
        return lambda done: self.bar.update(done - self.bar.n)

    def __exit__(self, *error):
        self.bar.close()


def check_tasks(names: Sequence[str], include_path: str | None = None) -> TaskManager:
    """The harness's list of tasks, once each of these has its data.

    Raises ValueError for a task that does not exist, OSError, in one sentence, for data that are not there.
    """
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        near = nearest(unknown[0], manager.all_tasks)
        raise ValueError(
            f"lm-eval {version('lm_eval')} has no task {unknown[0]!r}{f', did you mean {near}?' if near else ''}:"
            " lm-eval ls tasks prints them, --include_path=… adds a folder of your own"
        )
    for name in names:
        try:
            manager.load(name)
        except (OSError, DatasetsError) as error:
            raise OSError(
                f"the data of {name} are not here and cannot be fetched ({brief(error)}): where there is a network, run"
                f" python -m src.tools.lm_eval --download --tasks={','.join(names)}, copy its ~/.cache/huggingface here"
                " (or set HF_HOME to a copy), and set HF_HUB_OFFLINE=1"
            ) from error
    return manager


def table(found: dict[str, Any]) -> str:
    """The harness's table of scores."""
    return make_table(found) + (f"\n{make_table(found, 'groups')}" if found.get("groups") else "")
