"""What is shown of a batch: the very tokens, the targets among them, and who sees whom."""

import importlib.util
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from src import run
from src.codecs.text import Bytes
from src.tools import show_batch
from tests.helpers import formats
from tests.helpers.autoencoder import write_tiny

CONFIG = """
from configs import common
def get_config(name=None):
    config = common.base()
    image = common.image(8, 8, 3)
    image["codec"]["frozen"] = {{"name": "vae_latents", "path": "{0}/vae", "factor": 2}}
    packed = {{"name": "packed", "length": 64, "images": 1}}
    with config.unlocked():
        config.fields = {{"text": common.text(name="text:Bytes"), "image": image}}
        config.tasks = {{
            "draw": {{
                "weight": 1.0,
                "source": {{"name": "captions", "folder": "{0}/captions"}},
                "template": {{"name": "caption_to_image", "length": 32}},
                "objectives": {{"diffusion": common.diffusion()}},
            }},
            "packed": {{
                "weight": 1.0,
                "source": {{"name": "documents", "folder": "{0}/documents"}},
                "template": packed,
                "objectives": {{"text": common.next_token("text")}},
            }},
        }}
    return common.debug(config).lock()
"""


def test_rows_are_shown_as_the_model_sees_them(tmp_path, capsys):
    write_tiny(tmp_path / "vae")
    formats.make_captions(tmp_path / "captions")
    (tmp_path / "documents").mkdir()
    Image.fromarray(formats.picture(0)).save(tmp_path / "documents" / "a.png")
    parts = [{"text": "see"}, {"image": "a.png", "role": "generate"}, {"text": "no", "loss": False}, {"text": "yes"}]
    (tmp_path / "documents" / "documents.jsonl").write_text(json.dumps({"parts": parts}) + "\n")
    (tmp_path / "config.py").write_text(CONFIG.format(tmp_path))
    flags = [f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--rows=1"]
    assert show_batch.main(["show_batch", *flags]) == 0
    said = capsys.readouterr().out
    assert (
        "rows of 39 tokens: text.prompt (32, clean, causal), image (4, noisy, bidirectional, 1 in front), text." in said
    )
    assert "<|im_start|>" in said and "image  4 tokens, 4 of them targets" in said and "targets: 4 of image" in said
    packed = said[said.index("packed: rows of") :]
    assert "<s> [[see" in packed and "no [[yes </s>]]" in packed, packed
    codec, lines = Bytes(), "\n".join(re.findall(r"^ +ids  (.*)$", packed, re.MULTILINE))
    assert lines.startswith(f"{codec.bos} [[{' '.join(map(str, codec.encode('see')))}"), packed
    learned = " ".join(re.findall(r"\[\[([\d ]+)\]\]", lines)).split()
    assert f"targets: 4 of image, {len(learned)} of text" in packed and learned[-1] == str(codec.eos)
    assert "image 1  4 tokens" in packed and "image 1 (lead)  1 token\n" in packed
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
        legend = (tmp_path / "out" / f"{name}-mask-1.txt").read_text().splitlines()
        colors = {line[:7]: line[22:] for line in legend[1:] if "not seen" not in line and "edges" not in line}
        parts = list(colors.values())
        assert "image (lead)" in parts or "image 1 (lead)" in parts, legend
        used = {"#" + bytes(color).hex() for color in mask[scale // 2 :: scale, scale // 2 :: scale].reshape(-1, 3)}
        assert used - {"#f5f5f5"} <= set(colors) and len(set(parts)) == len(parts), (used, legend)
    assert np.asarray(Image.open(tmp_path / "out" / "draw.png")).std() > 10
    assert show_batch.main(["show_batch", flags[0], "--task=none"]) == 1
    assert "there is no task 'none'" in capsys.readouterr().err


def test_a_refused_row_in_buckets_is_shown_as_an_empty_image(tmp_path, capsys):
    formats.make_captions(tmp_path / "captions", rows=4)
    for i in range(3):
        (tmp_path / "captions" / f"{i}.png").write_bytes(b"broken")
    told = CONFIG.replace('"length": 32}}', '"length": 32, "buckets": ((4, 4), (2, 8))}}')
    told = "\n".join(line for line in told.splitlines() if "frozen" not in line)
    told = told.replace("return common.debug(config)", "config.data.max_bad.share = 1.0; return common.debug(config)")
    (tmp_path / "config.py").write_text(told.format(tmp_path))
    flags = [f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--task=draw"]
    assert show_batch.main(["show_batch", *flags]) == 0, capsys.readouterr().err
    assert list((tmp_path / "out").glob("draw*.png"))


CHATS = """
from configs import common
def get_config(name=None):
    config = common.base()
    config.seed = {2}
    with config.unlocked():
        config.fields = {{"text": common.text(name="text:Bytes")}}
        source = {{"name": "ultrachat", "folder": "{0}/chats"}}
        template = {{"name": "{1}", "length": 32}}
        objectives = {{"text": common.next_token("text")}}
        config.tasks = {{"chat": {{"weight": 1.0, "source": source, "template": template, "objectives": objectives}}}}
    return common.debug(config).lock()
"""
UNREAD = r"task chat: 32 of 32 rows .*a\.jsonl: .*'prompt', 'chosen'.*\"messages\".*: line 1, line 2, line 3: mend"


@pytest.mark.parametrize("template", ["chat", "packed"])
def test_data_are_judged_before_anything_compiles(template, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "chats").mkdir()
    line = lambda row: json.dumps(row) + "\n"
    (tmp_path / "chats" / "a.jsonl").write_text(line({"prompt": "a", "chosen": "b"}) * 40)
    (tmp_path / "config.py").write_text(CHATS.format(tmp_path, template, 0))
    flags = [f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--rows=1"]
    assert show_batch.main(["show_batch", *flags]) == 1
    assert re.search(UNREAD, capsys.readouterr().err) and not (tmp_path / "out").exists()

    monkeypatch.setattr(run.loop, "train", lambda *anything: pytest.fail("the step compiles there"))
    spec = importlib.util.spec_from_file_location("judged", tmp_path / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=UNREAD):
        run.train(SimpleNamespace(config=module.get_config(), workdir=str(tmp_path / "run"), profile=None), 0.0)


def test_bad_rows_are_shown_as_bad(tmp_path, capsys):
    (tmp_path / "chats").mkdir()
    line = lambda row: json.dumps(row) + "\n"
    flags = [f"--config={tmp_path}/config.py", f"--out={tmp_path}/out", "--rows=1"]
    talk = [{"role": "user", "content": "a" * 12}, {"role": "assistant", "content": "b" * 12}]
    (tmp_path / "chats" / "a.jsonl").write_text(line({"prompt": "a"}) * 20 + line({"messages": talk}) * 20)
    (tmp_path / "config.py").write_text(CHATS.format(tmp_path, "chat", 0))
    assert show_batch.main(["show_batch", *flags[:2], "--rows=6"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"<s> {'a' * 12} [[{'b' * 12} </s>]]" in said
    assert "bad rows, which are shown without tokens: a.jsonl: " in said
    for seed in range(20):
        (tmp_path / "config.py").write_text(CHATS.format(tmp_path, "chat", seed))
        if show_batch.main(["show_batch", *flags]):  # the one row that is shown is a bad one
            break
    assert "task chat: all 1 rows are bad: a.jsonl: there is no conversation" in capsys.readouterr().err


def test_targets_stand_in_brackets():
    class Letters:
        pad, image, image_start, image_end, bos, eos = range(26, 32)

        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    ids = np.array([30, 0, 1, 2, 28, -1, 29, 3, 31])
    loss = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1], bool)
    assert show_batch.words(ids, loss, Letters()) == "<s> a [[bc]] <|im_start|> <|im_end|> [[d </s>]]"
    assert show_batch.numbers(ids, loss) == "30 0 [[1 2]] 28 29 [[3 31]]"


def test_the_legend_names_the_color_and_the_tokens_of_each_part():
    parts = ["text", "text", "image (lead)", "image", "image", "text", ""]
    lines = show_batch.legend(parts).splitlines()
    colors = show_batch.colors_of(parts)
    assert [line.split(maxsplit=1)[1] for line in lines[1:2]] == ["0-1, 5       text"]
    assert [line[22:] for line in lines[1:5]] == ["text", "image (lead)", "image", "(padding)"]
    assert [line[:7] for line in lines[1:5]] == ["#" + bytes(color).hex() for color in colors.values()]
    assert [line[9:20].strip() for line in lines[1:5]] == ["0-1, 5", "2", "3-4", "6"]
    assert len(set(colors.values())) == 4 and lines[5] == "#f5f5f5  not seen"
