"""Llama 3, Mistral, Qwen 2.5 and Qwen 3 as transformers saves them: the same logits here, and the same files again."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from src.common.files.lazy_arrays import LazyArrays
from src.interfaces import Batch, Field, FieldSpec, Tokens, View
from src.models.build import build_architecture
from src.models.pretrained.about import TIED
from src.models.pretrained.families import nearest_family
from src.models.pretrained.hf_config import read_config
from src.models.pretrained.initial_weights import Initial, write_initial
from src.models.pretrained.llama_weights import HEAD, TABLE
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from src.train.init_from import InitFrom
from tests.golden.families.make import MODELS
from tests.helpers.published import run, same

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "families"


def logits_of(folder, ids):
    """Logits [B, N, V] of initial weights, in float32."""
    weights = Initial(folder)
    made_for = weights.meta["about"]
    trunk = {name.removeprefix("model.trunk."): v for name, v in made_for.items() if name.startswith("model.trunk.")}
    model = {"dtype": "float32", "trunk": trunk, "conditioning": {}, "time": {}}
    head = {"name": "categorical", "tied": made_for.get(TIED, False)}
    table = {"text": Field("text", FieldSpec(vocab=61), None)}
    architecture, init = build_architecture(model, {"text": {"embed": {"name": "tokens"}, "head": head}}, table)
    paths = jax.eval_shape(init, jax.random.key(0))
    leaf = lambda path, like: jnp.asarray(weights.tensors["/".join(key.key for key in path)], like.dtype)
    params = jax.tree_util.tree_map_with_path(leaf, paths)
    there = np.ones(ids.shape, bool)
    batch = jax.tree.map(jnp.asarray, Batch({"text": Tokens(ids, there, there)}))
    view = View(batch, FixedLayout((Segment("text", ids.shape[1]),)))

    def forward(params):
        net = architecture.bind(params)
        return net.field("text")(net.hidden({"t": view})["t"].of("text"))

    return np.asarray(jax.jit(forward)(params))


@pytest.mark.parametrize("name", MODELS)
def test_a_family_goes_in_and_out(name, tmp_path, capsys):
    """Logits within 1e-5 of those of transformers, of at most 4.5; then the same tensors and the same config."""
    code, told, error = run(capsys, source=GOLDEN / name, out=tmp_path / "init", new_words=0)
    assert code == 0 and "config.json" not in told, (told, error)
    expected = np.load(GOLDEN / name / "expected.npz")
    np.testing.assert_allclose(logits_of(tmp_path / "init", expected["ids"]), expected["logits"], atol=1e-5, rtol=0)
    assert run(capsys, source=tmp_path / "init", out=tmp_path / "back")[0] == 0
    same(load_file(tmp_path / "back" / "model.safetensors"), load_file(GOLDEN / name / "model.safetensors"))
    assert read_config(tmp_path / "back") == read_config(GOLDEN / name)
    before, after = (json.loads((path / "config.json").read_text()) for path in (GOLDEN / name, tmp_path / "back"))
    for key in ("architectures", "model_type", "tie_word_embeddings", "eos_token_id", "dtype"):
        assert before[key] == after[key], key


@pytest.mark.parametrize(
    "name, change, window",
    [
        ("mistral", {}, 5),
        ("mistral", {"sliding_window": None}, 0),
        ("mistral", {"sliding_window": ...}, 4096),
        ("qwen3", {}, 7),
        ("qwen3", {"use_sliding_window": False}, 0),
        ("qwen3", {"layer_types": None}, 7),
        ("qwen3", {"layer_types": None, "max_window_layers": 28}, 0),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, 0),
        ("llama", {"sliding_window": 9}, 0),
    ],
)
def test_windows_are_read_as_transformers_reads_them(name, change, window, tmp_path):
    """`...`: the key is absent."""
    fields = json.loads((GOLDEN / name / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    assert read_config(tmp_path).sliding_window == window


def test_numbers_that_are_absent_are_those_of_transformers(tmp_path):
    fields = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    del fields["head_dim"], fields["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    read = read_config(tmp_path)
    assert (read.head_dim, read.rms_norm_eps, read.num_key_value_heads) == (128, 1e-6, 2)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("qwen3", {"model_type": "qwen2"}, "model_type 'qwen2': known are LlamaForCausalLM .llama., MonoFormerFor"),
        ("qwen3", {"architectures": ["Gemma2ForCausalLM"]}, "and Qwen3ForCausalLM .qwen3.$"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True, here False only"),
        ("qwen3", {"head_dim": 7}, "head_dim=7 is odd"),
        ("qwen3", {"head_dim": "8"}, "head_dim='8' is not a whole number from 1 to 4096"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "full and sliding attention in one model"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layers of type 'chunked_attention'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": None, "max_window_layers": 1},
         "full and sliding attention in one model .*here all blocks are alike"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu', here 'silu' only"),
        ("mistral", {"sliding_window": "5"}, "sliding_window='5' is not a whole number"),
    ],
)  # fmt: skip
def test_what_a_family_has_and_this_model_has_not_is_refused(name, change, words, tmp_path):
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=words) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_family_is_chosen_by_the_options_of_the_trunk():
    of = lambda images=False, first=None, **trunk: nearest_family(
        {f"model.trunk.{name}": value for name, value in trunk.items()}, images, first
    ).architecture.removesuffix("ForCausalLM")
    assert of() == of(head_dim=8) == "Llama"
    assert of(first="MistralForCausalLM") == of(sliding_window=4) == "Mistral"
    assert of(qkv_bias=True) == of(qkv_bias=True, sliding_window=4, first="LlamaForCausalLM") == "Qwen2"
    assert of(qk_norm=True) == "Qwen3" and of(images=True, qk_norm=True) == "MonoFormer"


def test_a_run_without_a_head_of_its_own_begins_from_tied_weights_only(tmp_path, capsys):
    table = jax.ShapeDtypeStruct((61, 20), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    like = {"fields": {"text": {"embed": {"table": {"embedding": table}}}}}
    config = {"fields": {"text": {"head": {"name": "categorical", "tied": True}}}, "model": {}, "tasks": {}}
    assert run(capsys, source=GOLDEN / "qwen3", out=tmp_path / "init", new_words=0)[0] == 0
    with pytest.raises(ValueError, match=r"fields.text.head.tied is False there and True here.*set .*tied=False"):
        InitFrom(str(tmp_path / "init"), config=config).read(like, lambda paths: {})
    assert run(capsys, source=GOLDEN / "llama", out=tmp_path / "tied")[0] == 0
    grown = Initial(tmp_path / "tied").tensors
    assert grown[TABLE].shape == (65, 24) and (grown[HEAD] == grown[TABLE].T).all()
    table = jax.ShapeDtypeStruct((65, 24), np.float32, sharding=table.sharding)
    like = {"fields": {"text": {"embed": {"table": {"embedding": table}}}}}
    found = InitFrom(str(tmp_path / "tied"), config=config).read(like, lambda paths: {})
    np.testing.assert_array_equal(found["fields"]["text"]["embed"]["table"]["embedding"], grown[TABLE])


LOGITS = """
import sys, numpy, torch, transformers
ids, out = numpy.load(sys.argv[2])["ids"], sys.argv[3]
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
numpy.save(out, model(torch.tensor(ids)).logits.detach().numpy())
"""


@pytest.mark.faults
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_exported(name, tmp_path, capsys):
    """Weights moved a little, so that nothing is a copy of the file that it came from."""
    pytest.importorskip("transformers")
    assert run(capsys, source=GOLDEN / name, out=tmp_path / "init", new_words=0)[0] == 0
    trained = Initial(tmp_path / "init")
    rng = np.random.default_rng(0)
    tied = trained.meta["about"].get(TIED, False)
    leaves = {p: x.astype(np.float32) + rng.normal(0, 0.02, x.shape).astype(np.float32)
              for p, x in trained.tensors.items() if not (tied and p == HEAD)}  # fmt: skip
    write_initial(tmp_path / "run", LazyArrays(leaves), trained.meta["about"], trained.meta["published"])
    assert run(capsys, source=tmp_path / "run", out=tmp_path / "back")[0] == 0
    code = [sys.executable, "-c", LOGITS, tmp_path / "back", GOLDEN / name / "expected.npz", tmp_path / "theirs.npy"]
    subprocess.run(code, check=True, capture_output=True)
    ids = np.load(GOLDEN / name / "expected.npz")["ids"]
    np.testing.assert_allclose(logits_of(tmp_path / "run", ids), np.load(tmp_path / "theirs.npy"), atol=1e-5, rtol=0)
