"""Pictures of formats that are read elsewhere, in folders of classes."""

import os
import sys

sys.path.insert(0, os.getcwd())
import logging

from absl import logging as told_by
from etils import epath

from src.data.sources.image_folders import ImageFolders
from tests.cases.made import TMP, end, jpeg

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
told_by.get_absl_logger().addHandler(handler)
for name in ("cat/1.webp", "cat/2.jpg", "dog/1.jpg"):
    (TMP / "f" / name).parent.mkdir(parents=True, exist_ok=True)
    (TMP / "f" / name).write_bytes(jpeg())
count = len(ImageFolders(epath.Path(TMP / "f")))
end("" if count == 3 or any("webp" in line for line in lines) else f"{count} of 3 images, and nothing is said")
