"""Makes the folders beside it with transformers 5.24.0 and torch 2.13.0, on a CPU:

python -m tests.golden.families.make

Each is a small model of one family with random weights (float16, computed with in float32), as transformers saves it,
and expected.npz: rows of ids, and their logits. Rows are longer than the window and than the length of the pretraining
where the family has one.
"""

import pathlib
import shutil

import numpy as np

HERE = pathlib.Path(__file__).parent
SIZES = {"vocab_size": 61, "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e6}
MODELS = {
    "llama": ("Llama", {"hidden_size": 24, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 5, "rms_norm_eps": 1e-5}),
    "qwen2": (
        "Qwen2",
        {"hidden_size": 32, "tie_word_embeddings": True, "rope_parameters": YARN} | {"max_position_embeddings": 32},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
}
LENGTH = 16


def main():
    import torch
    import transformers

    torch.set_num_threads(1)
    for number, (folder, (kind, options)) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        config = getattr(transformers, f"{kind}Config")(**SIZES | ENDS | options, attn_implementation="eager")
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                mean = 1.0 if "norm" in name else 0.0
                weight.copy_(weight.normal_(mean, 0.2).half().float())
        ids = np.random.default_rng(number).integers(0, SIZES["vocab_size"], (2, LENGTH))
        with torch.no_grad():
            logits = model(torch.tensor(ids)).logits.numpy()
        path = HERE / folder
        shutil.rmtree(path, ignore_errors=True)
        model.half().save_pretrained(path)  # comes last: its table of rotations becomes float16 too
        (path / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(path / "expected.npz", ids=ids.astype(np.int32), logits=logits)


if __name__ == "__main__":
    main()
