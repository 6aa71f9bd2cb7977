"""A sound PNG with two megabytes of text in a compressed chunk, as drawing programs add."""

import os
import sys

sys.path.insert(0, os.getcwd())
import zlib

import numpy as np

from src.common.files.images import read_image
from tests.cases.made import chunk, end, in_png, png

text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{}" * 1_000_000))
try:
    end("" if np.array_equal(read_image(in_png(text)), read_image(png())) else "other pixels")
except ValueError as error:
    end(str(error))
