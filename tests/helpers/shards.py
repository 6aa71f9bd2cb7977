"""Shards that are written by hand."""

import itertools

from etils import epath

from src.data.files.array_record import write_shard
from src.data.files.shards import pack, write_manifest


def write_shards(folder, examples, rows=1000):
    """Writes (caption, bytes of an image file) examples into shards of `rows` rows."""
    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    shards, stream = [], iter(examples)
    for number in itertools.count():
        part = [pack({"caption": caption}, image) for caption, image in itertools.islice(stream, rows)]
        if not part:
            break
        name = f"{number:05d}.arrayrecord"
        shards.append({"name": name} | write_shard(target / name, part))
    write_manifest(target, shards, schema={"kind": "captions"})
