"""Check the claims about accuracy against the committed records: PASS, FAIL, or OPEN where seeds are missing.

Exits with 1 if a claim fails. Comparisons are printed without a verdict: they say what a control shows.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import records
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.arms import DEFAULT, DENSE, PARTIAL, PATCHES, STUDIES
from benchmarks.quality.config import config_of, cost_ratio
from benchmarks.quality.records import Results
from benchmarks.quality.tables import ACCURACIES, differences, mean_and_error
from benchmarks.report import Report

SEEDS = 3
"""Seeds that a claim needs."""

Cells = tuple[str | None, int | None, str, str]
"""Points, seeds, what is needed, and the verdict."""


@dataclass(frozen=True)
class Claim:
    """A claim about the accuracies of two arms of a study, seed by seed.

    Parameters
    ----------
    arm, other
        Names of the arms.
    study
        Name of the study.
    errors
        The mean difference, in standard errors of it, has to be at least this: -1 is "within one standard error, or
        above", 2 is "better by two standard errors". None: nothing is claimed.
    measures
        Keys of :data:`~benchmarks.quality.tables.ACCURACIES`.
    """

    arm: str
    other: str
    study: str = "long"
    errors: int | None = None
    measures: tuple[str, ...] = tuple(ACCURACIES)


@dataclass(frozen=True)
class CostClaim:
    """A claim that a step of an arm takes at most a share of the multiply-accumulates (MACs) of the dense arm."""

    arm: str
    share: float
    study: str = "long"


CLAIMS: tuple[Claim | CostClaim, ...] = (
    # Lossless at 20 epochs, and better than reconstructing less.
    Claim(DEFAULT, DENSE, errors=-1),
    CostClaim(DEFAULT, 0.70),
    Claim(DEFAULT, PARTIAL, errors=2, measures=("linear",)),
    # The coarse target against the one that thrown tokens had before.
    Claim(DEFAULT, PATCHES, errors=2, measures=("linear", "finetune")),
)
"""What README and docs claim, or the goals that they report as missed."""

COMPARISONS = (
    # Rivals that have the coarse target too.
    Claim(DEFAULT, "dense, cells"),
    Claim(DEFAULT, "partial, furthest, cells"),
    Claim("PR-MIM 0.65, cells", "partial 0.65, furthest, cells"),
    Claim("PR-MIM 0.65, cells", DENSE),
    Claim("dense, cells", DENSE),
    Claim("partial, furthest, cells", DENSE),
    Claim(DEFAULT, "PR-MIM, random, cells"),
    Claim(DEFAULT, DENSE, study="digits"),
    Claim(DEFAULT, PATCHES, study="digits"),
)
"""What the controls show."""


def judge(values: list[float], errors: int | None) -> str:
    """Return the verdict on differences of single seeds.

    Examples
    --------
    >>> judge([0.1, 0.2, 0.3], errors=2), judge([-0.1, 0.2, 0.3], errors=2), judge([0.1, 0.2], errors=2)
    ('PASS', 'FAIL', 'OPEN')
    >>> judge([0.1, 0.2, 0.3], errors=None), judge([-0.1, 0.2, 0.3], errors=None)
    ('above', 'no difference shown')
    """
    if len(values) < SEEDS:
        return "OPEN"
    mean, error = mean_and_error(values)
    if errors is not None:
        return "PASS" if mean >= errors * error else "FAIL"
    if abs(mean) < 2 * error:
        return "no difference shown"
    return "above" if mean > 0 else "below"


def rows(found: Results, claim: Claim) -> dict[str, Cells]:
    """Return a line for each measure of a claim: difference in points, seeds, what is needed, and the verdict."""
    lines: dict[str, Cells] = {}
    needed = "" if claim.errors is None else f"at least {claim.errors:+d} errors"
    for measure in claim.measures:
        values = [100 * value for value in differences(found, claim.arm, claim.other, measure)]
        points = None
        if values:
            mean, error = mean_and_error(values)
            points = f"{mean:+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
        label = f"{claim.study}, {ACCURACIES[measure]}: [{claim.arm}] - [{claim.other}]"
        lines[label] = (points, len(values), needed, judge(values, claim.errors))
    return lines


def cost_row(claim: CostClaim) -> dict[str, Cells]:
    """Return the line of a claim about cost, which follows from the options of the arm."""
    share = cost_ratio(config_of(STUDIES[claim.study].options(claim.arm)))
    verdict = "PASS" if share <= claim.share else "FAIL"
    return {
        f"{claim.study}, MACs: [{claim.arm}] / [{DENSE}]": (f"{share:.3f}", None, f"at most {claim.share}", verdict)
    }


def main(arguments: list[str] | None = None) -> int:
    """Print all claims and comparisons; return 1 if a claim fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="records, one file per study")
    options = parser.parse_args(arguments)
    found = {name: records.load(study, options.results) for name, study in STUDIES.items()}
    report = Report("verdicts", {"seeds needed": SEEDS}, None)
    columns = {"points": "", "seeds": "d", "needed": "", "verdict": ""}
    claims: dict[str, Cells] = {}
    for claim in CLAIMS:
        claims |= cost_row(claim) if isinstance(claim, CostClaim) else rows(found[claim.study], claim)
    report.table("claims", columns, claims)
    comparisons = [rows(found[claim.study], claim) for claim in COMPARISONS]
    report.table("comparisons", columns, {label: cells for lines in comparisons for label, cells in lines.items()})
    return int(any(verdict == "FAIL" for *_, verdict in claims.values()))


if __name__ == "__main__":
    sys.exit(main())
