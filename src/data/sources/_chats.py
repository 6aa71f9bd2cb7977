"""Chats as different data sets write them, read into turns of user and assistant.

    UltraChat       {"data": ["question", "answer", …]}
    OpenAI          {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    ShareGPT, LLaVA {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}
    Alpaca          {"instruction": "…", "input": "…", "output": "…"}

What a system says stands in front of the next question, or, behind a question, at its end, two line breaks between;
`system` or `system_prompt` beside the turns stands in front of the first. An answer before the first question, a last
question without answer, what a system says behind the last answer, and keys that are not known are left out; a warning
tells the first place of each, of marks in answers (`trainable`, `loss_mask`) and in questions, too. A chat is a bad row
where one of the keys `CONTENT` holds something, and where an answer is marked (`MARKS`) as one not to be trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from src.common.files.paths import shown
from src.data.example import MARKER, BadRow
from src.data.told_once import MARKS, marks_of, tell_keys, tell_once, tell_split

LISTS = ("messages", "conversations", "conversation", "data")
WHO = ("from", "role", "speaker")
WHAT = ("value", "content", "text")
USER = ("human", "user", "prompter")
ASSISTANT = ("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model")
SYSTEM = ("system", "developer")
BESIDE = ("system", "system_prompt")
# Keys of a chat, or of a turn, with a part of what was said that is no text of a turn.
CONTENT = (
    *("image", "images", "video", "videos", "audio", "audios", "context", "documents"),
    *("tools", "functions", "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking", "refusal"),
)
TOOLS, FORM_OF_TOOLS = ("tools", "functions", "tool_calls", "function_call"), "hermes"  # see `_tool_turns.py`
READ = (*BESIDE, *CONTENT)  # of a chat and of a turn, or refused
ALPACA = ("instruction", "input", "output", "history")
GAP = "\n\n"
FORM = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]} for each chat'


def read_turns(row: Mapping[str, Any], where: str, *, known: Sequence[str] = ()) -> Any:
    """The turns of a chat, in whichever form its keys show; their number and texts are checked by `example.turns_of`.
    `known` are keys of `CONTENT` that the source reads.

    Raises BadRow for what is no chat of these forms.
    """
    found = [key for key in LISTS if key in row]
    if not found and "instruction" not in row:
        keys = ", ".join(map(repr, [*row][:6])) or "none"
        raise BadRow("there is no conversation", where, f"its keys are {keys}; write {FORM}")
    _check_keys(row, where, known)
    used = next((key for key in found if isinstance(row[key], list) and row[key]), found[0] if found else "")
    tell_split(row, where)
    tell_keys(row, where, (*READ, used) if found else (*READ, *ALPACA), "beside the turns", marks_of(row))
    system = _joined([_system(row[key], key, where) for key in BESIDE if row.get(key) is not None])
    if not found:
        return _instruction(row, where, system)
    said = row[used]
    if not isinstance(said, list) or not said:
        raise BadRow("the turns are no list of texts", where, f"{used!r}; write {FORM}")
    if all(isinstance(turn, dict) for turn in said):
        return conversation(said, where, system)
    if len(said) % 2 and len(said) > 1:
        tell_once("the last question has no answer and is left out", where)
    return [_led([system], said[0]), *said[1 : len(said) - len(said) % 2]]


def conversation(said: Sequence[Mapping[str, Any]], where: str, system: str = "") -> list[Any]:
    """Question and answer in turn, of turns that name who speaks; `system` is what a system says before all.

    Raises BadRow where they do not take turns, for roles that are not known, and as the head of this module says.
    """
    turns: list[Any] = []
    waiting = [system]
    for number, turn in enumerate(said, 1):
        which = f"turn {number}"
        who, what = _value(turn, WHO), _text(_value(turn, WHAT), where, which)
        role = who.strip().lower() if isinstance(who, str) else who
        asked = len(turns) % 2 == 1
        if role in (*USER, *ASSISTANT, *SYSTEM):
            _check_keys(turn, where, (), f"{which}: ")
            read = (next((name for name in names if name in turn), "") for names in (WHO, WHAT))
            marks = [key for key, value in turn.items() if isinstance(value, bool)] + marks_of(turn)
            tell_keys(turn, where, (*READ, *read, *MARKS), "of a turn", marks if role in ASSISTANT else ())
            if role in USER and any(turn.get(key) for key in MARKS):
                tell_once("a question is marked as one to be trained, and the answers are the targets", where)
        if role in SYSTEM:
            what = _system(what, which, where)
            if asked and _is_said(turns[-1]):
                turns[-1] = _joined([turns[-1], what])
            elif not asked:
                waiting.append(what)
        elif role in USER and not asked:
            turns.append(_led(waiting, what))
            waiting = []
        elif role in ASSISTANT and asked:
            if mark := next((key for key in MARKS if turn.get(key) not in (None, 1)), None):
                found = f"{which} has {mark}={turn[mark]!r}; all answers are: end the chat before it, or leave it out"
                raise BadRow("an answer is marked as one that is not to be trained", where, found)
            turns.append(what)
        elif role in ASSISTANT and not turns:
            tell_once("the answer before the first question is left out", where)
        elif role in (*USER, *ASSISTANT):
            raise BadRow("the turns are not question and answer", where, f"{which} is of {who!r} again")
        else:
            known = ", ".join((*USER[:2], *ASSISTANT[:2], *SYSTEM[:1]))
            keys = ", ".join(map(repr, [*turn][:6])) or "none"
            said = f"has the keys {keys}" if who is None else f"is of {who!r}"
            raise BadRow("the role of a turn is unknown", where, f"{which} {said}; known are {known}")
    if len(turns) % 2 and len(turns) > 1:
        tell_once("the last question has no answer and is left out", where)
    if len(turns) > 1 and _joined(waiting):
        tell_once("what the system says behind the last answer is left out", where)
    return turns[: len(turns) - len(turns) % 2]


def _instruction(row: Mapping[str, Any], where: str, system: str) -> list[Any]:
    """The turns of Alpaca's form, which may have `history`, the pairs before; `system` stands before all."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("the history is no list of questions with their answers", where)
    turns = [turn for pair in history for turn in pair]
    if "output" not in row:
        keys = ", ".join(map(repr, [*row][:6]))
        raise BadRow("the turns are no list of texts", where, f"'output' is none; its keys are {keys}")
    given = {"input": "", "output": ""} | {key: row[key] for key in ALPACA[:3] if row.get(key) is not None}
    if wrong := next((key for key, value in given.items() if not isinstance(value, str)), None):
        raise BadRow("the turns are no list of texts", where, f"{wrong!r} is {shown(given[wrong], 40)}, no text")
    first, *rest = [*turns, _joined([row["instruction"], given["input"]]), row["output"]]
    return [_led([system], first), *rest]


def _check_keys(told: Mapping[str, Any], where: str, known: Sequence[str], which: str = "") -> None:
    """Raises BadRow for a key that holds more of the chat than its texts."""
    if key := next((key for key in CONTENT if told.get(key) and key not in known), None):
        advice = "put it into the text, or take it away" + f", or set source.tools to {FORM_OF_TOOLS}" * (key in TOOLS)
        raise BadRow("a key holds what is no text of a turn", where, f"{which}{key!r}: {advice}")


def _system(what: Any, which: str, where: str) -> str:
    """What a system says, which may be empty. Raises BadRow for what is no text."""
    what = _text(what, where, which)
    if not isinstance(what, str):
        raise BadRow("what the system says is no text", where, which)
    return what


def _is_said(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _led(before: Sequence[str], question: Any) -> Any:
    """A question with what stands before it; one that is empty or no text stays what it is."""
    return _joined([*before, question]) if _is_said(question) else question


def _joined(texts: Sequence[Any]) -> Any:
    """The texts that are not empty, joined; None where one is no text."""
    if not all(isinstance(text, str) for text in texts):
        return None
    return GAP.join(text for text in texts if text.strip())


def _value(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((turn[name] for name in names if name in turn), None)


def _text(content: Any, where: str, which: str) -> Any:
    """The text of a turn whose content may be a list of parts {"type": "text", "text": "…"}. Raises BadRow for a part
    with a key that holds more."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        for part in content:
            _check_keys(part, where, (), f"{which}: ")
            tell_keys(part, where, (*CONTENT, "type", "text"), "of a part")
        return _joined([part.get("text") for part in content])
    return content


def tell_marker(turns: Sequence[Any], where: str) -> None:
    """A warning where a question of a chat without an image has the marker of one."""
    if any(MARKER in turn for turn in turns[::2]):
        tell_once(f"{MARKER} stands in a chat without an image and is read as text", where)
