"""A number NaN in a field that no task reads, as Python's json writes it."""

import os
import sys

sys.path.insert(0, os.getcwd())
from src.data.sources.captions import Captions
from src.data.sources.webdataset import WebDataset
from tests.cases.made import TMP, end, jpeg, readable, tar

(TMP / "f").mkdir()
(TMP / "t").mkdir()
(TMP / "f/a.jpg").write_bytes(jpeg())
(TMP / "f/captions.jsonl").write_text('{"image": "a.jpg", "caption": "a cat", "similarity": NaN}\n')
tar(TMP / "t/0.tar", [("a.jpg", jpeg()), ("a.json", b'{"caption": "a cat", "similarity": NaN}')])
wrong = [text for source in (Captions(TMP / "f"), WebDataset(TMP / "t")) for text in readable(source)[1]]
end(*(text for text in wrong if "similarity" not in text))
