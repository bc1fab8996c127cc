"""Forward MACs of ViT-B/16 at 224 px: counted by PyTorch, and by formula."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arms
from benchmarks.report import Report, argument_parser, verdict

GOALS = {"dense": 9.70e9, "PR-MIM 0.5": 6.95e9}
"""Upper bounds in MACs."""
PARTS = {
    "patch_embed": "encoder.patch_embed",
    "encoder": "encoder.blocks",
    "decoder_embed": "decoder.embed",
    "decoder": "decoder.blocks",
    "stages": "reconstruct",
    "head": "decoder.pred",
    "cell_head": "cell_head",
}


def count(module: nn.Module, images: Tensor, noise: Tensor) -> tuple[float, dict[str, float]]:
    """Count the MACs of a forward pass: total, and by module."""
    counter = FlopCounterMode(display=False)
    # The counter covers attention only if it runs as matrix products.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(images, noise)
    by_module = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    return counter.get_total_flops() / 2, by_module


def counted_parts(arm: str, by_module: dict[str, float]) -> dict[str, float]:
    """Return the counted MACs by part of the model."""
    root = "OfficialLayout.method." if arm == arms.OFFICIAL else "MAE."
    total = dict.fromkeys(PARTS, 0.0)
    for part, module in PARTS.items():
        prefix = root + module
        # A list of blocks has no forward pass, so the counts of its children are summed.
        names = [n for n in by_module if n == prefix or n.removeprefix(prefix + ".").isdigit()]
        total[part] = sum(by_module[name] for name in names)
    return total


def main(arguments: list[str] | None = None) -> None:
    """Print the counted MACs, those of the formula, and the goals."""
    options = argument_parser(__doc__).parse_args(arguments)
    report = Report("macs", {"model": "vit_base", "pixels": 224, "patch": 16, "mask": 0.75}, options.json)
    names = (arms.OFFICIAL, *arms.ARMS)
    counted: dict[str, dict[str, float]] = {}
    expected: dict[str, dict[str, float]] = {}
    for arm in names:
        module = arms.build(arm)
        total, by_module = count(module, *arms.inputs(1))
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
        macs = totals[arm]
        print(f"goal for {arm}: at most {goal / 1e9:.2f} G: {macs / 1e9:.3f} G, {verdict(macs, goal)}")


if __name__ == "__main__":
    main()
