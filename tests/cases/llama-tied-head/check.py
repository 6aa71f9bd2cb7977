"""A Llama whose head is its embedding (Llama 3.2, SmolLM): no lm_head.weight in the file."""

import os
import pathlib
import sys

sys.path.insert(0, os.getcwd())
from tests.cases.llamas import convert, llama
from tests.cases.made import TMP, end

llama(TMP / "l", head=False, tie_word_embeddings=True)
code, text = convert(TMP / "l")
end("" if code == 0 or "tie_word_embeddings" in pathlib.Path("docs/weights.md").read_text() else text)
