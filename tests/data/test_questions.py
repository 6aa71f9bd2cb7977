"""Prompts that come from the data, or from nothing: every one of them leaves what its task makes to be made."""

import importlib

import jax
import numpy as np
import pytest

from configs import digits, sit_digits
from src.build import build_system
from src.data.example import Example
from src.data.templates.chat import Chat
from src.data.templates.packed import Packed
from src.data.templates.picture_chat import PictureChat
from tests.helpers.runs import config_of


def makes_all(task, batch):
    """Whether something of every name that the task makes is to be made, and nothing else."""
    made = {name for name, tokens in batch.tokens.items() if (tokens.target & tokens.valid).all(axis=0).any()}
    return made == set(task.fill) and not any(batch.tokens[name].target.any() for name in set(batch.tokens) - made)


@pytest.mark.parametrize("config", ["digits", "sit_digits", "imagenet256", "journeydb_ultrachat", "llava_journeydb"])
def test_a_made_up_prompt_fits_every_task_and_reads_no_data(config):
    """Of the published sizes: no tokenizer, no images are there."""
    for name, plan in build_system(config_of(importlib.import_module(f"configs.{config}"), "")).tasks.items():
        _, batch = plan.task.prompt([plan.task.invented_question()] * 2)
        assert makes_all(plan.task, batch), name


def test_held_out_examples_are_prompts_and_conditions_can_be_dropped_where_there_are_some():
    for module in (digits, sit_digits):
        for name, plan in build_system(config_of(module)).tasks.items():
            given = plan.task.questions(5)
            asked = plan.task.prompt(given)[1]
            assert len(given) == 5 and makes_all(plan.task, asked), name
            free = jax.tree.leaves(plan.task.prompt(given, null=True)[1])
            same = all(map(np.array_equal, jax.tree.leaves(asked), free))
            assert same != plan.task.conditional, f"{name}: guidance makes rows without conditions where there are some"


@pytest.mark.parametrize("template", [Chat(64), PictureChat(16, 64), Packed(64)], ids=lambda t: type(t).__name__)
def test_a_chat_is_asked_without_its_last_answer(template):
    turns = ["one?", "two", "three?", "four"]
    template.parts = {}  # of a packed row without images
    asked = template.question(Example({"turns": turns, "before": 0}, "a chat"))
    assert asked["turns"] == turns[:3] and asked.where == "a chat" and asked["before"] == 0
