"""A phone's photograph with a film behind the end of the picture."""

import os
import sys

sys.path.insert(0, os.getcwd())
from src.common.files.images import read_image
from tests.cases.made import end, jpeg

try:
    shape = read_image(jpeg() + b"ftypmp42" + b"\x00\xff\xda\x11" * 200).shape
    end("" if shape == (20, 27, 3) else "other pixels")
except ValueError as error:
    end(str(error))
