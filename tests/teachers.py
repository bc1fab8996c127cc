"""Small teachers with random weights, written with or without transformers."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DIM, DEPTH, HEADS, HIDDEN, SIDE, PATCH = 32, 3, 4, 64, 16, 4
SIZES = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CLIP_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
KINDS = ("clip", "clip vision", "dino", "classifier", "dinov2")


def build_model(kind: str, **changes: Any) -> Any:
    """Return a model of transformers that is small and whose every number is random."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build_model(transformers, kind, {**SIZES, "intermediate_size": HIDDEN, **changes})
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # away from the symmetries of the first values
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def _build_model(transformers: Any, kind: str, options: dict[str, Any]) -> Any:
    if kind == "dinov2":
        del options["intermediate_size"]
        options = {"mlp_ratio": HIDDEN // DIM, "layerscale_value": 0.5, **options}
        return transformers.Dinov2Model(transformers.Dinov2Config(**options))
    if kind == "clip":
        text = {**CLIP_TEXT, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.CLIPConfig(text_config=text, vision_config=options, projection_dim=8)
        return transformers.CLIPModel(config)
    name, config = {
        "clip vision": ("CLIPVisionModel", "CLIPVisionConfig"),
        "dino": ("ViTModel", "ViTConfig"),
        "classifier": ("ViTForImageClassification", "ViTConfig"),
    }[kind]
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def save_teacher(kind: str, folder: Path, *, shard: str = "1GB", **changes: Any) -> Path:
    """Write such a model as transformers does, and return the folder."""
    build_model(kind, **changes).save_pretrained(folder, max_shard_size=shard)
    return folder


# Names of a ViT's tensors in files of old and new releases of transformers.
NAMES = {
    "old": {
        "block": "encoder.layer.{}.",
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "o": "attention.output.dense",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    },
    "new": {
        "block": "layers.{}.",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
}


def write_teacher(
    folder: Path,
    *,
    names: str = "old",
    prefix: str = "",
    dtype: Any = np.float32,
    depth: int = DEPTH,
    without: str = "$^",
    **config: Any,
) -> Path:
    """Write a plain ViT without transformers, and return the folder.

    ``without``: a pattern of names to leave out; ``config`` is added to the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    named = NAMES[names]
    shapes = {
        "embeddings.cls_token": (1, 1, DIM),
        "embeddings.position_embeddings": (1, 1 + (SIDE // PATCH) ** 2, DIM),
        "embeddings.patch_embeddings.projection.weight": (DIM, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (DIM,),
        "layernorm.weight": (DIM,),
        "layernorm.bias": (DIM,),
    }
    for number in range(depth):
        for part, shape in (
            *((named[part], (DIM, DIM)) for part in "qkvo"),
            (named["fc1"], (HIDDEN, DIM)),
            (named["fc2"], (DIM, HIDDEN)),
            ("layernorm_before", (DIM,)),
            ("layernorm_after", (DIM,)),
        ):
            shapes[f"{named['block'].format(number)}{part}.weight"] = shape
            shapes[f"{named['block'].format(number)}{part}.bias"] = shape[:1]
    tensors = {
        prefix + name: rng.normal("norm" in name and "weight" in name, 0.2, shape).astype(dtype)
        for name, shape in shapes.items()
    }
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(without, name)}
    save_file(kept, folder / "model.safetensors")
    options = {"model_type": "vit", **SIZES, "num_hidden_layers": depth, "intermediate_size": HIDDEN, **config}
    (folder / "config.json").write_text(json.dumps(options))
    return folder
