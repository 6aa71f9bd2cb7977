"""A CLIPVisionModel as transformers 5 saves it: tensors without the prefix vision_model."""

import os
import pathlib
import shutil
import sys

sys.path.insert(0, os.getcwd())
from safetensors.numpy import load_file, save_file

from src.codecs.clip_files import read_clip
from tests.cases.made import TMP, end

golden = pathlib.Path("tests/golden/clip_vision")
(TMP / "c").mkdir()
shutil.copy(golden / "config.json", TMP / "c/config.json")
tensors = load_file(golden / "model.safetensors")
save_file({name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}, TMP / "c/model.safetensors")
try:
    read_clip(TMP / "c")
    end()
except ValueError as error:
    end(str(error)[:300])
