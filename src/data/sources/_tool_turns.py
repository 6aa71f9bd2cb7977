"""Tools of a chat as text, in the form of Hermes and Qwen 2.5: then a chat has turns of user and assistant alone.

The tools that there are stand behind what the system says, between <tools> and </tools>. A call is part of the
assistant's turn, and a target: <tool_call> {"name": …, "arguments": …} </tool_call>. What tools answer is the next
question, <tool_response> … </tool_response>, and no target; several answers in a row are one question. Texts that have
these marks already stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from src.data.example import BadRow
from src.data.sources._chats import ASSISTANT, LISTS, SYSTEM, WHAT, WHO

TOOL = ("tool", "function", "observation", "ipython")
CALLS = ("function_call", "tool_call")  # roles of a turn that is one call
TOOLS = ("tools", "functions")  # keys of a chat
CALL, RESPONSE = "tool_call", "tool_response"
HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function"
    " signatures within <tools></tools> XML tags:\n<tools>\n"
)
TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within"
    ' <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def with_tools_as_text(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A chat of the forms `messages` and `conversations` without keys and roles of tools; other rows are not changed.

    Raises BadRow for tools and calls that are no objects.
    """
    key = next((key for key in LISTS if isinstance(row.get(key), list) and row[key]), None)
    if key is None or not all(isinstance(turn, dict) for turn in row[key]):
        return dict(row)
    rest = {name: value for name, value in row.items() if name not in TOOLS}
    turns: list[dict[str, Any]] = []
    for number, turn in enumerate(row[key], 1):
        new = _turn(turn, f"{where} turn {number}")
        answers = _role(turn) in TOOL
        if answers and number > 1 and _role(row[key][number - 2]) in TOOL:
            turns[-1]["content"] += "\n" + new["content"]
        else:
            turns.append(new)
    tools = [tool for name in TOOLS if row.get(name) for tool in _listed(row[name], name, where)]
    if tools:
        text = HEAD + "\n".join(map(_json, tools)) + TAIL
        led = len(turns) > 0 and _role(turns[0]) in SYSTEM
        turns.insert(int(led), {"role": "system", "content": text})
    return rest | {key: turns}


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A turn of user, assistant or system. Raises BadRow."""
    role = _role(turn)
    said = next((turn[name] for name in WHAT if name in turn), None)
    if role in TOOL:
        return {"role": "user", "content": _marked(_text(said), RESPONSE)}
    if role in CALLS:
        return {"role": "assistant", "content": _marked(_text(said), CALL)}
    if role not in ASSISTANT:
        return dict(turn)
    calls = _calls(turn, where)
    if not calls:
        return dict(turn)
    rest = {name: value for name, value in turn.items() if name not in ("tool_calls", "function_call", *WHAT, *WHO)}
    texts = [_text(said)] if said else []
    return rest | {"role": role, "content": "\n".join([*texts, *(_marked(_json(call), CALL) for call in calls)])}


def _calls(turn: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Name and arguments of each call of a turn. Raises BadRow."""
    calls = [call for name in ("tool_calls", "function_call") if turn.get(name) for call in _several(turn[name])]
    found = []
    for call in calls:
        call = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise BadRow("a call of a tool has no name", where, 'write {"name": "…", "arguments": {…}}')
        found.append({"name": call["name"], "arguments": _parsed(call.get("arguments", {}))})
    return found


def _listed(tools: Any, name: str, where: str) -> list[Any]:
    """The tools of a chat, which may be a JSON text. Raises BadRow."""
    tools = _several(_parsed(tools))
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("the tools of a chat are no list of objects", where, repr(name))
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parsed(value: Any) -> Any:
    """What a JSON text says; any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _text(said: Any) -> str:
    """What a turn says, as text: that of its parts, or JSON."""
    if isinstance(said, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in said):
        return "\n\n".join(part["text"] for part in said)
    return said if isinstance(said, str) else _json(said)


def _marked(text: str, mark: str) -> str:
    return text if f"<{mark}>" in text else f"<{mark}>\n{text}\n</{mark}>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _role(turn: Mapping[str, Any]) -> str:
    who = next((turn[name] for name in WHO if name in turn), None)
    return who.strip().lower() if isinstance(who, str) else ""


def check_tools(tools: str) -> str:
    """The option itself. Raises ValueError for one that is not known."""
    if tools not in ("", "hermes"):
        raise ValueError(f"source.tools={tools!r} is unknown: use hermes, or '' to refuse chats with tools")
    return tools
