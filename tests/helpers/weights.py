"""A tiny published Llama, a config that begins from it, and a checkpoint of a state."""

import json

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from configs import imagenet256
from src.train.checkpoints.checkpointer import Checkpointer

FIELDS = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
          "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 258,
          "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}  # fmt: skip


def published(folder, seed=0, **fields):
    """A tiny Llama as TinyLlama is published, in bfloat16."""
    fields, rng = FIELDS | fields, np.random.default_rng(seed)
    table = (fields["vocab_size"], 32)
    shapes = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (32,)}
    block = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
             "self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32),
             "mlp.down_proj": (32, 64), "input_layernorm": (32,), "post_attention_layernorm": (32,)}  # fmt: skip
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in block.items()}
    tensors = {name: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


def config_from(path, **init_from):
    """ImageNet's recipe, tiny, on a mesh that splits even small parameters."""
    config = imagenet256.get_config("debug").unlock()
    config.fields.text.codec = {"name": "text:Bytes"}
    config.mesh.update({"data": 2, "fsdp": 4})
    config.sharding.min_size, config.batch = 64, 8
    latents = {"name": "pixels", "height": 32, "width": 32, "channels": 4}  # without their autoencoder
    config.fields.image.codec = {"host": latents, "device": config.fields.image.codec.device}
    config.tasks.class_prompt_to_image.source.moments = False
    config.init_from.update({"path": str(path)} | init_from)
    return config.lock()


def with_checkpoint(workdir, trainer, state):
    checkpoints = Checkpointer(workdir)
    position = {"rows": {}, "counts": {}, "meter": {}}
    state = jax.device_put(state, jax.devices()[0])  # which Orbax writes sooner than pieces of all devices
    assert checkpoints.save(int(state.step), state, position, trainer.system.identity())
    checkpoints.close()
