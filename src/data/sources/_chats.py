"""Chats as different data sets write them, read into turns of user and assistant.

    UltraChat       {"data": ["question", "answer", …]}
    OpenAI          {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    ShareGPT, LLaVA {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}
    Alpaca          {"instruction": "…", "input": "…", "output": "…"}

What a system says stands in front of the next question, or, behind a question, at its end, two line breaks between. An
answer before the first question and a last question without answer are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from src.data.example import BadRow

LISTS = ("messages", "conversations", "conversation", "data")
WHO = ("from", "role", "speaker")
WHAT = ("value", "content", "text")
USER = ("human", "user", "prompter")
ASSISTANT = ("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model")
SYSTEM = ("system", "developer")
GAP = "\n\n"
FORM = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]} for each chat'


def read_turns(row: Mapping[str, Any], where: str) -> Any:
    """The turns of a chat, in whichever form its keys show; their number and texts are checked by `example.turns_of`.

    Raises BadRow for what is no chat of these forms.
    """
    found = [key for key in LISTS if key in row]
    if not found and "instruction" in row:
        return _instruction(row, where)
    if not found:
        keys = ", ".join(map(repr, [*row][:6])) or "none"
        raise BadRow("there is no conversation", where, f"its keys are {keys}; write {FORM}")
    said = next((row[key] for key in found if isinstance(row[key], list)), None)
    if not said:
        raise BadRow("the turns are no list of texts", where, f"{found[0]!r}; write {FORM}")
    if all(isinstance(turn, dict) for turn in said):
        return conversation(said, where, row.get("system"))
    return said[: len(said) - len(said) % 2]


def conversation(said: Sequence[Mapping[str, Any]], where: str, system: Any = None) -> list[Any]:
    """Question and answer in turn, of turns that name who speaks; `system` is what a system says before all.

    Raises BadRow where they do not take turns, and for roles that are not known.
    """
    turns: list[Any] = []
    waiting = [system] if isinstance(system, str) and system.strip() else []
    for number, turn in enumerate(said, 1):
        who, what = _value(turn, WHO), _text(_value(turn, WHAT))
        role = who.strip().lower() if isinstance(who, str) else who
        asked = len(turns) % 2 == 1
        if role in SYSTEM:
            if asked:
                turns[-1] = _joined([turns[-1], what])
            else:
                waiting.append(what)
        elif role in USER and not asked:
            turns.append(_joined([*waiting, what]))
            waiting = []
        elif role in ASSISTANT and asked:
            turns.append(what)
        elif role in ASSISTANT and not turns:
            logging.log_first_n(logging.WARNING, "%s begins with an answer, which is left out (told once)", 1, where)
        elif role in (*USER, *ASSISTANT):
            raise BadRow("the turns are not question and answer", where, f"turn {number} is of {who!r} again")
        else:
            known = ", ".join((*USER[:2], *ASSISTANT[:2], *SYSTEM[:1]))
            raise BadRow("the role of a turn is unknown", where, f"turn {number} is of {who!r}; known are {known}")
    return turns[: len(turns) - len(turns) % 2]


def _instruction(row: Mapping[str, Any], where: str) -> list[Any]:
    """The turns of Alpaca's form, which may have `system` and `history`, the pairs before."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("the history is no list of questions with their answers", where)
    asked = _joined([row.get("system") or "", row["instruction"], row.get("input") or ""])
    turns = [turn for pair in history for turn in pair]
    return [*turns, asked, row.get("output")]


def _joined(texts: Sequence[Any]) -> Any:
    """The texts that are not empty, joined; None where one is no text."""
    if not all(isinstance(text, str) for text in texts):
        return None
    return GAP.join(text for text in texts if text.strip())


def _value(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((turn[name] for name in names if name in turn), None)


def _text(content: Any) -> Any:
    """The text of a turn whose content may be a list of parts {"type": "text", "text": "…"}."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return _joined([part.get("text") for part in content])
    return content
