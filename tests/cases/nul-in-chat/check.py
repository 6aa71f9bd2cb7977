"""A chat with the character U+0000 in a question or an answer."""

import json
import os
import sys

sys.path.insert(0, os.getcwd())
import numpy as np

from src.codecs.text import Bytes
from src.data.example import BadRow
from src.data.sources.llava import Llava
from src.data.sources.ultrachat import UltraChat
from src.data.task import SourceTask
from src.data.templates.chat import Chat
from src.data.templates.picture_chat import PictureChat
from src.interfaces import FieldSpec
from tests.cases.made import TMP, end, jpeg
from tests.helpers.fields import field, table

(TMP / "c").mkdir()
chats = (["a\0b", "c"], ["a", "b\0c"], ["a", "b"])
(TMP / "c/a.jsonl").write_text("".join(json.dumps({"data": d}) + "\n" for d in chats))
wrong = []


def read_all(task, rows, name):
    for row in range(rows):
        try:
            task.read("train", row)
        except BadRow:
            pass
        except Exception as error:
            wrong.append(f"{name} {row + 1}: {type(error).__name__}: {error}")


task = SourceTask("t", UltraChat(TMP / "c"), Chat(64), table(Bytes()))
read_all(task, 3, "chat")


class Eye:
    where, shape, takes, spec = "frozen", (4, 3), (8, 8, 3), FieldSpec((2, 2), features=3)

    def preprocess(self, pixels):
        return np.zeros(self.takes, np.float32)


def talk(*turns):
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


(TMP / "1.jpg").write_bytes(jpeg())
rows = [{"image": "1.jpg", "conversations": talk("<image>\nWhat?", "a\0b")}, {"conversations": talk("a\0b", "c")}]
(TMP / "l.json").write_text(json.dumps(rows))
fields = table(Bytes(), vision=field("vision", Eye()))
task = SourceTask("t", Llava(TMP / "l.json", TMP), PictureChat(20, 80), fields)
read_all(task, 2, "picture chat")
end(*wrong)
