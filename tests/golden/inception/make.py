"""Makes expected.npz with torch-fidelity 0.4.0 and torch 2.13.0: python make.py

The network's weights are those of `weights` in tests/evals/scores/test_inception.py, its output is for random images.
"""

import numpy as np


def weights(shapes):
    """Random tensors by name; each depends on its place in the order of names."""
    found = {}
    for number, name in enumerate(sorted(shapes)):
        rng = np.random.RandomState(number)
        shape = shapes[name]
        if name.endswith(("running_var", "bn.weight")):
            found[name] = rng.random_sample(shape) + 0.5
        elif len(shape) > 1:
            found[name] = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            found[name] = rng.standard_normal(shape) * 0.1
        found[name] = found[name].astype(np.float32)
    return found


def main():
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as peer

    peer.load_state_dict_from_url = lambda *_, **__: {}
    load = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda *_, **__: None
    network = peer.FeatureExtractorInceptionV3("any", ["2048", "logits_unbiased"])
    state = network.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items() if "num_batches" not in name}
    load(network, state | {name: torch.from_numpy(t) for name, t in weights(shapes).items()})
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: spatial.append(out))
    images = np.random.RandomState(0).randint(0, 256, (2, 40, 56, 3)).astype(np.uint8)
    with torch.no_grad():
        pool, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    places = spatial[0][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)
    np.savez("expected.npz", images=images, pool=pool.numpy(), logits=logits.numpy(), spatial=places.numpy())


if __name__ == "__main__":
    main()
