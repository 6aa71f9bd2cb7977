"""Makes the other files of this folder with transformers 5.24.0 and torch 2.13.0: python make.py"""

import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}


def main():
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    write(Dinov2Model(Dinov2Config(**SIZES, image_size=98, patch_size=14)), HERE)
    sizes = SIZES | {"num_register_tokens": 3, "image_size": 98, "patch_size": 14}
    write(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)), HERE / "registers", antialias=True)


def write(model, folder, **options):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for parameter in model.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # As the files on the hub, which were written before transformers 5.
    older = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    for new, old in (older | {"o_proj": "output.dense"}).items():
        tensors = {name.replace(f"attention.{new}.", f"attention.{old}."): each for name, each in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    images = np.random.RandomState(0).standard_normal((2, 3, 56, 42)).astype(np.float32)
    with torch.no_grad():
        found = model(torch.from_numpy(images), output_hidden_states=True)
        places = torch.from_numpy(np.random.RandomState(1).standard_normal((1, 1, 37, 37)).astype(np.float32))
        scale = (16 + 0.1) / 37  # of the published code without registers; with them it names the size
        size = {"size": (16, 40)} if options else {"scale_factor": (scale, scale)}
        fewer = torch.nn.functional.interpolate(places, mode="bicubic", **size, **options)
    hidden = torch.stack(found.hidden_states).numpy()
    np.savez_compressed(
        folder / "expected.npz", images=images, hidden=hidden, pooled=found.pooler_output.numpy(),
        places=places[0, 0].numpy(), fewer=fewer[0, 0].numpy(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
