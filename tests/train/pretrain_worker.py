"""Worker of test_distributed_pretrain.py: several commands under torchrun.

Argument: a folder that holds `photos`, some of them unreadable. Each process leaves `rank_N.json` there, with exit code
and output of every command.
"""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import prmim_torch
from prmim_train.cli.commands import main
from prmim_train.run import directory

WORDS = {
    **{"backend": "torch", "channels": 1, "image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1},
    **{"num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "epochs": 1, "batch_size": 120},
    **{"holdout": 0.2, "base_learning_rate": 0.01, "precision": "float32", "device": "cpu", "log_every": 2},
    **{"eval_limit": 40, "pictures": 2},
}
"""12 steps on the digits."""
CLASSIFIER = {
    **{"epochs": 1, "batch_size": 120, "base_learning_rate": 0.02, "log_every": 2, "mixup": 0.8, "cutmix": 1},
    **{"rand_augment": 9, "erasing": 0.25},
}
# The statistics of all processes, so that their number changes nothing.
PROTOCOLS = {
    "finetune": ("--protocol", "finetune"),
    "linear": ("--protocol", "linear", "--solver", "lars", "--pool", "mean", "--batch_norm", "all"),
}
"""12 steps as well."""


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def command(out, *more):
    return ["pretrain", *words(WORDS), *more, "--out", str(out)]


def attention_command(folder, out):
    """Return a run of 10 steps, with attention maps after 5."""
    options = {"throwing": "weighted", "attention_start": 1, "epochs": 2, "batch_size": 60, "holdout": 0}
    return command(folder / out, *words({**options, "data": folder / "photos", "eval_limit": 0, "pictures": 0}))


def classifier(run, out, *more):
    return ["evaluate", "--run", str(run), *words(CLASSIFIER), *more, "--out", str(out)]


@contextlib.contextmanager
def stopped(step, rank, engine=prmim_torch.Engine):
    """Send SIGTERM to one process, in a step."""
    take = engine.train_step

    def train_step(self, *batch):
        if self.step + 1 == step and self.rank == rank:
            signal.raise_signal(signal.SIGTERM)
        take(self, *batch)

    engine.train_step = train_step
    yield
    engine.train_step = take


@contextlib.contextmanager
def full_disk():
    """Let the main process fail, and it alone, when it writes what only it writes."""
    write = directory.write_manifest

    def fail(directory, run, step):
        raise OSError("No space left on device")

    directory.write_manifest = fail
    yield
    directory.write_manifest = write


def run(words, setting):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), setting:
        code = main(words)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    folder, nothing = Path(sys.argv[1]), contextlib.nullcontext()
    run_folder = folder / "run"
    photos = ("--data", str(folder / "photos"), "--holdout", "0")
    probed, finetune, linear = folder / "probed", PROTOCOLS["finetune"], PROTOCOLS["linear"]
    commands = {
        "stopped": (command(run_folder), stopped(5, rank=1)),
        "taken": (command(run_folder), nothing),
        "full disk": (command(run_folder, "--resume"), full_disk()),
        "resumed": (command(run_folder, "--resume", "--parallel", "fsdp"), nothing),
        "finished": (command(run_folder, "--resume"), nothing),
        "uneven": (command(run_folder, "--resume", "--accumulate", "40"), nothing),
        "photos": (command(folder / "photos run", *photos, "--batch_size", "40"), nothing),
        "attention": (attention_command(folder, "attention"), nothing),
        "half": (command(folder / "half"), stopped(3, rank=0)),
        "probed": (command(probed, "--probe_every", "1"), nothing),
        "frozen": (["evaluate", "--run", str(probed), "--eval_limit", "40"], nothing),
        "tuning stopped": (
            classifier(probed, folder / "finetune", *finetune),
            stopped(5, 1, prmim_torch.ClassifierEngine),
        ),
        "tuned": (classifier(probed, folder / "finetune", *finetune, "--resume", "--parallel", "fsdp"), nothing),
        "linear": (classifier(probed, folder / "linear", *linear), nothing),
        "picture": (["picture", "--run", str(probed)], nothing),
    }
    results = {name: run(*given) for name, given in commands.items()}
    (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(results))
