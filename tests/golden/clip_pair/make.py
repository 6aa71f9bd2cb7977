"""Makes the other files of this folder with transformers 5.24.0, tokenizers 0.23.3 and torch 2.13.0: python make.py"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
WORDS = ("photo", "handwritten", "seven", "of", "the", "there", "can't", "cat", "ice", "straße", "42")
TEXTS = (
    "a handwritten seven", "A photo of THE cat!", "", "  two\tspaces \n and  lines ", "can't won't it'll I'M x's",
    "100% of 42,000", "straße STRASSE İstanbul ΟΔΟΣ", "日本語 naïve café", "emoji \U0001f600\U0001f3fd!!", "...'s''t'",
    "a<|endoftext|>b", "<|startoftext|> twice", "xyz" * 30, "the " * 40, "\u00a0non\u2003breaking\x85next", "½ ² Ⅷ ٣",
    "re'read 've 'd'", "\x00\x1f control", "e\u0301 composed", "don’t “quote” — dash",
)  # fmt: skip


def vocabulary():
    """Bytes alone and as ends of words, then the beginnings of some words, then the two marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        for run in ByteLevel(add_prefix_space=False).pre_tokenize_str(word):
            symbols = [*run[0][:-1], run[0][-1] + "</w>"]
            while len(symbols) > 1:
                pair = tuple(symbols[:2])
                symbols[:2] = ["".join(pair)]
                if pair not in merges:
                    merges.append(pair)
    pieces += ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges


def main():
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    vocab, merges = vocabulary()
    (HERE / "vocab.json").write_text(json.dumps(vocab))
    (HERE / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    (HERE / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    ids = [tokenizer(text, truncation=True, max_length=16)["input_ids"] for text in TEXTS]

    sizes = {"intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    end = vocab["<|endoftext|>"]
    text = sizes | {"hidden_size": 16, "vocab_size": len(vocab), "max_position_embeddings": 16, "projection_dim": 10}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = sizes | {"hidden_size": 12, "image_size": 12, "patch_size": 4, "projection_dim": 10}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(HERE)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, HERE / "model.safetensors", metadata={"format": "pt"})
    rows = torch.full((len(ids), 16), end)
    for row, found in zip(rows, ids, strict=True):
        row[: len(found)] = torch.tensor(found)
    pixels = torch.from_numpy(np.random.RandomState(0).standard_normal((3, 3, 12, 12)).astype(np.float32))
    with torch.no_grad():
        texts = model.text_model(input_ids=rows[:6], output_hidden_states=True)
        text_embeds = model.text_projection(model.text_model(input_ids=rows).pooler_output)
        image_embeds = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    hidden = torch.stack(texts.hidden_states).numpy()
    np.savez_compressed(
        HERE / "expected.npz", ids=rows.numpy().astype(np.int16), pixels=pixels.numpy(), hidden=hidden,
        texts=text_embeds.numpy(), images=image_embeds.numpy(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
