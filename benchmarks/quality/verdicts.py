"""Check the accuracy claims against the records: PASS, FAIL or OPEN.

OPEN means that records are missing. Exits with 1 if a claim or a goal fails. Comparisons with controls are printed
without a verdict. The number after ± is the standard error over seeds; the number in brackets is the standard error
over test images. The interval is Student's t interval over seeds. The verdict follows from the rule that was fixed in
advance, in standard errors, and not from the interval.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import scipy.stats

from benchmarks.quality import records
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.arms import (
    DEEPER,
    DEFAULT,
    DENSE,
    LONGER,
    MORE_VISIBLE,
    PARTIAL,
    PATCHES,
    STUDIES,
)
from benchmarks.quality.records import Results
from benchmarks.quality.tables import ACCURACIES, differences, mean_and_error, points
from benchmarks.report import Report

SEEDS = 3
"""Seeds that a claim needs."""

CONFIDENCE = 0.95
"""Confidence level of the intervals."""

Cells = tuple[str | None, str | None, int | None, str]
"""Points, their interval, seeds, and the verdict."""


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
        Lower bound of the mean difference, in standard errors: -1 means "within one standard error, or above", 2 means
        "better by two standard errors". None: nothing is claimed.
    measures
        Keys of :data:`~benchmarks.quality.tables.ACCURACIES`.
    least
        Number of measures for which the claim must hold. None: all.
    """

    arm: str
    other: str
    study: str = "long"
    errors: int | None = None
    measures: tuple[str, ...] = tuple(ACCURACIES)
    least: int | None = None

    @property
    def needed(self) -> str:
        """Required differences, as text."""
        if self.errors is None:
            return ""
        some = "" if self.least is None else f" on {self.least} of {len(self.measures)} measures"
        return f", at least {self.errors:+d} errors{some}"


@dataclass(frozen=True)
class CostClaim:
    """A claim about the cost of an arm's step.

    It takes at most a share of the dense arm's multiply-accumulates (MACs).
    """

    arm: str
    share: float
    study: str = "long"


Claims = tuple[Claim | CostClaim, ...]

CLAIMS: Claims = (
    # Lossless at 20 epochs, and better than reconstructing less.
    Claim(DEFAULT, DENSE, errors=-1),
    CostClaim(DEFAULT, 0.70),
    Claim(DEFAULT, PARTIAL, errors=2, measures=("linear",)),
    # The coarse target against the former target of thrown tokens.
    Claim(DEFAULT, PATCHES, errors=2, measures=("linear", "finetune")),
)
"""Claims of README and docs, or goals that they report as missed."""


def better_than_dense(arm: str, study: str) -> Claims:
    """Claim that an arm beats dense on all measures.

    On two of them, the claimed margin is two standard errors.
    """
    return Claim(arm, DENSE, study, errors=0), Claim(arm, DENSE, study, errors=2, least=2)


GOALS: Mapping[str, tuple[Claims, ...]] = {
    "grid14: lossless at 0.70 of the MACs, above plain partial": (
        (
            Claim(DEFAULT, DENSE, "grid14", errors=-1),
            CostClaim(DEFAULT, 0.70, "grid14"),
            Claim(DEFAULT, PARTIAL, "grid14", errors=2, measures=("linear",)),
        ),
    ),
    **{
        f"{study}: better than dense at equal compute": tuple(
            better_than_dense(arm, study) for arm in (LONGER, DEEPER, MORE_VISIBLE)
        )
        for study in ("long", "grid14")
    },
    "grid14: lossless on two measures at 0.65": ((Claim("PR-MIM 0.65, cells", DENSE, "grid14", errors=-1, least=2),),),
}
"""Goals on the paper's grid and at equal compute. All claims of at least one alternative must hold."""


def rivals(study: str) -> Claims:
    """Compare an arm with others that have the coarse target, and these with dense."""
    return (
        Claim(DEFAULT, "dense, cells", study),
        Claim(DEFAULT, "partial, furthest, cells", study),
        Claim("PR-MIM 0.65, cells", "partial 0.65, furthest, cells", study),
        Claim("PR-MIM 0.65, cells", DENSE, study),
        Claim("dense, cells", DENSE, study),
        Claim("partial, furthest, cells", DENSE, study),
    )


COMPARISONS = (
    *rivals("long"),
    Claim(DEFAULT, "PR-MIM, random, cells"),
    Claim(DEFAULT, DENSE, study="digits"),
    Claim(DEFAULT, PATCHES, study="digits"),
    *rivals("grid14"),
    Claim(LONGER, "dense, cells", "grid14"),
    *(
        Claim(DEFAULT, other, "simmim")
        for other in (DENSE, PARTIAL, "dense, cells", "partial, furthest, cells", PATCHES)
    ),
)
"""Comparisons with controls."""


def interval(values: list[float]) -> str:
    """Return the t interval of a mean, with one degree of freedom less than values.

    Examples
    --------
    >>> interval([1.0, 2.0, 3.0]), interval([1.0])
    ('[-0.48, +4.48]', '')
    """
    if len(values) < 2:
        return ""
    mean, error = mean_and_error(values)
    reach = error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return f"[{mean - reach:+.2f}, {mean + reach:+.2f}]"


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


def together(verdicts: list[str], least: int | None = None) -> str:
    """Return the verdict on several claims: all, or at least ``least``, must hold.

    Examples
    --------
    >>> together(["PASS", "OPEN"]), together(["PASS", "OPEN", "FAIL"]), together(["PASS", "OPEN", "FAIL"], least=1)
    ('OPEN', 'FAIL', 'PASS')
    >>> together(["FAIL", "OPEN"], least=1), together(["FAIL", "FAIL", "PASS"], least=2)
    ('OPEN', 'FAIL')
    """
    needed = len(verdicts) if least is None else least
    if verdicts.count("PASS") >= needed:
        return "PASS"
    return "OPEN" if verdicts.count("PASS") + verdicts.count("OPEN") >= needed else "FAIL"


def rows(found: Results, claim: Claim) -> dict[str, Cells]:
    """Return a line for each measure of a claim.

    Difference in points, its interval, seeds, and the verdict.
    """
    lines: dict[str, Cells] = {}
    for measure in claim.measures:
        values = differences(found, claim.arm, claim.other, measure)
        label = f"{claim.study}, {ACCURACIES[measure]}: [{claim.arm}] - [{claim.other}]{claim.needed}"
        difference = points(found, claim.arm, claim.other, measure)
        in_points = [100 * value for value in values]
        lines[label] = (difference, interval(in_points), len(values), judge(values, claim.errors))
    return lines


def cost_row(claim: CostClaim) -> dict[str, Cells]:
    """Return the line of a claim about cost.

    The cost follows from the options of the arm.
    """
    share = STUDIES[claim.study].cost_ratio(claim.arm)
    verdict = "PASS" if share <= claim.share else "FAIL"
    return {
        f"{claim.study}, MACs: [{claim.arm}] / [{DENSE}], at most {claim.share}": (f"{share:.3f}", None, None, verdict)
    }


def lines_of(found: Mapping[str, Results], claim: Claim | CostClaim) -> dict[str, Cells]:
    """Return the lines of a claim."""
    return cost_row(claim) if isinstance(claim, CostClaim) else rows(found[claim.study], claim)


def verdict_of(found: Mapping[str, Results], claim: Claim | CostClaim) -> str:
    """Return the verdict on a whole claim."""
    least = None if isinstance(claim, CostClaim) else claim.least
    return together([verdict for *_, verdict in lines_of(found, claim).values()], least)


def goal_row(found: Mapping[str, Results], alternatives: tuple[Claims, ...]) -> tuple[int, int, str]:
    """Return the present and needed numbers of records of a goal, and the verdict."""
    trainings = {
        (claim.study, arm)
        for claims in alternatives
        for claim in claims
        if isinstance(claim, Claim)
        for arm in (claim.arm, claim.other)
    }
    present = sum(min(SEEDS, len(found[study][arm])) for study, arm in trainings)
    verdicts = [together([verdict_of(found, claim) for claim in claims]) for claims in alternatives]
    verdict = together(verdicts, least=1)
    needed = SEEDS * len(trainings)
    return present, needed, f"open: {present} of {needed} records" if verdict == "OPEN" else verdict


def main(arguments: list[str] | None = None) -> int:
    """Print all claims, goals and comparisons; return 1 if a claim or a goal fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="records, one file per study")
    options = parser.parse_args(arguments)
    found = {name: records.load(study, options.results) for name, study in STUDIES.items()}
    report = Report("verdicts", {"seeds needed": SEEDS}, None)
    columns = {"points": "", f"{CONFIDENCE:.0%} interval": "", "seeds": "d", "verdict": ""}

    def table(title: str, claims: Claims) -> None:
        lines = {label: cells for claim in claims for label, cells in lines_of(found, claim).items()}
        report.table(title, columns, {label: cells for label, cells in lines.items() if cells[0] is not None})

    table("claims", CLAIMS)
    goals = {title: goal_row(found, alternatives) for title, alternatives in GOALS.items()}
    report.table("goals", {"records": "d", "of": "d", "verdict": ""}, goals)
    for title, alternatives in GOALS.items():
        table(title, tuple(claim for claims in alternatives for claim in claims))
    table("comparisons", COMPARISONS)
    verdicts = [*(verdict_of(found, claim) for claim in CLAIMS), *(verdict for *_, verdict in goals.values())]
    return int("FAIL" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
