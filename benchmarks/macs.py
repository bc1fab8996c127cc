"""Forward multiply-accumulates of ViT-B/16 at 224 px, counted by torch, beside the formula of `prmim_core.cost`."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arms
from benchmarks.report import Report, argument_parser

GOALS = {"dense": 9.70e9, "PR-MIM 0.5": 7.00e9}
"""The goals of the design, in MACs."""
PARTS = {
    "patch_embed": "encoder.patch_embed",
    "encoder": "encoder.blocks",
    "decoder_embed": "decoder.embed",
    "decoder": "decoder.blocks",
    "stages": "reconstruct",
    "head": "decoder.pred",
}


def count(module: torch.nn.Module) -> tuple[float, dict[str, float]]:
    """Count the MACs of one forward pass on one image: in all, and per module."""
    counter = FlopCounterMode(display=False)
    # The counter knows what attention costs only where it is carried out as matrix products.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*arms.inputs(1))
    by_module = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    return counter.get_total_flops() / 2, by_module


def counted_parts(arm: str, by_module: dict[str, float]) -> dict[str, float]:
    """Sum what the counter saw in the modules of each part."""
    root = "OfficialLayout.method." if arm == arms.OFFICIAL else "MAE."
    total = dict.fromkeys(PARTS, 0.0)
    for part, module in PARTS.items():
        prefix = root + module
        # A list of blocks is no module that runs, so its children are summed.
        names = [n for n in by_module if n == prefix or n.removeprefix(prefix + ".").isdigit()]
        total[part] = sum(by_module[name] for name in names)
    return total


def main(arguments: list[str] | None = None) -> None:
    """Print a table of what is counted, one of the formula, and the goals."""
    options = argument_parser(__doc__).parse_args(arguments)
    report = Report("macs", {"model": "vit_base", "pixels": 224, "patch": 16, "mask": 0.75}, options.json)
    names = (arms.OFFICIAL, *arms.ARMS)
    counted: dict[str, dict[str, float]] = {}
    expected: dict[str, dict[str, float]] = {}
    for arm in names:
        module = arms.build(arm)
        total, by_module = count(module)
        counted[arm] = {**counted_parts(arm, by_module), "total": total}
        costs = arms.formula(module)
        expected[arm] = {**{part: costs.parts[part].macs for part in PARTS}, "total": costs.macs}
    columns = dict.fromkeys(names, ".4f")
    for title, table in (("GMACs, counted", counted), ("GMACs, formula", expected)):
        rows = {part: [table[arm][part] / 1e9 for arm in names] for part in (*PARTS, "total")}
        report.table(title, columns, rows)
    totals = {arm: counted[arm]["total"] for arm in names}
    saved = [1 - totals[arm] / totals[arms.OFFICIAL] for arm in names]
    report.table("of the official layout", dict.fromkeys(names, ".1%"), {"saved": saved})
    for arm, goal in GOALS.items():
        verdict = "met" if totals[arm] <= goal else "MISSED"
        print(f"goal for {arm}: at most {goal / 1e9:.2f} G: {totals[arm] / 1e9:.3f} G, {verdict}")


if __name__ == "__main__":
    main()
