"""Try hostile and faulty situations, and count per kind how many are handled.

.venv/bin/python tests/hostile                       all cases
.venv/bin/python tests/hostile --quick               those that CI runs
.venv/bin/python tests/hostile --kinds 8 9           some kinds
.venv/bin/python tests/hostile --match "NaN"         cases whose name contains a text

Ends with exit code 1 if a case fails.
"""

import argparse
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import cases
import data  # noqa: F401  # registers its cases
import environment  # noqa: F401
import library  # noqa: F401
import modules  # noqa: F401
import options  # noqa: F401
import runs  # noqa: F401
from tqdm import tqdm

LIMIT = 300
"""Seconds after which a case has failed."""


def main() -> int:
    """Run the chosen cases; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the cases that CI runs")
    parser.add_argument("--kinds", type=int, nargs="+", choices=cases.KINDS, default=list(cases.KINDS))
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--slowest", type=int, default=0, help="show the time of the slowest cases")
    chosen = parser.parse_args()
    picked = [
        case
        for case in sorted(cases.CASES, key=lambda case: case.kind)
        if case.kind in chosen.kinds and chosen.match in case.name and (case.is_quick or not chosen.quick)
    ]
    if not picked:
        parser.error("no case is chosen")
    failures: dict[int, int] = dict.fromkeys(chosen.kinds, 0)
    seconds: list[tuple[float, str]] = []
    signal.signal(signal.SIGALRM, _time_is_up)
    for case in tqdm(picked, disable=None, unit="case"):
        started = time.perf_counter()
        reason = _failure(case)
        seconds.append((time.perf_counter() - started, f"{case.kind}: {case.name}"))
        if reason is not None:
            failures[case.kind] += 1
            tqdm.write(f"FAILED {case.kind} ({cases.KINDS[case.kind]}): {case.name}\n{reason}")
    _print_table(picked, failures)
    for spent, name in sorted(seconds, reverse=True)[: chosen.slowest]:
        print(f"{spent:7.2f} s  {name}")
    return 1 if any(failures.values()) else 0


def _failure(case: cases.Case) -> str | None:
    """Return why a case is not handled; None if it is."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        signal.alarm(LIMIT)
        try:
            case.check(Path(folder))
        except (Exception, KeyboardInterrupt):
            return traceback.format_exc(limit=-4)
        finally:
            signal.alarm(0)
    return None


def _time_is_up(number: int, frame: object) -> None:
    raise TimeoutError(f"not handled within {LIMIT} s")


def _print_table(picked: list[cases.Case], failures: dict[int, int]) -> None:
    width = max(map(len, cases.KINDS.values()))
    print(f"{'kind':<{width + 4}} tried  handled  failed")
    tried = {kind: sum(case.kind == kind for case in picked) for kind in failures}
    for kind in filter(tried.get, tried):
        name = f"{kind:>2}  {cases.KINDS[kind]}"
        print(f"{name:<{width + 4}} {tried[kind]:5}  {tried[kind] - failures[kind]:7}  {failures[kind]:6}")
    total, failed = len(picked), sum(failures.values())
    print(f"{'all':<{width + 4}} {total:5}  {total - failed:7}  {failed:6}")


if __name__ == "__main__":
    sys.exit(main())
