"""Scores a trained run, or weights, on tasks of lm-eval (EleutherAI's harness).

pip install -r requirements-eval.txt
python -m src.tools.lm_eval --config=configs/tinyllama_finetune.py --workdir=runs/tinyllama --json=scores.json
python -m src.tools.lm_eval --weights=data/tinyllama --tasks=lambada_openai,gsm8k --num_fewshot=5
python -m src.tools.lm_eval --download

Without --tasks these are the seven of MonoFormer's table (arXiv 2409.16280): PIQA, HellaSwag, WinoGrande, ARC easy and
challenge, BoolQ and OpenBookQA, without examples in front. lm-eval fetches their data from the Hugging Face hub;
--download does this alone, for machines without a network. --include_path is a folder of tasks of your own.

--likelihood=elbo scores a run by the bound of its masked diffusion, from --draws draws for each answer, and tells the
standard errors beside the scores.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

from absl import flags

from src.common.runtime import command, config_flag
from src.tools.language import model_flags

PAPER = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa")
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


def define() -> flags.FlagValues:
    """The flags."""
    values = model_flags.define_model()
    common = {"flag_values": values}
    flags.DEFINE_list("tasks", list(PAPER), "Tasks of lm-eval.", **common)
    flags.DEFINE_integer("num_fewshot", None, "Examples in front of a question; as the task has it.", 0, **common)
    flags.DEFINE_integer("limit", None, "Questions of a task, for trying it.", 1, **common)
    flags.DEFINE_boolean("add_bos_token", True, "Begin each text with <s>, as in training.", **common)
    flags.DEFINE_boolean("chat", False, "Ask as chats: <s> question answer </s>.", **common)
    flags.DEFINE_string("include_path", None, "A folder of tasks.", **common)
    flags.DEFINE_boolean("download", False, "Only fetch the data of the tasks.", **common)
    flags.DEFINE_integer("seed", 0, "Of texts that are drawn with a temperature.", 0, **common)
    flags.DEFINE_string("json", None, "A file that gets the report.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code."""
    values = define()
    return command.run(lambda: run(values, config_flag.parse(values, argv)), values)


def run(values: flags.FlagValues, config: Any) -> None:
    """Scores what the flags say, and prints the harness's table.

    Raises ValueError and OSError, in one sentence, before parameters are read: for flags that do not fit, tasks that do
    not exist, and data that are not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-eval is missing: pip install -r requirements-eval.txt")
    if not values.download:
        model_flags.check_model(values)
    model_flags.start(values, config)
    from src.common.mesh import distributed
    from src.tools.language.harness import HarnessModel, check_tasks, table

    manager = check_tasks(values.tasks, values.include_path)
    if values.download:
        print(f"the data of {', '.join(values.tasks)} are in the cache of the Hugging Face libraries")
        return
    text = model_flags.open_model(values, config, values.add_bos_token)
    import lm_eval

    model = HarnessModel(model=text, seed=values.seed)
    found = lm_eval.simple_evaluate(
        model, tasks=list(values.tasks), task_manager=manager, num_fewshot=values.num_fewshot, limit=values.limit,
        apply_chat_template=values.chat, fewshot_as_multiturn=values.chat, log_samples=False,
    )  # fmt: skip
    setting = {name: values[name].value for name in ("tasks", "num_fewshot", "limit", "chat", "seed")}
    about = dict(text.about) | text.uncertainty()
    report = {"model": about, "setting": setting, "lm_eval": lm_eval.__version__}
    report |= {name: found[name] for name in KEPT if name in found}
    if distributed.is_first():
        print(f"{table(found)}\nmodel    {about}\nsetting  {setting}")
        if values.json:
            from src.common.files.store import write_named

            write_named(values.json, (json.dumps(report, indent=2, default=float) + "\n").encode(), "report")
            print(f"written to {values.json}")
    distributed.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
