"""Cost of every method: dense, partial, and with PR-MIM.

The arms are those of the packaged recipes of ViT-B. Counts and MACs follow from formulas. Saved bytes are the increase
per additional image in a batch. The arms of a method take turns in one process.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.arms import loss, share_weights
from benchmarks.report import Report, argument_parser, pick_device, random_images, ratio, take_turns
from benchmarks.step import WARM_UP, torch_step
from prmim_core import counter_noise
from prmim_methods import DecodingConfig, MaskAlignConfig, MethodConfig
from prmim_torch import METHODS
from prmim_train.config.layers import read_options, recipe_names
from prmim_train.config.pretrain import pretrain_config

ENDING = "_vit_base"
PARTIAL = {
    "amt_mae": "amt_mae_vit_base",
    "amt_simmim": "amt_simmim_vit_base",
    "crossmae": "crossmae_vit_base_partial",
    "videomae": "videomae_vit_base_dual",
}
"""Recipes of methods that are published with thrown tokens; others throw at random."""
RECIPES = tuple(name.removesuffix(ENDING) for name in recipe_names() if name.endswith(ENDING))
"""Recipes of ViT-B with thrown tokens."""
COLUMNS = {
    "supervised": "d",
    "GMACs": ".3f",
    "MACs to dense": ".3f",
    "saved MB": ".1f",
    "saved to dense": ".3f",
    "ms per image": ".1f",
    "step to dense": ".3f",
}


def read_config(recipe: str) -> MethodConfig:
    """Return the method of a recipe."""
    return pretrain_config(**read_options(recipe)).method


def arms_of(name: str) -> dict[str, MethodConfig]:
    """Return the arms of a method, the dense one first."""
    config = read_config(name + ENDING)
    if not isinstance(config, DecodingConfig):
        return {"dense": config.baseline(), "PR-MIM": config}
    partial = replace(config, throwing="random") if name not in PARTIAL else read_config(PARTIAL[name])
    return {
        "dense": replace(config, throw_ratio=0.0),
        "partial": replace(partial, reconstruction="none"),
        "PR-MIM": replace(config, reconstruction="kernel"),
    }


def with_teacher(configs: dict[str, MethodConfig], folder: Path, *, weights: bool = False) -> dict[str, MethodConfig]:
    """Give the arms of MaskAlign a CLIP ViT-B/16, written to a folder.

    The configuration determines their cost. A step also needs ``weights``, which are random.
    """
    if not isinstance(configs["dense"], MaskAlignConfig):
        return configs
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    teacher = CLIPVisionConfig(patch_size=16)
    (CLIPVisionModel(teacher) if weights else teacher).save_pretrained(folder)
    return {arm: replace(config, teacher=str(folder)) for arm, config in configs.items()}


def saved_megabytes(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Return the megabytes saved for the backward pass per additional image."""
    parameters = list(module.parameters())

    def count(size: int) -> int:
        return memory.saved_bytes(lambda: loss(module, *(array[:size] for array in inputs)), parameters)

    return memory.per_image(count, len(inputs[0])) / 1e6


def inputs_of(config: MethodConfig, batch: int, device: str) -> tuple[Tensor, ...]:
    """Return random images, noise, and equal token weights if needed."""
    images = torch.from_numpy(random_images((batch, *config.image_size, config.channels))).to(device)
    noise = counter_noise(0, 0, torch.arange(batch, device=device), config.grid.num_tokens)
    return (images, noise, torch.ones(noise.shape, device=device)) if config.needs_weights else (images, noise)


def table(title: str, configs: dict[str, MethodConfig], options: argparse.Namespace, report: Report) -> None:
    """Print the cost of the arms of one method."""
    device = pick_device(options.device)
    inputs = {arm: inputs_of(config, options.batch, device) for arm, config in configs.items()}
    modules = {arm: METHODS[config.name](config).to(device) for arm, config in configs.items()}
    share_weights(modules.values())
    saved = {arm: saved_megabytes(module, inputs[arm]) for arm, module in modules.items()}
    steps = {arm: torch_step(module, inputs[arm]) for arm, module in modules.items()}
    times = take_turns(steps, options.repeats, warm_up=WARM_UP)
    macs = {arm: forward_macs(config) for arm, config in configs.items()}
    rows = {
        arm: (
            num_supervised(config),
            macs[arm] / 1e9,
            macs[arm] / macs["dense"],
            saved[arm],
            saved[arm] / saved["dense"],
            1e3 * statistics.median(times[arm]) / options.batch,
            ratio(times[arm], times["dense"]),
        )
        for arm, config in configs.items()
    }
    report.table(title, COLUMNS, rows)


def num_supervised(config: MethodConfig) -> int:
    """Return the number of supervised tokens of an image.

    Without a decoder, visible tokens are supervised too.
    """
    if config.num_supervised is not None:
        return config.num_supervised
    return config.counts.num_tokens if config.is_reconstructed else config.counts.visible


def forward_macs(config: MethodConfig) -> int:
    """Return the multiply-accumulates of a forward pass."""
    cost = config.cost()
    assert cost is not None  # the teacher is here
    return cost.macs


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each recipe.

    Each recipe has its own process, since retained memory would add up.
    """
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="NAME", help="names of recipes"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    if len(options.recipes) == 1:
        measure(options.recipes[0], options)
        return
    shared = ("device", "batch", "repeats", "json")
    words = [word for name in shared for word in (f"--{name}", str(getattr(options, name)))]
    for name in options.recipes:
        subprocess.run([sys.executable, "-m", "benchmarks.methods", "--recipes", name, *words], check=True)


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the table of a recipe."""
    settings = {"device": pick_device(options.device), "batch": options.batch, "median of": options.repeats}
    report = Report(f"methods-{name}", settings, options.json)
    with tempfile.TemporaryDirectory() as folder:
        table(name, with_teacher(arms_of(name), Path(folder), weights=True), options, report)


if __name__ == "__main__":
    main()
