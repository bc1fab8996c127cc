"""Run the GPU benchmarks in pieces, and write the numbers into the documentation.

The command is idempotent: it skips pieces that were finished with the same words on the same hardware. Each piece runs
in its own process, until ``--minutes`` are over. The remaining time is used for trainings of the study ``grid14``,
whose records are saved with the others. Without a GPU, ``--dry`` runs the same pieces on the CPU at tiny sizes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.pages import fill_column, replace_block, write_page
from benchmarks.quality import data, records, tables
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.arms import STUDIES
from benchmarks.report import environment
from prmim_train.run.files import write_json

ROOT = Path(__file__).parent.parent
STUDY = "grid14"
SPARE = 25.0
"""Seconds reserved for the last training to write its checkpoint."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A command that writes its own results.

    Parameters
    ----------
    words
        Words after ``python -m``; ``{out}`` is the folder of the piece.
    dry
        The words at tiny sizes, for any CPU.
    """

    words: tuple[str, ...]
    dry: tuple[str, ...]


def _bench(name: str, words: str, dry: str) -> Piece:
    """Return a benchmark of this package that writes its tables into the folder."""
    fixed = (f"benchmarks.{name}", "--json", "{out}")
    return Piece((*fixed, *words.split()), (*fixed, *dry.split()))


_JUNIT = ("--junitxml", "{out}/tests.xml", "-p", "no:cacheprovider")
PIECES = {
    "step": _bench(
        "step",
        "--models vit_base --precision bfloat16 --compile --goals --batch 64 --repeats 20",
        "--models vit_tiny --precision bfloat16 --batch 1 --repeats 1 --device cpu --goals --no-peers",
    ),
    "memory": _bench(
        "memory",
        "--models vit_base --precisions bfloat16 --batch 16",
        "--models vit_tiny --precisions bfloat16 --batch 2 --device cpu",
    ),
    "plan": _bench("plan", "--repeats 20 --no-growth", "--images 1 --repeats 1 --device cpu --no-growth"),
    "tests": Piece(
        ("pytest", "-q", "-k", "gpu", "tests/torch", "tests/core", *_JUNIT),
        ("pytest", "-q", "-k", "gpu and plan", "tests/torch/test_furthest.py", *_JUNIT),
    ),
    "all arms": _bench(
        "step",
        "--models vit_base --precision bfloat16 --compile --batch 64 --repeats 20",
        "--models vit_tiny --precision bfloat16 --batch 1 --repeats 1 --device cpu --no-peers",
    ),
}
"""Pieces in order of priority. Peers are the MAE of transformers on the same device."""


def launch(words: Sequence[str], seconds: float) -> int:
    """Run ``python -m`` with a time limit; return its exit status, 124 on timeout."""
    try:
        return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def folder_of(out: Path, name: str) -> Path:
    """Return the folder of a piece."""
    return out / name.replace(" ", "-")


def words_of(out: Path, name: str, *, dry: bool) -> list[str]:
    """Return the words of a piece after ``python -m``."""
    words = PIECES[name].dry if dry else PIECES[name].words
    return [word.replace("{out}", str(folder_of(out, name))) for word in words]


def is_finished(out: Path, name: str, *, dry: bool) -> bool:
    """Return whether a piece was finished with the same words on the same hardware."""
    done = folder_of(out, name) / "done.json"
    if not done.exists():
        return False
    record = json.loads(done.read_text("utf-8"))
    return (record["words"], record["hardware"]) == (words_of(out, name, dry=dry), environment()["hardware"])


def carry_out(out: Path, deadline: float, *, dry: bool) -> list[str]:
    """Run the remaining pieces in order until a deadline; return the failed ones.

    The deadline is a time of ``time.monotonic``.
    """
    failed = []
    for name in PIECES:
        finished = is_finished(out, name, dry=dry)
        seconds = deadline - time.monotonic()
        if finished or seconds <= 0:
            print(f"== {name}: {'done' if finished else 'left for the next call'}", flush=True)
            continue
        done = folder_of(out, name) / "done.json"
        done.parent.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)  # of other words or hardware
        words = words_of(out, name, dry=dry)
        print(f"== python -m {' '.join(words)}", flush=True)
        start = time.monotonic()
        code = launch(words, seconds)
        if code == 0:
            write_json(done, {"seconds": time.monotonic() - start, "words": words, **environment()})
        else:
            print(f"== {name}: {'out of time' if code == 124 else f'FAILED with {code}'}", flush=True)
            failed += [name] if code != 124 else []
    return failed


def train(options: argparse.Namespace, deadline: float) -> bool:
    """Train arms of the study until a deadline; return whether nothing failed.

    The deadline is a time of ``time.monotonic``. Without its images, the study is skipped.
    """
    if deadline - time.monotonic() <= SPARE:
        print(f"== {STUDY}: left for the next call", flush=True)
        return True
    try:
        data.find(STUDIES[STUDY].world, options.data, options.out / "runs" / "data")
    except FileNotFoundError as error:
        print(f"== {STUDY}: skipped: {error}", flush=True)
        return True
    minutes = (deadline - time.monotonic() - SPARE) / 60
    where = ("--data", str(options.data), "--runs", str(options.out / "runs"), "--results", str(options.results))
    words = ("benchmarks.quality", "--study", STUDY, "--jobs", "1", "--minutes", f"{minutes:.2f}", *where)
    print(f"== python -m {' '.join(words)}", flush=True)
    return launch((*words, "--json", str(options.out / STUDY)), 60 * minutes + 2 * SPARE) == 0


def first_table(out: Path, name: str, *, dry: bool) -> tuple[Json, dict[str, Json]]:
    """Return the content of a piece's file, and the rows of its first table.

    Empty if the piece is not finished.
    """
    files = [path for path in folder_of(out, name).glob("*.json") if path.name != "done.json"]
    if not files or not is_finished(out, name, dry=dry):
        return {}, {}
    content = json.loads(files[0].read_text("utf-8"))
    return content, next(iter(content["tables"].values()))


STEP_ROWS = {
    **{name: name for name in ("dense", "partial 0.5", "PR-MIM 0.25", "PR-MIM 0.5", "PR-MIM 0.65", "official layout")},
    "transformers, fused attention": "transformers sdpa",
    "transformers, explicit attention": "transformers eager",
}
"""Rows of the table of steps in the page, and in the benchmark."""
STEP_COLUMN = "ViT-B/16, CUDA, bfloat16, compiled"


def step_cells(rows: Mapping[str, Json]) -> dict[str, str]:
    """Return the column of steps: ratios to dense, some with milliseconds.

    Dense and PR-MIM 0.5 have milliseconds.
    """
    cells = {}
    for label, name in STEP_ROWS.items():
        if name in rows:
            cells[label] = "1" if name == "dense" else f"{rows[name]['to dense']:.2f}"
            if name in ("dense", "PR-MIM 0.5"):
                cells[label] += f" ({rows[name]['ms per image']:.2f})"
    return cells


def goal_cells(rows: Mapping[str, Json]) -> dict[str, str]:
    """Return the cells of the goals that compare steps."""
    cells = {"the same, compiled": f"bfloat16, at most 0.76: {rows['PR-MIM 0.5']['to dense']:.2f}"}
    to_peer = rows["dense"].get("to fastest peer")
    if to_peer is not None:
        cells["our dense step to the fastest peer's: at most 0.90"] = f"bfloat16, compiled: {to_peer:.2f}"
    plan = rows["plan of PR-MIM 0.5"]["ms per image"] / rows["PR-MIM 0.5"]["ms per image"]
    cells["plan to the step of PR-MIM at 0.5: at most 0.5 % (GPU: 1 %)"] = f"{plan:.2%}"
    return cells


def memory_cells(rows: Mapping[str, Json]) -> dict[str, str]:
    """Return the cells of the goals about saved bytes."""
    ours = rows["PR-MIM 0.5"]
    worst = max((row["to formula"] for name, row in rows.items() if "recomputed" not in name), key=lambda x: abs(x - 1))
    return {
        "saved for the backward pass, PR-MIM at 0.5 to the official layout: at most 0.64": (
            f"{ours['saved to official']:.2f}"
        ),
        "the same to our own dense: at most 0.72": f"{ours['to dense']:.2f}",
        "saved bytes, formula to count: within 10 %": f"within {abs(worst - 1):.0%}",
    }


def plan_cells(rows: Mapping[str, Json]) -> dict[str, str]:
    """Return the column of plans, in microseconds per image."""
    return {grid: f"{row['torch']:.1f}" for grid, row in rows.items()}


def performance(page: str, out: Path, *, dry: bool) -> str:
    """Return the page of performance with the numbers of all finished pieces."""
    fills: tuple[tuple[str, str, Callable[[Mapping[str, Json]], dict[str, str]]], ...] = (
        ("step", "GPU", goal_cells),
        ("step", STEP_COLUMN, step_cells),
        ("all arms", STEP_COLUMN, step_cells),
        ("memory", "GPU", memory_cells),
        ("plan", "GPU", plan_cells),
    )
    about: Json = {}
    for name, column, cells in fills:
        content, rows = first_table(out, name, dry=dry)
        if rows:
            about = content
            page = fill_column(page, column, cells(rows))
    if not about:
        return page
    tests = folder_of(out, "tests") / "tests.xml"
    tested = tests_text(tests) if tests.exists() and is_finished(out, "tests", dry=dry) else ""
    device = f"GPU columns: {about['hardware']}, torch {about['versions']['torch']}, by `make gpu`.{tested}"
    return replace_block(page, "gpu device", device)


def tests_text(path: Path) -> str:
    """Return the results of the GPU tests as text; a finished piece has no failed tests."""
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    tests, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    return f" {tests - skipped} tests on it passed, 0 failed, {skipped} were skipped."


def write_pages(docs: Path, out: Path, results: Path, *, dry: bool) -> None:
    """Write the available numbers into the pages."""
    page = docs / "results" / "performance.md"
    write_page(page, performance(page.read_text("utf-8"), out, dry=dry))
    found = records.load(STUDIES[STUDY], results)
    if any(found.values()):
        page = docs / "results" / "accuracy.md"
        write_page(page, replace_block(page.read_text("utf-8"), STUDY, f"\n\n{tables.markdown(found)}\n\n"))


def main(arguments: list[str] | None = None) -> int:
    """Run the pieces, train, and write the pages; return 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; run the command again to continue")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="results of the pieces (default: runs/gpu; with --dry: runs/gpu-dry)"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="FOLDER", help="data sets")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="records of the trainings")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="pages to fill (default: docs; with --dry: none)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, without trainings")
    parser.add_argument("--pages", action="store_true", help="only write the pages")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    options.out = (options.out or Path("runs/gpu-dry" if options.dry else "runs/gpu")).resolve()
    if not (options.dry or options.pages or has_gpu()):
        print("gpu: PyTorch sees no GPU; --dry runs the pieces on the CPU", file=sys.stderr)
        return 2
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise, JAX reserves memory that PyTorch needs
    failed = [] if options.pages else carry_out(options.out, deadline, dry=options.dry)
    if not (options.pages or options.dry or train(options, deadline)):
        failed.append(STUDY)
    docs = options.docs or (None if options.dry else ROOT / "docs")
    if docs is not None:
        write_pages(docs, options.out, options.results, dry=options.dry)
    if failed:
        print(f"gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def has_gpu() -> bool:
    """Return whether PyTorch sees a GPU."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
