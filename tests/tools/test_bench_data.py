"""The bench of the data counts what it reads."""

import pytest

from configs import common
from src.tools import bench_data
from tests.helpers import formats


def config_of(tmp_path):
    folder, names = formats.make_imagenet(tmp_path)
    (folder / "n01440764" / "n01440764_0.JPEG").write_bytes(b"broken")
    config = common.base()
    config.fields = {"text": common.text(name="text:Bytes"), "image": common.image(8, 8, 3)}
    images = {
        "source": {"name": "image_folders", "folder": str(folder), "names": str(names)},
        "template": {"name": "class_prompt", "length": 64, "drop": 0.0},
        "objectives": {"o": common.diffusion("image")},
    }
    chats = {
        "source": {"name": "ultrachat", "folder": str(formats.make_ultrachat(tmp_path / "u", turns=1))},
        "template": {"name": "chat", "length": 64},
        "objectives": {"o": common.next_token("text")},
    }
    config.tasks = {"images": images | {"weight": 1.0}, "chats": chats | {"weight": 1.0}}
    return common.debug(config)


def test_figures_are_those_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = config_of(tmp_path)
    figures = bench_data.bench(config, seconds=0.0)
    images, chats = figures["images"], figures["chats"]
    assert (images["rows"], images["read"], chats["rows"], chats["bad"]) == (20, 32, 8, 0)
    assert 1 <= images["bad"] <= 2  # 32 of the 20 rows in turn
    assert images["images_per_second"] / images["rows_per_second"] == pytest.approx(1 - images["bad"] / 32)
    text = len("Question 0.0?") + len("Answer 0.0: it is so.") + 2
    assert chats["tokens_per_second"] / chats["rows_per_second"] == pytest.approx(text)
    sizes = [p.stat().st_size for p in (tmp_path / "train").glob("*/*")]
    assert min(sizes) < images["bytes_per_row"] < max(sizes) and chats["bytes_per_row"] == 0
    assert "| images |" in bench_data.table(figures) and [*bench_data.bench(config, ["chats"], 0.0)] == ["chats"]
    with pytest.raises(ValueError, match="--task=x is no task of this config; there are chats, images"):
        bench_data.bench(config, ["x"])
