"""Folders that systems leave behind beside those of the classes."""

import os
import sys

sys.path.insert(0, os.getcwd())
from etils import epath

from src.data.sources.image_folders import ImageFolders
from tests.cases.made import TMP, end, jpeg

for name in ("cat/1.jpg", "dog/1.jpg", "__MACOSX/cat/._1.jpg", "@eaDir/1.jpg"):
    (TMP / "f" / name).parent.mkdir(parents=True, exist_ok=True)
    (TMP / "f" / name).write_bytes(jpeg())
try:
    ids = [c["id"] for c in ImageFolders(epath.Path(TMP / "f")).classes]
except ValueError as error:
    end("" if "@eaDir" in str(error) or "__MACOSX" in str(error) else str(error))
end("" if ids == ["cat", "dog"] else f"classes {ids}")
