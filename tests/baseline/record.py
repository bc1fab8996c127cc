"""Records results of the project, to compare them after a refactoring.

``python tests/baseline/record.py`` writes ``numbers.json`` beside this file: losses and gradient norms of a few
training steps of every method and classifier on both frameworks, plans, and costs. ``test_baseline.py`` compares.
``--texts FOLDER`` also writes the help and ``prmim inspect`` texts, which are read by people and not compared.
"""

import argparse
import contextlib
import importlib
import io
import json
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("numbers.json")
STEPS = 5
BACKENDS = ("torch", "jax")

SIZES = {"image_size": (8, 8), "patch_size": (2, 2), "channels": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
PATCHES = {"thrown_target": "patch"}
"""What thrown tokens predicted when the numbers were recorded."""
METHODS: dict[str, dict[str, Any]] = {
    "mae": {**DECODER, **PATCHES},
    "simmim": {"drop_path": 0.3, **PATCHES},
    "maskalign": {"teacher_layers": 2, "fusion": "sum"},
    "localmim": {**DECODER, "scales": (2, 0.5), "layers": (1, 2)},
}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "partial": {"reconstruction": "none"},
    "kernel": {},
    "interpolate": {"reconstruction": "interpolate"},
    "conv": {"reconstruction": "conv", "stages": 1},
}
TRAINING = {
    "seed": 3,
    "total_steps": 20,
    "warmup_steps": 2,
    "learning_rate": 2e-3,
    "precision": "float32",
    "clip_grad": 1.0,
    "device": "cpu",
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "finetune": {"drop_path": 0.2, "layer_decay": 0.75, "ema_decay": 0.9},
    "linear": {"pool": "cls"},
}


def digits() -> np.ndarray:
    """Return the embedded digits, uint8 (1797, 8, 8, 1)."""
    datasets = importlib.import_module("sklearn.datasets")
    return (datasets.load_digits().images * 15).astype(np.uint8)[..., None]


def write_teacher(folder: Path) -> Path:
    """Write the small teacher of the tests."""
    spec = importlib.util.spec_from_file_location("teachers", Path(__file__).parents[1] / "teachers.py")
    teachers = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(teachers)  # type: ignore[union-attr]
    return teachers.write_teacher(folder)  # type: ignore[no-any-return]


def make_config(method: str, arm: str, teacher: Path) -> Any:
    """Return the record of one arm of one method."""
    methods = importlib.import_module("prmim_methods")
    options = {"init_seed": TRAINING["seed"], **SIZES, **METHODS[method]}
    if method == "maskalign":
        options["teacher"] = str(teacher)
    config = methods.create_config(method, **options)
    return config.baseline() if arm == "dense" else replace(config, **ARMS[arm])


def make_engine(backend: str, config: Any) -> Any:
    """Return the engine of a method."""
    package, methods = importlib.import_module(f"prmim_{backend}"), importlib.import_module("prmim_methods")
    decay = "step" if config.name == "simmim" else "cosine"
    return package.Engine(config, methods.TrainingConfig(**TRAINING, decay=decay))


def make_classifier(backend: str, protocol: str, teacher: Path) -> Any:
    """Return the engine of a classifier on the encoder of a method."""
    package, methods = importlib.import_module(f"prmim_{backend}"), importlib.import_module("prmim_methods")
    config = make_config("mae" if protocol == "finetune" else "simmim", "kernel", teacher)
    training = methods.TrainingConfig(**TRAINING, betas=(0.9, 0.999))
    options = methods.ClassifierConfig(protocol=protocol, **CLASSIFIERS[protocol])
    return package.ClassifierEngine(config, options, 10, training)


def train(engine: Any, images: np.ndarray, *more: np.ndarray) -> dict[str, Any]:
    """Take a few steps; return what each measured."""
    lines = []
    for step in range(STEPS):
        sample = np.random.default_rng(step).integers(0, len(images), 16)
        engine.train_step(images[sample], sample, *(array[sample] for array in more))
        lines.append(engine.read_metrics())
    engine.close()
    return {
        "loss": [line["loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
        "parameters": engine.num_parameters,
    }


def trainings(backend: str, teacher: Path) -> dict[str, Any]:
    """Return losses and gradient norms of every method and classifier."""
    images = digits()
    targets = np.eye(10, dtype=np.float32)[np.arange(len(images)) % 10]
    found = {
        f"{method}-{arm}": train(make_engine(backend, make_config(method, arm, teacher)), images)
        for method in METHODS
        for arm in ARMS
        if method != "maskalign" or arm != "partial"
    }
    for protocol in CLASSIFIERS:
        found[protocol] = train(make_classifier(backend, protocol, teacher), images, targets)
    return found


def checksum(array: np.ndarray) -> int:
    """Return a number that changes with any value of an integer array."""
    return zlib.crc32(np.ascontiguousarray(array, np.int64).tobytes())


def plans() -> dict[str, int]:
    """Return a checksum of the order of every kind of plan."""
    core = importlib.import_module("prmim_core")
    found = {}
    for shape in ((4, 4), (14, 14), (4, 6, 6)):
        grid = core.Grid(shape)
        noise = core.counter_noise(1, 2, np.arange(8), grid.num_tokens)
        counts = core.count_tokens(grid.num_tokens, 0.75, 0.5)
        weights = np.random.default_rng(0).random(noise.shape)
        for throwing in ("furthest", "random", "cell", "weighted"):
            schedule = core.Schedule(grid, counts, 3, throwing)
            given = weights if throwing == "weighted" else None
            found[f"{shape} {throwing}"] = checksum(core.make_plan(schedule, noise, weights=given).order)
        schedule = core.Schedule(grid, counts, 3, "furthest", "none")
        found[f"{shape} from none"] = checksum(core.make_plan(schedule, noise).order)
        unit = (2,) * len(shape)
        size = 2 ** len(shape)
        counts = core.count_tokens(grid.num_tokens, 0.75, 0.25, mask_unit=size, throw_unit=size)
        schedule = core.Schedule(grid, counts, 2, "furthest", "visible", unit)
        found[f"{shape} units"] = checksum(core.make_plan(schedule, noise).order)
    return found


def costs() -> dict[str, dict[str, list[int]]]:
    """Return MACs and bytes of every part of the published recipes.

    For each reconstruction and accounting.
    """
    methods = importlib.import_module("prmim_methods")
    accountings = {
        "": {},
        "True 2": {"compute_bytes": 2},
        "official explicit": {"bookkeeping": "official", "attention": "explicit"},
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = {"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
        (Path(folder) / "config.json").write_text(json.dumps(teacher))
        for name, config in methods.METHODS.items():
            given = {"maskalign": {"teacher": folder}, "localmim": {}}.get(name, PATCHES)
            for reconstruction in ("kernel", "interpolate", "conv", "none"):
                for key, options in accountings.items():
                    recompute = "compute_bytes" in options
                    record = config(**given, reconstruction=reconstruction, recompute_blocks=recompute)
                    report = record.cost(methods.Accounting(**options))
                    parts = {
                        part: [cost.macs, cost.activation_bytes, cost.recomputed_bytes]
                        for part, cost in report.parts.items()
                        if part != "cell_head"  # not there when the numbers were recorded; its cost is in the total
                    }
                    total = [report.macs, report.activation_bytes, report.peak_activation_bytes]
                    found[" ".join([name, reconstruction, key]).strip()] = {**parts, "total": total}
    return found


def record() -> dict[str, Any]:
    """Return all numbers."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder) / "teacher")
        return {
            "plans": plans(),
            "costs": costs(),
            "trainings": {backend: trainings(backend, teacher) for backend in BACKENDS},
        }


def texts(folder: Path) -> None:
    """Write the help of all commands, and ``prmim inspect`` for every recipe."""
    main = importlib.import_module("prmim_train.cli.commands").main
    folder.mkdir(parents=True, exist_ok=True)
    teacher = write_teacher(folder / "teacher")
    words = {f"help_{name}": [name, "--help"] for name in ("pretrain", "inspect", "evaluate", "picture")}
    words["help"] = ["--help"]
    sized = ["--data", "digits", "--epochs", "30"]
    for method in ("mae", "simmim"):
        for arm in ("", "_dense"):
            words[f"inspect_{method}{arm}"] = ["inspect", "--config", f"{method}_vit_base{arm}", *sized]
    for arm in ("", "_dense"):
        small = [
            "--image_size",
            "16",
            "--patch_size",
            "4",
            "--teacher",
            str(teacher),
            "--fusion",
            "sum",
            "--teacher_layers",
            "2",
        ]
        words[f"inspect_maskalign{arm}"] = ["inspect", "--config", f"maskalign_vit_base{arm}", *sized, *small]
    words["inspect_digits"] = ["inspect"]
    for name, given in words.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main(given)
        (folder / f"{name}.txt").write_text(out.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path)
    arguments = parser.parse_args()
    if arguments.texts is not None:
        texts(arguments.texts)
    else:
        FILE.write_text(json.dumps(record(), indent=1) + "\n")
