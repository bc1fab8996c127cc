"""Teachers: published vision transformers, described by their ``config.json``.

Reads JSON only; the adapters read the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from prmim_methods.checkpoints import read_json
from prmim_methods.encoder import IMAGENET_MEAN, IMAGENET_STD
from prmim_methods.files import is_special
from prmim_methods.hub import find_folder, local_folder
from prmim_methods.messages import shown
from prmim_methods.sizes import Transformer

Family = Literal["clip", "vit", "dinov2"]
Activation = Literal["gelu", "quick_gelu"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

CONFIG_FILE = "config.json"
LARGEST = 2**14
"""Upper bound of numbers in a configuration, far above published models."""
MOST_LAYERS = 1000
DOWNLOADED = (CONFIG_FILE, "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


class _Kind(NamedTuple):
    """A family of models: title, pixel statistics, and defaults of its configuration."""

    title: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    defaults: dict[str, Any]


_COMMON = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
_CLIP_OWN = {"intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_VIT_OWN = {"intermediate_size": 3072, "patch_size": 16, "layer_norm_eps": 1e-12}
_DINOV2_OWN = {"mlp_ratio": 4, "patch_size": 14, "layer_norm_eps": 1e-6}
_KINDS: dict[Family, _Kind] = {
    "clip": _Kind("CLIP", CLIP_MEAN, CLIP_STD, _COMMON | _CLIP_OWN),
    "vit": _Kind("ViT", IMAGENET_MEAN, IMAGENET_STD, _COMMON | _VIT_OWN),
    "dinov2": _Kind("DINOv2", IMAGENET_MEAN, IMAGENET_STD, _COMMON | _DINOV2_OWN),
}
MODEL_TYPES: dict[str, Family] = {"clip": "clip", "clip_vision_model": "clip", "vit": "vit", "dinov2": "dinov2"}
"""Families by the ``model_type`` of a configuration."""


@dataclass(frozen=True)
class TeacherConfig:
    """Architecture and preprocessing of a teacher.

    Parameters
    ----------
    folder
        Folder of its files.
    family
        ``"clip"``, ``"vit"`` (plain ones, such as DINO) or ``"dinov2"``.
    size
        Size of its blocks.
    patch_size
        Pixels of a patch along both axes.
    channels
        Channels of its images.
    grid_shape
        Tokens along both axes of its training images.
    activation
        ``"gelu"`` or ``"quick_gelu"``.
    eps
        Epsilon of its layer norms.
    qkv_bias
        Whether queries, keys and values have biases.
    mean, std
        Per-channel statistics of its training pixels, in [0, 1].
    """

    folder: Path
    family: Family
    size: Transformer
    patch_size: tuple[int, ...]
    channels: int
    grid_shape: tuple[int, ...]
    activation: Activation
    eps: float
    qkv_bias: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def patch_dim(self) -> int:
        """Values in a patch."""
        return prod(self.patch_size) * self.channels

    @property
    def title(self) -> str:
        """The teacher in words."""
        patch = "x".join(map(str, self.patch_size))
        return (
            f"{_KINDS[self.family].title}, {self.size.depth} blocks of width {self.size.dim}, patches of {patch} pixels"
        )


def local_teacher(source: str) -> Path | None:
    """Return a teacher's local folder, without network access.

    None if the teacher is not downloaded.

    Parameters
    ----------
    source
        A folder, or a name on the Hugging Face hub.

    Raises
    ------
    ValueError
        If there is no such folder and the text is not a name.
    """
    return local_folder(source, "teacher", CONFIG_FILE)


def find_teacher(source: str | Path) -> Path:
    """Return a teacher's folder, downloaded if it is a name on the Hugging Face hub.

    Parameters
    ----------
    source
        A folder, or ``owner/name``; the latter needs ``huggingface_hub``, which caches the download.

    Raises
    ------
    ImportError
        If ``huggingface_hub`` is needed and not installed.
    ValueError
        If there is no such folder, or the model cannot be downloaded.
    """
    return find_folder(source, "teacher", DOWNLOADED)


def read_teacher(folder: Path) -> TeacherConfig:
    """Read the configuration of a teacher from the JSON files of its folder.

    Parameters
    ----------
    folder
        A folder written by ``save_pretrained`` of ``transformers``. Without ``preprocessor_config.json``, the pixel
        statistics are those of CLIP for CLIP, else those of ImageNet.

    Returns
    -------
    TeacherConfig

    Raises
    ------
    ValueError
        If the configuration is missing, corrupt, or of an unsupported model, or if the folder holds pipes, sockets or
        devices.

    Examples
    --------
    >>> import json, tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> sizes = {"model_type": "clip_vision_model", "patch_size": 16}
    >>> _ = (folder / CONFIG_FILE).write_text(json.dumps(sizes))
    >>> teacher = read_teacher(folder)
    >>> teacher.title, teacher.grid_shape, teacher.mean[0]
    ('CLIP, 12 blocks of width 768, patches of 16x16 pixels', (14, 14), 0.48145466)
    """
    for path in folder.glob("*"):  # adapters open files by name, which would block on a pipe
        if is_special(path):
            raise ValueError(f"teacher: expected files in {folder}, got a pipe, a socket or a device: {path.name!r}")
    config = read_json(folder / CONFIG_FILE, "teacher")
    if config is None:
        raise ValueError(f"teacher: expected a folder with a config.json, got {folder}, which has no such file")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"teacher: expected a model of type {known}, got {shown(model_type)} in {folder}")
    if config.get("use_swiglu_ffn"):
        raise ValueError(f"teacher: expected a DINOv2 model without SwiGLU layers, got one with them in {folder}")
    family = MODEL_TYPES[model_type]
    # A CLIP model may have two towers; only the vision tower sees images.
    own = config.get("vision_config", config)
    if not isinstance(own, dict):
        raise ValueError(f"teacher: expected an object vision_config, got {shown(own)} in {folder}")
    options = _KINDS[family].defaults | own
    patch_size, image_size = (_pair(options, name, folder) for name in ("patch_size", "image_size"))
    if options["hidden_act"] not in get_args(Activation):
        expected = " or ".join(get_args(Activation))
        raise ValueError(f"teacher: expected the activation {expected}, got {shown(options['hidden_act'])} in {folder}")
    if any(side < patch for side, patch in zip(image_size, patch_size, strict=True)):
        raise ValueError(f"teacher: expected images of at least a patch {patch_size}, got {image_size} in {folder}")
    channels = _size(options["num_channels"], "num_channels", folder)
    mean, std = _read_statistics(folder, family, channels)
    return TeacherConfig(
        folder=folder,
        family=family,
        size=_read_size(options, folder),
        patch_size=patch_size,
        channels=channels,
        grid_shape=tuple(side // patch for side, patch in zip(image_size, patch_size, strict=True)),
        activation=options["hidden_act"],
        eps=_number(options["layer_norm_eps"], "layer_norm_eps", folder),
        qkv_bias=bool(options["qkv_bias"]),
        mean=mean,
        std=std,
    )


def check_images(teacher: TeacherConfig, grid_shape: Sequence[int], channels: int) -> None:
    """Raise ValueError unless a teacher can process images of this grid and channels."""
    if len(grid_shape) != 2:
        raise ValueError(f"teacher: expected images of 2 axes, got a grid of {len(grid_shape)}")
    if channels not in (1, teacher.channels):
        raise ValueError(f"teacher: expected images of {teacher.channels} channels, or of 1 to repeat, got {channels}")


def _read_size(options: dict[str, Any], folder: Path) -> Transformer:
    dim, heads = (_size(options[name], name, folder) for name in ("hidden_size", "num_attention_heads"))
    depth = _size(options["num_hidden_layers"], "num_hidden_layers", folder, at_most=MOST_LAYERS)
    if "mlp_ratio" in options:
        hidden = int(dim * _number(options["mlp_ratio"], "mlp_ratio", folder))
    else:
        hidden = _size(options["intermediate_size"], "intermediate_size", folder)
    if dim % heads:
        raise ValueError(f"teacher: expected a divisor of the width {dim} as heads, got {heads} in {folder}")
    if hidden < dim or hidden % dim:
        raise ValueError(f"teacher: expected hidden layers of a multiple of the width {dim}, got {hidden} in {folder}")
    return Transformer(dim, depth, heads, hidden // dim)


def _read_statistics(folder: Path, family: Family, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    preprocessing = read_json(folder / "preprocessor_config.json", "teacher") or {}
    kind = _KINDS[family]
    mean, std = (
        _numbers(preprocessing.get(name) or default, name, folder, at_least=least)
        for name, default, least in (("image_mean", kind.mean, -LARGEST), ("image_std", kind.std, 1e-6))
    )
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"teacher: expected image_mean and image_std of {channels} channels, got {len(mean)} and {len(std)} in "
            f"{folder}"
        )
    return mean, std


def _size(value: Any, name: str, folder: Path, at_most: int = LARGEST) -> int:
    if type(value) is not int or not 1 <= value <= at_most:
        raise ValueError(f"teacher: expected a whole number {name} in [1, {at_most}], got {shown(value)} in {folder}")
    return value


def _number(value: Any, name: str, folder: Path, at_least: float = 0.0) -> float:
    if type(value) not in (int, float) or not at_least <= value <= LARGEST:  # NaN neither
        raise ValueError(f"teacher: expected a number {name} of at least {at_least:g}, got {shown(value)} in {folder}")
    return float(value)


def _numbers(values: Any, name: str, folder: Path, at_least: float) -> tuple[float, ...]:
    listed = values if isinstance(values, list | tuple) else [values]
    return tuple(_number(value, name, folder, at_least) for value in listed)


def _pair(options: dict[str, Any], name: str, folder: Path) -> tuple[int, ...]:
    sizes = options[name] if isinstance(options[name], list) else [options[name]] * 2
    if len(sizes) != 2:
        raise ValueError(f"teacher: expected one or two whole numbers {name}, got {shown(options[name])} in {folder}")
    return tuple(_size(size, name, folder) for size in sizes)
