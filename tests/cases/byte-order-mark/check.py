"""Files that Windows programs wrote begin with U+FEFF."""

import json
import os
import sys

sys.path.insert(0, os.getcwd())
from src.data.sources.captions import Captions
from src.data.sources.webdataset import WebDataset
from tests.cases.made import TMP, end, jpeg, readable, tar

bom = b"\xef\xbb\xbf"
(TMP / "f").mkdir()
(TMP / "t").mkdir()
(TMP / "f/a.jpg").write_bytes(jpeg())
line = bom + json.dumps({"image": "a.jpg", "caption": "a cat"}).encode() + b"\r\n"
(TMP / "f/captions.jsonl").write_bytes(line)
good, told = readable(Captions(TMP / "f"))
wrong = [] if len(good) == 1 else told
texts = [("a.txt", bom + b"a cat\r\n"), ("b.json", bom + b'{"caption": "a cat"}')]
tar(TMP / "t/0.tar", [("a.jpg", jpeg()), texts[0], ("b.jpg", jpeg()), texts[1]])
good, told = readable(WebDataset(TMP / "t"))
wrong += told + [f"caption {e['caption']!r}" for e in good if e["caption"] != "a cat"]
end(*wrong)
