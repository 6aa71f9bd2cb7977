"""An archive made by putting two archives one behind the other (cat a.tar b.tar)."""

import os
import sys

sys.path.insert(0, os.getcwd())
from etils import epath

from src.data.sources.webdataset import WebDataset
from tests.cases.made import TMP, end, jpeg, readable, tar

tar(TMP / "a", [("1.jpg", jpeg()), ("1.txt", b"one")])
tar(TMP / "b", [("2.jpg", jpeg()), ("2.txt", b"two")])
(TMP / "t").mkdir()
(TMP / "t/0.tar").write_bytes((TMP / "a").read_bytes() + (TMP / "b").read_bytes())
try:
    good, told = readable(WebDataset(epath.Path(TMP / "t")))
except ValueError:
    end()
end("" if len(good) + len(told) == 2 else f"{len(good)} of 2 examples, and nothing is said")
