"""Worker jobs of test_distributed.py.

A script for torchrun, and a module for a single process.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from prmim_methods import ClassifierConfig, TrainingConfig, create_config
from prmim_torch import MAE, METHODS, ClassifierEngine, Engine

TINY = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
DECODER |= {"class_tokens": 3, "position": "learned", "mask_unit": 2}
CONFIGS = {
    "mae": create_config("mae", **TINY, **DECODER, init_seed=3),
    "simmim": create_config("simmim", **TINY, drop_path=0.3, recompute_blocks=True, init_seed=3),
}
TRAINING = {
    "seed": 3,
    "total_steps": 8,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "device": "cpu",
    "timeout": 30.0,
}
PARALLEL = ("ddp", "fsdp")
READINGS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_cpu")
BATCH = 16
STEPS, STEP_SAVED, STEP_SPOILT = 6, 3, 4

CURVES = {
    "mae": ("mae", {"accumulate": 2, "clip_grad": 0.2, "weight_decay": 0.5}),
    "simmim": ("simmim", {"accumulate": 2, "clip_grad": 1.0}),
}
"""Runs that must not depend on the number of processes: methods, and options of the training. One step of an MAE is not
finite."""

CLASSIFIERS = {
    "finetune": (
        "simmim",
        ClassifierConfig(drop_path=0.3, layer_decay=0.7, ema_decay=0.8),
        {"accumulate": 2, "clip_grad": 0.5, "betas": (0.9, 0.999)},
    ),
    "probe": ("mae", ClassifierConfig(protocol="linear", pool="cls", batch_norm="all"), {"learning_rate": 0.5}),
    "device_probe": ("mae", ClassifierConfig(protocol="linear", pool="cls"), {"learning_rate": 0.5}),
}
CLASSES = 5


def make_engine(method, **training):
    return Engine(CONFIGS[method], TrainingConfig(**{**TRAINING, **training}))


def train(engine, last, spoilt=None):
    """Train up to a step, each process on its rows; return all measurements.

    In one step the loss of one process, the last, is not finite.
    """
    curve = []
    while engine.step < last:
        images = np.random.default_rng(engine.step).integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8)
        sample = np.arange(engine.step * BATCH, (engine.step + 1) * BATCH)
        rows = slice(engine.rank, None, engine.world_size)
        if engine.step + 1 == spoilt and engine.rank == engine.world_size - 1:
            with_hook = engine.method.register_forward_hook(spoil)
            engine.train_step(images[rows], sample[rows])
            with_hook.remove()
        else:
            engine.train_step(images[rows], sample[rows])
        curve.append(engine.read_metrics())
    return curve


def spoil(method, arguments, output):
    output.loss = output.loss * float("nan")


def save(engine, directory):
    """Start an asynchronous save; training continues."""
    if engine.rank == 0:
        directory.mkdir(parents=True)
    engine.any(False)  # wait for the folder
    return engine.async_save(directory)


def start(name, parallel):
    method, options = CURVES[name]
    return make_engine(method, parallel=parallel, **options)


def spoilt_step(name):
    return STEP_SPOILT if name == "mae" else None


def draw(name, parallel, directory):
    """Run one of CURVES; save it halfway and at the end."""
    engine = start(name, parallel)
    curve = train(engine, STEP_SAVED, spoilt_step(name))
    saving = save(engine, directory / "half")
    curve += train(engine, STEPS, spoilt_step(name))
    saving.result()
    save(engine, directory / "end").result()
    engine.close()
    return curve


def resume(name, parallel, directory):
    """Resume one of CURVES from halfway."""
    engine = start(name, parallel)
    engine.restore(directory / "half")
    curve = train(engine, STEPS, spoilt_step(name))
    engine.close()
    return curve


def look(parallel, directory):
    """Compute features before and after a restore; the run must not change."""
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    engine = start("mae", parallel)
    engine.features(images)
    train(engine, 1)
    engine.features(images)
    engine.restore(directory / "half")
    result = {
        "features": engine.features(images).tolist(),
        "patches": np.nan_to_num(engine.reconstruct(images, np.arange(4)).patches, nan=-9).tolist(),
        "attention": engine.attention(images[engine.rank :]).tolist(),  # other images in each process
        "curve": train(engine, STEPS, STEP_SPOILT),
    }
    engine.close()
    return result


def curves(shared, own):
    """Run all CURVES, resume them, and resume those of one process and of two."""
    every = [(name, parallel) for name in CURVES for parallel in PARALLEL]
    results = {f"{name} {parallel}": draw(name, parallel, own / name / parallel) for name, parallel in every}
    for name, parallel in every:
        results[f"{name} {parallel} resumed"] = resume(name, parallel, own / name / parallel)
    for parallel in PARALLEL:
        for source in ("1 ddp", "2 ddp", "2 fsdp"):
            processes, saved = source.split()
            results[f"mae {parallel} from {source}"] = resume("mae", parallel, shared / processes / "mae" / saved)
    return results


def looks(shared, own):
    return {parallel: look(parallel, shared / "1" / "mae" / "ddp") for parallel in PARALLEL}


def make_classifier(name, parallel="ddp", **more):
    method, config, training = CLASSIFIERS[name]
    training = TrainingConfig(**{**TRAINING, **training, **more}, parallel=parallel)
    return ClassifierEngine(CONFIGS[method], config, CLASSES, training)


def classify(name, parallel, directory):
    """Train a classifier, then resume it from halfway."""
    engine = make_classifier(name, parallel)
    curve = train_classifier(engine, STEP_SAVED)
    saving = save(engine, directory / "half")
    curve += train_classifier(engine, STEPS)
    saving.result()
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    logits = engine.predict(images).tolist()
    save(engine, directory / "end").result()
    engine.restore(directory / "half")
    resumed = train_classifier(engine, STEPS)
    result = {"curve": curve, "resumed": resumed, "logits": logits, "again": engine.predict(images).tolist()}
    engine.close()
    return result


def draw_classes(step):
    """Return images and targets; in one step, the last target is not finite."""
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8)
    targets = rng.dirichlet(np.ones(CLASSES), BATCH).astype(np.float32)
    if step + 1 == STEP_SPOILT:
        targets[-1, 0] = np.nan
    return images, targets


def train_classifier(engine, last, rows=None):
    """Train up to a step.

    ``rows``: those of the process, in another order than usual.
    """
    curve = []
    while engine.step < last:
        images, targets = draw_classes(engine.step)
        sample = np.arange(engine.step * BATCH, (engine.step + 1) * BATCH)
        rows = slice(engine.rank, None, engine.world_size) if rows is None else rows
        engine.train_step(images[rows], sample[rows], targets[rows])
        curve.append(engine.read_metrics())
    return curve


def classifiers(shared, own):
    pairs = [*((name, parallel) for name in ("finetune", "probe") for parallel in PARALLEL), ("device_probe", "ddp")]
    return {f"{name} {parallel}": classify(name, parallel, own / name / parallel) for name, parallel in pairs}


def message_of(call):
    try:
        call()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def agreement(shared, own):
    """Let one process fail or differ: a flag, a missing file, a failed write."""
    engine = make_engine("mae", parallel="fsdp")
    results = {"device": engine.device, "any": [engine.any(engine.rank == 1), engine.any(False), engine.any(True)]}
    good, here = shared / "1" / "mae" / "ddp" / "half", own / "agreement"
    save(engine, here / "full")

    wanted = here / "missing" if engine.rank == 1 else good
    results["missing"] = message_of(lambda: engine.restore(wanted))
    if engine.rank == 0:
        shutil.copytree(good, here / "torn")
        shard = next((here / "torn" / "training_state").iterdir())
        shard.write_bytes(shard.read_bytes()[:-1])
    engine.any(False)
    results["torn"] = message_of(lambda: engine.restore(here / "torn"))
    results["step"] = engine.step

    train(engine, 1)
    write_data = HuggingFaceStorageWriter.write_data
    if engine.rank == 1:
        HuggingFaceStorageWriter.write_data = fail_to_write
    results["full"] = message_of(lambda: engine.save(here / "full"))
    HuggingFaceStorageWriter.write_data = write_data
    results["left"] = sorted(path.name for path in (here / "full").rglob("*"))
    engine.restore(here / "full")  # the old state is unchanged
    results["step again"] = engine.step
    engine.close()
    return results


def fail_to_write(writer, plan, planner):
    raise OSError(28, "No space left on device")


def holdings(shared, own):
    """Count tensors per process, and gradient communications.

    A frozen teacher is left out.
    """
    results = {}
    METHODS["mae"] = create_with_teacher
    for parallel in PARALLEL:
        engine = make_engine("mae", parallel=parallel, accumulate=4)
        travels = []
        if parallel == "ddp":
            engine._forward.register_comm_hook(travels, count_and_reduce)
        train(engine, 2)
        travels.clear()
        images, sample = np.zeros((8, 16, 16, 3), dtype=np.uint8), np.arange(8) + 8 * engine.rank
        with Calls() as calls:
            engine.train_step(images, sample)
        frozen = [engine.method.get_parameter(name) for name in ("teacher.weight", "encoder.norm.bias")]
        moments = [state["exp_avg"] for state in engine._optimizer.state.values()]
        results[parallel] = {
            "learned": engine.num_parameters,
            "moments": sum((m.to_local() if isinstance(m, DTensor) else m).numel() for m in moments),
            "frozen": all(not isinstance(p, DTensor) and p.grad is None for p in frozen),
            "buckets": sum(travels),
            "reduce_scatters": sum("reduce_scatter" in name for name in calls.called),
            "all_reduces": sum("allreduce" in name for name in calls.called),
            "readings": [name for name in calls.called if any(part in name for part in READINGS)],
        }
        engine.close()
    METHODS["mae"] = MAE
    return results


class Calls(TorchDispatchMode):
    """Record collective communication, and operators that block the host."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.called.append(function.name())
        return function(*arguments, **(kwargs or {}))


def create_with_teacher(config):
    method = MAE(config)
    method.encoder.norm.requires_grad_(False)
    method.teacher = torch.nn.Linear(5, 3).requires_grad_(False)
    return method


def count_and_reduce(travels, bucket):
    travels.append(1)
    sent = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return sent.get_future().then(lambda done: done.value()[0])


def compiled(shared, own):
    """Train with torch.compile, with a backend that generates no code.

    Code generation would take a minute.
    """
    compile_, torch.compile = torch.compile, functools.partial(torch.compile, backend="aot_eager")
    results = {}
    for parallel in PARALLEL:
        for is_compiled in (True, False):
            engine = make_engine("mae", parallel=parallel, compile=is_compiled, accumulate=2, precision="bfloat16")
            results[f"{parallel} {'compiled' if is_compiled else 'plain'}"] = train(engine, 3)
            engine.close()
    torch.compile = compile_
    return results


def hang(shared, own):
    """Let the last process hang."""
    engine = make_engine("mae", timeout=2.0)
    train(engine, 2)
    if engine.rank == engine.world_size - 1:
        time.sleep(300)
    try:
        train(engine, 3)
    finally:
        engine.close()
        (own / "left").touch()


def die(shared, own):
    """Let the last process die in the middle of a run."""
    engine = make_engine("mae", parallel="fsdp")
    train(engine, 2)
    if engine.rank == engine.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        train(engine, 100_000)
    finally:
        engine.close()


JOBS = {job.__name__: job for job in (curves, classifiers, looks, agreement, holdings, compiled)}
FAULTS = {job.__name__: job for job in (hang, die)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=Path)
    parser.add_argument("jobs", nargs="+")
    arguments = parser.parse_args()
    shared, own = arguments.shared, arguments.shared / os.environ["WORLD_SIZE"]
    torch.set_num_threads(1)
    if arguments.jobs[0] in FAULTS:
        FAULTS[arguments.jobs[0]](shared, own)
        return
    # The first engine creates the process group; the engines of the jobs use it and leave it open.
    first = make_engine("mae")
    results = {job: JOBS[job](shared, own) for job in arguments.jobs}
    (own / f"rank_{first.rank}.json").write_text(json.dumps(results))
    first.close()
    first.close()
    assert not dist.is_initialized()
    again = make_engine("mae")
    assert len(train(again, 1)) == 1
    again.close()


if __name__ == "__main__":
    main()
