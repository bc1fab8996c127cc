"""Tables and figure: means, standard errors, and paired differences to dense."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import DEFAULT, DENSE, FACTORS, GRID, PARTIAL, PATCHES
from benchmarks.quality.correct import image_error
from benchmarks.quality.records import BASELINES, FROZEN, Results
from benchmarks.report import Report
from prmim_train.report.figures import new_figure, save_figure, write_caption

ACCURACIES = {"linear": "linear", "finetune": "fine-tuned", "knn": "neighbours"}
LINES = {
    "PR-MIM, cells": ("#2a9d5c", {0.0: DENSE, 0.5: DEFAULT, 0.65: "PR-MIM 0.65, cells"}),
    "control: cells of decoded tokens only": (
        "#8a939e",
        {0.0: "dense, cells", 0.5: "partial, furthest, cells", 0.65: "partial 0.65, furthest, cells"},
    ),
    "PR-MIM, patch target": (
        "#1f6f8b",
        {0.0: DENSE, 0.25: "PR-MIM 0.25", 0.5: PATCHES, 0.65: "PR-MIM 0.65"},
    ),
    "plain partial, random": (
        "#d9822b",
        {0.0: DENSE, 0.25: "partial 0.25, random", 0.5: PARTIAL, 0.65: "partial 0.65, random"},
    ),
    "PR-MIM, patch target, compute of dense": ("#6a4c93", {0.5: "PR-MIM, equal compute"}),
}
"""Lines of the figure: colour, and arms by throw ratio."""
LOSSES = {"loss_decoded": "loss, decoded", "loss_thrown": "loss, thrown"}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for a single value.

    Examples
    --------
    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def differences(results: Results, arm: str, other: str, value: str) -> list[float]:
    """Return the differences between two arms, for each seed that both have.

    Examples
    --------
    >>> results = {"a": {0: {"linear": 0.5}, 1: {"linear": 0.75}}, "b": {1: {"linear": 0.5}}}
    >>> differences(results, "a", "b", "linear")
    [0.25]
    """
    both = sorted(set(results[arm]) & set(results[other]))
    return [results[arm][seed][value] - results[other][seed][value] for seed in both]


def main_effects(results: Results, value: str) -> dict[str, list[float]]:
    """Return main effects of the grid: differences to the mean of a factor's choices.

    Each difference is within a group of trainings that agree in seed and in all other factors. Incomplete groups are
    left out. Every choice occurs in all groups, so the means are informative if factors hardly interact.

    Examples
    --------
    >>> seeds = {arm: {0: {"linear": 0.5}} for arm in GRID}
    >>> seeds |= {arm: {0: {"linear": 0.75}} for arm in GRID if arm.startswith("none")}
    >>> found = main_effects(seeds, "linear")
    >>> found["furthest_from none"] == [0.125] * 9, found["stages 4"] == [0.0] * 6
    (True, True)
    """
    effects: dict[str, list[float]] = {}
    for factor in FACTORS:
        alike: dict[Any, dict[Any, float]] = {}
        for arm, it in GRID.items():
            others = tuple(it.options[name] for name in FACTORS if name != factor)
            for seed, run in results.get(arm, {}).items():
                alike.setdefault((others, seed), {})[it.options[factor]] = run[value]
        for choice in FACTORS[factor]:
            effects[f"{factor} {choice}"] = [
                found[choice] - statistics.mean(found.values())
                for found in alike.values()
                if len(found) == len(FACTORS[factor])
            ]
    return effects if all(effects.values()) else {}


def show(results: Results, report: Report) -> None:
    """Print accuracies, differences to dense, main effects of the grid, and costs."""
    present = {arm: runs for arm, runs in results.items() if runs}
    measured = [name for name in ACCURACIES if any(name in run for runs in present.values() for run in runs.values())]
    report.table(
        "accuracy, %",
        {"seeds": "d", **{ACCURACIES[name]: "" for name in measured}},
        {arm: (len(runs), *(_percent(list(values(runs, name))) for name in measured)) for arm, runs in present.items()},
    )
    if results.get(DENSE):
        report.table(
            "points above dense",
            {ACCURACIES[name]: "" for name in measured},
            {arm: tuple(points(results, arm, DENSE, name) for name in measured) for arm in present if arm != DENSE},
        )
    for name, title in BASELINES.items():
        compared = {arm: [run for run in runs.values() if name in run] for arm, runs in present.items()}
        if any(compared.values()):
            report.table(
                f"points above {title}",
                {ACCURACIES[measure]: "" for measure in FROZEN},
                {
                    arm: tuple(_percent([run[each] - run[name][each] for run in runs], sign="+") for each in FROZEN)
                    for arm, runs in compared.items()
                },
            )
    effects = {name: main_effects(results, name) for name in measured}
    if measured and effects[measured[0]]:
        report.table(
            "choices of PR-MIM: points above the mean, other choices equal",
            {"trainings": "d", **{ACCURACIES[name]: "" for name in measured}},
            {
                choice: (len(found), *(_percent(effects[name][choice], sign="+") for name in measured))
                for choice, found in effects[measured[0]].items()
            },
        )
    columns = {"epochs": "d", "MACs of a step to dense": ".3f", **dict.fromkeys(LOSSES.values(), "")}
    report.table("cost and loss", columns, {arm: _costs(runs) for arm, runs in present.items()})


def values(runs: Mapping[int, Mapping[str, Any]], name: str) -> list[float]:
    """Return a value of each seed that has it."""
    return [run[name] for run in runs.values() if run.get(name) is not None]


def points(results: Results, arm: str, other: str, measure: str) -> str | None:
    """Return the mean difference in points ± its standard error over seeds.

    In brackets: the standard error over test images, if known.
    """
    found = _percent(differences(results, arm, other, measure), sign="+")
    error = 100 * image_error(results[arm], results[other], measure)
    return found if found is None or math.isnan(error) else f"{found} ({error:.2f})"


def _percent(numbers: Sequence[float], sign: str = "") -> str | None:
    if not numbers:
        return None
    mean, error = mean_and_error([100 * number for number in numbers])
    return f"{mean:{sign}.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def _costs(runs: Mapping[int, Mapping[str, Any]]) -> tuple[Any, ...]:
    run = next(iter(runs.values()))
    losses = (values(runs, name) for name in LOSSES)
    return (
        run["epochs"],
        run["macs_to_dense"],
        # A loss of exactly 0 means that no tokens contribute.
        *(f"{statistics.mean(found):.4f}" if any(found) else None for found in losses),
    )


def markdown(results: Results) -> str:
    """Return accuracies and differences to dense as Markdown tables.

    Arms without records are left out. Differences have the standard error over seeds, and in brackets that over test
    images.
    """
    present = {arm: runs for arm, runs in results.items() if runs}
    head = ("", "seeds", "MACs of a step to dense", "epochs", *ACCURACIES.values())
    rows = [
        (
            arm,
            str(len(runs)),
            f"{next(iter(runs.values()))['macs_to_dense']:.2f}",
            str(next(iter(runs.values()))["epochs"]),
            *(f"{_percent(values(runs, name)) or ''} %" for name in ACCURACIES),
        )
        for arm, runs in present.items()
    ]
    above = [
        (arm, *(points(results, arm, DENSE, name) or "" for name in ACCURACIES))
        for arm in present
        if arm != DENSE and results[DENSE]
    ]
    tables = [_table(head, rows), *([_table(("points above dense", *ACCURACIES.values()), above)] if above else [])]
    return "\n\n".join(tables)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(results: Results, path: Path, caption: str) -> None:
    """Draw accuracy against throw ratio; error bars are standard errors over seeds.

    Raises ValueError without records of arms that throw.
    """
    thrown = [arm for _, arms in LINES.values() for share, arm in arms.items() if share]
    shown = [name for name in ACCURACIES if any(values(results.get(arm, {}), name) for arm in thrown)]
    if not shown:
        raise ValueError(f"plot: expected records of arms such as {thrown[0]!r}, got none")
    figure = new_figure(3.4 * len(shown), 3.0)
    for axes, name in zip(figure.subplots(1, len(shown), sharex=True, squeeze=False)[0], shown, strict=True):
        for label, (colour, arms) in LINES.items():
            points = {share: values(results.get(arm, {}), name) for share, arm in arms.items()}
            spread = {
                share: mean_and_error([100 * value for value in found]) for share, found in points.items() if found
            }
            if set(spread) - {0.0}:
                axes.plot(list(spread), [mean for mean, _ in spread.values()], color=colour, marker="o", label=label)
                for share, (mean, error) in spread.items():
                    if not math.isnan(error):
                        axes.errorbar([share], [mean], yerr=[error], color=colour, capsize=3)
        axes.set_title(ACCURACIES[name], fontsize=10)
        axes.set_xlabel("share of all patches thrown")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy in %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
    write_caption(figure, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
