"""What is added to the files of a trace: operations with the names of their scopes, and the time of each scope.

On CPU and GPU an event of a trace has the name of an instruction of the compiled program ("fusion.12"). The scopes
(`jax.named_scope`) are in the metadata of the instruction; xprof finds them there, Perfetto does not.
"""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import logging

PERFETTO, SCOPES = "perfetto_trace.json.gz", "scopes.txt"
MODULE = re.compile(r"^HloModule ([^\s,]+)")
NAMED = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name=\"([^\"]*)\"", re.MULTILINE)
AROUND = re.compile(r"(?:jvp|transpose|vmap|rematted_computation|checkpoint)\(([^()]*)\)")
OURS = ("draw", "prepare", "embed", "trunk", "block", "attention", "feed_forward", "losses", "optimizer", "guard")
OURS += ("norms", "encoders")
HEAD = "head_"  # and the name of a field
SHOWN = 4  # scopes that are told at the end of a trace


def complete(folder: pathlib.Path, steps: int, program: Callable[[], str] | None) -> str:
    """Writes both files beside the newest trace below `folder`; the scopes with the most time, in one line.

    program   gives the text of the compiled step; None, or one that fails: without its scopes

    Raises OSError or ValueError where the trace cannot be read.
    """
    traces = sorted(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise OSError(f"JAX wrote no trace into {folder}")
    with gzip.open(traces[-1]) as file:
        trace = json.load(file)
    trace.pop("metadata", None)  # Perfetto refuses it
    module, names = "", {}
    try:
        module, names = named(program()) if program else ("", {})
    except Exception as error:  # not every backend shows its programs
        logging.info("the trace has no scopes: %s", error)
    events = [event for event in trace["traceEvents"] if _is_operation(event)]
    for event in events:
        own = names if event["args"].get("hlo_module", "").split("(")[0] == module else {}
        event["args"]["scope"] = own.get(event["args"].get("hlo_op"), event["args"].get("tf_op", ""))
    with gzip.open(traces[-1].with_name(PERFETTO), "wt", encoding="utf-8") as file:
        json.dump(trace, file)
    seconds = by_scope(events)
    total = sum(seconds.values())
    if not total:
        return ""
    ordered = sorted(seconds.items(), key=lambda pair: -pair[1])
    lines = [f"{value / steps * 1e3:10.3f} ms  {value / total:6.1%}  {name}" for name, value in ordered]
    head = f"Time of the operations of a step by scope, of {steps} step{'s' * (steps > 1)}; all threads and devices."
    text = "\n".join([head, *lines, f"{total / steps * 1e3:10.3f} ms  in all", ""])
    traces[-1].with_name(SCOPES).write_text(text, encoding="utf-8")
    return ", ".join(f"{name} {value / total:.0%}" for name, value in ordered[:SHOWN])


def named(text: str) -> tuple[str, dict[str, str]]:
    """The name of a compiled program, and by instruction its path of scopes, as JAX writes it."""
    found = MODULE.search(text)
    return (found[1] if found else ""), {name: path for name, path in NAMED.findall(text) if path}


def scope_of(path: str) -> str:
    """Our scopes in the path of an operation, `trunk/block/attention`, and whether it is of the backward pass.

    "other" where there is none.
    """
    plain = path.split(";")[0]
    while (outer := AROUND.sub(r"\1", plain)) != plain:
        plain = outer
    kept = [part for part in plain.split("/") if part in OURS or part.startswith(HEAD)]
    return ("/".join(kept) or "other") + " (backward)" * ("transpose(" in path and bool(kept))


def by_scope(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of operations by scope; an operation that lies within another one is not counted twice."""
    threads = collections.defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    seconds: dict[str, float] = collections.defaultdict(float)
    for thread in threads.values():
        around: list[tuple[float, str]] = []  # end and scope of the operations that the next one may lie in
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            begin, duration, scope = event["ts"], event["dur"], scope_of(event["args"]["scope"])
            while around and around[-1][0] <= begin:
                around.pop()
            if around:
                seconds[around[-1][1]] -= duration / 1e6
            seconds[scope] += duration / 1e6
            around.append((begin + duration, scope))
    return dict(seconds)


def _is_operation(event: Mapping[str, Any]) -> bool:
    return event.get("ph") == "X" and "dur" in event and "hlo_op" in event.get("args", {})
