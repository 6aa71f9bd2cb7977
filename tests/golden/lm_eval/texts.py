"""Two hundred questions of each kind, in the words of a language of few characters; equal on every machine."""

import json
import random

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
THINGS = ["apple", "small stone", "yellow leaf", "river", "old house", "bird", "white cloud", "door"]
COUNT = 200


def sentence(rng):
    """A sentence about numbers or things."""
    first, second = rng.sample(range(len(NUMBERS)), 2)
    thing, other = rng.sample(THINGS, 2)
    return rng.choice(
        [
            f"{NUMBERS[first]} is {'larger' if first > second else 'smaller'} than {NUMBERS[second]}.",
            f"the {thing} is near the {other}.",
            f"there are {NUMBERS[first]} pieces of it behind the {thing}.",
            f"he said that the {thing} has {NUMBERS[second]} corners, and she does not believe it.",
        ]
    )


def text(rng, most):
    """Some sentences, up to `most`, a few of them on lines of their own."""
    return "".join(sentence(rng) + rng.choice([" ", " ", " ", "\n"]) for _ in range(rng.randint(1, most))).strip()


def choices(seed=1):
    """Questions with four answers of one word or two; some are longer than a row of the network."""
    rng = random.Random(seed)
    found = []
    for _ in range(COUNT):
        before = text(rng, 9)
        first = rng.choice(THINGS)
        options = rng.sample(NUMBERS if rng.random() < 0.5 else THINGS, 4)
        question = f"{before} how is the {first} called?"
        found.append({"question": question, "choices": options, "answer": rng.randrange(4)})
    return found


def documents(seed=2):
    """Texts of one sentence up to several rows."""
    rng = random.Random(seed)
    return [{"text": text(rng, 16)} for _ in range(COUNT)]


def prompts(seed=3):
    """Beginnings of texts."""
    rng = random.Random(seed)
    return [{"prompt": text(rng, 9), "answer": rng.choice(NUMBERS)} for _ in range(COUNT)]


def corpus():
    """All of it, for the tokenizer."""
    asked = [" ".join([row["question"], *row["choices"]]) + "\nQuestion: \nAnswer:" for row in choices()]
    return asked + [row["text"] for row in documents()] + [row["prompt"] for row in prompts()]


TASKS = {
    "local_choices": (choices, {
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "answer",
        "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }),
    "local_rolling": (documents, {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    }),
    "local_generate": (prompts, {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}\n", "doc_to_target": "answer",
        "generation_kwargs": {"until": ["ni", "\n\n"], "max_gen_toks": 40, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }),
}  # fmt: skip


def write_tasks(folder):
    """The three as tasks of lm-eval, whose names are those of `TASKS`, in a folder for `include_path`."""
    for name, (rows, options) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **options}))  # JSON is YAML
    return folder
