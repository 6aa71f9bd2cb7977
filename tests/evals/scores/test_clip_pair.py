"""CLIP with its text tower against transformers 5.24.0 (golden arrays of random weights), and its tokenizer."""

import hashlib
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from src.codecs.clip import preprocess
from src.data.sources import digits
from src.evals.image_scores import ImageScoresEvaluator
from src.evals.networks.clip_pair import read_clip_pair
from src.evals.networks.clip_tokens import joined, read_tokens, words
from src.evals.scores.drawn_images import DrawnImages, draw
from src.evals.scores.networks import clip_images, clip_texts
from src.tools import scores
from tests.golden.clip_pair.make import TEXTS
from tests.helpers.tasks import digit_tasks, fields

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/clip_pair"
FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json")


def close(found, want, message=""):
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max(), err_msg=message)


def test_both_towers_are_those_of_transformers():
    pair, params, _ = read_clip_pair(GOLDEN)
    want = np.load(GOLDEN / "expected.npz")
    ids = jnp.asarray(want["ids"], jnp.int32)
    for depth, states in enumerate(want["hidden"]):
        close(pair.hidden(params, ids[:6], depth), states, f"after {depth} blocks")
    close(jax.jit(pair.texts)(params, ids), want["texts"])
    close(jax.jit(pair.images)(params, jnp.moveaxis(want["pixels"], 1, -1)), want["images"])


@pytest.mark.parametrize("alone", [False, True])
def test_ids_are_those_of_transformers(alone, tmp_path):
    """From vocab.json and merges.txt, and from tokenizer.json alone."""
    shutil.copy(GOLDEN / "tokenizer.json", tmp_path)
    tokens = read_tokens(tmp_path if alone else GOLDEN)
    want = np.load(GOLDEN / "expected.npz")["ids"]
    for text, row in zip(TEXTS, want, strict=True):
        assert tokens.rows([text], 16)[0].tolist() == row.tolist(), text


def test_words_and_pieces():
    assert words("The cat's 42 CAN'T!'s") == ["the", "cat", "'s", "4", "2", "can", "'t", "!'", "s"]
    ranks = {("a", "b"): 1, ("b", "c</w>"): 0, ("a", "bc</w>"): 2}
    assert joined("abc", ranks) == ("abc</w>",) and joined("abb", ranks) == ("ab", "b</w>")


def changed(folder, name, change):
    for file in FILES:
        shutil.copy(GOLDEN / file, folder)
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("config.json", lambda v: v.pop("text_config"), "has no text_config: a score of texts needs a whole CLIP"),
        (
            "config.json",
            lambda v: v["text_config"].update(num_attention_heads=3),
            "num_attention_heads=3 does not divide",
        ),
        ("config.json", lambda v: v["text_config"].update(vocab_size=500), "has ids up to 550, and the text tower 500"),
        ("config.json", lambda v: v["text_config"].update(vocab_size=600), r"\[551, 16\], the model \[600, 16\]"),
        ("vocab.json", lambda v: v.pop("<|endoftext|>"), r"has no <\|endoftext\|>: give the tokenizer that belongs"),
        ("vocab.json", lambda v: v.update(a="b"), "is no tokenizer of CLIP"),
    ],
)
def test_what_does_not_fit_is_one_sentence(name, change, told, tmp_path):
    changed(tmp_path, name, change)
    with pytest.raises(ValueError, match=told) as caught:
        read_clip_pair(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer: add tokenizer"):
        read_tokens(tmp_path)


def by_hand(images, texts):
    """The score of uint8 images and their texts by the towers."""
    pair, params, tokens = read_clip_pair(GOLDEN)
    prepared = jnp.stack([preprocess(image, 12) for image in images])
    x, y = clip_images(pair, params, prepared), clip_texts(pair, params, jnp.asarray(tokens.rows(texts, 16)))
    cos = (x * y).sum(1) / jnp.linalg.norm(x, axis=1) / jnp.linalg.norm(y, axis=1)
    return float(jnp.maximum(100 * cos, 0).mean())


@pytest.mark.faults
def test_the_score_of_drawn_folders_and_of_others(tmp_path, capsys):
    lines = ["a handwritten seven", "the cat", "ice"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    digest = hashlib.sha256((tmp_path / "prompts.txt").read_bytes()).hexdigest()
    images = np.random.default_rng(0).integers(0, 256, (5, 14, 17, 3)).astype(np.uint8)

    def job(name, count, **about):
        drawn = DrawnImages(epath.Path(tmp_path / name), {"seed": 0, **about}, count, 2)
        draw(drawn, lambda rows, seed: images[rows.start : rows.stop], None, lambda done: None, True)

    def score(name, *more):
        flags = [f"--images={tmp_path / name}", "--network=clip", f"--weights={GOLDEN}", f"--json={tmp_path}/s.json"]
        code = scores.main(["scores", *flags, *more])
        said = capsys.readouterr()
        return code, said.err, json.loads((tmp_path / "s.json").read_text()) if code == 0 else None

    prompts = f"--prompts={tmp_path}/prompts.txt"
    job("drawn", 5, prompts=digest)
    code, said, report = score("drawn", prompts)
    assert code == 0, said
    want = by_hand(images, [lines[i % 3] for i in range(5)])
    assert report["scores"] == {"clip_score": pytest.approx(want, rel=1e-5)} and want > 0
    assert report["prompts"]["sha256"] == digest and len(report["network"]["sha256"]) == 64
    job("wise", 4, prompts=hashlib.sha256("\n".join(lines[:2]).encode()).hexdigest(), benchmark="t2i_compbench")
    (tmp_path / "two.txt").write_text("\n".join(lines[:2]))
    code, said, report = score("wise", f"--prompts={tmp_path}/two.txt")
    assert code == 0 and report["scores"]["clip_score"] == pytest.approx(
        by_hand(images[:4], [lines[0], lines[0], lines[1], lines[1]]), rel=1e-5
    )
    np.savez(tmp_path / "three.npz", images[:3])
    assert score("three.npz", prompts)[2]["scores"]["clip_score"] == pytest.approx(by_hand(images[:3], lines), rel=1e-5)
    np.savez(tmp_path / "five.npz", images)
    job("classes", 5)
    for name, more, told in (
        ("five.npz", [prompts], "has 3 lines, and there are 5 images: each image needs its own"),
        ("drawn", [f"--prompts={tmp_path}/two.txt"], "which were drawn from another file"),
        ("classes", [prompts], "which were drawn from classes"),
        ("drawn", ["--metrics=clip_score"], "needs what the images were drawn from: give --prompts"),
        ("drawn", [prompts, "--metrics=fid"], "fid needs pool features, which the network 'clip' does not have"),
    ):
        code, said, _ = score(name, *more)
        assert code == 1 and said.count("\n") == 1 and told in said


def test_the_score_of_a_task_that_draws_from_words():
    class Draws:
        fields, decoders, guidance = fields(), {}, types.SimpleNamespace(scale=1.0)

        def values(self, task, given, seed):
            self.given = given
            return {"image": digits.load("test").values[: len(given)]}

    options = {"draw": "caption_to_image", "network": "clip", "weights": str(GOLDEN), "metrics": ("clip_score",)}
    evaluator, pipeline = ImageScoresEvaluator(digit_tasks(), **options, count=7), Draws()
    evaluator.check(Draws.fields)
    result = evaluator(pipeline, 0)
    texts = [example["caption"] for example in pipeline.given]
    assert all(isinstance(text, str) for text in texts) and len(set(texts)) > 1
    images = np.rint((digits.load("test").values[:7] + 1) * 127.5).astype(np.uint8).repeat(3, axis=3)
    assert result.scalars == {"clip_score": pytest.approx(by_hand(images, texts), rel=1e-5)}
    with pytest.raises(ValueError, match="clip_score needs what the images were drawn from: give prompts"):
        ImageScoresEvaluator(digit_tasks(), **options | {"draw": "label_to_image"})
