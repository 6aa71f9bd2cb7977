"""What is shown of a batch: the very tokens, what is learned of them, and who sees whom."""

import json
import re

import jax
import numpy as np
from PIL import Image

from src.codecs.text import Bytes
from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import write_vae
from src.tools import show_batch
from tests.helpers import formats

TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)  # one latent for 2 x 2 pixels
CONFIG = """
from configs import common
def get_config(name=None):
    config = common.base()
    config.text_codec.name = "text:Bytes"
    data = {{"name": "pictures:CaptionToImage", "folder": "{0}/captions", "size": 8, "length": 32}}
    packed = {{"name": "documents:Documents", "folder": "{0}/documents", "length": 64, "images": 1, "size": 8}}
    config.tasks = {{
        "draw": {{"share": 1.0, "data": data, "objectives": {{"diffusion": common.diffusion()}}}},
        "packed": {{"share": 1.0, "data": packed, "objectives": {{"text": common.next_token("text")}}}},
    }}
    with config.unlocked():
        config.image_codec = {{"name": "vae_latents", "path": "{0}/vae", "factor": 2}}
    return common.debug(config).lock()
"""


def test_rows_are_shown_as_the_model_sees_them(tmp_path, capsys):
    write_vae(tmp_path / "vae", Vae(TINY), Vae(TINY).init(jax.random.key(0)))
    formats.make_captions(tmp_path / "captions")
    (tmp_path / "documents").mkdir()
    Image.fromarray(formats.picture(0)).save(tmp_path / "documents" / "a.png")
    parts = [{"text": "see"}, {"image": "a.png", "role": "generate"}, {"text": "no", "loss": False}, {"text": "yes"}]
    (tmp_path / "documents" / "documents.jsonl").write_text(json.dumps({"parts": parts}) + "\n")
    (tmp_path / "config.py").write_text(CONFIG.format(tmp_path))
    flags = [f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--rows=1"]
    assert show_batch.main(["show_batch", *flags]) == 0
    said = capsys.readouterr().out
    assert "rows of 39 tokens: prompt (text, 32, causal), image.time (time, 1, causal), image (image, 4, bi" in said
    assert "<|im_start|>" in said and "image  4 tokens" in said
    packed = said[said.index("packed: rows of") :]
    assert "<s> [[see" in packed and "no [[yes </s>]]" in packed, packed
    codec, lines = Bytes(), "\n".join(re.findall(r"^ +ids  (.*)$", packed, re.MULTILINE))
    assert lines.startswith(f"{codec.bos} [[{' '.join(map(str, codec.encode('see')))}"), packed
    learned = " ".join(re.findall(r"\[\[([\d ]+)\]\]", lines)).split()
    assert f"learned: {len(learned)} of text" in packed and learned[-1] == str(codec.eos)
    assert "image 1  4 tokens" in packed and "image 1 (time)  1 token\n" in packed
    for name, length in (("draw", 39), ("packed", 64)):
        mask = np.asarray(Image.open(tmp_path / "out" / f"{name}-mask-1.png"))
        scale = show_batch.CELL // length
        assert mask.shape == (length * scale, length * scale, 3)
        seen = (mask[scale // 2 :: scale, scale // 2 :: scale] != 245).any(-1)
        assert not seen[0, 1:].any() and seen[0, 0], "the first token sees itself alone"
        where = slice(33, 37) if name == "draw" else None
        if where:
            assert seen[where, where].all(), "the tokens of the image see each other"
            assert not seen[:33, where].any() and not np.triu(seen[:33, :33], 1).any()
    assert np.asarray(Image.open(tmp_path / "out" / "draw.png")).std() > 10
    assert show_batch.main(["show_batch", flags[0], "--task=none"]) == 1
    assert "there is no task 'none'" in capsys.readouterr().err


def test_a_refused_row_in_buckets_is_shown_as_an_empty_image(tmp_path, capsys):
    formats.make_captions(tmp_path / "captions", rows=4)
    for i in range(3):
        (tmp_path / "captions" / f"{i}.png").write_bytes(b"broken")
    told = CONFIG.replace("pictures:CaptionToImage", "buckets:CaptionToImage")
    told = told.replace('"length": 32}}', '"length": 32, "buckets": ((4, 4), (2, 8))}}').replace('"vae_latents"', '""')
    told = told.replace("return common.debug(config)", "config.data.max_bad.share = 1.0; return common.debug(config)")
    (tmp_path / "config.py").write_text(told.format(tmp_path))
    flags = [f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--task=draw"]
    assert show_batch.main(["show_batch", *flags]) == 0, capsys.readouterr().err
    assert list((tmp_path / "out").glob("draw*.png"))


def test_what_is_learned_stands_in_brackets():
    class Letters:
        pad, image, image_start, image_end, bos, eos = range(26, 32)

        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    ids = np.array([30, 0, 1, 2, 28, -1, 29, 3, 31])
    loss = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1], bool)
    assert show_batch.words(ids, loss, Letters()) == "<s> a [[bc]] <|im_start|> <|im_end|> [[d </s>]]"
    assert show_batch.numbers(ids, loss) == "30 0 [[1 2]] 28 29 [[3 31]]"
