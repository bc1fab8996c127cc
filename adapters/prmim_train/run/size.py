"""Checks, by formula and before anything is built, that a model fits into memory."""

from math import prod

from prmim_methods import Accounting
from prmim_methods.encoder import EncoderOptions
from prmim_methods.hardware import Choice, choose_precision, may_have_accelerator, physical_memory
from prmim_methods.messages import counted
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.config.training import TrainingOptions
from prmim_train.run.processes import launched

MOST_BLOCKS = 1000
"""Maximum number of blocks of an encoder or a decoder. Building them takes seconds."""
MOST_TOKENS = 2**20
"""Maximum number of tokens of an image. Sampling from so many takes minutes."""
OPTIMIZED_BYTES = 16
"""Bytes of a float32 weight, its gradient, and the two moments of AdamW."""
SLACK = 2
"""Allowed ratio of estimated need to memory. Estimates are not exact, and swap adds memory."""
ACCELERATORS = 2**42
"""Upper bound of the accelerator memory of one process, 4 TiB in bytes."""


def check_size(config: PretrainConfig, *, images: int = 1) -> None:
    """Check that a model can be built, from its options alone.

    Parameters
    ----------
    config
        Options of the run.
    images
        Images per forward pass in this process.

    Raises
    ------
    ValueError
        If the model has more than `MOST_BLOCKS` blocks, an image has more than `MOST_TOKENS` tokens, the weights exceed
        the memory of this machine, or weights and activations exceed what any device has. With `device: cpu`, that is
        the memory of this machine.
    """
    if reason := excess(config, images=images):
        raise ValueError(reason)


def check_numbers(encoder: EncoderOptions) -> None:
    """Raise ValueError if an encoder or an image is too large.

    The limits are `MOST_BLOCKS` blocks and `MOST_TOKENS` tokens.
    """
    if reason := _excess_of_numbers(encoder):
        raise ValueError(reason)


def check_batch(config: TrainingOptions, method: EncoderOptions) -> None:
    """Raise ValueError if this process's share of a batch exceeds the memory."""
    deepest = 1 if method.pixel_range is None else 4  # bytes
    size = config.batch_size // launched().world_size * prod(method.image_size) * method.channels * deepest
    if size > SLACK * (physical_memory() or ACCELERATORS):
        raise ValueError(f"batch_size: expected images that fit into memory, got {_gigabytes(size)} of images at once")


def excess(config: PretrainConfig, *, images: int = 1) -> str:
    """Return why a model cannot be built; empty if it can. See `check_size`."""
    return _excess_of_numbers(config.method) or _excess_of_memory(config, images)


def _excess_of_numbers(method: EncoderOptions) -> str:
    stacks = {"depth": method.encoder_size.depth, "decoder_depth": getattr(method, "decoder_depth", 0)}
    for name, depth in stacks.items():
        if depth > MOST_BLOCKS:
            return f"{name}: expected at most {MOST_BLOCKS:,} blocks to build, got {depth:,}"
    tokens = method.grid.num_tokens
    if tokens > MOST_TOKENS:
        return f"image_size: expected at most {MOST_TOKENS:,} patches of an image, got {tokens:,}"
    return ""


def _excess_of_memory(config: PretrainConfig, images: int) -> str:
    method, parameters = config.method, config.method.parameters()
    shares = launched().world_size if config.parallel == "fsdp" else 1
    weights = 4 * (parameters.learned + parameters.fixed) // shares
    memory = SLACK * (physical_memory() or ACCELERATORS)
    if weights > memory:
        return f"model: expected weights that fit into memory, got {_gigabytes(weights)}"
    trained = weights + (OPTIMIZED_BYTES - 4) * parameters.learned // shares
    cost = method.cost(accounting(config))
    activations = method.shared_bytes + (0 if cost is None else images * cost.peak_activation_bytes)
    limit = memory if config.device.startswith("cpu") else max(memory, ACCELERATORS)
    if trained + activations <= limit:
        return ""
    return (
        f"model: expected a training step that fits into memory, got {_gigabytes(trained)} of weights with gradients "
        f"and optimizer, and {_gigabytes(activations)} of activations for {counted(images, 'image')} at once"
    )


def expected_precision(config: TrainingOptions) -> Choice[str]:
    """Return the expected number format of a run.

    Without a framework, it is unknown on accelerators.
    """
    platform = config.device.partition(":")[0]
    if platform == "auto":
        platform = "unknown" if may_have_accelerator() else "cpu"
    if config.precision == "auto" and platform in ("cuda", "unknown"):
        return Choice("bfloat16", "auto: expected on an accelerator; decided when the run starts")
    return choose_precision(config.precision, platform, backend=config.backend)


def accounting(config: TrainingOptions) -> Accounting:
    """Return the settings of the memory formulas, with the expected number format."""
    return Accounting(compute_bytes=4 if expected_precision(config).value == "float32" else 2)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count < 1e14 else f"{count / 1e9:.3g} GB"
