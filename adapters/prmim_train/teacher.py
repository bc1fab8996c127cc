"""How large a teacher is, read from its configuration file alone: no framework, no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from prmim_core import Transformer

CONFIG = "config.json"

# By `model_type`: the family, and what transformers leaves out of the file because it is the default.
FAMILIES = {
    "clip_vision_model": ("CLIP", {"patch_size": 32}),
    "vit": ("ViT", {"patch_size": 16}),
    "dinov2": ("DINOv2", {"patch_size": 14}),
}
DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3}


@dataclass(frozen=True)
class TeacherSize:
    """What a teacher's configuration says of it.

    Parameters
    ----------
    family
        What kind of network it is, in words.
    transformer
        Its blocks.
    patch_size
        Height and width of a patch in pixels.
    channels
        Channels of the images that it sees.
    """

    family: str
    transformer: Transformer
    patch_size: tuple[int, ...]
    channels: int

    @property
    def patch_dim(self) -> int:
        """Values in a patch."""
        return prod(self.patch_size) * self.channels


def read_teacher(name_or_path: str) -> TeacherSize | None:
    """Read the size of a teacher.

    Parameters
    ----------
    name_or_path
        A folder, or a name on the hub.

    Returns
    -------
    TeacherSize or None
        None where it is no folder, and not among what was fetched from the hub before.

    Raises
    ------
    FileNotFoundError
        If it is a folder that holds no `config.json`.
    ValueError
        If it holds something else than a vision transformer that can teach.
    """
    path = _config_file(name_or_path)
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"teacher: expected a folder with {CONFIG}, there is none in {name_or_path}")
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"teacher: expected JSON in {path}, got something else") from error
    return _teacher_size(options, str(path))


def _teacher_size(options: Mapping[str, Any], place: str) -> TeacherSize:
    kind = options.get("model_type")
    if kind == "clip":  # both towers: images are seen by one of them
        options, kind = options.get("vision_config", {}), "clip_vision_model"
    if kind not in FAMILIES:
        raise ValueError(f"teacher: expected a model of type clip, {', '.join(FAMILIES)}, got {kind!r} in {place}")
    family, own = FAMILIES[kind]
    known = {**DEFAULTS, **own, **options}
    dim = known["hidden_size"]
    mlp_ratio = known.get("mlp_ratio", known.get("intermediate_size", 4 * dim) // dim)
    size = Transformer(dim, known["num_hidden_layers"], known["num_attention_heads"], int(mlp_ratio))
    patch = known["patch_size"]
    return TeacherSize(family, size, tuple(patch) if isinstance(patch, list) else (patch, patch), known["num_channels"])


def _config_file(name_or_path: str) -> Path | None:
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / CONFIG
    if find_spec("huggingface_hub") is None:  # then nothing was fetched either
        return None
    found = import_module("huggingface_hub").try_to_load_from_cache(name_or_path, CONFIG)
    return Path(found) if isinstance(found, str) else None
