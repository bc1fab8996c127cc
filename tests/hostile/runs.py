"""Hostile runs: two writers, other data or options, foreign checkpoints."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cases import TINY, case, cases, check_line, prmim, write_tiny
from PIL import Image

NEIGHBOURS = ("evaluate", "--run", "X", "--protocol", "knn", "--baselines", "false", "--eval_limit", "100")


@functools.cache
def made(number: int = 24, seed: int = 0) -> Path:
    """Return a folder with `tiny.npz` and a finished run `X` on it; made once."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    write_tiny(folder, number)
    prmim(folder, "pretrain", *TINY, "--out", "X", "--holdout", "0.5", "--seed", str(seed))
    return folder


def copied(folder: Path, **options: int) -> None:
    """Copy the finished run into a folder."""
    shutil.copytree(made(**options), folder, dirs_exist_ok=True)


def again(folder: Path, *words: str, **expected: object) -> str:
    """Give the command of the run once more, with other options."""
    return prmim(folder, "pretrain", *TINY, "--out", "X", "--holdout", "0.5", "--resume", *words, **expected)


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of the run."""
    return {str(path): path.read_bytes() for path in sorted((folder / "X").rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- two writers


def start(folder: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    """Start a long run in a process of its own."""
    command = [sys.executable, "-m", "prmim_train", "pretrain", *TINY, "--epochs", "400", "--out", "X", *words]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has logged a step."""
    while not (folder / "X" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@cases(
    1,
    {
        "the same command with --resume": ("--resume",),
        "a fresh start in the same folder": (),
        "with other options": ("--resume", "--mask_ratio", "0.5"),
        "by another path to the folder": ("--resume", "--out", "./Y/../X"),
        "by a link to the folder": ("--resume", "--out", "link"),
    },
    quick=False,
)
def second_writer(folder, words):
    write_tiny(folder)
    (folder / "Y").mkdir()
    (folder / "link").symlink_to("X")
    first = start(folder, "--resume")
    wait_for_steps(folder, first)
    second = start(folder, *words)
    output = second.communicate(timeout=120)[0]
    assert second.returncode == 1, output
    lines = [line for line in output.splitlines() if "error" in line]
    assert len(lines) == 1, output
    check_line(lines[0], "another process is training in")
    assert first.poll() is None, first.communicate()[0]
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    steps = [json.loads(line)["step"] for line in (folder / "X" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@case(1, "the lock of a killed process", quick=False)
def killed_process(folder):
    write_tiny(folder)
    first = start(folder)
    wait_for_steps(folder, first)
    first.kill()
    first.wait()
    prmim(folder, "pretrain", *TINY, "--epochs", "400", "--out", "X", "--resume", "--workers", "0")


@case(1, "two tasks of srun", quick=False)
def tasks_of_srun(folder):
    write_tiny(folder)
    step = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    words = ("--epochs", "10", "--resume")
    tasks = [start(folder, *words, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]
    outputs = [task.communicate(timeout=240)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    steps = [json.loads(line)["step"] for line in (folder / "X" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert ["Run directory" in output for output in outputs] == [True, False], outputs


@case(1, "a leftover lock file of an earlier process")
def leftover_lock(folder):
    copied(folder)
    (folder / "X" / ".lock").write_text("12345")
    again(folder, "--epochs", "2")


@case(1, "a folder in place of the lock file")
def lock_is_a_folder(folder):
    copied(folder)
    (folder / "X" / ".lock").unlink(missing_ok=True)
    (folder / "X" / ".lock").mkdir()
    again(folder, "--epochs", "2", code=1, says=".lock")


@case(1, "a link in place of the lock file")
def lock_is_a_link(folder):
    copied(folder)
    (folder / "precious").write_text("kept")
    (folder / "X" / ".lock").unlink(missing_ok=True)
    (folder / "X" / ".lock").symlink_to(folder / "precious")
    again(folder, "--epochs", "2", code=1, says=".lock")
    assert (folder / "precious").read_text() == "kept"


@case(1, "a folder in which no run was started")
def never_started(folder):
    write_tiny(folder)
    prmim(folder, "pretrain", *TINY, "--out", "a/b", "--device", "cuda:77", code=2, says="device")
    assert not (folder / "a").exists()


# ---------------------------------------------------------------------------------------------------- the split moves


def change_images(folder: Path, change: str) -> None:
    """Change `tiny.npz`."""
    with np.load(folder / "tiny.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    match change:
        case "one added at the end":
            images, labels = np.concatenate([images, images[:1] + 1]), np.append(labels, 0)
        case "one added in front":
            images, labels = np.concatenate([images[:1] + 1, images]), np.append(0, labels)
        case "one removed":
            images, labels = images[1:], labels[1:]
        case "one replaced":
            images[3] += 1
        case "in another order":
            images, labels = images[::-1], labels[::-1]
        case "other labels":
            labels = 1 - labels
        case "labels of three classes":
            labels = np.arange(len(labels)) % 3
        case "all others":
            images = images + 7
    np.savez(folder / "tiny.npz", images=images, labels=labels)


CHANGES = (
    *("one added at the end", "one added in front", "one removed", "one replaced", "in another order"),
    *("other labels", "labels of three classes", "all others"),
)


@cases(2, {f"{change}: evaluate": change for change in CHANGES})
def changed_images_evaluated(folder, change):
    copied(folder)
    change_images(folder, change)
    prmim(folder, *NEIGHBOURS, code=2, says="data: expected what the run in X was trained on")
    assert not (folder / "X" / "evaluation.json").exists()


@cases(2, {f"{change}: resume": change for change in CHANGES})
def changed_images_resumed(folder, change):
    copied(folder)
    change_images(folder, change)
    before = content(folder)
    again(folder, "--epochs", "2", code=2, says="data: expected what the run in X was trained on")
    assert content(folder) == before


@cases(2, {f"{change}: allowed": change for change in CHANGES})
def changed_images_allowed(folder, change):
    copied(folder)
    with np.load(folder / "tiny.npz") as arrays:
        old = {image.tobytes() for image in arrays["images"]}
    trained = trained_images(folder)
    change_images(folder, change)
    with np.load(folder / "tiny.npz") as arrays:
        new = {image.tobytes() for image in arrays["images"]}
    output = prmim(folder, *NEIGHBOURS, "--allow_changes")
    assert "Changed: expected what the run in X was trained on" in output
    found = json.loads((folder / "X" / "evaluation.json").read_text())
    assert 0 < found["test_images"] <= len(new) - len(new & trained)
    assert len(old) == 24


def trained_images(folder: Path) -> set[bytes]:
    """Return the images of `tiny.npz` that the run was trained on."""
    from prmim_train.run.directory import RunDirectory
    from prmim_train.run.prepare import open_run_data, read_run_config

    run = RunDirectory(folder / "X")
    data = open_run_data(run, read_run_config(run, data=str(folder / "tiny.npz")))
    return {data.source.read(int(index)).tobytes() for index in data.train}


@cases(2, {"holdout": ("holdout: 0.5", "holdout: 0.25"), "seed": ("seed: 0", "seed: 5")})
def edited_config(folder, change):
    copied(folder)
    place = folder / "X" / "config.yaml"
    before, after = (f"{line}\n" for line in change)
    assert before in place.read_text()
    place.write_text(place.read_text().replace(before, after))
    prmim(folder, *NEIGHBOURS, code=2, says="another split")


@case(2, "evaluate with another --holdout")
def another_holdout(folder):
    copied(folder)
    prmim(folder, *NEIGHBOURS, "--holdout", "0.8", says="held-out images were trained on, and are left out")
    assert json.loads((folder / "X" / "evaluation.json").read_text())["test_images"] <= 12


@case(2, "the training images as test data")
def training_images_as_test_data(folder):
    copied(folder)
    prmim(folder, *NEIGHBOURS, "--test_data", "tiny.npz", says="12 of 24 test images were trained on")


@cases(2, {f"test data: {change}": change for change in ("one added at the end", "one replaced", "other labels")})
def changed_test_data_of_a_classifier(folder, change):
    copied(folder)
    shutil.copy(made(number=25) / "tiny.npz", folder / "test.npz")
    words = ["evaluate", "--run", "X", "--protocol", "finetune", "--epochs", "1", "--batch_size", "8"]
    words += ["--test_data", "test.npz"]
    prmim(folder, *words)
    other = folder / "other"
    other.mkdir()
    shutil.copy(folder / "test.npz", other / "tiny.npz")
    change_images(other, change)
    shutil.copy(other / "tiny.npz", folder / "test.npz")
    prmim(folder, *words, "--resume", code=2, says="data: expected what the run in X/finetune was trained on")


def write_photos(folder: Path) -> None:
    for k, image in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)):
        place = folder / "photos" / "ab"[k % 2] / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
        os.utime(place, (10**9 + k, 10**9 + k))


def change_photos(folder: Path, change: str) -> None:
    place = folder / "photos" / "a" / "2.png"
    match change:
        case "deleted":
            place.unlink()
        case "renamed":
            place.rename(place.with_name("2b.png"))
        case "moved to the other class":
            place.rename(folder / "photos" / "b" / "2.png")
        case "longer":
            place.write_bytes(place.read_bytes() + b"\0")
        case "touched":
            place.touch()
        case "replaced by a link to another":
            place.unlink()
            place.symlink_to(folder / "photos" / "a" / "4.png")
        case "unreadable":
            place.unlink()
            place.symlink_to("nowhere")


@cases(
    2,
    {
        f"a file of the folder {change}": change
        for change in (
            *("deleted", "renamed", "moved to the other class", "longer", "touched"),
            *("replaced by a link to another", "unreadable"),
        )
    },
)
def changed_folder(folder, change):
    write_photos(folder)
    words = [*TINY, "--data", "photos", "--out", "X"]
    prmim(folder, "pretrain", *words)
    change_photos(folder, change)
    prmim(folder, *NEIGHBOURS, code=2, says="data: expected what the run in X was trained on")
    prmim(folder, "pretrain", *words, "--resume", code=2, says="data: expected what the run in X was trained on")


@case(2, "a folder that was moved")
def moved_folder(folder):
    write_photos(folder)
    words = [*TINY, "--out", "X"]
    prmim(folder, "pretrain", *words, "--data", "photos")
    (folder / "photos").rename(folder / "elsewhere")
    prmim(folder, "pretrain", *words, "--data", "elsewhere", "--resume", "--epochs", "2", says="data from 'photos' to")


# --------------------------------------------------------------------------------------------- resume with another task


@cases(
    3,
    {
        " ".join(words): words
        for words in (
            ("--mask_ratio", "0.5"),
            ("--throw_ratio", "0.25"),
            ("--throwing", "random"),
            ("--stages", "1"),
            ("--reconstruction", "none"),
            ("--thrown_target", "patch"),
            ("--norm_pix", "false"),
            ("--batch_size", "4"),
            ("--seed", "1"),
            ("--holdout", "0.1"),
            ("--crop_scale", "0.5,1"),
            ("--flip", "false"),
            ("--method", "simmim"),
            ("--depth", "2"),
            ("--patch_size", "4"),
            ("--image_size", "16"),
            ("--data", "digits"),
        )
    },
)
def other_task(folder, words):
    copied(folder)
    before = content(folder)
    output = again(folder, "--epochs", "2", *words, code=2, says="")
    assert words[0][2:] in output, output
    assert content(folder) == before


@cases(
    3,
    {
        " ".join(words): words
        for words in (
            ("--workers", "1"),
            ("--epochs", "2"),
            ("--log_every", "2"),
            ("--base_learning_rate", "0.001"),
            ("--clip_grad", "1"),
            ("--keep_checkpoints", "1"),
            ("--precision", "bfloat16"),
        )
    },
)
def harmless_change(folder, words):
    copied(folder)
    again(folder, *words, says=f"{words[0][2:]} from ")


@case(3, "a finished run without checkpoints")
def no_checkpoints(folder):
    copied(folder)
    shutil.rmtree(folder / "X" / "checkpoints")
    again(folder, code=2, says="expected the last checkpoint of the finished run")


@case(3, "fewer epochs than were taken")
def fewer_epochs(folder):
    copied(folder)
    again(folder, "--epochs", "2")
    again(folder, "--epochs", "1", code=2, says="epochs")


@cases(3, {"photos.v1 and photos.v2": ("photos.v1", "photos.v2"), "a.npz and a.tar": ("a.npz", "a.tar")})
def default_folders(folder, names):
    from prmim_train.config.pretrain import pretrain_config

    assert len({pretrain_config(data=name).run_path for name in names}) == len(names)


@case(3, "other data with the same default folder")
def same_default_folder(folder):
    for name in ("one", "two"):
        (folder / name).mkdir()
        shutil.copy(made(number=24 if name == "one" else 26) / "tiny.npz", folder / name / "tiny.npz")
    prmim(folder, "pretrain", *TINY, "--data", "one/tiny.npz")
    prmim(folder, "pretrain", *TINY, "--data", "two/tiny.npz", code=2, says="already holds a run")
    prmim(folder, "pretrain", *TINY, "--data", "two/tiny.npz", "--resume", code=2, says="data: expected what the run")


# ---------------------------------------------------------------------------------------------------------- checkpoints


def newest(folder: Path) -> Path:
    return sorted((folder / "X" / "checkpoints").glob("step_*"))[-1]


@cases(
    4,
    {
        f"{what} of another run": what
        for what in ("weights", "training state", "weights and manifest", "state and manifest", "the whole checkpoint")
    },
)
def mixed_checkpoint(folder, what):
    copied(folder)
    ours, theirs = newest(folder), newest(made(seed=1))
    parts = {
        "weights": ["weights.safetensors"],
        "training state": ["training_state"],
        "weights and manifest": ["weights.safetensors", "manifest.json"],
        "state and manifest": ["training_state", "manifest.json"],
        "the whole checkpoint": ["weights.safetensors", "training_state", "manifest.json"],
    }[what]
    for name in parts:
        if (theirs / name).is_dir():
            shutil.rmtree(ours / name)
            shutil.copytree(theirs / name, ours / name)
        else:
            shutil.copy(theirs / name, ours / name)
    for words in (NEIGHBOURS, ("picture", "--run", "X", "--kind", "schedule")):
        prmim(folder, *words, code=1, says="checkpoint: expected a good one")
    again(folder, "--epochs", "2", code=1, says="checkpoint: expected a good one")


@case(4, "a checkpoint under the name of another step")
def renamed_checkpoint(folder):
    copied(folder)
    place = newest(folder)
    place.rename(place.with_name("step_00000099"))
    prmim(folder, *NEIGHBOURS, code=1, says="it belongs to another step")


@cases(4, {"NaN": np.nan, "infinity": np.inf})
def weights_not_finite(folder, value):
    import hashlib

    from safetensors.numpy import load_file, save_file

    copied(folder)
    place = newest(folder) / "weights.safetensors"
    weights = load_file(place)
    next(iter(weights.values())).flat[0] = value
    save_file(weights, place)
    manifest = json.loads((place.parent / "manifest.json").read_text())
    manifest["files"]["weights.safetensors"] = {
        "bytes": place.stat().st_size,
        "sha256": hashlib.sha256(place.read_bytes()).hexdigest(),
    }
    (place.parent / "manifest.json").write_text(json.dumps(manifest))
    for words in (NEIGHBOURS, ("picture", "--run", "X"), ("evaluate", "--run", "X", "--protocol", "finetune")):
        prmim(folder, *words, code=2, says="checkpoint: expected finite weights")


@cases(
    4,
    {
        "no ID": '{"facts": {}}',
        "an ID that is a number": '{"id": 7, "facts": {}}',
        "facts that are a list": '{"id": "0123456789abcdef0123456789abcdef", "facts": []}',
        "an ID that is a path": '{"id": "../../x", "facts": {}}',
    },
)
def odd_identity(folder, text):
    copied(folder)
    (folder / "X" / "run.json").write_text(text)
    prmim(folder, *NEIGHBOURS, code=2, says="run.json")


@cases(4, {"empty": b"", "no archive": b"PK\3\4", "JSON": b"{}"})
def odd_trained(folder, damaged):
    copied(folder)
    (folder / "X" / "trained.npz").write_bytes(damaged)
    prmim(folder, *NEIGHBOURS, code=2, says="trained.npz")


@case(4, "a run without a recorded identity")
def earlier_version(folder):
    copied(folder)
    for name in ("run.json", "trained.npz"):
        (folder / "X" / name).unlink()
    prmim(folder, *NEIGHBOURS)
    again(folder, "--epochs", "2")
    assert (folder / "X" / "run.json").is_file()
