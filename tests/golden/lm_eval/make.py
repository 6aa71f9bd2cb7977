"""Makes tokenizer.model and expected.npz with lm-eval 0.4.13, transformers 5.24.0 and torch 2.13.0, on a CPU:

python -m tests.golden.lm_eval.make

lm-eval's own model `hf` scores the golden Llama on the tasks of texts.py. Of each kind the array has what the harness
asked (ids) and what it got, in the order of the questions.
"""

import json
import pathlib
import shutil
import tempfile

import numpy as np

from tests.golden.lm_eval.texts import TASKS, corpus, write_tasks

HERE = pathlib.Path(__file__).parent
SETTING = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}


def main():
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if not (HERE / "tokenizer.model").exists():
        from src.codecs.text import train_sentencepiece

        train_sentencepiece(corpus(), 93, HERE / "tokenizer.model")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for file in (HERE.parent / "llama").iterdir():
            shutil.copy(file, folder)
        shutil.copy(HERE / "tokenizer.model", folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(SETTING))
        model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16)
        pairs = {}
        inner = model._loglikelihood_tokens
        model._loglikelihood_tokens = lambda requests, **options: kept(pairs, requests, inner(requests, **options))
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(TASKS), task_manager=TaskManager(include_path=str(write_tasks(folder))),
            bootstrap_iters=0,
        )  # fmt: skip
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
    scored = [answer for row in samples["local_choices"] for answer in row["filtered_resps"]]
    np.savez_compressed(
        HERE / "expected.npz",
        **ragged("pair", [pairs[tuple(args)] for args in asked(samples["local_choices"])]),
        log_likelihood=np.array([float(answer[0]) for answer in scored]),
        greedy=np.array([answer[1] in (True, "True") for answer in scored]),
        rolling=np.array([float(row["filtered_resps"][0]) for row in samples["local_rolling"]]),
        texts=np.array([row["filtered_resps"][0] for row in samples["local_generate"]]),
        prefix=np.array([model.prefix_token_id, model.max_length]),
        results=np.array(json.dumps(found["results"], default=str)),
    )


def kept(pairs, requests, answers):
    """The answers; the ids of each request are kept by its texts."""
    pairs |= {request[0]: request[1:] for request in requests if request[0] is not None}
    return answers


def asked(samples):
    """(context, continuation) of each request."""
    return [tuple(args) for row in samples for args in row["arguments"]]


def ragged(name, pairs):
    """Pairs of lists of ids as three arrays: the ids behind each other, lengths of contexts and of continuations."""
    ids = [i for pair in pairs for part in pair for i in part]
    return {
        f"{name}_ids": np.array(ids, np.uint8),
        f"{name}_context": np.array([len(pair[0]) for pair in pairs], np.uint16),
        f"{name}_continuation": np.array([len(pair[1]) for pair in pairs], np.uint16),
    }


if __name__ == "__main__":
    main()
