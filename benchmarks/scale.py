"""Cost by resolution, tokens and model size; largest batch for a GPU's memory.

Both follow from formulas, which are checked on small cases. The training state takes 16 bytes per parameter: weight,
gradient and AdamW's two moments in float32. The batch follows from the rest of the memory and the peak of activations
per image by :mod:`prmim_methods.cost`. It is an upper bound: half-precision copies of weights and memory fragmentation
also take space.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import arms
from benchmarks.macs import count
from benchmarks.memory import per_image, saved_bytes
from benchmarks.report import Report, argument_parser, ratio, take_turns
from benchmarks.step import WARM_UP, torch_step
from prmim_core import counter_noise
from prmim_methods import Accounting, CostReport, MAEConfig, VideoMAEConfig
from prmim_methods.sizes import VIT_SIZES
from prmim_torch import METHODS
from prmim_train.report.figures import new_figure, save_figure, write_caption

PATCH = 16
MODELS = ("vit_small", "vit_base", "vit_large", "vit_huge")
PIXELS = (224, 384, 512)
GIGABYTES = (16, 24, 40, 80)
STATE_BYTES = 16
CHECKED = (("vit_small", 224), ("vit_small", 384), ("vit_base", 224))
GRIDS: dict[str, MAEConfig] = {
    "196": MAEConfig(),
    "784": MAEConfig(image_size=(448, 448)),
    "1,568 (video)": VideoMAEConfig(),
    "3,136": MAEConfig(image_size=(896, 896)),
}
"""Methods by number of tokens, with their published mask ratios and decoders."""
GROWING = ("vit_base", "vit_large", "vit_huge")
RATIOS = (0.25, 0.5, 0.65, 0.7)
GROWTH_GIGABYTES = 24
WORTH = 0.1
"""Fraction of the MACs that a useful throw ratio must save."""
NARROW = {
    **{"embed_dim": 96, "depth": 6, "num_heads": 3},
    **{"decoder_dim": 64, "decoder_depth": 4, "decoder_heads": 2},
}
"""Sizes whose steps a CPU core can time on all grids."""


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
            state = STATE_BYTES * MAEConfig(model=model, throw_ratio=0.0).parameters().learned
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


@dataclass(frozen=True)
class Growth:
    """Cost of a throw ratio, relative to the dense method.

    Parameters
    ----------
    macs
        Forward MACs, relative to dense.
    peak
        Peak of activation bytes, relative to dense.
    batch
        Images that fit into :data:`GROWTH_GIGABYTES`.
    """

    macs: float
    peak: float
    batch: int


def growth(config: MAEConfig, throw_ratio: float, precision: str) -> Growth:
    """Return the cost of a throw ratio.

    Examples
    --------
    >>> growth(GRIDS["196"], 0.5, "bfloat16")
    Growth(macs=0.717236560564673, peak=0.6950715818124551, batch=678)
    """
    accounting = Accounting(compute_bytes=2 if precision == "bfloat16" else 4)
    thrown = replace(config, throw_ratio=throw_ratio)
    ours, dense = (each.cost(accounting) for each in (thrown, replace(config, throw_ratio=0.0)))
    batch = batch_that_fits(GROWTH_GIGABYTES, STATE_BYTES * thrown.parameters().learned, ours.peak_activation_bytes)
    return Growth(ours.macs / dense.macs, ours.peak_activation_bytes / dense.peak_activation_bytes, batch)


def smallest_worth(config: MAEConfig, precision: str) -> float | None:
    """Return the smallest throw ratio that saves :data:`WORTH` of the MACs.

    In steps of 0.05; None if no ratio does.
    """
    ratios = (step / 20 for step in range(1, int(20 * config.mask_ratio)))
    return next((share for share in ratios if growth(config, share, precision).macs <= 1 - WORTH), None)


def growth_table(options: argparse.Namespace, report: Report) -> None:
    """Print MACs, bytes and batches by number of tokens, model and throw ratio."""
    rows = {}
    for model in options.growing:
        for tokens, grid in GRIDS.items():
            config = replace(grid, model=model)
            dense, *thrown = (growth(config, throw_ratio, options.precision) for throw_ratio in (0.0, *RATIOS))
            cost = replace(config, throw_ratio=0.0).cost()
            rows[f"{model}, {tokens}"] = (
                cost.macs / 1e9,
                *(found.macs for found in thrown),
                *(found.peak for found in thrown),
                *(found.batch for found in (dense, *thrown)),
                smallest_worth(config, options.precision),
            )
    columns = {"GMACs dense": ".1f"} | {f"MACs {share}": ".3f" for share in RATIOS}
    columns |= {f"bytes {share}": ".3f" for share in RATIOS} | {f"batch {share}": "d" for share in (0.0, *RATIOS)}
    report.table(f"growth, batch in {GROWTH_GIGABYTES} GB", columns | {f"{WORTH:.0%} saved from": ".2f"}, rows)


def growth_steps(options: argparse.Namespace, report: Report) -> None:
    """Print CPU seconds and MACs of steps of narrow models, by number of tokens."""
    rows = {}
    for tokens in options.timed:
        dense = replace(GRIDS[tokens], throw_ratio=0.0, **NARROW)
        configs = {share: replace(dense, throw_ratio=share) for share in (0.0, *RATIOS)}
        images = torch.randint(0, 256, (options.batch, *dense.image_size, dense.channels), dtype=torch.uint8)
        noise = counter_noise(0, 0, torch.arange(options.batch), dense.grid.num_tokens)
        steps = {
            str(share): torch_step(METHODS[config.name](config), (images, noise)) for share, config in configs.items()
        }
        times = take_turns(steps, options.repeats, warm_up=WARM_UP, clock=time.process_time)
        rows[tokens] = (
            1e3 * statistics.median(times["0.0"]) / options.batch,
            *(ratio(times[str(share)], times["0.0"]) for share in RATIOS),
            *(config.cost().macs / dense.cost().macs for share, config in configs.items() if share),
        )
    columns = {"CPU ms dense": ".1f"} | {f"step {share}": ".2f" for share in RATIOS}
    report.table("steps of narrow models", columns | {f"MACs {share}": ".2f" for share in RATIOS}, rows)


def draw_growth(precision: str, path: Path) -> None:
    """Draw relative MACs and bytes against the throw ratio.

    By model and number of tokens, relative to dense.
    """
    ratios = [step / 100 for step in range(0, 71, 5)]
    colours = dict(zip(GRIDS, ("#3f88c5", "#2a9d5c", "#6a4c93", "#e07b28"), strict=True))
    styles = dict(zip(GROWING, ("-", "--", ":"), strict=True))
    figure = new_figure(9.0, 3.6)
    both = figure.subplots(1, 2, sharey=True)
    for axes, name, title in zip(both, ("macs", "peak"), ("multiply-accumulates", "bytes of activations"), strict=True):
        for tokens, grid in GRIDS.items():
            for model, style in styles.items():
                config = replace(grid, model=model)
                left = [getattr(growth(config, throw_ratio, precision), name) for throw_ratio in ratios]
                label = f"{tokens} tokens" if style == "-" else None
                axes.plot(ratios, left, style, color=colours[tokens], linewidth=1.4, label=label)
        axes.axhline(1 - WORTH, color="#7b8794", linewidth=0.8)
        axes.set_title(f"{title}, to dense", fontsize=10)
        axes.set_xlabel("share of all tokens thrown")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
    write_caption(figure, "Solid: ViT-B, dashed: ViT-L, dotted: ViT-H. Published decoders. Grey: a tenth is saved.")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


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
    parser.add_argument("--models", nargs="*", choices=tuple(VIT_SIZES), default=list(MODELS))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--growing", nargs="*", choices=GROWING, default=list(GROWING), help="models that grow")
    parser.add_argument("--timed", nargs="*", choices=tuple(GRIDS), default=[], help="tokens of steps that are timed")
    parser.add_argument("--batch", type=int, default=2, help="images of a timed step")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the growth to this file")
    parser.add_argument("--no-check", dest="check", action="store_false", help="skip the counts of PyTorch")
    options = parser.parse_args(arguments)
    report = Report("scale", {"patch": PATCH, "mask": 0.75, "precision": options.precision}, options.json)
    cost_table(options, report)
    fit_table(options, report)
    growth_table(options, report)
    if options.timed:
        growth_steps(options, report)
    if options.plot is not None:
        draw_growth(options.precision, options.plot)
    if options.check:
        check_table(report)


if __name__ == "__main__":
    main()
