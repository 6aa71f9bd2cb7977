"""A Llama that has four words of its own beyond its tokenizer's, by added_tokens.json."""

import json
import os
import sys

sys.path.insert(0, os.getcwd())
from etils import epath

from src.codecs.text import SentencePiece, train_sentencepiece
from src.models.pretrained.initial_weights import Initial
from tests.cases.llamas import convert, llama
from tests.cases.made import TMP, end

train_sentencepiece(["a red cat sits on a mat", "what is it? a dog and a fox"], 300, TMP / "t.model", True)
pieces = SentencePiece(TMP / "t.model").vocab_size - 4
llama(TMP / "l", vocab=pieces + 4)
(TMP / "l/tokenizer.model").write_bytes((TMP / "t.model").read_bytes())
words = ("<pad>", "[INST]", "[/INST]", "<tool>")
(TMP / "l/added_tokens.json").write_text(json.dumps({w: pieces + i for i, w in enumerate(words)}))
code, text = convert(TMP / "l")
if code:
    end()
rows = Initial(epath.Path(f"{TMP / 'l'}-out")).shapes["fields/text/embed/table/embedding"].shape[0]
end("" if rows == pieces + 8 else f"{rows} rows: the foreign words became MonoFormer's")
