"""Stored results of the studies: one JSONL file per study, one line per training."""

import json
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import STUDIES, Study

Record = dict[str, Any]
"""Result of one training."""

Results = dict[str, dict[int, Record]]
"""Records by arm and seed."""

FROZEN = ("linear", "knn")
"""Accuracies of frozen features, in every record."""

BASELINES = {"untrained": "an untrained encoder", "pixels": "raw pixels"}
"""Other features whose accuracies a record can have."""


def path_of(study: Study, folder: Path) -> Path:
    """Return the file of a study's records."""
    return folder / f"{study.name}.jsonl"


def read(path: Path) -> list[Record]:
    """Return the records of a file; none if the file does not exist."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def save(record: Record, study: Study, folder: Path) -> None:
    """Store a record in its study's file.

    It replaces an older record of the same arm and seed. The file stays sorted by the study's arms, then seeds. It is
    replaced atomically; only one process may write to it at a time.
    """
    path = path_of(study, folder)
    rank = {arm: place for place, arm in enumerate(study.arms)}

    def key(record: Record) -> tuple[int, str, int]:
        return rank.get(record["arm"], len(rank)), record["arm"], record["seed"]

    records = [*(other for other in read(path) if key(other) != key(record)), record]
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in sorted(records, key=key)), "utf-8")
    partial.replace(path)


def load(study: Study, folder: Path) -> Results:
    """Return the records of a study's current options, with an entry for every arm."""
    results: Results = {arm: {} for arm in study.arms}
    for record in read(path_of(study, folder)):
        if study.has(record):
            results[record["arm"]][record["seed"]] = record
    return results


def load_alike(study: Study, folder: Path) -> Results:
    """Return the records of all studies with equal world and epochs, its own first."""
    alike = [other for other in STUDIES.values() if (other.world, other.epochs) == (study.world, study.epochs)]
    found: Results = {}
    for other in sorted(alike, key=lambda other: other.name != study.name):
        for arm, seeds in load(other, folder).items():
            found[arm] = {**seeds, **found.get(arm, {})}
    return found
