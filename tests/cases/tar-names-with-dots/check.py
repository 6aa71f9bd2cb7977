"""Pairs whose names have a dot before the ending."""

import os
import sys

sys.path.insert(0, os.getcwd())
import logging

from absl import logging as told_by
from etils import epath

from src.data.sources.webdataset import WebDataset
from tests.cases.made import TMP, end, jpeg, readable, tar

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
told_by.get_absl_logger().addHandler(handler)
(TMP / "t").mkdir()
tar(TMP / "t/0.tar", [("IMG.2021.01.jpg", jpeg()), ("IMG.2021.01.txt", b"one"), ("b.jpg", jpeg()), ("b.txt", b"two")])
good, told = readable(WebDataset(epath.Path(TMP / "t")))
said = told or any("IMG" in line or "dot" in line or "left out" in line for line in lines)
end("" if len(good) == 2 or said else f"{len(good)} of 2 examples, and nothing is said of the other")
