"""Forward multiply-accumulates of ViT-B/16 at 224 px, counted by torch, beside the formula of `prmim_core.cost`."""

import argparse

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arms import ARMS, build, inputs, machine
from prmim_core import Transformer, cost

# The goals of the design, in MACs.
GOALS = {"dense": 9.70e9, "PR-MIM 0.5": 7.00e9}
PARTS = {
    "patch_embed": "encoder.patch_embed",
    "encoder": "encoder.blocks",
    "decoder_embed": "decoder.embed",
    "decoder": "decoder.blocks",
    "stages": "reconstruct",
    "head": "decoder.pred",
}


def count(method: torch.nn.Module) -> tuple[float, dict[str, float]]:
    """Count the MACs of one forward pass on one image: in all, and per module."""
    counter = FlopCounterMode(display=False)
    # The counter knows what attention costs only where it is carried out as matrix products.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        method(*inputs(1))
    by_module = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    return counter.get_total_flops() / 2, by_module


def formula(arm: str, method: torch.nn.Module) -> dict[str, float]:
    """Return the MACs per part by formula."""
    sizes = {"patch_dim": 768, "encoder": Transformer(768, 12, 12), "decoder": Transformer(512, 8, 16)}
    if arm == "official layout":
        report = cost(method.method.schedule, bookkeeping="official", **sizes)
    else:
        report = cost(method.schedule, variant=method.variant, **sizes)
    return {name: part.macs for name, part in report.parts.items()}


def counted_parts(arm: str, by_module: dict[str, float]) -> dict[str, float]:
    """Sum what the counter saw in the modules of each part."""
    root = "MAE." if arm != "official layout" else "OfficialLayout.method."
    total = dict.fromkeys(PARTS, 0.0)
    for part, module in PARTS.items():
        prefix = root + module
        # A list of blocks is no module that runs, so its children are summed.
        names = [n for n in by_module if n == prefix or n.removeprefix(prefix + ".").isdigit()]
        total[part] = sum(by_module[name] for name in names)
    return total


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    print(f"Forward GMACs per image, ViT-B/16, 224 px, mask 0.75: counted by torch (formula)  [{machine()}]")
    arms = ("official layout", *ARMS)
    print(f"{'':18}" + "".join(f"{arm:>22}" for arm in arms))
    methods = {arm: build(arm) for arm in arms}
    counted = {arm: count(method) for arm, method in methods.items()}
    expected = {arm: formula(arm, method) for arm, method in methods.items()}
    for part in PARTS:
        cells = [
            f"{counted_parts(arm, counted[arm][1])[part] / 1e9:.4f} ({expected[arm][part] / 1e9:.4f})" for arm in arms
        ]
        print(f"{part:18}" + "".join(f"{cell:>22}" for cell in cells))
    totals = {arm: counted[arm][0] for arm in arms}
    print(f"{'total':18}" + "".join(f"{totals[arm] / 1e9:>22.4f}" for arm in arms))
    official = totals["official layout"]
    print(f"{'saved':18}" + "".join(f"{1 - totals[arm] / official:>21.1%} " for arm in arms))
    for arm, goal in GOALS.items():
        verdict = "met" if totals[arm] <= goal else "MISSED"
        print(f"goal for {arm}: at most {goal / 1e9:.2f} G: {totals[arm] / 1e9:.3f} G, {verdict}")


if __name__ == "__main__":
    main()
