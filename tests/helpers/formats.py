"""Small files of the formats that are read, written as their publishers write them. Nothing of them is real."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

# wnid -> what the published list of MonoFormer says of it; two names stand for two classes each
CLASSES = {
    "n01440764": {"label": "tench", "second_labels": ["Tinca tinca"]},
    "n02012849": {"label": "crane", "second_labels": []},
    "n03126707": {"label": "crane", "second_labels": []},
    "n03710637": {"label": "maillot", "second_labels": []},
    "n03710721": {"label": "maillot", "second_labels": ["tank suit"]},
}


def picture(seed, height=20, width=27):
    """Pixels [h, w, 3] of a smooth gradient and some noise, so that JPEG keeps them apart."""
    rng = np.random.default_rng(seed)
    ramp = (
        np.linspace(0, 1, height)[:, None, None] * rng.uniform(0, 200, 3) + np.linspace(0, 1, width)[None, :, None] * 50
    )
    return (ramp + rng.integers(0, 6, (height, width, 3))).astype(np.uint8)


def encoded(pixels, kind="JPEG"):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=95)
    return file.getvalue()


def make_imagenet(folder, classes=tuple(CLASSES), each=4, height=20, width=27):
    """`train/<wnid>/<wnid>_<i>.JPEG` and `names.json`; returns (folder of the classes, file of the names)."""
    for number, wnid in enumerate(classes):
        (folder / "train" / wnid).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            data = encoded(picture(100 * number + i, height + i, width))
            (folder / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(data)
    (folder / "names.json").write_text(json.dumps(CLASSES, indent=1))
    return folder / "train", folder / "names.json"


def make_journeydb(folder, rows=6):
    """`train_anno.jsonl` and `imgs/000/<i>.jpg`; returns (annotations, folder of the images)."""
    lines = []
    for i in range(rows):
        path = folder / "imgs" / f"{i // 4:03d}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)))
        told = {"img_path": f"./{i // 4:03d}/{i}.jpg", "prompt": f"a red fox number {i} --v 4", "Task1": {"Prompt": ""}}
        lines.append(json.dumps(told | {"Task2": {"Caption": f"The fox {i} sits."}, "Task3": {"Style": []}}))
    (folder / "train_anno.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train_anno.jsonl", folder / "imgs"


def make_ultrachat(folder, rows=8, files=2, turns=3):
    """`train_<k>.jsonl`, chats of 1 to `turns` questions with answers; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(files):
        lines = []
        for i in range(k, rows, files):
            pairs = [(f"Question {i}.{t}?", f"Answer {i}.{t}: it is so.") for t in range(1 + i % turns)]
            lines.append(json.dumps({"id": str(i), "data": [turn for pair in pairs for turn in pair]}))
        (folder / f"train_{k}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_llava(folder, rows=8):
    """`llava_mix665k.json` and `images/coco/<i>.jpg`: the marker at the start or the end of the first question, and
    every fourth row without picture; returns (list, folder of the images)."""
    elements = []
    (folder / "images" / "coco").mkdir(parents=True, exist_ok=True)
    for i in range(rows):
        question = (f"<image>\nWhat is {i}?", f"What is {i}?\n<image>", f"<image>\nHow {i}?", f"Why {i}?")[i % 4]
        turns = [question, f'A fox, [{i}] of "{{many}}".', "Which colour?", "Red."][: 2 + 2 * (i % 2)]
        talk = [{"from": ("human", "gpt")[t % 2], "value": turn} for t, turn in enumerate(turns)]
        element = {"id": f"{i:012d}", "conversations": talk}
        if i % 4 < 3:
            (folder / "images" / "coco" / f"{i}.jpg").write_bytes(encoded(picture(i, 18, 30)))
            element = {"id": element["id"], "image": f"coco/{i}.jpg", "conversations": talk}
        elements.append(element)
    (folder / "llava_mix665k.json").write_text(json.dumps(elements, indent=2))
    return folder / "llava_mix665k.json", folder / "images"


def make_captions(folder, rows=6):
    """`captions.jsonl` with the images beside it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        (folder / f"{i}.png").write_bytes(encoded(picture(i), "PNG"))
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"a fox, {i}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_tars(folder, shards=2, each=4):
    """`<k>.tar` with a picture and its text, a .txt or a .json, for each example; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(shards):
        with tarfile.open(folder / f"{k:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for i in range(k * each, (k + 1) * each):
                add_file(archive, f"{i:06d}.jpg", encoded(picture(i)))
                text = f"a fox, {i}"
                kind, data = ("txt", text) if i % 2 else ("json", json.dumps({"caption": text, "width": 27}))
                add_file(archive, f"{i:06d}.{kind}", data.encode())
    return folder


def add_file(archive, name, data):
    """A member of an open archive."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def make_tfds(folder, rows=7, shards=2, classes=tuple(CLASSES), features=None, example=None, splits=("train",)):
    """A data set that TFDS writes: image, label and captions, or `features` with the values of `example(row)`; returns
    the folder of its version."""
    import tensorflow_datasets as tfds

    where, kinds = folder / "mini" / "1.0.0", tfds.features
    usual = {
        "image": kinds.Image(encoding_format="jpeg"),
        "label": kinds.ClassLabel(names=classes),
        "captions": kinds.Sequence({"text": kinds.Text()}),
    }
    values = lambda row: {
        "image": io.BytesIO(encoded(picture(row))),
        "label": row % len(classes),
        "captions": [{"text": f"a fox, {row}"}, {"text": "another"}],
    }
    where.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="mini", version=tfds.core.Version("1.0.0"), data_dir=str(where), module_name="mini"
        ),
        features=kinds.FeaturesDict(features or usual),
    )
    writer = tfds.core.SequentialWriter(info, -(-rows // shards), file_format="array_record")
    writer.initialize_splits([*splits])
    for split in splits:
        writer.add_examples({split: [(example or values)(row) for row in range(rows)]})
    writer.close_all()
    return where
