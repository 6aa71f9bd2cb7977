"""Packed chats whose question alone fills a row: nothing of them is learned."""

import contextlib
import json
import os
import sys

sys.path.insert(0, os.getcwd())
from src.codecs.text import Bytes
from src.data.example import BadRow
from src.data.sources.ultrachat import UltraChat
from src.data.task import SourceTask
from src.data.templates.packed import Packed
from tests.cases.made import TMP, end
from tests.helpers.fields import table

(TMP / "c").mkdir()
(TMP / "c/a.jsonl").write_text("".join(json.dumps({"data": ["q" * 200, "a dog"]}) + "\n" for _ in range(30)))
task = SourceTask("t", UltraChat(TMP / "c"), Packed(64), table(Bytes()))
silent = 0
for row in range(task.rows("train")):
    with contextlib.suppress(BadRow):
        silent += not task.read("train", row)["text/target"].any()
end(f"{silent} rows have no target, and nothing is said" if silent else "")
