"""Prompts of benchmarks, and the folders that their judges read."""

import json

import numpy as np
import pytest
from PIL import Image

from src.evals.scores.benchmarks import BENCHMARKS, read_benchmark, write_benchmark

RNG = np.random.default_rng(0)


def made(count, each):
    return RNG.integers(0, 256, (count, each, 4, 6, 3)).astype(np.uint8)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_geneval(tmp_path):
    rows = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}]
    rows += [{"tag": "counting", "include": [], "exclude": [], "prompt": "zwei Äpfel"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    prompts = read_benchmark("geneval", str(tmp_path / "p.jsonl"))
    assert [p.text for p in prompts] == ["a bench", "zwei Äpfel"]
    images = made(2, 4)
    write_benchmark("geneval", tmp_path / "out", prompts, iter(images))
    for number, row in enumerate(rows):
        folder = tmp_path / f"out/{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        for index in range(4):
            np.testing.assert_array_equal(pixels(folder / f"samples/{index:04d}.png"), images[number, index])


def test_dpg(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/midjourney_1.txt").write_text("a red\nhouse\n")
    prompts = read_benchmark("dpg", str(tmp_path / "p"))
    assert (prompts[0].text, prompts[0].name) == ("a red house", "midjourney_1")
    images = made(1, 4)
    write_benchmark("dpg", tmp_path / "out", prompts, images)
    grid = pixels(tmp_path / "out/midjourney_1.png")
    assert grid.shape == (8, 12, 3)
    for index, (top, left) in enumerate([(0, 0), (0, 6), (4, 0), (4, 6)]):
        np.testing.assert_array_equal(grid[top : top + 4, left : left + 6], images[0, index])


def test_wise_and_t2i_compbench(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps([{"Prompt": "the fruit of Newton", "prompt_id": 7, "Category": "x"}]))
    prompts = read_benchmark("wise", str(tmp_path / "w.json"))
    write_benchmark("wise", tmp_path / "wise", prompts, made(1, 1))
    assert [p.name for p in (tmp_path / "wise").iterdir()] == ["7.png"]
    (tmp_path / "c.txt").write_text("a green bench and a red car\na blue cup\n")
    prompts = read_benchmark("t2i_compbench", str(tmp_path / "c.txt"))
    write_benchmark("t2i_compbench", tmp_path / "c", prompts, made(2, 2))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "a blue cup_000002.png",
        "a blue cup_000003.png",
        "a green bench and a red car_000000.png",
        "a green bench and a red car_000001.png",
    ]
    assert BENCHMARKS["t2i_compbench"].each == 10


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("geneval", '{"prompt": "a"}\n{"text": "b"}', "line 2 is no JSON object with a prompt"),
        ("geneval", '{"prompt": ""}', "line 1 is no JSON object with a prompt"),
        ("geneval", "", "has no prompts"),
        ("dpg", "a prompt", "is no folder of .txt files"),
        ("wise", '{"Prompt": "a"}', "is no list of objects with prompt_id and Prompt"),
        ("wise", '[{"Prompt": "a", "prompt_id": "../a"}]', "is no list of objects.*has a slash"),
        ("t2i_compbench", "a/b", "has a slash or more than 240 bytes"),
        ("t2i_compbench", "twice\ntwice", "has 'twice' twice"),
    ],
)
def test_other_files_are_one_sentence(tmp_path, name, content, told):
    (tmp_path / "p").write_text(content)
    with pytest.raises(ValueError, match=told) as error:
        read_benchmark(name, str(tmp_path / "p"))
    assert "\n" not in str(error.value)
