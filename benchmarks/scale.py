"""Cost by resolution and model size, and the largest batch for a GPU's memory.

Both follow from formulas, which are checked on small cases. The training state takes 16 bytes per parameter: weight,
gradient and AdamW's two moments in float32. The batch follows from the rest of the memory and the peak of activations
per image by :mod:`prmim_methods.cost`. It is an upper bound: half-precision copies of weights and memory fragmentation
also take space.
"""

import argparse

import torch

from benchmarks import arms
from benchmarks.macs import count
from benchmarks.memory import per_image, saved_bytes
from benchmarks.report import Report, argument_parser
from prmim_core import counter_noise
from prmim_methods import Accounting, CostReport, MAEConfig, Transformer
from prmim_methods.sizes import VIT_SIZES

PATCH = 16
MODELS = ("vit_small", "vit_base", "vit_large", "vit_huge")
PIXELS = (224, 384, 512)
GIGABYTES = (16, 24, 40, 80)
STATE_BYTES = 16
CHECKED = (("vit_small", 224), ("vit_small", 384), ("vit_base", 224))


def parameters(model: str) -> int:
    """Return the number of parameters of a dense MAE.

    Examples
    --------
    >>> parameters("vit_base")
    111655680
    """
    config = MAEConfig(model=model)
    encoder, decoder = config.encoder_size, config.decoder_size

    def blocks(size: Transformer) -> int:
        products = (4 + 2 * size.mlp_ratio) * size.dim**2
        biases_and_norms = (3 + 1 + size.mlp_ratio + 1 + 4) * size.dim
        return size.depth * (products + biases_and_norms) + 2 * size.dim  # and the final norm

    linear = [(config.patch_dim, encoder.dim), (encoder.dim, decoder.dim), (decoder.dim, config.patch_dim)]
    tokens = encoder.dim + decoder.dim
    return blocks(encoder) + blocks(decoder) + sum((one + 1) * other for one, other in linear) + tokens


def costs(model: str, pixels: int, throw_ratio: float, precision: str, *, recompute_blocks: bool = False) -> CostReport:
    """Return the cost per image of an MAE with patches of 16 x 16 pixels."""
    config = MAEConfig(
        model=model, image_size=(pixels, pixels), throw_ratio=throw_ratio, recompute_blocks=recompute_blocks
    )
    return config.cost(Accounting(compute_bytes=2 if precision == "bfloat16" else 4))


def batch_that_fits(gigabytes: float, state: int, per_image: int) -> int:
    """Return the largest batch that fits into memory beside the training state.

    Examples
    --------
    >>> batch_that_fits(16, 2 * 10**9, 10**8)
    140
    """
    return max(0, int((gigabytes * 1e9 - state) // per_image))


def measured_macs_and_bytes(arm: str, model: str, pixels: int) -> tuple[float, float]:
    """Count MACs and saved bytes per image of a float32 forward pass in PyTorch."""
    module = arms.build(arm, model, image_size=(pixels, pixels))
    images = torch.randint(0, 256, (2, pixels, pixels, 3), dtype=torch.uint8)
    noise = counter_noise(0, 0, torch.arange(2), module.num_tokens)
    macs, _ = count(module, images[:1], noise[:1])
    learned = list(module.parameters())
    saved = per_image(lambda size: saved_bytes(lambda: arms.loss(module, images[:size], noise[:size]), learned), 2)
    return macs, saved


def cost_table(options: argparse.Namespace, report: Report) -> None:
    """Print the cost per image, by model and resolution."""
    rows = {}
    for model in options.models:
        for pixels in PIXELS:
            dense, ours = (costs(model, pixels, ratio, options.precision) for ratio in (0.0, 0.5))
            again, ours_again = (
                costs(model, pixels, ratio, options.precision, recompute_blocks=True) for ratio in (0.0, 0.5)
            )
            peaks = [report.peak_activation_bytes / 1e6 for report in (dense, ours, again, ours_again)]
            rows[f"{model}, {pixels}"] = (
                *(dense.macs / 1e9, ours.macs / 1e9, ours.macs / dense.macs),
                *(*peaks, ours.peak_activation_bytes / dense.peak_activation_bytes),
            )
    columns = {"GMACs dense": ".2f", "PR-MIM 0.5": ".2f", "ratio": ".3f"}
    columns |= {"MB dense": ".1f", " PR-MIM 0.5": ".1f", "dense, recomputed": ".1f"}
    columns |= {"PR-MIM, recomputed": ".1f", " ratio": ".3f"}
    report.table("per image", columns, rows)


def fit_table(options: argparse.Namespace, report: Report) -> None:
    """Print the largest batch, by model, resolution, arm and memory."""
    rows = {}
    for model in options.models:
        for pixels in PIXELS:
            state = STATE_BYTES * parameters(model)
            for arm, throw_ratio in (("dense", 0.0), ("PR-MIM 0.5", 0.5)):
                kept, recomputed = (
                    costs(model, pixels, throw_ratio, options.precision, recompute_blocks=flag)
                    for flag in (False, True)
                )
                rows[f"{model}, {pixels}, {arm}"] = (
                    state / 1e9,
                    *(
                        batch_that_fits(size, state, report.peak_activation_bytes)
                        for report in (kept, recomputed)
                        for size in GIGABYTES
                    ),
                )
    columns = {"state GB": ".2f"} | {f"{size} GB": "d" for size in GIGABYTES}
    columns |= {f"{size} GB, recomputed": "d" for size in GIGABYTES}
    report.table("images that fit", columns, rows)


def check_table(report: Report) -> None:
    """Print the counts of PyTorch, and the formulas relative to them."""
    rows = {}
    for model, pixels in CHECKED:
        for arm, throw_ratio in (("dense", 0.0), ("PR-MIM 0.5", 0.5)):
            macs, saved = measured_macs_and_bytes(arm, model, pixels)
            expected = costs(model, pixels, throw_ratio, "float32")
            rows[f"{model}, {pixels}, {arm}"] = (
                *(macs / 1e9, expected.macs / macs),
                *(saved / 1e6, expected.activation_bytes / saved),
            )
    columns = {"GMACs": ".3f", "formula to it": ".3f", "saved MB": ".1f", "formula to it ": ".3f"}
    report.table("counted, float32", columns, rows)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(VIT_SIZES), default=list(MODELS))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--no-check", dest="check", action="store_false", help="skip the counts of PyTorch")
    options = parser.parse_args(arguments)
    report = Report("scale", {"patch": PATCH, "mask": 0.75, "precision": options.precision}, options.json)
    cost_table(options, report)
    fit_table(options, report)
    if options.check:
        check_table(report)


if __name__ == "__main__":
    main()
