"""Cost by formula against resolution and model size, and the batch that fits a GPU; checked where it fits here.

The memory that does not grow with the batch is 16 bytes per parameter: weight, gradient and AdamW's two moments in
float32. The batch is what is left over the peak of an image's activations, by `prmim_core.cost`, so it is a bound:
gradients of activations, half-precision copies of weights and the allocator's losses take some of it.
"""

import argparse
from typing import Any

from benchmarks import arms
from benchmarks.memory import per_image, saved_bytes
from benchmarks.report import Report, argument_parser
from prmim_core import Grid, Schedule, Transformer, cost, count_tokens, vit_size
from prmim_core.cost import VIT_SIZES

DECODER = Transformer(512, 8, 16)
PATCH = 16
PATCH_DIM = PATCH * PATCH * 3
MODELS = ("vit_small", "vit_base", "vit_large", "vit_huge")
PIXELS = (224, 384, 512)
GIGABYTES = (16, 24, 40, 80)
STATE_BYTES = 16
CHECKED = (("vit_small", 224), ("vit_small", 384), ("vit_base", 224))


def parameters(model: str) -> int:
    """Count the learned numbers of a dense MAE; a table of offsets comes to it where tokens are rebuilt.

    Examples
    --------
    >>> parameters("vit_base")
    111655680
    """
    encoder = vit_size(model)

    def blocks(size: Transformer) -> int:
        products = (4 + 2 * size.mlp_ratio) * size.dim**2
        biases_and_norms = (3 + 1 + size.mlp_ratio + 1 + 4) * size.dim
        return size.depth * (products + biases_and_norms) + 2 * size.dim  # and the norm behind them

    linear = [(PATCH_DIM, encoder.dim), (encoder.dim, DECODER.dim), (DECODER.dim, PATCH_DIM)]
    tokens = encoder.dim + DECODER.dim
    return blocks(encoder) + blocks(DECODER) + sum((one + 1) * other for one, other in linear) + tokens


def costs(model: str, pixels: int, throw_ratio: float, precision: str, *, recompute_blocks: bool = False) -> Any:
    """Return the cost per image of an MAE with patches of 16 pixels."""
    grid = Grid((pixels // PATCH,) * 2)
    return cost(
        Schedule(grid, count_tokens(grid.num_tokens, 0.75, throw_ratio)),
        patch_dim=PATCH_DIM,
        encoder=vit_size(model),
        decoder=DECODER,
        recompute_blocks=recompute_blocks,
        compute_bytes=2 if precision == "bfloat16" else 4,
    )


def batch_that_fits(gigabytes: float, state: int, per_image: int) -> int:
    """Return how many images fit into memory beside the training state; 0 where that alone does not.

    Examples
    --------
    >>> batch_that_fits(16, 2 * 10**9, 10**8)
    140
    """
    return max(0, int((gigabytes * 1e9 - state) // per_image))


def measured_macs_and_bytes(arm: str, model: str, pixels: int) -> tuple[float, float]:
    """Return what torch counts of a forward pass in float32 per image: MACs, and bytes saved for the backward pass."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from prmim_core import counter_noise

    module = arms.build(arm, model, image_size=(pixels, pixels))
    images = torch.randint(0, 256, (2, pixels, pixels, 3), dtype=torch.uint8)
    noise = counter_noise(0, 0, torch.arange(2), module.grid.num_tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(images[:1], noise[:1])
    learned = list(module.parameters())
    saved = per_image(lambda size: saved_bytes(lambda: arms.loss(module, images[:size], noise[:size]), learned), 2)
    return counter.get_total_flops() / 2, saved


def cost_table(options: argparse.Namespace, report: Report) -> None:
    """Print what images cost, by model and resolution."""
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
    """Print the formula over what torch counts."""
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
    parser.add_argument("--no-check", dest="check", action="store_false", help="formulas only")
    options = parser.parse_args(arguments)
    report = Report("scale", {"patch": PATCH, "mask": 0.75, "precision": options.precision}, options.json)
    cost_table(options, report)
    fit_table(options, report)
    if options.check:
        check_table(report)


if __name__ == "__main__":
    main()
