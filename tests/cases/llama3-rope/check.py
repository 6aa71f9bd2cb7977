"""A Llama 3.1 with rope_scaling of type llama3, in the old and the new form of config.json."""

import os
import pathlib
import sys

sys.path.insert(0, os.getcwd())
from tests.cases.llamas import convert, llama
from tests.cases.made import TMP, end

rope = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
llama(TMP / "old", rope_scaling=rope, rope_theta=5e5)
llama(TMP / "new", rope_parameters=rope | {"rope_theta": 5e5})
told = "rope_scaling" in pathlib.Path("docs/weights.md").read_text()
end(*(text for code, text in map(convert, (TMP / "old", TMP / "new")) if code and not told))
