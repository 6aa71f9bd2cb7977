"""The files of samples: one image each, arrays and JSON, and a file of prompts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from src import run
from src.data.files.wave_file import read_wave
from src.evals.given import asked_of, read_prompts
from src.evals.samples import SampleFiles, formats_of, name_of
from src.sampling.decoders.blocks import Blocks
from src.sampling.decoders.left_to_right import LeftToRight
from src.sampling.guidance import Guidance
from src.sampling.steps.next_token import Greedy, Sampled
from tests.helpers.tasks import digit_tasks, fields

SAID = {"prompt": "一只猫"}


def images(count, channels=1):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_keeps_every_image(tmp_path, channels):
    pixels = images(12, channels)
    files = SampleFiles(str(tmp_path / "deep" / "cat"), ["grid", "png", "npy", "json"])
    found = [{"image": image, "text.caption": f"said {i}"} for i, image in enumerate(pixels)]
    paths, single = files.write_images(found, ["一只猫"] * 12)
    files.write_json(found, [SAID] * 12, {"seed": 3}, paths, single)
    names = ["cat.json", "cat.npy", "cat.png", *(f"cat-{i + 1:02}.png" for i in range(12))]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == sorted(names)
    np.testing.assert_array_equal(np.load(tmp_path / "deep" / "cat.npy"), pixels)
    told = json.loads((tmp_path / "deep" / "cat.json").read_text())
    assert told["seed"] == 3 and told["files"] == ["cat.png", "cat.npy"] and len(told["samples"]) == 12
    for number, (sample, image) in enumerate(zip(told["samples"], pixels, strict=True)):
        assert sample["given"] == SAID and sample["made"]["text.caption"] == f"said {number}"
        kept = np.asarray(Image.open(tmp_path / "deep" / sample["made"]["image"]))
        np.testing.assert_array_equal(kept, np.broadcast_to(image, (8, 8, 3)))


def test_sounds_are_wav_files(tmp_path):
    files = SampleFiles(str(tmp_path / "ae"), ["json"])
    found = [{"frames": np.float32([0.5, -0.25, size])} for size in (0.0, 2.0)]
    paths, single = files.write_images(found, [""] * 2)
    paths += files.write_sounds(found, {"frames": 8000}, single)
    files.write_json(found, [{"text": "ae"}] * 2, {}, paths, single)
    told = json.loads((tmp_path / "ae.json").read_text())
    for sample, expected in zip(told["samples"], ([0.5, -0.25, 0], [0.25, -0.125, 1]), strict=True):
        rate, wave = read_wave(tmp_path / sample["made"]["frames"])
        assert rate == 8000 and np.abs(wave - expected).max() < 1e-4
    assert told["files"] == [] and [sample["made"]["frames"] for sample in told["samples"]] == ["ae-1.wav", "ae-2.wav"]


def test_only_what_is_asked_for_is_written_and_two_names_have_two_files(tmp_path):
    found = [{"left": a, "right": b} for a, b in zip(images(3), 255 - images(3), strict=True)]
    for formats, names in (
        (["npy"], {"a.fox-left.npy", "a.fox-right.npy"}),
        (["grid"], {"a.fox-left.png", "a.fox-right.png"}),
    ):
        folder = tmp_path / formats[0]
        paths, single = SampleFiles(str(folder / "a.fox"), formats).write_images(found, [""] * 3)
        expected = names if formats == ["npy"] else {"a-left.fox", "a-right.fox"}
        assert {path.name for path in folder.iterdir()} == expected and len(paths) == 2 and single == [{}, {}, {}]


@pytest.mark.parametrize("ending", [".png", ".npy", ".json", ".PNG", ""])
def test_the_ending_of_output_is_that_of_each_file(tmp_path, ending):
    files = SampleFiles(str(tmp_path / f"fox{ending}"), ["grid", "npy", "json"])
    paths, _ = files.write_images([{"image": image} for image in images(2)], ["", ""])
    assert files.json == str(tmp_path / "fox.json") and paths[1] == str(tmp_path / "fox.npy")
    assert paths[0].lower() == str(tmp_path / "fox.png").lower()


def test_formats_that_keep_nothing_are_refused():
    assert formats_of(None, True, "draw") == ["grid", "json"] and formats_of(None, False, "say") == ["json"]
    assert formats_of(["png", "npy", "png"], True, "draw") == ["png", "npy"]
    for asked, pictured in ((["jpg"], True), (["json"], True), ([], True), (["npy"], False), (["json", "grid"], False)):
        with pytest.raises(ValueError, match=r"^--format=.*\b(give|add)\b"):
            formats_of(asked, pictured, "draw")


def test_names_of_what_is_given():
    assert name_of({"caption": "a handwritten three"}) == "a-handwritten-three" and name_of({"label": "3"}) == "class-3"
    assert name_of({"image": "/data/digit.png"}) == "digit" != name_of({"prompt": "a", "image": "/data/digit.png"})
    prompts = ["一只猫", "一只狗", "قطة", "كلب", "🐱", "🐶", "a 🐱", "a 🐶"]
    assert len({name_of({"prompt": prompt}) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("data", ["a cat\n一只猫\nقطة\n", "\ufeffa cat\r\n一只猫\r\nقطة", "a cat\n一只猫\nقطة\n\n \n"])
def test_a_file_of_prompts_has_one_in_each_line(tmp_path, data):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data.encode())
    assert read_prompts(str(path)) == ["a cat", "一只猫", "قطة"]
    asked = asked_of(["grade=3"], str(path), prompt=None, label=None)
    assert [values["prompt"] for values in asked] == ["a cat", "一只猫", "قطة"] and asked[2]["grade"] == "3"
    for given, prompt in (([], "a"), (["prompt=a"], None), (["caption=a"], None)):
        with pytest.raises(ValueError, match="the prompt is given twice"):
            asked_of(given, str(path), prompt=prompt)


NO_PROMPTS = {b"a\n\xff": "line 2 is no UTF-8", b"a\n\nb": "line 2 is empty", b"\n\nb": "line 1 is empty"}
NO_PROMPTS |= {b"": "no lines", b"\n \n": "no lines"}


@pytest.mark.parametrize(("data", "said"), NO_PROMPTS.items())
def test_what_is_no_file_of_prompts_is_refused(tmp_path, data, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_prompts(str(path))
    with pytest.raises(FileNotFoundError, match="the file of prompts"):
        read_prompts(str(tmp_path / "none.txt"))


class Made:
    """A pipeline that draws or writes something else in each row."""

    guidance = Guidance(scale=2.5)
    choose = Greedy()

    def __init__(self, name):
        task = "caption_to_image" if name == "image" else "number_sentences"
        self.decoders = {"text": LeftToRight(choose=self.choose), "image": Blocks(steps=1)}
        self.name, self.rows, self.tasks = name, [], {task: digit_tasks()[task]}

    def check(self, name, given):
        if any("Ω" in str(example) for example in given):
            raise ValueError("'Ω' is not known")

    def with_params(self, params):
        return self

    def __call__(self, name, given, seed):
        self.rows = list(given)
        return [{self.name: f"said {i}" if "text" in self.name else images(1)[0]} for i in range(len(given))]


def sampled(monkeypatch, tmp_path, name, **given):
    """(rows that were asked for, what was printed) of a call of `--mode=sample`."""
    pipeline = Made(name)
    system = SimpleNamespace(pipeline=pipeline, fields=fields(), config=SimpleNamespace(seed=7))
    said = []
    for place, value in {
        "use_program_cache": lambda: None, "_build": lambda flags: system, "_workdir": lambda flags: tmp_path,
        "restore_checkpoint": lambda *_: SimpleNamespace(step=np.int32(40)), "with_extras": lambda *rest: None,
        "used_params": lambda *rest: None, "_say": said.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(run, place, value)
    monkeypatch.setattr(run.config_flag, "name_of", lambda flags: "digits.py")
    monkeypatch.setattr(run.config_flag, "overrides", lambda flags: {})
    flags = dict.fromkeys(("prompts", "prompt", "label", "image", "task", "count", "grid", "output", "format", "step"))
    run.sample(SimpleNamespace(**flags | {"given": [], **given}), 0.0)
    return pipeline.rows, said


def test_a_call_tells_all_in_json(monkeypatch, tmp_path):
    rows, said = sampled(monkeypatch, tmp_path, "image", prompt="一只猫", format=["png", "json"], count=3)
    (path,) = (tmp_path / "samples").glob("*.json")
    told = json.loads(path.read_text())
    about = {
        "task": "caption_to_image",
        "step": 40,
        "seed": 7,
        "guidance": 2.5,
        "config": "digits.py",
        "overrides": {},
        "files": [],
    }
    assert {key: told[key] for key in about} == about and len(told["samples"]) == len(rows) == len(said) == 3
    assert [str(path.parent / sample["made"]["image"]) for sample in told["samples"]] == said
    rows, said = sampled(monkeypatch, tmp_path, "image", prompt="一只狗")
    assert len(rows) == run.COUNT and len(said) == 1 and said[0].endswith(".png")
    assert len(list((tmp_path / "samples").glob("*.json"))) == 2, "another file for another prompt"


def test_count_is_that_of_each_prompt_also_of_texts(monkeypatch, tmp_path):
    rows, said = sampled(monkeypatch, tmp_path, "text.sentence", prompt="a", count=3)
    assert len(rows) == 3 and said == ["a said 0", "a said 1", "a said 2"]
    path = tmp_path / "lines.txt"
    path.write_text("一\n二\n", "utf-8")
    rows, said = sampled(monkeypatch, tmp_path, "text.sentence", prompts=str(path), count=2)
    assert said == ["一 said 0", "一 said 1", "二 said 2", "二 said 3"]
    told = json.loads((tmp_path / "samples" / "lines.json").read_text())["samples"]
    assert [s["given"]["prompt"] + s["made"]["text.sentence"] for s in told] == [s.replace(" ", "", 1) for s in said]
    assert len(sampled(monkeypatch, tmp_path, "image", prompts=str(path))[0]) == 2, "one of each"
    path.write_text("a\nΩ\n", "utf-8")
    with pytest.raises(ValueError, match=r"lines.txt, line 2: 'Ω'"):
        sampled(monkeypatch, tmp_path, "image", prompts=str(path))


def test_equal_texts_are_told_before_they_are_made(monkeypatch, tmp_path):
    warned = []
    monkeypatch.setattr(run.logging, "warning", lambda told, *values: warned.append(told % values))
    for name, options in (("text.sentence", {}), ("text.sentence", {"count": 1}), ("image", {"count": 3})):
        sampled(monkeypatch, tmp_path, name, prompt="a", **options)
    assert not warned
    sampled(monkeypatch, tmp_path, "text.sentence", prompt="a", count=3)
    (told,) = warned
    assert told.startswith("--count=3 ") and told.endswith("--config.decode.text.choose.name=next_token:Sampled")
    monkeypatch.setattr(Made, "choose", Sampled())
    sampled(monkeypatch, tmp_path, "text.sentence", prompt="a", count=3)
    assert len(warned) == 1
