"""Published weights into what a run starts from and back, through the tool: bit by bit, and every error at once."""

import inspect
import json
import pathlib
import shutil
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from src.codecs.text import SentencePiece, train_sentencepiece
from src.common.files.lazy_arrays import LazyArrays
from src.common.files.safetensors import SafeTensors
from src.common.lookup import lookup
from src.common.tree import flatten, unflatten
from src.models.pretrained import hf_vision_config
from src.models.pretrained.about import value_of
from src.models.pretrained.initial_weights import Initial, write_initial
from src.models.pretrained.llama_weights import HEAD, TABLE, names_of, place_of
from src.tools.conversion import convert as conversion
from src.tools.conversion import tokenizer, vision_tower
from tests.helpers.published import GOLDEN, copied, read_checkpoint, run, same, understanding, understanding_clip


def halves(tensors, config):
    """The way TinyLlama is published."""
    for name in tensors:
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # of older files
    config["torch_dtype"] = "bfloat16"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_llama_goes_in_and_out_bit_by_bit(shards, tmp_path, capsys):
    """With four more words, of which everything else is independent."""
    tensors = copied("llama", tmp_path / "there", halves, shards)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "there" / name).write_bytes(b"{}")
    code, out, _ = run(capsys, source=tmp_path / "there", out=tmp_path / "init", shard_mb=1)
    first = Initial(tmp_path / "init")
    assert code == 0 and f"63,024 parameters, bfloat16, hash {first.hash}" in out, out
    assert "tokenizer files: tokenizer.model, tokenizer_config.json" in out
    del tensors["model.layers.0.self_attn.rotary_emb.inv_freq"]

    assert run(capsys, source=tmp_path / "init", out=tmp_path / "back")[0] == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.pop("mlp_bias") is False  # today's transformers write it
    there = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config == there | {"vocab_size": 101, "dtype": there.pop("torch_dtype")}
    assert (tmp_path / "back" / "tokenizer.model").exists()
    grown = {name: back[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert all(tensor.shape == (101, 48) for tensor in grown.values())
    same(back | {name: tensor[:97] for name, tensor in grown.items()}, tensors)
    new = np.concatenate([tensor[97:].astype(np.float32) for tensor in grown.values()])
    assert 0.017 < new.std() < 0.023 and abs(new.mean()) < 0.003 and len(np.unique(new)) > 300

    assert run(capsys, source=tmp_path / "back", out=tmp_path / "again", new_words=0)[0] == 0
    again = Initial(tmp_path / "again")
    assert again.hash == first.hash
    same(dict(again.tensors), dict(first.tensors))


def test_a_vocabulary_with_the_special_tokens_does_not_grow_again(tmp_path, capsys):
    copied("llama", tmp_path / "there")
    train_sentencepiece(["a red fox"], 300, tmp_path / "there" / "tokenizer.model", byte_fallback=True)
    words = SentencePiece(tmp_path / "there" / "tokenizer.model").vocab_size - 97
    assert run(capsys, source=tmp_path / "there", out=tmp_path / "init", new_words=words)[0] == 0
    assert run(capsys, source=tmp_path / "init", out=tmp_path / "back")[0] == 0
    assert run(capsys, source=tmp_path / "back", out=tmp_path / "again")[0] == 0
    assert Initial(tmp_path / "again").hash == Initial(tmp_path / "init").hash


def test_new_words_may_begin_as_the_mean(tmp_path, capsys):
    tensors = copied("llama", tmp_path / "there")
    assert run(capsys, source=tmp_path / "there", out=tmp_path / "init", new_rows="mean", new_words=2)[0] == 0
    leaves = Initial(tmp_path / "init").tensors
    for name, there in (("model.embed_tokens.weight", leaves[TABLE]),
                        ("lm_head.weight", leaves[HEAD].T)):  # fmt: skip
        np.testing.assert_array_equal(there[:97], tensors[name])
        np.testing.assert_allclose(there[97:], np.tile(tensors[name].mean(0), (2, 1)), rtol=1e-5, atol=1e-8)


def adaptive(tensors, config):
    """With the time before the trunk instead of in a token."""
    for name in [name for name in tensors if name.startswith("t_projector")]:
        del tensors[name]
    tensors |= {"adaLN_module.1.weight": np.ones((128, 64), np.float32), "adaLN_module.1.bias": np.ones(128, "f4")}
    config["decoder_t_embed"] = "adaln_before_decoder"


@pytest.mark.parametrize("change", [None, understanding, understanding_clip, adaptive])
def test_monoformer_and_its_average_go_in_and_out_bit_by_bit(change, tmp_path, capsys):
    def average(tensors, config):
        if change:
            change(tensors, config)
        for name in tensors:
            tensors[name] = tensors[name] * 0.5

    want = (
        copied("monoformer", tmp_path / "there", change, shards=2),
        copied("monoformer", tmp_path / "there" / "ema", average),
    )
    assert run(capsys, source=tmp_path / "there", out=tmp_path / "init")[0] == 0
    first = Initial(tmp_path / "init")
    golden = read_checkpoint(tmp_path / "there", unflatten(first.shapes))  # whose numbers tests/test_golden.py holds
    same({path: np.asarray(leaf) for path, leaf in flatten(golden).items()}, dict(first.tensors))
    made_for = first.meta["about"]
    told = [made_for[f"fields.image.{name}"] for name in ("head.order", "head.channels", "process.variance")]
    assert told == ["rsc", 4, "learned_range"]
    assert run(capsys, source=tmp_path / "init", out=tmp_path / "back")[0] == 0
    for tensors, folder in zip(want, (tmp_path / "back", tmp_path / "back" / "ema"), strict=True):
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_encoder.")}
        same(load_file(folder / "model.safetensors"), kept)
        config = json.loads((folder / "config.json").read_text())
        old = json.loads((GOLDEN / "monoformer" / "config.json").read_text())
        old["decoder_t_embed"] = "adaln_before_decoder" if change is adaptive else old["decoder_t_embed"]
        if change is understanding_clip:
            understanding_clip({}, old)
        old.pop("torch_dtype", None)
        assert config == old | {"mlp_bias": False, "dtype": "float32"}
    _, out, _ = run(capsys, source=tmp_path / "there", info=True)
    assert "MonoFormerForCausalLM" in out and "model.layers.*.mlp.up_proj.weight" in out
    assert "beside it: ema/" in out and "NOT SOUND" not in out


SQUARE = {"name": "pixels", "height": 64, "width": 64, "fit": "letterbox"}
VAE = {"name": "vae_latents", "path": str(GOLDEN / "autoencoder_kl")}


@pytest.mark.parametrize(
    "codec, fields",
    [
        ({"name": "clip_vision", "path": "some/clip"}, ("clip", "some/clip", {})),
        ({"frozen": {"name": "clip_vision:ClipVision", "path": "some/clip"}}, ("clip", "some/clip", {})),
        ({"host": SQUARE, "frozen": VAE, "device": {"name": "patch", "size": 2}},
         ("vae", VAE["path"], {"patch_size": 2, "resolution": 64})),
        ({"host": SQUARE, "frozen": VAE | {"path": "gone"}, "device": {"name": "patch", "size": 4}},
         ("vae", "gone", {"patch_size": 4, "resolution": 64})),
        ({"host": SQUARE, "device": {"name": "patch", "size": 4}}, None),
        ({"host": SQUARE | {"width": 32}, "frozen": VAE, "device": {"name": "patch", "size": 2}}, None),
    ],
)  # fmt: skip
def test_an_understanding_run_says_which_encoder_it_was_trained_with(codec, fields, tmp_path, capsys, monkeypatch):
    """Whatever encoder the weights that it began from had; what came in goes out again."""
    copied("monoformer", tmp_path / "there", understanding_clip)
    assert run(capsys, source=tmp_path / "there", out=tmp_path / "init")[0] == 0
    started = Initial(tmp_path / "init")

    def trained(source, options):
        found = LazyArrays(dict(started.tensors))
        config = {"fields": {"text": {"codec": {"name": "text:Bytes"}}, "vision": {"embed": {"init": "zeros"}}},
                  "init_from": {"path": str(tmp_path / "init")}}  # fmt: skip
        for name, value in started.meta["about"].items():
            *groups, last = name.split(".")
            node = config
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = value
        config["fields"]["image"]["codec"] = {"host": {"name": "pixels", "height": 8, "width": 8, "channels": 4},
                                              "device": {"name": "patch", "size": 2}}  # fmt: skip
        config["fields"]["vision"]["codec"] = codec
        found.config = config
        return found

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(conversion, "find_trained", trained)
    code, said, error = run(capsys, source=tmp_path / "run", out=tmp_path / "out")
    assert code == 0, error
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = tuple(config.get(name) for name in ("vision_encoder", "vision_encoder_path", "vision_encoder_args"))
    assert told == (fields or (None, None, None)) and (config["image_size"], config["patch_size"]) == (64, 2)
    assert ("names no vision_encoder (clip or vae): the official class leaves im_embedder out" in said) == (not fields)
    assert ("'gone' is no folder here, so the encoder is not in the checkpoint" in said) == ("gone" in told)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    frozen = {n.removeprefix(vision_tower.PREFIX): t for n, t in tensors.items() if n.startswith(vision_tower.PREFIX)}
    if VAE["path"] in told:
        same(frozen, load_file(GOLDEN / "autoencoder_kl" / "diffusion_pytorch_model.safetensors"))
    else:
        assert not frozen

    for source, out in (("out", "again"), ("again", "back")):
        assert run(capsys, source=tmp_path / source, out=tmp_path / out)[0] == 0
    same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    about = {n: v for n, v in Initial(tmp_path / "again").meta["about"].items() if n.startswith("fields.vision.")}
    assert bool(about) == bool(fields)
    assert about == {name: value_of({"fields": {"vision": {"codec": codec}}}, name) for name in about}


def test_without_a_projector_no_encoder_is_named(tmp_path, capsys):
    """The official class would build it."""
    copied("monoformer", tmp_path / "there", understanding_clip)
    assert run(capsys, source=tmp_path / "there", out=tmp_path / "init")[0] == 0
    whole = Initial(tmp_path / "init")
    plain = {path: leaf for path, leaf in dict(whole.tensors).items() if not path.startswith("fields/vision/")}
    write_initial(tmp_path / "plain", LazyArrays(plain), whole.meta["about"], whole.meta["published"])
    assert run(capsys, source=tmp_path / "plain", out=tmp_path / "back")[0] == 0
    assert not [name for name in json.loads((tmp_path / "back" / "config.json").read_text()) if "vision" in name]


def test_the_encoders_options_are_those_of_their_classes():
    for published, links in hf_vision_config.LINKS.items():
        files = {option.partition(".")[0]: file for option, file in links.items() if option.endswith(".name")}
        options = [*links, *(option for ours, *_ in hf_vision_config.ARGS[published].values() for option in ours)]
        for stage, option in (option.split(".") for option in options if not option.endswith(".name")):
            assert option in inspect.signature(lookup("codecs", files[stage])).parameters


def test_names_are_inverse():
    for name in load_file(GOLDEN / "monoformer" / "model.safetensors"):
        path, block = place_of(name)
        assert names_of(path, 3)[block or 0] == name
    assert names_of("fields/vision/embed/second/bias", 1) == ("im_embedder.2.bias",)
    assert names_of("fields/label/embed/table/embedding", 1) is None and names_of("trunk/layers/new/kernel", 2) is None


def spoilt(tensors, config):
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["t_projector.2.bias"]
    tensors["model.norm.weight"] = np.zeros(63, np.float32)
    tensors["lm_head.weight"] = np.zeros((96, 64), np.int32)
    tensors["model.layers.3.input_layernorm.weight"] = np.zeros(64, np.float32)
    tensors["surprise.weight"] = np.zeros(2, np.float32)
    config |= {"vision_encoder": "clip", "vision_encoder_path": "openai/clip-vit-large-patch14"}


@pytest.mark.parametrize("shards", [1, 2])
def test_everything_that_is_wrong_is_in_one_message(shards, tmp_path, capsys):
    copied("monoformer", tmp_path / "there", spoilt, shards)
    code, _, error = run(capsys, source=tmp_path / "there", out=tmp_path / "init")
    assert code == 1 and not (tmp_path / "init").exists() and error.count("\n") == 1
    for words in ("model.layers.1.mlp.up_proj.weight is missing", "t_projector.2.bias is missing",
                  "im_embedder.2.weight is missing",
                  "model.norm.weight has shape [63], the config says [64]",
                  "lm_head.weight is int32, no float of 16 bits or more",
                  "'model.layers.3.input_layernorm.weight' is not in this model",
                  "'surprise.weight' is not in this model"):  # fmt: skip
        assert words in error, words
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    (tmp_path / "there" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    _, _, error = run(capsys, source=tmp_path / "there", out=tmp_path / "init")
    assert "known are LlamaForCausalLM (llama), MonoFormerForCausalLM (llama), MistralForCausalLM" in error


def test_weights_that_are_no_whole_model_are_not_exported(tmp_path, capsys):
    assert run(capsys, source=GOLDEN / "llama", out=tmp_path / "init")[0] == 0
    whole = Initial(tmp_path / "init")
    leaves, made_for = dict(whole.tensors), whole.meta["about"]
    bias = leaves | {"trunk/layers/mlp/up/bias": np.zeros((3, 80), np.float32)}
    wide = leaves | {"trunk/final_norm/scale": np.zeros(47, np.float32)}
    for number, (changed, about, words) in enumerate((
        (bias, made_for | {"model.trunk.bias": True}, "model.trunk.bias=True, there False only, the parameter 'trunk/"),
        ({}, {}, "model.trunk.width is not known"),
        ({p: x for p, x in wide.items() if p != "trunk/layers/mlp/up/kernel"}, made_for,
         "no whole LlamaForCausalLM: trunk/final_norm/scale, trunk/layers/mlp/up/kernel are missing or of other"),
        (leaves, made_for | {"model.trunk.heads": 7}, "hidden_size=48 is no even multiple of num_attention_heads=7"),
    )):  # fmt: skip
        write_initial(tmp_path / str(number), LazyArrays(changed), about)
        code, _, error = run(capsys, source=tmp_path / str(number), out=tmp_path / "out")
        assert code == 1 and words in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()


def test_flags_and_sources_that_mean_nothing_are_one_sentence(tmp_path, capsys, monkeypatch):
    full = tmp_path / "full"
    copied("llama", full)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    head = {"use_adaln_final_layer": False, "use_pos_embed": False}
    copied("monoformer", tmp_path / "head", lambda tensors, config: config.update(head))
    for flags, words in (
        ({}, "give --source"),
        ({"source": full}, "give --out"),
        ({"source": full, "out": full}, "is there already and not empty"),
        ({"source": tmp_path / "pickled", "out": "x"}, "may run code"),
        ({"source": tmp_path / "none", "out": "x"}, "give a folder, or owner/name of the Hugging Face hub"),
        ({"source": "no.such/Llama", "out": "x"}, "pip install huggingface_hub, or fetch its files in another way"),
        ({"source": GOLDEN / "clip_vision", "out": "x"}, "needs no conversion"),
        ({"source": full / "model.safetensors", "out": "x"}, "has no config.json beside its tensors"),
        ({"source": full, "out": "x", "new_rows": "zero"}, "a flag is wrong"),
        ({"source": tmp_path / "head", "out": "x"}, "use_adaln_final_layer=False"),
    ):
        code, _, error = run(capsys, **flags)
        assert code == 1 and words in error and error.count("\n") == 1, (flags, error)
    assert not pathlib.Path("x").exists()


def test_weights_go_to_a_store_and_come_from_it(tmp_path, capsys, bucket, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tensors = copied("llama", tmp_path / "there")
    code, *told = run(capsys, source=tmp_path / "there", out="gs://b/init", new_words=0, shard_mb=1)
    assert code == 0, told
    assert run(capsys, source="gs://b/init", out="gs://b/back")[0] == 0
    same(dict(SafeTensors("gs://b/back")), tensors)
    code, _, error = run(capsys, source="gs://b/init", out="gs://b/back")
    assert code == 1 and "is there already and not empty" in error


def test_a_disk_without_room_is_told_of_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "src.common.files.safetensors_writer.shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000)
    )
    code, _, error = run(capsys, source=GOLDEN / "llama", out=tmp_path / "init")
    assert code == 1 and "GB left and 0.000252 are needed: make room" in error and not (tmp_path / "init").exists()


def test_a_name_of_the_hub_is_fetched_where_its_client_is(tmp_path, capsys, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        if name == "gone/away":
            raise RuntimeError("no route to host")
        return str(GOLDEN / "llama")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert run(capsys, source="some.one/Llama", out=tmp_path / "init", revision="abc")[0] == 0
    ((name, options),) = asked
    assert (name, options["revision"]) == ("some.one/Llama", "abc")
    assert not [pattern for pattern in options["allow_patterns"] if "bin" in pattern]
    assert Initial(tmp_path / "init").shapes[TABLE].shape == (101, 48)
    code, _, error = run(capsys, source="gone/away", info=True)
    assert code == 1 and "no route to host" in error and "where there is no network" in error


def test_info_tells_of_every_kind(tmp_path, capsys):
    run(capsys, source=GOLDEN / "llama", out=tmp_path / "init")
    for source, words in (
        (GOLDEN / "llama", ("LlamaForCausalLM", "hidden_size=48", "62,640 parameters, 250,560 bytes")),
        (tmp_path / "init", ("initial weights, hash", "model.trunk.heads=6", "63,024 parameters")),
        (GOLDEN / "autoencoder_kl", ("AutoencoderKL", "latent_channels=4", "167,959 parameters")),
        (GOLDEN / "clip_vision", ("CLIP", "patch_size=7", "vision_model.encoder.layers.*.mlp.fc1.weight")),
        (GOLDEN / "llama" / "model.safetensors", ("tensors without a config.json", "lm_head.weight")),
    ):
        code, out, error = run(capsys, source=source, info=True)
        assert code == 0 and all(word in out for word in words), (source, out, error)
    copied("llama", tmp_path / "odd", lambda tensors, config: config.update(vocab_size=98))
    assert "NOT SOUND: " in run(capsys, source=tmp_path / "odd", info=True)[1]


def test_initial_weights_are_known_by_their_hash_and_damage_is_found(tmp_path):
    rng = np.random.default_rng(0)
    leaves = {"trunk/layers/a/kernel": rng.normal(size=(2, 3, 5)).astype(np.float32),
              "b": rng.normal(size=7).astype(ml_dtypes.bfloat16)}  # fmt: skip
    names = [write_initial(tmp_path / str(i), LazyArrays(leaves), {"model.trunk.depth": 2}, shard_bytes=size)
             for i, size in enumerate((10**9, 16))]  # fmt: skip
    assert names[0] == names[1] and (tmp_path / "1" / "model-00002-of-00002.safetensors").exists()
    same(dict(SafeTensors(tmp_path / "1")), leaves)
    assert (
        write_initial(tmp_path / "2", LazyArrays(leaves | {"b": leaves["b"] * 2}), {"model.trunk.depth": 2}) != names[0]
    )
    assert write_initial(tmp_path / "3", LazyArrays(leaves), {"model.trunk.depth": 3}) != names[0]

    meta = json.loads((tmp_path / "0" / "weights.json").read_text())
    for change, words in (
        ({"format": 3}, "have format 3, read are formats up to 2"),
        ({"hash": "0" * 32}, "whose hash is not that of its content"),
        ({"about": {"model.trunk.depth": 3}}, "whose hash is not that of its content"),
        ({"leaves": 3}, "not what was written"),
    ):
        (tmp_path / "0" / "weights.json").write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=words):
            Initial(tmp_path / "0")
    shutil.copy(tmp_path / "3" / "weights.json", tmp_path / "0" / "weights.json")
    save_file({"b": leaves["b"]}, tmp_path / "0" / "model.safetensors")
    with pytest.raises(ValueError, match="differs in 'trunk/layers/a/kernel'"):
        Initial(tmp_path / "0")
    with pytest.raises(FileNotFoundError, match=r"have no weights\.json: give a folder that"):
        Initial(tmp_path)


def test_the_tokenizers_files_learn_the_new_words(tmp_path):
    """Where transformers looks for them (`AutoTokenizer` of 5.23 was tried); a second time changes nothing."""
    published = {"version": "1.0", "added_tokens": [{"id": 1, "content": "<s>", "special": True}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(published))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "model_max_length": 1e30}))
    words = {"<PAD>": 32000, "<image>": 32001, "<|im_start|>": 32002, "<|im_end|>": 32003}
    tokenizer.name_special_tokens(tmp_path, 32000, 32000)
    told = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {t["content"]: t["id"] for t in told["tokenizer.json"]["added_tokens"]} == {"<s>": 1} | words
    assert told["tokenizer.json"]["version"] == "1.0" and told["tokenizer_config.json"]["add_bos_token"] is True
    decoder = told["tokenizer_config.json"]["added_tokens_decoder"]
    assert {entry["content"]: int(number) for number, entry in decoder.items()} == words
    assert told["added_tokens.json"] == words and told["tokenizer_config.json"]["pad_token"] == "<PAD>"
    tokenizer.name_special_tokens(tmp_path, 32000, 32000)
    assert told == {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
