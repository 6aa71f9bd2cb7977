"""Published checkpoints (safetensors) of a family <-> our leaves by path, without torch or transformers.

Their parts are those of the rows `text`, `image` and `vision` of a config, and of the trunk, `time` and `conditioning`.
Linear layers are stored `[out, in]` there and `[in, out]` here; the trunk's blocks are stacked along a leading axis.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from src.common.files.lazy_arrays import Leaves, is_stacked
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.tree import listed
from src.models.pretrained.families import LLAMA, Family
from src.models.pretrained.hf_config import PublishedConfig

SINGLE = {
    "model.embed_tokens.weight": "fields/text/embed/table/embedding",
    "model.norm.weight": "trunk/final_norm/scale",
    "lm_head.weight": "fields/text/head/linear/kernel",
    "x_embedder": "fields/image/embed/linear",
    "t_embedder.mlp.0": "time/first",
    "t_embedder.mlp.2": "time/second",
    "t_projector.0": "conditioning/first",
    "t_projector.2": "conditioning/second",
    "adaLN_module.1": "conditioning/linear",
    "final_layer.adaLN_modulation.1": "fields/image/head/adaln",
    "final_layer.linear": "fields/image/head/linear",
    "im_embedder.0": "fields/vision/embed/first",
    "im_embedder.2": "fields/vision/embed/second",
}
IMAGE, VISION = "fields/image", "fields/vision"
PROJECTOR = f"{VISION}/embed/first/kernel"
TABLE, HEAD = "fields/text/embed/table/embedding", "fields/text/head/linear/kernel"  # the leaves with an axis of words
FLOATS = ("float64", "float32", "float16", "bfloat16")
INNER = ("embed_tokens.", "layers.", "norm.")  # of the trunk, whose names begin with `model.`
IGNORED = ("rotary_emb.inv_freq",)  # a buffer that older Llama files carry
TOWER = "vision_encoder."  # frozen, and published in a folder of its own
TIME_FEATURES = 256
NEW_ROWS = ("normal", "mean")


def place_of(name: str, family: Family = LLAMA) -> tuple[str, int | None] | None:
    """Our path of a published tensor, and its block (None outside the blocks); None when the name is unknown."""
    if name.startswith("model.layers."):
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        number = re.fullmatch("0|[1-9][0-9]{0,3}", index)  # what `int` takes is more: "01", "+1", other scripts
        return (f"trunk/layers/{family.block[rest]}", int(index)) if rest in family.block and number else None
    if name in SINGLE:
        return SINGLE[name], None
    stem, _, leaf = name.rpartition(".")
    known = stem in SINGLE and leaf in ("weight", "bias")
    return (f"{SINGLE[stem]}/{'kernel' if leaf == 'weight' else 'bias'}", None) if known else None


def names_of(path: str, blocks: int, family: Family = LLAMA) -> tuple[str, ...] | None:
    """The published tensors of one of our leaves, one for each block; None when no checkpoint has it."""
    if path.startswith("trunk/layers/"):
        rest = {ours: theirs for theirs, ours in family.block.items()}.get(path.removeprefix("trunk/layers/"))
        return None if rest is None else tuple(f"model.layers.{i}.{rest}" for i in range(blocks))
    singles = {ours: theirs for theirs, ours in SINGLE.items()}
    if path in singles:
        return (singles[path],)
    stem, _, leaf = path.rpartition("/")
    if stem not in singles or leaf not in ("kernel", "bias"):
        return None
    return (f"{singles[stem]}.{'weight' if leaf == 'kernel' else 'bias'}",)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """The published name of each tensor of a file: without what wrappers put in front of all of them (`module.`), and
    with `model.` where the Llama was saved without its head."""
    names = list(names)
    first = "embed_tokens.weight"
    found = [name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")]
    prefix = found[0].removesuffix("model.") if len(found) == 1 else ""
    bare = found == [prefix]
    inner = {name: name.removeprefix(prefix) for name in names}
    return {name: f"model.{i}" if bare and i.startswith(INNER) else i for name, i in inner.items()}


class Published:
    """The tensors of a checkpoint as `Leaves`: nothing is read before it is needed, and then one block at a time.

    tied   the head is the embedding, where the checkpoint has none

    `entries` has dtypes and shapes by published name. `wrong` lists names that the family has not, tensors that are no
    floats of 16 bits or more, and leaves whose blocks are not 0, 1, 2, … of one shape; only where it is empty leaves
    mean something. `towers` lists tensors of a frozen encoder, which are left out. Blocks of several dtypes become the
    smallest one that holds all of them.
    """

    def __init__(self, tensors: SafeTensors | Mapping[str, np.ndarray], tied: bool = False, family: Family = LLAMA):
        self.tensors, self.family = tensors, family
        self.entries: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.towers: list[str] = []
        self._file_names: dict[str, str] = {}
        entries = getattr(tensors, "entries", tensors)
        found: dict[str, dict[int, str]] = {}
        for there, name in canonical(entries).items():
            if name.endswith(IGNORED) or name.startswith(TOWER):
                self.towers += [there] * name.startswith(TOWER)
                continue
            if name in self.entries:
                self.wrong.append(f"{shown(there)} is {shown(self._file_names[name])} once more")
            self.entries[name], self._file_names[name] = entries[there], there
            at = place_of(name, family)
            if at is None:
                self.wrong.append(f"{shown(there)} is no tensor of {family.architecture}")
                continue
            found.setdefault(at[0], {})[at[1] or 0] = name
            if self.entries[name].dtype.name not in FLOATS:
                self.wrong.append(f"{name} is {self.entries[name].dtype.name}, no float of 16 bits or more")
        self.names = {path: tuple(blocks[i] for i in sorted(blocks)) for path, blocks in found.items()}
        for path, blocks in found.items():
            if max(blocks) >= len(blocks) or len({self.entries[name].shape for name in blocks.values()}) > 1:
                self.wrong.append(f"{path} lacks blocks, or has blocks of several shapes")
        if tied and TABLE in self.names:
            self.names.setdefault(HEAD, self.names[TABLE])
        self.shapes = {path: self._shape(path, names) for path, names in self.names.items()}

    def _shape(self, path: str, names: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        shape = self.entries[names[0]].shape
        shape = shape[::-1] if path.endswith("kernel") else shape
        shape = (len(names), *shape) if is_stacked(path) else shape
        kinds = {self.entries[name].dtype for name in names if self.entries[name].dtype.name in FLOATS}
        kinds = kinds or {np.dtype(np.float32)}  # of tensors that are refused
        kind = functools.reduce(jnp.promote_types, kinds) if len(kinds) > 1 else kinds.pop()
        return jax.ShapeDtypeStruct(shape, "float32" if kind.name == "float64" else kind)

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """See `Leaves`."""
        for name in self.names[path]:
            tensor = self.tensor(name)
            yield tensor.T if path.endswith("kernel") else tensor
            self.release(name)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its published name."""
        return self.tensors[self._file_names[name]]

    def release(self, name: str) -> None:
        """Frees the memory of a tensor's pages."""
        if isinstance(self.tensors, SafeTensors):
            self.tensors.release(self._file_names[name])


def check_complete(found: Published, config: PublishedConfig) -> None:
    """Raises ValueError, in one sentence that lists every tensor that is missing, extra or misshaped by the config."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, shape in expected(found.shapes, config).items():
        inner = shape[is_stacked(path) :]
        names = names_of(path, config.num_hidden_layers, config.family) or ()
        wanted |= dict.fromkeys(names, inner[::-1] if path.endswith("kernel") else inner)
    wrong = []
    if config.tied and names_of(HEAD, 1)[0] not in found.entries:
        wanted.pop(names_of(HEAD, 1)[0], None)
    elif config.tied and not _equal(found, *(names_of(path, 1)[0] for path in (HEAD, TABLE))):
        wrong.append("tie_word_embeddings is true and lm_head.weight another tensor than the embedding (set it to false"
                     " to keep the head, or leave the tensor out)")  # fmt: skip
    wrong += [f"{name} is missing" for name in wanted if name not in found.entries]
    for name, entry in found.entries.items():
        if name not in wanted:
            wrong.append(f"{shown(name)} is not in this model")
        elif entry.shape != wanted[name]:
            wrong.append(f"{name} has shape {list(entry.shape)}, the config says {list(wanted[name])}")
    wrong += [text for text in found.wrong if "no float" in text] if wrong else found.wrong
    if wrong:
        raise ValueError(f"the checkpoint {_where(found.tensors)} does not fit its config: {listed(wrong, 100)}")


def _equal(found: Published, *names: str, rows: int = 4096) -> bool:
    """Whether two tensors have the same bits; one that is missing is no difference here."""
    if any(name not in found.entries for name in names):
        return True
    first, second = map(found.tensor, names)
    pieces = range(0, len(first) if first.ndim else 1, rows)
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    same = same and all(first[i : i + rows].tobytes() == second[i : i + rows].tobytes() for i in pieces)
    for name in names:
        found.release(name)
    return same


def expected(found: Mapping[str, Any], config: PublishedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our leaves by the config; `found` is only read for the width of a vision encoder's features."""
    c, width = config, config.hidden_size
    asked, heads = c.head_dim * c.num_attention_heads, c.head_dim * c.num_key_value_heads
    block = {
        "attention/q/kernel": (width, asked),
        "attention/k/kernel": (width, heads),
        "attention/v/kernel": (width, heads),
        "attention/q/bias": (asked,),
        "attention/k/bias": (heads,),
        "attention/v/bias": (heads,),
        "attention/q_norm/scale": (c.head_dim,),
        "attention/k_norm/scale": (c.head_dim,),
        "attention/out/kernel": (asked, width),
        "mlp/gate/kernel": (width, c.intermediate_size),
        "mlp/up/kernel": (width, c.intermediate_size),
        "mlp/down/kernel": (c.intermediate_size, width),
        "attention_norm/scale": (width,),
        "mlp_norm/scale": (width,),
    }
    have = {*c.family.block.values()}
    shapes = {f"trunk/layers/{path}": (c.num_hidden_layers, *s) for path, s in block.items() if path in have}
    shapes |= {"trunk/final_norm/scale": (width,), TABLE: (c.vocab_size, width), HEAD: (width, c.vocab_size)}
    if c.tied and HEAD not in found:
        del shapes[HEAD]
    if c.image is None:
        return shapes
    features = c.image.in_channels * c.image.patch_size**2
    linears = {
        f"{IMAGE}/embed/linear": (features, width),
        "time/first": (TIME_FEATURES, width),
        "time/second": (width, width),
        f"{IMAGE}/head/adaln": (width, 2 * width),
        f"{IMAGE}/head/linear": (width, features * (2 if c.image.learn_sigma else 1)),
    }
    if c.image.decoder_t_embed == "add_before_image_tokens":
        linears |= dict.fromkeys(("conditioning/first", "conditioning/second"), (width, width))
    else:
        linears |= {"conditioning/linear": (width, 2 * width)}
    if c.vision is not None or any(path.startswith(f"{VISION}/") for path in found):
        first = getattr(found.get(PROJECTOR), "shape", (width,))[0]
        linears |= {f"{VISION}/embed/first": (first, width), f"{VISION}/embed/second": (width, width)}
    for path, shape in linears.items():
        shapes |= {f"{path}/kernel": shape, f"{path}/bias": shape[1:]}
    return shapes


@dataclasses.dataclass(frozen=True)
class Grown:
    """`Leaves` with `rows` more words, each with a row of the embedding and a column of the head.

    how    normal: N(0, 0.02²) by `seed`, as transformers did when MonoFormer was made; mean: the mean of the others
    tied   the head is the embedding, in the new rows too

    Raises ValueError for another word.
    """

    inner: Leaves
    rows: int
    how: str = "normal"
    seed: int = 0
    tied: bool = False

    def __post_init__(self):
        if self.how not in NEW_ROWS:
            raise ValueError(f"new words {self.how!r} are unknown; use {' or '.join(NEW_ROWS)}")

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Leaves`."""
        shapes = dict(self.inner.shapes)
        for path, axis in ((TABLE, 0), (HEAD, 1)):
            if path in shapes:
                size = list(shapes[path].shape)
                size[axis] += self.rows
                shapes[path] = jax.ShapeDtypeStruct(tuple(size), shapes[path].dtype)
        return shapes

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """See `Leaves`."""
        axis = {TABLE: 0, HEAD: 1}.get(path)
        if axis is None or not self.rows:
            yield from self.inner.blocks(path)
            return
        for whole in self.inner.blocks(path):
            words = whole if axis == 0 else whole.T
            if self.how == "mean":
                new = np.broadcast_to(words.mean(0, dtype=np.float64), (self.rows, words.shape[1]))
            else:
                generator = np.random.default_rng((self.seed, zlib.crc32((TABLE if self.tied else path).encode())))
                new = generator.normal(0, 0.02, (self.rows, words.shape[1]))
            grown = np.concatenate([words, new.astype(words.dtype)])
            yield grown if axis == 0 else grown.T


def _where(tensors: Any) -> str:
    return shown(getattr(tensors, "path", "given"))
