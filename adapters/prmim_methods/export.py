"""Equivalent models of other libraries: their class, options, and weight names."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from prmim_methods.architecture import config_of, encoder_of
from prmim_methods.cost import CUSTOM
from prmim_methods.encoder import EncoderOptions
from prmim_methods.layouts import BEIT, PIXIO, TIMM, TIMM_RELATIVE, VIT, VIT_MAE, Layout, to_library
from prmim_methods.mae import MAEConfig
from prmim_methods.methods import METHODS
from prmim_methods.sizes import LAYER_NORM_EPS, Transformer

FORMATS = {
    "hf": "a folder for transformers",
    "timm": "a state dict for timm",
    "safetensors": "a file of ours, with the architecture in its metadata",
    "torch.export": "a PyTorch program from images to features",
}
"""Formats of ``prmim export``."""


class LibraryModel(NamedTuple):
    """A model of another library.

    Parameters
    ----------
    name
        Class of ``transformers``, or name of the model in timm.
    options
        Content of ``config.json``, or arguments of ``timm.create_model``.
    layout
        The library's names for our weights.
    """

    name: str
    options: dict[str, Any]
    layout: Layout


def exported_config(architecture: Mapping[str, Any]) -> EncoderOptions:
    """Return the exportable part of a weight file: MAE as a method, else the encoder.

    Examples
    --------
    >>> from prmim_methods import MAEConfig, SimMIMConfig
    >>> [type(exported_config(config.architecture())).__name__
    ...     for config in (MAEConfig(), SimMIMConfig())]
    ['MAEConfig', 'EncoderConfig']
    """
    method = METHODS.get(str(architecture.get("method")))
    has_decoder = method is not None and issubclass(method, MAEConfig)
    if not has_decoder:
        return encoder_of(architecture)
    # Mixes of features are not exported, so any that fits all widths can stand for the user's.
    is_custom = architecture.get("reconstruction") == CUSTOM
    return config_of({**architecture, "reconstruction": "interpolate"} if is_custom else architecture)


def transformers_model(config: EncoderOptions, *, encoder_only: bool = False) -> LibraryModel:
    """Return the ``transformers`` model for the weights of a method or an encoder.

    Parameters
    ----------
    config
        The method, or an encoder alone.
    encoder_only
        Whether to leave out MAE's decoder, which ``ViTMAEForPreTraining`` can hold.

    Raises
    ------
    ValueError
        If ``transformers`` has no such model.

    Notes
    -----
    An encoder with position tables is a ``ViTModel``, with several class tokens a ``PixioModel``, with LayerScale or
    relative position bias a ``BeitModel``.

    Examples
    --------
    >>> from prmim_methods import MAEConfig, SimMIMConfig
    >>> configs = MAEConfig(), MAEConfig(class_tokens=8), SimMIMConfig()
    >>> [transformers_model(config).name for config in configs]
    ['ViTMAEForPreTraining', 'PixioModel', 'BeitModel']
    """
    _check_axes(config, "hf")
    if config.class_tokens == 0:
        raise _misfit("hf", "an encoder with class tokens", "one without", "timm")
    if not encoder_only and isinstance(config, MAEConfig) and _fits_vit_mae(config):
        return _transformers("ViTMAEForPreTraining", "vit_mae", config, VIT_MAE, **_decoder_options(config))
    if config.class_tokens == 1 and config.position != "relative" and config.layer_scale is None:
        return _transformers("ViTModel", "vit", config, VIT)
    if not _is_square(config):
        raise _misfit("hf", "square images and patches for this encoder", f"images of {config.image_size}", "timm")
    if config.class_tokens == 1:
        is_relative = config.position == "relative"
        return _transformers(
            "BeitModel",
            "beit",
            config,
            BEIT,
            layer_scale_init_value=config.layer_scale or 0.0,
            use_shared_relative_position_bias=is_relative,
            use_relative_position_bias=False,
            use_absolute_position_embeddings=not is_relative,
            use_mask_token=True,
            use_mean_pooling=False,
        )
    size = config.encoder_size
    return _transformers(
        "PixioModel", "pixio", config, PIXIO, n_cls_tokens=config.class_tokens, mlp_ratio=size.mlp_ratio
    )


def preprocessor_options(config: EncoderOptions) -> dict[str, Any]:
    """Return the content of ``preprocessor_config.json``.

    It holds the centre crop and the pixel statistics of our evaluation. For images that are not square, it resizes
    without keeping proportions. It cannot clip to a ``pixel_range``.

    Examples
    --------
    >>> from prmim_methods import MAEConfig
    >>> found = preprocessor_options(MAEConfig(channels=1, pixel_range=(-50, 50)))
    >>> found["rescale_factor"], found["image_mean"], found["image_std"]
    (0.01, [0.0], [0.5])
    """
    height, width = config.image_size
    low, high = config.pixel_range or (0, 255)
    size = {"height": height, "width": width}
    is_square = height == width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": config.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": height} if is_square else size,
        "resample": 3,
        "do_center_crop": is_square,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / (high - low),
        "do_normalize": True,
        "image_mean": [mean + low / (high - low) for mean in config.pixel_mean],
        "image_std": list(config.pixel_std),
    }


def timm_model(config: EncoderOptions) -> LibraryModel:
    """Return the timm model that computes a method's mean feature.

    Raises
    ------
    ValueError
        If timm has no such model.

    Examples
    --------
    >>> from prmim_methods import SimMIMConfig
    >>> timm_model(SimMIMConfig()).name
    'vit_relpos_base_patch16_cls_224'
    """
    _check_axes(config, "timm")
    size = config.encoder_size
    options = {
        "img_size": tuple(config.image_size),
        "patch_size": tuple(config.patch_size),
        "in_chans": config.channels,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
        "embed_dim": size.dim,
        "depth": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": size.mlp_ratio,
        "class_token": config.class_tokens > 0,
        # timm starts LayerScale at this value; the weights replace it.
        **({} if config.layer_scale is None else {"init_values": config.layer_scale}),
    }
    statistics = {"mean": tuple(config.pixel_mean), "std": tuple(config.pixel_std)}
    crop = {"input_size": (config.channels, *config.image_size), "crop_pct": 1.0, "interpolation": "bicubic"}
    overlay = {"pretrained_cfg_overlay": {**crop, **statistics}}
    if config.position == "relative":
        relative = {"rel_pos_type": "bias", "shared_rel_pos": True, "qkv_bias": True}
        return LibraryModel("vit_relpos_base_patch16_cls_224", {**options, **relative, **overlay}, TIMM_RELATIVE)
    registers = {"reg_tokens": config.class_tokens - 1} if config.class_tokens > 1 else {}
    return LibraryModel("vit_base_patch16_224", {**options, **registers, **overlay}, TIMM)


def timm_weights(weights: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return an encoder's weights under timm's names.

    Further class tokens are registers.
    """
    named = to_library(weights, layout)
    tokens = named.get("cls_token")
    if tokens is not None and tokens.shape[1] > 1:
        named |= {"cls_token": tokens[:, :1], "reg_token": tokens[:, 1:]}
    return named


def _transformers(name: str, model_type: str, config: EncoderOptions, layout: Layout, **more: Any) -> LibraryModel:
    size = config.encoder_size
    options = {
        "architectures": [name],
        "model_type": model_type,
        "image_size": _one_or_two(config.image_size),
        "patch_size": _one_or_two(config.patch_size),
        "num_channels": config.channels,
        **_block_options(size),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return LibraryModel(name, {**options, **more}, layout)


def _block_options(size: Transformer, prefix: str = "") -> dict[str, int]:
    return {
        f"{prefix}hidden_size": size.dim,
        f"{prefix}num_hidden_layers": size.depth,
        f"{prefix}num_attention_heads": size.heads,
        f"{prefix}intermediate_size": size.mlp_ratio * size.dim,
    }


def _decoder_options(config: MAEConfig) -> dict[str, Any]:
    return {
        **_block_options(config.decoder_size, "decoder_"),
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix,
    }


def _fits_vit_mae(config: MAEConfig) -> bool:
    """Return whether ``ViTMAEForPreTraining`` has this decoder and this dense loss."""
    has_decoder = config.embed_bias and not config.is_cross and not config.fused_blocks
    return has_decoder and config.class_tokens == 1 and config.low_pass is None and _is_square(config)


def _is_square(config: EncoderOptions) -> bool:
    return len(set(config.image_size)) == len(set(config.patch_size)) == 1


def _one_or_two(sizes: tuple[int, ...]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)


def _check_axes(config: EncoderOptions, to: str) -> None:
    if len(config.image_size) != 2:
        raise _misfit(to, "images of 2 axes", f"{len(config.image_size)}", "safetensors")


def _misfit(to: str, expected: str, got: str, other: str) -> ValueError:
    return ValueError(f"to: expected {expected} for {to}, got {got}; --to {other} can hold this encoder")
