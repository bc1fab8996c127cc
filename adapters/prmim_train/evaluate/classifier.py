"""Fine-tuning, and linear probing with LARS.

Classifiers use the same training loop as pre-training (`prmim_train.run.loop.train`), with its logs, checkpoints and
resuming. Their run directory is a subfolder of the pre-training run.
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prmim_methods.files import expanded
from prmim_methods.record import options as options_of
from prmim_methods.sizes import Transformer
from prmim_methods.weight_files import WEIGHTS_FILE
from prmim_train.config.classify import ClassifyConfig, classify_config
from prmim_train.config.layers import NOT_STORED, merge_layers
from prmim_train.config.pretrain import PretrainConfig, change
from prmim_train.config.training import SAMPLING, SOURCE_OPTIONS
from prmim_train.data.augment import Augment
from prmim_train.data.batches import Batch, BatchIterator, evaluation_batches, train_batches
from prmim_train.data.mixing import Mixing
from prmim_train.evaluate.score_pictures import draw_confusion, draw_learning
from prmim_train.evaluate.scores import format_score, score, write_predictions
from prmim_train.run.budget import training_budget
from prmim_train.run.directory import CONFIG, RunDirectory
from prmim_train.run.engine import ClassifierEngine, create_classifier_engine
from prmim_train.run.files import write_json
from prmim_train.run.loop import Job, train
from prmim_train.run.manifest import step_of
from prmim_train.run.origin import Origin, data_origin, image_facts, read_trained
from prmim_train.run.prepare import (
    LabelledImages,
    check_frames,
    find_checkpoint,
    labelled_sides,
    open_run_data,
    read_run_config,
)
from prmim_train.run.processes import launched, on_main, say

__all__ = ["Classification", "Predictions", "classify_command", "cross_entropy", "predict"]

TITLES = {"finetune": "Fine-tuning", "linear": "Linear probe with LARS"}
EARLIER = {"linear": {"crop_draw": "retry", "batch_norm": "all"}}
"""Values of these options for classifiers of earlier versions, by protocol, where the recipe now differs."""
FEWEST_STEPS = 10  # per epoch; fewer suggest that batch_size is unintentionally large
ENOUGH_REACH = 10.0  # trust x learning rate x steps with which a linear head converged under LARS


class Predictions(NamedTuple):
    """Predictions of a classifier.

    Parameters
    ----------
    logits
        float32 (images, classes).
    truth
        True class of each image, int64.
    unreadable
        Unreadable images, which are excluded: name to reason.
    """

    logits: NDArray[np.float32]
    truth: NDArray[np.int64]
    unreadable: dict[str, str]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Predicted class of each image, int64."""
        predicted: NDArray[np.int64] = self.logits.argmax(axis=1)
        return predicted


class Classification(Job[ClassifierEngine]):
    """Training and evaluation of a classifier on a pre-trained encoder.

    Parameters
    ----------
    config
        Options of the classifier.
    pretrained
        The pre-training run.

    Raises
    ------
    ValueError
        If there are no labels or no test images.
    FileNotFoundError
        If neither the pre-training run nor the classifier has the checkpoint.
    """

    def __init__(self, config: ClassifyConfig, pretrained: RunDirectory) -> None:
        _check_halves(config)
        self.pretrained = pretrained
        given = (*SOURCE_OPTIONS, *SAMPLING, "holdout", "max_pixels")
        base = read_run_config(pretrained, **{name: getattr(config, name) for name in given})
        for name in ("rand_augment", "erasing"):
            if base.method.pixel_range is not None and getattr(config, name):
                raise ValueError(f"{name}: expected 0 for a run with a pixel_range, got {getattr(config, name):g}")
        data = open_run_data(pretrained, base, allow_changes=config.allow_changes)
        self.base = _on_backend(base, config.backend)
        check_frames(base.method, config.image_size)
        self.image_size = config.encoder(base.method).image_size
        self.train, self.test = labelled_sides(data, config.test_data, read_trained(pretrained))
        self.budget = training_budget(config, len(self.train.indices))
        self.measure_epochs = config.test_every
        self.weights: Path | None = None
        # The checkpoint of a classifier holds its encoder, so that of the pre-training run may be deleted.
        if not (config.resume and RunDirectory(config.run_path).checkpoints()):
            checkpoint = find_checkpoint(pretrained, config.checkpoint)
            config = replace(config, checkpoint=step_of(checkpoint))
            self.weights = checkpoint / WEIGHTS_FILE
        self.config: ClassifyConfig = config
        words = ["prmim", "evaluate", "--run", str(pretrained.path), "--protocol", config.protocol]
        words += ["--solver", "lars"] if config.protocol == "linear" else []
        words += [] if config.run_path == pretrained.path / config.protocol else ["--out", str(config.run_path)]
        self.command = shlex.join([*words, "--resume"])
        self._tested: tuple[int, Predictions] | None = None

    @property
    def size(self) -> Transformer:
        """Size of the encoder."""
        return self.base.method.encoder_size

    def create_engine(self) -> ClassifierEngine:
        """Build the engine of the classifier."""
        return create_classifier_engine(
            self.config,
            self.base,
            self.budget,
            num_classes=len(self.train.class_names),
            weights=self.weights,
        )

    def origin(self) -> Origin:
        """Return the origin: training and test images, and the run of the encoder."""
        found = data_origin(self.train.source, self.train.indices)
        facts = {**found.facts, "encoder": (self.pretrained.read_identity() or (None,))[0]}
        if self.test.source is not self.train.source:
            facts |= image_facts(self.test.source, self.test.source.identities(), "test_")
        return replace(found, facts=facts)

    def describe(self, engine: ClassifierEngine) -> str:
        """Describe the training, with notes on unsuitable hyperparameters."""
        config, steps = self.config, self.budget.steps_per_epoch
        lines = [
            f"{TITLES[config.protocol]} of {self.base.method.title} ({self.base.run_path}, step {config.checkpoint}), "
            f"{engine.num_parameters:,} trainable parameters, on {engine.device}",
            f"  training images: {len(self.train.indices):,} ({self.train.source.description})",
            f"  test images: {len(self.test.indices):,} ({self.test.source.description})",
            f"  {self.budget.total_steps:,} steps of {config.batch_size:,} images ({config.epochs} epochs), "
            f"peak learning rate {config.learning_rate:g} ({config.base_learning_rate:g} x {config.batch_size} / 256)",
        ]
        if steps < FEWEST_STEPS:
            lines.append(
                f"  note: with batch_size {config.batch_size:,}, an epoch of {len(self.train.indices):,} images has "
                f"{steps:.1f} steps; the published batch size is meant for ImageNet"
            )
        # A LARS step changes a weight matrix by trust x learning rate, relative to its norm.
        reach = config.trust * config.learning_rate * self.budget.total_steps
        if config.protocol == "linear" and reach < ENOUGH_REACH / 2:
            rate = float(f"{config.base_learning_rate * ENOUGH_REACH / reach:.0e}")
            lines.append(
                f"  note: trust x learning rate x steps is {reach:.2g}, too small for the head to converge (45 in the "
                f"published recipe); try --base_learning_rate {rate:g}"
            )
        return "\n".join(lines)

    def batches(self, engine: ClassifierEngine) -> BatchIterator[Batch]:
        """Iterate over augmented images and soft targets."""
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
            image_size=self.image_size,
            seed=config.seed,
            start_step=engine.step,
            total_steps=self.budget.total_steps,
            crop_scale=config.crop_scale,
            crop_ratio=config.crop_ratio,
            crop_draw=config.crop_draw,
            crop_padding=config.crop_padding,
            flip=config.flip,
            augment=_augment(config, self.base) if config.rand_augment or config.erasing else None,
            mix=mixing,
            workers=config.workers,
            rank=engine.rank,
            world_size=engine.world_size,
        )

    def take_step(self, engine: ClassifierEngine, batch: Batch) -> None:
        """Take one optimizer step."""
        assert batch.targets is not None
        engine.train_step(batch.images, batch.index, batch.targets)

    def measure(self, engine: ClassifierEngine) -> dict[str, Any]:
        """Evaluate on the test images."""
        tested = self._test(engine)
        return {
            "test_loss": cross_entropy(tested.logits, tested.truth),
            "test_accuracy": float(np.mean(tested.predicted == tested.truth)),
        }

    def facts(self) -> dict[str, Any]:
        """Return protocol, pre-training run, and data."""
        return {
            "protocol": self.config.protocol,
            "run": str(self.base.run_path),
            "checkpoint": self.config.checkpoint,
            "data": self.train.source.description,
            "train_images": len(self.train.indices),
            "classes": len(self.train.class_names),
            "image_size": list(self.image_size),
        }

    def conclude(self, run: RunDirectory, engine: ClassifierEngine, summary: dict[str, Any]) -> None:
        """Evaluate, write `evaluation.json`, and draw pictures."""
        tested = self._test(engine)
        summary["evaluation"] = {
            "test_data": self.test.source.description,
            **score(tested.truth, tested.predicted, self.test.class_names),
            "loss": cross_entropy(tested.logits, tested.truth),
            "unreadable_test_images": tested.unreadable,
        }
        on_main(engine, lambda: self._report(run, engine.step, tested, summary["evaluation"]))

    def restart_hint(self, weights: Path) -> str:
        """Explain how to start a new classifier."""
        return "start another classifier with --out ANOTHER"

    def _test(self, engine: ClassifierEngine) -> Predictions:
        """Predict the test images.

        Cached, since the predictions after the last step are needed twice.
        """
        if self._tested is None or self._tested[0] != engine.step:
            size, share = self.config.evaluation_batch, self.config.test_share(self.image_size)
            tested = predict(engine, self.test, self.image_size, batch_size=size, share=share)
            self._tested = (engine.step, tested)
        return self._tested[1]

    def _report(self, run: RunDirectory, step: int, tested: Predictions, found: dict[str, Any]) -> None:
        """Print and write the evaluation."""
        title, names = TITLES[self.config.protocol], self.test.class_names
        print(f"{title}: {format_score(found)}")
        if tested.unreadable:
            print(f"Unreadable test images, left out: {len(tested.unreadable):,}")
        curves, confusion = run.path / "curves.png", run.path / "confusion.png"
        draw_learning(curves, run.read_metrics())
        print(f"Picture: {curves}")
        if draw_confusion(confusion, tested.truth, tested.predicted, names, f"{title}, after the last step"):
            print(f"Picture: {confusion}")
        options = {name: value for name, value in self.config.flat().items() if name not in NOT_STORED}
        record = {**self.facts(), "step": step, **found, "options": options}
        write_predictions(run.path / "predictions.npz", tested.truth, {self.config.protocol: tested.predicted})
        write_json(run.path / "evaluation.json", record)
        print(f"Written: {run.path / 'evaluation.json'}")


def classify_command(run: str, *, protocol: str, **given: Any) -> None:
    """Train and evaluate a classifier on a run's encoder, in a subfolder of the run.

    Parameters
    ----------
    run
        Folder of the pre-training run.
    protocol
        `finetune` or `linear`.
    **given
        Options of `ClassifyConfig`.

    Raises
    ------
    ValueError, TypeError, OSError, Interrupted, NonFiniteLoss, FailedElsewhereError
        See :func:`prmim_train.pretrain.pretrain`.
    """
    directory = RunDirectory.open(expanded(run))
    base = read_run_config(directory)
    folder = expanded(given.get("out") or str(directory.path / protocol))
    given = {**given, "protocol": protocol, "out": str(folder)}
    if given.get("resume"):
        if RunDirectory.holds_run(folder):
            stored = _read_classifier(RunDirectory(folder), protocol)
            if given.get("checkpoint") is None:  # the last one of the run may be newer now
                given.pop("checkpoint", None)
            given = merge_layers(stored, given)
        else:
            say(f"No classifier in {folder} yet: starting a new one.")
    train(Classification(classify_config(base, given), directory))


def _read_classifier(run: RunDirectory, protocol: str) -> dict[str, Any]:
    """Read the options of a classifier to resume."""
    options = run.read_config()
    if options.get("protocol") != protocol:
        raise ValueError(f"out: expected the folder of a {protocol} classifier, got another run in {run.path}")
    unknown = set(options) - {item.name for item in options_of(ClassifyConfig)}
    if unknown:
        raise ValueError(f"out: expected options of prmim evaluate in {run.path / CONFIG}, got {min(unknown)}")
    return {**EARLIER.get(protocol, {}), **options}


def predict(
    engine: ClassifierEngine,
    images: LabelledImages,
    image_size: tuple[int, ...],
    *,
    batch_size: int = 256,
    share: float = 1.0,
) -> Predictions:
    """Predict the center crops of images.

    Parameters
    ----------
    engine
        The classifier.
    images
        The images.
    image_size
        [Frames,] height and width in pixels.
    batch_size
        Images per forward pass. Affects only the speed.
    share
        See `prmim_train.data.transforms.center_crop`.

    Returns
    -------
    Predictions

    Raises
    ------
    ValueError
        If no image can be read.
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
    """Mean cross-entropy of logits (images, classes) and true classes (images,).

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
        base.method.pixel_mean,
        base.method.pixel_std,
        operations=config.rand_augment_operations,
        level=config.rand_augment,
        spread=config.rand_augment_spread,
        erasing=config.erasing,
    )


def _check_halves(config: ClassifyConfig) -> None:
    """Check that mixing does not depend on the number of processes.

    See the notes of `Mixing`.
    """
    world_size = launched().world_size
    if world_size > 1 and (config.mixup or config.cutmix) and config.batch_size // world_size % 2:
        raise ValueError(
            f"batch_size: expected an even number of images per process for mixup and cutmix, got {config.batch_size} "
            f"for {world_size} processes"
        )


def _on_backend(base: PretrainConfig, backend: str) -> PretrainConfig:
    """Return the options of a run for another backend.

    Weights are portable; `scan_blocks` is an option of JAX only.
    """
    return base if base.backend == backend else change(base, backend=backend, scan_blocks=False)
