"""What the cases of Llamas share: a small published one, and its conversion in a process of its own."""

import json
import subprocess
import sys

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
BLOCK = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
    "input_layernorm": (32,),
    "post_attention_layernorm": (32,),
}


def llama(folder, head=True, vocab=96, prefix="", later=np.float32, **fields):
    """Writes one; `later` is the dtype of its second block. Gives back its tensors."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, 32), "model.norm.weight": (32,)}
    shapes |= {"lm_head.weight": (vocab, 32)} if head else {}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in BLOCK.items()}
    folder.mkdir(parents=True)
    tensors = {
        prefix + name: rng.normal(0, 0.1, shape).astype(later if ".layers.1." in name else np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocab} | fields))
    return tensors


def convert(folder):
    """The exit code, and the last line of what was said."""
    command = [sys.executable, "-m", "src.tools.convert", f"--source={folder}", f"--out={folder}-out"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, (done.stderr or done.stdout).strip().splitlines()[-1][:400]
