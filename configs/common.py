"""The defaults that every config starts from, and the fragments that several share. A config says only what differs."""

from ml_collections import ConfigDict

from src.common.runtime.config_dict import Config

NO_CLIP = float("inf")
MATRICES = "trunk/layers/(mot/)?(attention/(q|k|v|out)|mlp/(gate|up|down))/kernel"


def base() -> ConfigDict:
    """MonoFormer's shape of a run, with the fixed defaults; a config adds tasks and sizes.

    It is locked: an unknown key is refused, except in the tables of names (tasks, fields, …) and the options of parts.
    """
    return Config(
        {
            "seed": 0,
            "steps": 1000,
            "batch": 64,  # rows of all tasks and devices together
            "accumulate": 1,  # microbatches a step; the result does not depend on it
            "tasks": {},
            # data: rows, also across slices; fsdp: rows, and parameters by size; tensor: heads, feed-forward
            # features and vocabulary; context: tokens of the sequence. One of them may be -1: what is left over.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1},
            "sharding": sharding(),
            # A row for each field: codec, embed, process, head, step (docs/architecture.md); see text(), image(), …
            "fields": {},
            "model": model(),
            # The first parameters: path, a folder that src.tools.convert made ("": none); ema: its averaged weights;
            # skip: regexes of paths that are initialised nevertheless.
            "init_from": {"path": "", "ema": False, "skip": ()},
            "optim": optim(),
            # warmup: decay min(decay, (1 + step) / (10 + step)), so that a short run forgets its initial weights
            # more: decays of further averages; power: widths of power-function averages, two of them to make any width
            # of afterwards (docs/architecture/training.md). Each takes the memory of the parameters.
            "ema": {"decay": 0.9999, "warmup": True, "more": (), "power": ()},
            "sample": {"batch_size": 128},  # rows of one call of the network
            # How a field is made, by row: left_to_right or blocks (sampling/decoders)
            "decode": decode(),
            # Classifier-free guidance; features: the first so many of a token's outputs are guided, 0: all; ramp 1: it
            # rises from none at t = 1 to `scale` at t = 0
            "guidance": {"scale": 2.0, "interval": (0.0, 1.0), "ramp": 0.0, "rescale": 0.0, "features": 0},
            # every 0: at the end only. ema: an average, of ema.decay, or of the decay or width that is given here
            "eval": {"every": 0, "ema": True, "decay": 0.0, "width": 0.0, "evaluators": {}},
            "data": {
                "workers": 0,  # processes per task that read ahead; 0 uses threads
                # A run stops when more than this share of the rows that a task read is bad, and at least so many.
                "max_bad": {"share": 0.05, "least": 10},
            },
            # The parameters at the start, to which an objective `distill` holds the network: float32 | bfloat16 (half
            # the memory; then the student starts a rounding away from its teacher)
            "teacher": {"dtype": "float32"},
            "guard": guard(),
            "log": {"every": 50, "trackers": ()},  # trackers: wandb, mlflow, or package.module:Class
            # keep: the newest that stay; keep_every: those at multiples of it stay too (0: none); best: and so many of
            # the best by a scalar of an evaluator, known where eval.every is (no metric: none; mode: max | min)
            "checkpoint": {"every": 1000, "keep": 2, "keep_every": 0, "best": {"metric": "", "mode": "max", "keep": 1}},
            # The compiled step is kept and loaded by the next start: on (in the workdir) | off | auto (in a workdir
            # that is in a store, else in the cache of programs of this machine)
            "compiled_step": "auto",
            # A run that hangs is ended: seconds for the batch or the steps of one log line, for everything before the
            # second step, for one save, for one evaluator; 0: for ever.
            "watchdog": {"seconds": 1800.0, "start": 7200.0, "save": 3600.0, "evaluate": 0.0},
            # checks: before the first step; a run with an error does not start. every: steps between two measurements
            # of the objectives' gradients on the trunk, 0 for none. panels: steps between two held-out evaluations, 0
            # where the run evaluates and at its end; batches of held-out rows, and generated images, of each.
            "doctor": {"checks": True, "every": 500, "panels": 0, "batches": 4, "drawings": 20},
        }
    ).lock()


def sharding() -> dict:
    """Which axis of a parameter `mesh.tensor` splits, by rule; the first match wins."""
    return {
        "tensor": (
            ("(attention/[qkv]|mlp/(gate|up))/(kernel|bias|lora_b)", -1),
            ("(attention/out|mlp/down)/(kernel|lora_a)", -2),
            ("(^|/)embed/table/embedding", 0),
            ("(^|/)head/linear/kernel", -1),
        ),
        "min_size": 2**16,  # parameters with fewer elements are not split by mesh.fsdp
    }


def model() -> dict:
    """The parts of the model; sizes come from the config, vocabulary and patches from the data."""
    return {
        "dtype": "float32",  # of the computation: float32 | bfloat16; parameters stay float32
        "trunk": {
            "width": 64,
            "depth": 4,
            "heads": 4,
            "kv_heads": 4,
            "mlp_width": 256,
            "head_dim": 0,  # of a head; 0: width / heads
            "norm": "rms",  # rms | layer
            "norm_epsilon": 1e-5,
            "final_norm": True,
            "mlp": "swiglu",  # swiglu | gelu
            "bias": False,
            "qkv_bias": False,  # biases of the projections to q, k and v alone (Qwen 2)
            "qk_norm": False,
            "rope": True,
            "rope_theta": 10_000.0,
            # ("linear", factor), ("dynamic", factor, length), ("llama3", factor, low, high, length) or
            # ("yarn", factor, fast, slow, length, magnitude): models/rotary.py
            "rope_scaling": (),
            "sliding_window": 0,  # slots that a query sees, its own included; 0: all before it
            "attention": "auto",  # auto | dense | splash (TPU) | cudnn (GPU)
            "remat": "none",  # none | dots | names | full: from most to least memory of the backward pass
            "init": "normal:0.02",  # or a name of flax.nnx.initializers: lecun_normal, xavier_uniform, zeros, …; torch
            # parts of a block that tokens of `mot_fields` have of their own: attention_norm, attention, mlp_norm, mlp
            "mot": (),
        },
        "mot_fields": ("image", "vision"),
        # Low-rank adapters on the linear layers of the trunk's blocks that the regex `targets` is the whole path of;
        # rank 0: none. With them the trunk itself is frozen, whatever optim.lr_multipliers say (models/lora.py).
        "lora": {"rank": 0, "alpha": 16.0, "targets": "attention/(q|k|v|out)|mlp/(gate|up|down)"},
        # conditioning:TimeToken | AdaLNBeforeTrunk | AdditivePerLayer | AdaLNPerLayer | Conditioning (head only)
        "conditioning": {"name": "conditioning:TimeToken"},
        "time": {"features": 256, "init": "normal:0.02"},
    }


def text(init: str = "normal:0.02", **codec) -> dict:
    """Words. Codecs: text:SentencePiece (without a path it is trained on the tasks' own text, where they bring some),
    text:Llama (a path to tokenizer.model), text:Bytes (a token for each byte, no file)."""
    codec = codec or {"name": "text:SentencePiece", "path": "", "vocab_size": 200, "folder": "", "byte_fallback": False}
    return {
        "codec": codec,
        "embed": {"name": "tokens", "init": init},
        # chunk: most entries of one piece of the loss; tied: the matrix is that of the embedding
        "head": {"name": "categorical", "init": "normal:0.02", "chunk": 8192, "tied": False},
    }


def image(height: int, width: int, channels: int, patch: int = 2) -> dict:
    """Images of pixels that are denoised in patches, each told its time (MonoFormer, SiT)."""
    return {
        "codec": {
            "host": {"name": "pixels", "height": height, "width": width, "channels": channels},
            "device": {"name": "patch", "size": patch, "scale": 1.0, "shift": 0.0},
        },
        "embed": {"name": "patches", "init": "xavier_uniform"},
        "process": flow(),
        "head": {"name": "adaln", "init": "zeros", "adaln_init": "zeros"},
        "step": {"name": "gaussian:Euler"},
        "time_token": True,
    }


def masked_ids(**confidence) -> dict:
    """Parts of images whose ids are masked, and unmasked by confidence (MaskGIT): in place of those of `image`."""
    return {
        "process": {"name": "categorical", "mask": 1.0, "schedule": {"name": "keep:CosineDecay"}},
        "head": {"name": "linear", "init": "normal:0.02"},
        "step": {"name": "categorical:Confidence"} | confidence,
        "timed": False,  # the share of masks shows the time
        "time_token": False,
    }


def label(count: int) -> dict:
    """A class that conditions the whole row."""
    return {"codec": {"name": "classes", "count": count}, "embed": {"name": "classes", "init": "normal:0.02"}}


def vision(**codec: dict) -> dict:
    """Images that are only read: features of a frozen network, or patches."""
    return {"codec": codec, "embed": {"name": "features", "init": "lecun_normal"}, "time_token": True}


def dit(**size) -> dict:
    """A DiT's trunk (Peebles & Xie 2023): LayerNorm, GELU, biases, no rotary positions, adaLN-zero in every block."""
    trunk = {"norm": "layer", "norm_epsilon": 1e-6, "final_norm": False, "mlp": "gelu", "bias": True, "rope": False}
    size = size | {"kv_heads": size["heads"], "mlp_width": 4 * size["width"]}
    return {"trunk": trunk | size, "conditioning": {"name": "conditioning:AdaLNPerLayer"}}


def optim(**changes) -> dict:
    """AdamW, Adafactor (`moments`) or Muon; rules are (regex on the parameter's path, value), the first match wins."""
    return {
        "method": "adamw",  # adamw | muon, for the matrices that muon.targets finds; the others have AdamW
        "lr": 1e-4,
        "schedule": "constant",  # constant | cosine | linear
        "warmup": 0,
        "steps": 0,  # 0: the run's steps
        "final": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        # targets: regex for whole paths; rms: of an update, 0.2 is about that of AdamW's (train/muon.py)
        "muon": {"momentum": 0.95, "steps": 5, "rms": 0.2, "targets": MATRICES},
        "moments": "full",  # full | bfloat16 | factored (Adafactor): 8, 6 or about 2 bytes of state a weight
        "weight_decay": 0.0,
        "decays": (),  # of the weights that a rule finds, in place of weight_decay
        "grad_clip": 1.0,
        "lr_multipliers": ((".*", 1.0),),  # of the learning rate, by rule; 0 freezes
    } | changes


def guard() -> dict:
    """Steps whose loss or gradient is not finite are skipped and counted (`guard/skipped`)."""
    return {
        "patience": 10,  # skipped steps in a row after which the run stops, or goes back to a checkpoint
        "spike": 0.0,  # skip gradient norms so many deviations above the last 128, too; 6.0: 20 times them or more
        "restore": False,  # instead of stopping, go back to a checkpoint from before and leave the data since then out
        "restores": 1,  # how often, in the whole run; then it stops
    }


def flow() -> dict:
    """Straight lines from data to noise, velocity prediction (SiT's linear interpolant)."""
    return {
        "name": "gaussian:Gaussian",
        "schedule": {"name": "schedules:Linear"},
        "parameterization": "velocity",  # eps | x0 | v | velocity | score
        "variance": "fixed_small",  # fixed_small | fixed_large | learned_range
    }


def ddpm() -> dict:
    """The published MonoFormer's process: 1000 linear betas, noise prediction, learned variance."""
    return flow() | {
        "schedule": {"name": "schedules:LinearBetas"},
        "parameterization": "eps",
        "variance": "learned_range",
    }


def patches_of_squares(size: int, patch: int = 2) -> dict:
    """A codec: whole images in a square with black borders, in patches (of latents, with a `frozen` autoencoder)."""
    square = {"name": "pixels", "height": size, "width": size, "channels": 3, "fit": "letterbox"}
    return {"host": square, "device": {"name": "patch", "size": patch}}


def decode(max_new_tokens: int = 16, steps: int = 25) -> dict:
    """Words from left to right, images in one block of denoising steps."""
    return {
        # choose: next_token:Greedy, or next_token:Sampled with temperature, top_k, top_p
        "text": {"name": "left_to_right", "max_new_tokens": max_new_tokens, "choose": {"name": "next_token:Greedy"}},
        "image": {"name": "blocks", "steps": steps},
    }


def diffusion(*names: str, weight: float = 1.0, timesteps: str = "timesteps:LogitNormal") -> dict:
    """Diffusion loss of a name, of images by default."""
    return {
        "name": "diffusion",
        "names": names or ("image",),
        "weight": weight,
        "timesteps": {"name": timesteps},
        # weighting: weighting:Constant, MinSNR or ELBO
        "loss": {"name": "squared_error", "weighting": {"name": "weighting:Constant"}},
    }


def unmask(*names: str) -> dict:
    """Cross-entropy of the masked ids of a name, of images by default."""
    return diffusion(*names, timesteps="timesteps:Stratified") | {"loss": {"name": "cross_entropy", "on": "changed"}}


def next_token(*names: str, weight: float = 1.0) -> dict:
    """Next-token loss of some names."""
    return {"name": "next_token", "names": names, "weight": weight}


def distill(*names: str, weight: float = 1.0, temperature: float = 1.0) -> dict:
    """Divergence of some names from the model at the start of the run."""
    return {"name": "distill", "names": names, "weight": weight, "temperature": temperature}


def words_and_digits(config: ConfigDict, image: dict, segment: dict, objective: dict) -> ConfigDict:
    """Words -> handwritten digit and digit -> words, for a system with its own way to make images: the field `image`,
    options of its segment, and its objective. The sizes are those of configs/digits.py."""
    config.steps, config.batch = 1000, 56
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    config.model.time.init = "lecun_normal"
    config.fields = {"text": text("normal:0.125"), "image": image}
    config.tasks = {
        "caption_to_image": {
            "weight": 32,
            "source": {"name": "digits", "shift": 0},
            "template": {"name": "caption_to_image", "segment": segment},
            "objectives": {"image": objective},
        },
        "image_to_caption": {
            "weight": 24,
            "source": {"name": "digits"},
            "template": {"name": "image_to_caption", "blocks": segment.get("blocks", "bidirectional")},
            "objectives": {"text": next_token("text.caption", weight=0.3)},
        },
    }
    config.optim.update({"lr": 3e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98})
    config.ema.update({"decay": 0.99, "warmup": True})
    config.guidance.scale = 1.0
    config.eval.evaluators = {"digits": {"name": "digits", "images": 500, "captions": 360, "sentences": 0}}
    config.checkpoint.every = 500
    return config


def official(config: ConfigDict, channels: int = 4, guided: int = 3) -> ConfigDict:
    """MonoFormer as published, bug for bug, on whatever data the config has; sizes, batch and steps are the config's.

    Time token with both linears at zero (it stays a constant), cross-entropy weighted 0.01, output patches in (row,
    column, channel) order, learned variance, uniform DDPM times, ancestral sampling, guidance on the first `guided` of
    the image's `channels`. The projector of images that are read is initialised as torch's layers are.
    """
    config.optim.update(optim(lr=1e-4, grad_clip=2.0))
    config.ema.update({"decay": 0.9999, "warmup": False})
    config.model.trunk.update({"qk_norm": False, "init": "normal:0.02"})
    config.model.time.init = config.fields.text.embed.init = config.fields.text.head.init = "normal:0.02"
    if "vision" in config.fields:
        config.fields.vision.embed.init = "torch"
    with config.unlocked():
        config.model.conditioning = {"name": "conditioning:TimeToken", "init": "official"}
        for task in config.tasks.values():
            for objective in task.objectives.values():
                if objective.name == "diffusion":
                    objective.timesteps = {"name": "timesteps:Grid"}
                else:
                    objective.weight = 0.01
    config.decode.image.steps = 20
    return official_image(config, channels, guided) if "image" in config.fields else config


def official_image(config: ConfigDict, channels: int, guided: int) -> ConfigDict:
    """The images' part of `official`."""
    image = config.fields.image
    with config.unlocked():
        image.process, image.step = ddpm(), {"name": "ancestral"}
        image.embed = {"name": "patches", "init": "zeros"}
        image.head = {
            "name": "adaln",
            "init": "normal:0.02",
            "adaln_init": "normal:0.02",
            "order": "rsc",
            "channels": channels,
        }
    config.guidance.features = guided * image.codec.device.size**2
    return config


def debug(config: ConfigDict) -> ConfigDict:
    """The same system, tiny: some steps in seconds."""
    config.model.trunk.update({"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 64})
    config.steps, config.batch = 8, min(config.batch, 88)
    config.log.every, config.checkpoint.every, config.eval.every = 2, 4, 0
    config.optim.warmup = min(config.optim.warmup, 2)
    if "steps" in config.decode.image:
        config.decode.image.steps = 2
    config.sample.batch_size = 20
    counts = {"images": 20, "captions": 20, "sentences": 20, "canvases": 20, "rows": 20}
    for evaluator in config.eval.evaluators.values():
        evaluator.update({k: min(v, evaluator[k]) for k, v in counts.items() if k in evaluator})
    return config


def variant(config: ConfigDict, name: str | None, **variants) -> ConfigDict:
    """Applies the variants named after the colon of `--config=file.py:official,debug`.

    In whatever order they are named, they are applied as the config lists them, `debug` last: a later one has the say
    in an option of both. Every config has `debug`.
    """
    last = variants.pop("debug", debug)
    known = variants | {"debug": last}
    wanted = [part for part in (name or "").split(",") if part]
    if unknown := [part for part in wanted if part not in known]:
        raise ValueError(f"config variant {unknown[0]!r} is unknown; there are {', '.join(known)}")
    for part, change in known.items():
        config = change(config) if part in wanted else config
    return config.lock()
