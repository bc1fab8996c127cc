"""Worker script of test_distributed.py.

The test also imports it, for a single device.
"""

import argparse
import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prmim_jax import MAE, ClassifierEngine, Engine
from prmim_methods import ClassifierConfig, TrainingConfig, create_config

TINY = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}
METHODS = {
    "mae": {"name": "mae", **TINY, "depth": 1, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    | {"class_tokens": 3, "position": "learned", "mask_unit": 2},
    "simmim": {"name": "simmim", **TINY, "drop_path": 0.3, "scan_blocks": True, "recompute_blocks": True},
}
OPTIONS = {
    "mae": {"accumulate": 2, "clip_grad": 0.2, "weight_decay": 0.5},
    "simmim": {"clip_grad": 1.0},
}
# 9 is a width that two devices cannot share: some of the arrays of stacked blocks are cut between the blocks.
ODD = {"name": "simmim", **TINY, "embed_dim": 9, "num_heads": 3, "scan_blocks": True, "reconstruction": "interpolate"}
CLASSIFIERS = {
    "finetune": (
        ODD,
        {"drop_path": 0.3, "layer_decay": 0.7, "ema_decay": 0.8},
        {"accumulate": 2, "clip_grad": 0.5},
    ),
    "probe": (METHODS["mae"], {"protocol": "linear", "pool": "cls", "batch_norm": "all"}, {"learning_rate": 0.5}),
    "device_probe": (METHODS["mae"], {"protocol": "linear", "pool": "cls"}, {"learning_rate": 0.5}),
}
CLASSES = 5
TRAINING = {
    "seed": 3,
    "total_steps": 8,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "device": "cpu",
    "timeout": 10.0,
}
COMPILER = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
COLLECTIVES = (
    r"= .*? (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
BATCH = 16
STEPS, STEP_SAVED, STEP_SPOILT = 6, 3, 4
COMPILED = []
"""One entry per program that the script has compiled."""


def make_engine(name, parallel="ddp", **training):
    training = TrainingConfig(**{**TRAINING, **OPTIONS[name], **training}, parallel=parallel)
    return Engine(create_config(**{"init_seed": 3, **METHODS[name]}), training)


def let_black_images_spoil_a_step():
    """Make the loss of an MAE nonfinite if one of its images is black."""
    call = MAE.__call__

    def call_spoilt(self, images, noise):
        output = call(self, images, noise)
        output.loss = jnp.where((images.max((1, 2, 3)) == 0).any(), jnp.nan, output.loss)
        return output

    MAE.__call__ = call_spoilt


def rows(engine):
    """Return the images of the next step, and their numbers, of this process."""
    images = np.random.default_rng(engine.step).integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8)
    if engine.step + 1 == STEP_SPOILT:
        images[-1] = 0
    sample = np.arange(engine.step * BATCH, (engine.step + 1) * BATCH)
    mine = slice(engine.rank, None, engine.world_size)
    return images[mine], sample[mine]


def train(engine, last):
    """Train up to a step; return what is measured in each step."""
    curve = []
    while engine.step < last:
        engine.train_step(*rows(engine))
        curve.append(engine.read_metrics())
    return curve


def save(engine, directory):
    """Begin to save; training goes on meanwhile."""
    if engine.rank == 0:
        directory.mkdir(parents=True)
    engine.any(False)  # until it is there
    return engine.async_save(directory)


def draw(name, parallel, shared, own):
    """Run a method, save it twice, and resume: there, and from a single-device run."""
    engine = make_engine(name, parallel)
    curve = train(engine, STEP_SAVED)
    saving = save(engine, own / name / parallel / "half")
    curve += train(engine, STEPS)
    saving.result()
    before = len(COMPILED)
    save(engine, own / name / parallel / "end").result()
    compiled = len(COMPILED) - before
    result = {"curve": curve, "device": engine.device, "held": held(engine), "compiled by a save": compiled}
    engine.restore(own / name / parallel / "half")
    result["resumed"] = train(engine, STEPS)
    if shared is not None:
        engine.restore(shared / "one" / name / "ddp" / "half")
        result["from one"] = train(engine, STEPS)
    result["programs"] = engine._train._cache_size()
    return result, engine


def draw_all(pairs, shared, own):
    """Train each pair, and count the messages between its devices.

    The first of several processes draws pictures.
    """
    results = {}
    for name, parallel in pairs:
        result, engine = draw(name, parallel, shared, own)
        result |= talk(engine)
        if engine.world_size > 1 and not results:
            result |= look(engine)
        results[f"{name} {parallel}"] = result
        result["rushed"] = rush(engine)
        engine.close()
    return results


def rush(engine, steps=30):
    """Take steps without reading what they measure."""
    images, sample = rows(engine)
    for _ in range(steps):
        engine.train_step(images, sample)
    return engine.read_metrics()["skipped"]


def look(engine):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    patches = engine.reconstruct(images, np.arange(3)).patches
    return {
        "features": engine.features(images).tolist(),
        "patches": np.nan_to_num(patches, nan=-9).tolist(),
        "attention": engine.attention(images).tolist(),
    }


def held(engine):
    """Count the numbers of which one device has to keep weights and moments."""
    adam = engine._state.moments[0]
    arrays = jax.tree.leaves((engine._state.parameters, adam.mu, adam.nu))
    return sum(array.addressable_shards[0].data.size for array in arrays)


def talk(engine):
    """Count collective operations per step, by kind, and their share inside loops."""
    batch = tuple(map(engine._layout.put_rows, engine._inputs(*rows(engine))))
    program = engine._train.lower(engine._state, engine._buffers, batch, 0, 0.0).compile().as_text()
    lines = [line for line in program.splitlines() if re.search(COLLECTIVES, line)]
    kinds = Counter(re.search(COLLECTIVES, line).group(1) for line in lines)
    return {"talk": dict(kinds), "talk in loops": sum("while/body" in line for line in lines)}


def local_curves(shared, own):
    return draw_all([("mae", "ddp"), ("simmim", "fsdp")], shared, own)


def two_curves(shared, own):
    return draw_all([("mae", "fsdp"), ("simmim", "ddp")], shared, own)


def make_classifier(name, parallel="ddp", **more):
    method, options, training = CLASSIFIERS[name]
    training = TrainingConfig(**{**TRAINING, "betas": (0.9, 0.999), **training, **more}, parallel=parallel)
    config = create_config(**{"init_seed": 3, **method})
    return ClassifierEngine(config, ClassifierConfig(**options), CLASSES, training)


def classify(name, parallel, directory):
    """Train a classifier, and take it up again where it was saved on the way."""
    engine = make_classifier(name, parallel)
    curve = train_classifier(engine, STEP_SAVED)
    saving = save(engine, directory / name / parallel / "half")
    curve += train_classifier(engine, STEPS)
    saving.result()
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    logits = engine.predict(images).tolist()
    save(engine, directory / name / parallel / "end").result()
    engine.restore(directory / name / parallel / "half")
    resumed = train_classifier(engine, STEPS)
    result = {"curve": curve, "resumed": resumed, "logits": logits, "again": engine.predict(images).tolist()}
    result["programs"] = engine._train._cache_size()
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
        mine = slice(engine.rank, None, engine.world_size) if rows is None else rows
        engine.train_step(images[mine], sample[mine], targets[mine])
        curve.append(engine.read_metrics())
    return curve


def classifiers(shared, own):
    return {
        f"{name} {parallel}": classify(name, parallel, own)
        for name, parallel in (("finetune", "fsdp"), ("probe", "ddp"), ("device_probe", "ddp"))
    }


def message_of(call):
    try:
        call()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def agreement(shared, own):
    """Let one process know, or miss, what the others do not."""
    engine = make_engine("mae", "fsdp")
    wanted = own / "missing" if engine.rank == 1 else shared / "one" / "mae" / "ddp" / "half"
    return {
        "any": [engine.any(engine.rank == 1), engine.any(False), engine.any(True)],
        "missing": message_of(lambda: engine.restore(wanted)),
        "step": engine.step,
    }


def die(shared, own):
    """Let the last process die in the middle of a run."""
    engine = make_engine("mae", "fsdp")
    train(engine, 2)
    engine.any(False)
    if engine.rank == engine.world_size - 1:
        (own / "left").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        train(engine, 100_000)
    finally:
        engine.close()


JOBS = {job.__name__: job for job in (local_curves, two_curves, classifiers, agreement)}


def count_compiled(event, seconds, **more):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=Path)
    parser.add_argument("own")
    parser.add_argument("jobs", nargs="+")
    arguments = parser.parse_args()
    shared, own = arguments.shared, arguments.shared / arguments.own
    for name, value in {**COMPILER, "jax_compilation_cache_dir": str(shared / "compiled")}.items():
        jax.config.update(name, value)
    jax.monitoring.register_event_duration_secs_listener(count_compiled)
    let_black_images_spoil_a_step()
    if arguments.jobs == ["die"]:
        die(shared, own)
    # The first engine connects the processes; those between leave them connected.
    first = make_engine("mae")
    results = {job: JOBS[job](shared, own) for job in arguments.jobs}
    assert COMPILED
    (own / f"rank_{first.rank}.json").write_text(json.dumps(results))
    first.close()
    first.close()


if __name__ == "__main__":
    main()
