"""Members whose names have a backslash; nothing is unpacked, so no name can do harm."""

import os
import sys

sys.path.insert(0, os.getcwd())
from etils import epath

from src.data.sources.webdataset import WebDataset
from tests.cases.made import TMP, end, jpeg, readable, tar

(TMP / "t").mkdir()
tar(TMP / "t/0.tar", [("p/a\\_b_2.jpg", jpeg()), ("p/a\\_b_2.txt", b"one")])
good, told = readable(WebDataset(epath.Path(TMP / "t")))
end("" if len(good) == 1 else str(told))
