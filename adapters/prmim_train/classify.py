"""How good is an encoder once a classifier is trained on it: fine-tuning, and the linear probe by LARS.

The training goes through `prmim_train.loop.train` as pre-training does: it is logged, checkpointed and resumed in the
same way, in a folder inside that of the run.
"""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_core.options import pixel_statistics
from prmim_train.augment import Augment
from prmim_train.budget import training_budget
from prmim_train.classify_config import ClassifyConfig, classify_config
from prmim_train.config import PretrainConfig
from prmim_train.data import Batch, BatchIterator, evaluation_batches, train_batches
from prmim_train.engine import ClassifierEngine, create_classifier_engine
from prmim_train.layers import parse_options
from prmim_train.loop import Job, train
from prmim_train.mixing import Mixing
from prmim_train.prepare import LabelledImages, find_checkpoint, labelled_sides, open_data, read_run_config
from prmim_train.processes import launched, on_main, say
from prmim_train.run_directory import RunDirectory, write_atomically
from prmim_train.score_pictures import draw_confusion, draw_learning
from prmim_train.scores import format_score, score

__all__ = ["Classification", "Predictions", "classify_command", "cross_entropy", "predict"]

TITLES = {"finetune": "Fine-tuning", "linear": "Linear probe by LARS"}
FEWEST_STEPS = 10  # an epoch: below that a batch is hardly meant to be as large
ENOUGH_REACH = 10.0  # trust x learning rate x steps, with which a head by LARS came to its end


class Predictions(NamedTuple):
    """What a classifier made of some images.

    Parameters
    ----------
    logits
        float32 (images, classes).
    truth
        Class of each image, int64.
    unreadable
        Images that could not be read, and are left out: why, by name.
    """

    logits: NDArray[np.float32]
    truth: NDArray[np.int64]
    unreadable: dict[str, str]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class that each image was taken for, int64."""
        predicted: NDArray[np.int64] = self.logits.argmax(axis=1)
        return predicted


class Classification(Job[ClassifierEngine]):
    """The training of a classifier on a run's encoder; at the end it is judged on images never trained on.

    Parameters
    ----------
    config
        The options of the classifier.
    pretrained
        The run that trained the encoder.

    Raises
    ------
    ValueError
        If the images have no labels, or there is nothing to test on.
    FileNotFoundError
        If the run has no such checkpoint, and the classifier none either.
    """

    def __init__(self, config: ClassifyConfig, pretrained: RunDirectory) -> None:
        _check_halves(config)
        base = read_run_config(pretrained, data=config.data, holdout=config.holdout)
        data = open_data(base)
        self.base = _on_backend(base, config.backend)
        self.train, self.test = labelled_sides(data, config.test_data)
        self.budget = training_budget(config, len(self.train.indices))
        self.measure_epochs = config.test_every
        self.weights: Path | None = None
        # A classifier that goes on has its encoder with it, and the run's checkpoint may be gone.
        if not (config.resume and RunDirectory(config.run_path).checkpoints()):
            checkpoint = find_checkpoint(pretrained, config.checkpoint)
            config = replace(config, checkpoint=int(checkpoint.name.removeprefix("step_")))
            self.weights = checkpoint / "weights.safetensors"
        self.config: ClassifyConfig = config
        self.command = f"prmim evaluate --run {pretrained.path} --protocol {config.protocol}"
        self.command += " --solver lars" if config.protocol == "linear" else ""
        self.command += "" if config.run_path == pretrained.path / config.protocol else f" --out {config.run_path}"
        self.command += " --resume"
        self._tested: tuple[int, Predictions] | None = None

    def create_engine(self) -> ClassifierEngine:
        """Build the classifier."""
        num_classes = len(self.train.class_names)
        return create_classifier_engine(
            self.config, self.base, self.budget, num_classes=num_classes, weights=self.weights
        )

    def describe(self, engine: ClassifierEngine) -> str:
        """Tell what is about to be trained, and what is likely to be wrong with it."""
        config, steps = self.config, self.budget.steps_per_epoch
        lines = [
            f"{TITLES[config.protocol]} of {self.base.traits.title} ({self.base.run_path}, step {config.checkpoint}), "
            f"{engine.num_parameters:,} learned parameters, on {engine.device}",
            f"  learns from {len(self.train.indices):,} images ({self.train.source.description})",
            f"  tested on {len(self.test.indices):,} images ({self.test.source.description})",
            f"  {self.budget.total_steps:,} steps of {config.batch_size:,} images ({config.epochs} epochs), "
            f"peak learning rate {config.learning_rate:g} ({config.base_learning_rate:g} x {config.batch_size} / 256)",
        ]
        if steps < FEWEST_STEPS:
            lines.append(
                f"  note: batch_size {config.batch_size:,} leaves {steps:.1f} steps an epoch of "
                f"{len(self.train.indices):,} images; the published one is meant for ImageNet"
            )
        # A step of LARS is as long as the weights are, times this.
        reach = config.trust * config.learning_rate * self.budget.total_steps
        if config.protocol == "linear" and reach < ENOUGH_REACH / 2:
            rate = float(f"{config.base_learning_rate * ENOUGH_REACH / reach:.0e}")
            lines.append(
                f"  note: trust x learning rate x steps is {reach:.2g}, too little for the head to learn much (it is "
                f"45 in the published recipe); try --base_learning_rate {rate:g}"
            )
        return "\n".join(lines)

    def batches(self, engine: ClassifierEngine) -> BatchIterator[Batch]:
        """Return augmented images and soft targets."""
        config = self.config
        mixing = Mixing(
            self.train.labels,
            len(self.train.class_names),
            config.seed,
            mixup=config.mixup,
            cutmix=config.cutmix,
            switch=config.mix_switch,
            smoothing=config.label_smoothing,
        )
        return train_batches(
            self.train.source,
            indices=self.train.indices,
            batch_size=config.batch_size,
            image_size=self.base.image_plane,
            seed=config.seed,
            start_step=engine.step,
            total_steps=self.budget.total_steps,
            crop_scale=config.crop_scale,
            crop_ratio=config.crop_ratio,
            flip=config.flip,
            augment=_augment(config, self.base) if config.rand_augment or config.erasing else None,
            mix=mixing,
            workers=config.workers,
            rank=engine.rank,
            world_size=engine.world_size,
        )

    def take_step(self, engine: ClassifierEngine, batch: Batch) -> None:
        """Learn from a batch."""
        assert batch.targets is not None
        engine.train_step(batch.images, batch.index, batch.targets)

    def measure(self, engine: ClassifierEngine) -> dict[str, Any]:
        """Test."""
        tested = self._test(engine)
        return {
            "test_loss": cross_entropy(tested.logits, tested.truth),
            "test_accuracy": float(np.mean(tested.predicted == tested.truth)),
        }

    def facts(self) -> dict[str, Any]:
        """Return protocol and data."""
        return {
            "protocol": self.config.protocol,
            "run": str(self.base.run_path),
            "checkpoint": self.config.checkpoint,
            "data": self.train.source.description,
            "train_images": len(self.train.indices),
            "classes": len(self.train.class_names),
        }

    def conclude(self, run: RunDirectory, engine: ClassifierEngine, summary: dict[str, Any]) -> None:
        """Judge the classifier, write `evaluation.json`, draw pictures."""
        tested = self._test(engine)
        summary["evaluation"] = {
            "test_data": self.test.source.description,
            **score(tested.truth, tested.predicted, self.test.class_names),
            "loss": cross_entropy(tested.logits, tested.truth),
            "unreadable_test_images": tested.unreadable,
        }
        on_main(engine, lambda: self._report(run, engine.step, tested, summary["evaluation"]))

    def elsewhere(self, weights: Path) -> str:
        """Say that a classifier has to begin anew."""
        return "begin another one with --out ANOTHER"

    def _test(self, engine: ClassifierEngine) -> Predictions:
        """Let the classifier judge the test images; what it says after the last step is needed twice."""
        if self._tested is None or self._tested[0] != engine.step:
            size, share = min(256, self.config.micro_batch), self.config.test_crop
            tested = predict(engine, self.test, self.base.image_plane, batch_size=size, share=share)
            self._tested = (engine.step, tested)
        return self._tested[1]

    def _report(self, run: RunDirectory, step: int, tested: Predictions, found: dict[str, Any]) -> None:
        """Print and write how good the classifier is."""
        title, names = TITLES[self.config.protocol], self.test.class_names
        print(f"{title}: {format_score(found)}")
        if tested.unreadable:
            print(f"Test images left out, since they cannot be read: {len(tested.unreadable):,}")
        curves, confusion = run.path / "curves.png", run.path / "confusion.png"
        draw_learning(curves, run.read_metrics())
        print(f"Picture: {curves}")
        if draw_confusion(confusion, tested.truth, tested.predicted, names, f"{title}, after the last step"):
            print(f"Picture: {confusion}")
        options = {name: value for name, value in asdict(self.config).items() if name not in ("out", "resume")}
        record = {**self.facts(), "step": step, **found, "options": options}
        write_atomically(run.path / "evaluation.json", (json.dumps(record, indent=2) + "\n").encode())
        print(f"Written: {run.path / 'evaluation.json'}")


def classify_command(run: str, *, protocol: str, **given: Any) -> None:
    """Train a classifier on the encoder of a run, judge it, and write all of it into a folder inside the run's.

    Parameters
    ----------
    run
        The run's folder.
    protocol
        `finetune` or `linear`.
    **given
        Options of `ClassifyConfig`; those that are None are left.

    Raises
    ------
    ValueError, TypeError, OSError, Interrupted, NonFiniteLoss, FailedElsewhereError
        See `prmim_train.loop.pretrain`.
    """
    directory = RunDirectory.open(Path(run))
    base = read_run_config(directory)
    given = {"protocol": protocol, **{name: value for name, value in given.items() if value is not None}}
    folder = Path(given.get("out", directory.path / protocol))
    if given.get("resume"):
        if RunDirectory.holds_run(folder):
            given = {**_read_classifier(RunDirectory(folder), protocol), **given}
        else:
            say(f"No classifier in {folder} yet: a new one begins.")
    train(Classification(classify_config(base, {**given, "out": str(folder)}), directory))


def _read_classifier(run: RunDirectory, protocol: str) -> dict[str, Any]:
    """Return the options of a classifier that goes on."""
    options = parse_options(run.read_config(), str(run.path))
    if options.get("protocol") != protocol:
        raise ValueError(f"out: expected the folder of a classifier by {protocol}, got another run, {run.path}")
    unknown = set(options) - {field.name for field in fields(ClassifyConfig)}
    if unknown:
        raise ValueError(f"out: expected options of prmim evaluate in {run.path / 'config.yaml'}, got {min(unknown)}")
    return options


def predict(
    engine: ClassifierEngine,
    images: LabelledImages,
    image_size: tuple[int, int],
    *,
    batch_size: int = 256,
    share: float = 1.0,
) -> Predictions:
    """Let a classifier judge the centres of some images.

    Parameters
    ----------
    engine
        The classifier.
    images
        The images.
    image_size
        Height and width in pixels.
    batch_size
        Images that go through the network at a time; changes nothing but the speed.
    share
        See `prmim_train.transforms.center_crop`.

    Returns
    -------
    Predictions

    Raises
    ------
    ValueError
        If none of the images can be read.
    """
    logits, truth = [], []
    with evaluation_batches(
        images.source, images.indices, batch_size=batch_size, image_size=image_size, share=share
    ) as batches:
        for batch in batches:
            logits.append(engine.predict(batch.images))
            truth.append(images.labels[batch.index])
        unreadable = batches.unreadable.reasons
    return Predictions(np.concatenate(logits), np.concatenate(truth), unreadable)


def cross_entropy(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """Return the mean cross-entropy of logits (images, classes) against classes (images,).

    Examples
    --------
    >>> round(cross_entropy(np.zeros((3, 4), np.float32), np.array([0, 1, 2])), 4)  # log 4
    1.3863
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_sums - shifted[np.arange(len(truth)), truth]))


def _augment(config: ClassifyConfig, base: PretrainConfig) -> Augment:
    return Augment(
        *pixel_statistics(base.mean, base.std, base.channels),
        operations=config.rand_augment_operations,
        level=config.rand_augment,
        spread=config.rand_augment_spread,
        erasing=config.erasing,
    )


def _check_halves(config: ClassifyConfig) -> None:
    """Raise ValueError where mixing would depend on the number of processes: see the notes of `Mixing`."""
    world_size = launched().world_size
    if world_size > 1 and (config.mixup or config.cutmix) and config.batch_size // world_size % 2:
        raise ValueError(
            f"batch_size: expected an even number of images for each of the {world_size} processes, for mixup and "
            f"cutmix, got {config.batch_size} for all"
        )


def _on_backend(base: PretrainConfig, backend: str) -> PretrainConfig:
    """Return the options of a run for a backend, which may be another: weights go over, ways of computing do not."""
    return base if base.backend == backend else replace(base, backend=backend, scan_blocks=False)
