"""A turn of the system before the first question."""

import json
import os
import sys

sys.path.insert(0, os.getcwd())
from src.data.sources.llava import Llava
from tests.cases.made import TMP, end, jpeg, readable

(TMP / "1.jpg").write_bytes(jpeg())
told = [("system", "Be short."), ("human", "<image>\nWhat?"), ("gpt", "A fox.")]
turns = [{"from": who, "value": text} for who, text in told]
(TMP / "l.json").write_text(json.dumps([{"image": "1.jpg", "conversations": turns}]))
good, told = readable(Llava(TMP / "l.json", TMP))
end(*told)
