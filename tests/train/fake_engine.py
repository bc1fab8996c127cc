"""A small framework: a linear autoencoder in NumPy behind the engine's calls.

Tests register it as the backend `fake`; it is quick, exact and can be told to fail.  Under the name `maskalign` it
keeps its autoencoder and compares features with a teacher that is a fixed projection of the patches.  Knobs, set as
class attributes or, for runs in another process, by environment variables: `delay` (seconds per step), `bad_steps` (the
steps that are not finite), `save_error` (raised halfway through a save).
"""

import math
import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import load_file, save_file

from prmim_core import block_visible, counter_noise, make_plan, patchify, unattended_visible
from prmim_methods import ClassifierConfig, MethodConfig, TrainingConfig
from prmim_methods.hardware import Choice, choose_precision, is_slow
from prmim_methods.outputs import Comparison, Reconstruction
from prmim_methods.sizes import Transformer

DIM = 32
TEACHER_DIM = 24


class Engine:
    delay: ClassVar[float] = float(os.environ.get("PRMIM_FAKE_DELAY", "0"))
    bad_steps: ClassVar[tuple[int, ...]] = ()
    save_error: ClassVar[Exception | None] = None
    slowdown: ClassVar[float | None] = None
    num_devices: ClassVar[int] = 1
    made: ClassVar[list["Engine"]] = []

    def __init__(self, config: MethodConfig, training: TrainingConfig) -> None:
        self.config, self.training = config, training
        self.losses = config.losses
        self.schedule = config.schedule
        self.rank, self.world_size = 0, 1
        self.is_closed = False
        size = math.prod(config.image_size) * config.channels
        rng = np.random.default_rng(config.init_seed)
        self.encoder = rng.normal(0, size**-0.5, (size, DIM))
        self.decoder = rng.normal(0, DIM**-0.5, (DIM, size))
        self.momentum = [np.zeros_like(self.encoder), np.zeros_like(self.decoder)]
        self.step = 0
        self.device = "numpy"
        self.precision = choose_precision(training.precision, "cpu", backend="torch")
        self.compiled = Choice(False, "as given")
        self.seen: list[np.ndarray] = []
        self.bad = -1
        self.skipped_in_a_row = 0
        self._forget()
        Engine.made.append(self)

    @property
    def num_parameters(self) -> int:
        return self.encoder.size + self.decoder.size

    def measure_slowdown(self, size: Transformer) -> float | None:
        return self.slowdown if is_slow(self.precision.value, "cpu", backend="torch") else None

    def _forget(self) -> None:
        self.sums: list[tuple[float, ...]] = []
        self.skipped = 0

    def _plan(self, sample: np.ndarray, step: int, weights: np.ndarray | None = None) -> Any:
        grid = self.schedule.grid
        noise = counter_noise(self.training.seed, step, sample, grid.num_tokens)
        unit = getattr(self.config, "mask_shape", (1,) * grid.axes)
        number = self.schedule.counts.visible // math.prod(unit)
        if weights is None:
            visible = block_visible(grid, unit, number, noise)
        else:
            assert weights.dtype == np.float32
            visible = unattended_visible(grid, unit, number, noise, weights)
        return make_plan(self.schedule, noise, visible=visible, weights=weights)

    def _masks(self, plan: Any) -> tuple[np.ndarray, np.ndarray]:
        batch, length = plan.order.shape
        kinds = np.empty((batch, length), dtype=np.int64)
        counts = self.schedule.counts
        row = np.repeat([0, 1, 2], [counts.visible, counts.decoded, counts.thrown])
        np.put_along_axis(kinds, plan.order, np.broadcast_to(row, (batch, length)), axis=1)
        width = self.encoder.shape[0] // length
        return np.repeat(kinds == 1, width, axis=1), np.repeat(kinds == 2, width, axis=1)

    def _flat(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8
        return patchify(images / 255.0, self.config.patch_size).reshape(len(images), -1)

    def train_step(self, images: np.ndarray, sample: np.ndarray, weights: np.ndarray | None = None) -> None:
        time.sleep(self.delay)
        self.seen.append(sample)
        pixels = self._flat(images)
        is_decoded, is_thrown = self._masks(self._plan(sample, self.step, weights))
        is_masked = is_decoded | is_thrown
        encoded = np.where(is_masked, 0, pixels) @ self.encoder
        error = np.where(is_masked, encoded @ self.decoder - pixels, 0)
        loss = float(np.sum(error**2) / is_masked.sum())
        slope = 2 * error / len(images)
        gradients = [np.where(is_masked, 0, pixels).T @ (slope @ self.decoder.T), encoded.T @ slope]
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gradients))
        if not self._update(gradients):
            return
        error = encoded @ self.decoder - pixels
        # Cells are not modelled: every token that is not thrown has them.
        tokens = {"decoded": is_decoded, "visible": ~is_masked, "thrown": is_thrown, "cells": ~is_thrown}
        measured = [tokens[name.removeprefix("loss_")] for name in self.losses[1:]]
        parts = [float(np.sum(error**2 * part) / max(1, part.sum())) for part in measured]
        self.sums.append((loss, *parts, norm))

    def _update(self, gradients: list[np.ndarray]) -> bool:
        """Apply the momentum, unless the step is set to fail; return whether it did."""
        self.step += 1
        if self.step in Engine.bad_steps:
            self.bad = self.step if self.bad < 0 else self.bad
            self.skipped += 1
            self.skipped_in_a_row += 1
            return False
        self.skipped_in_a_row = 0
        rate = self.training.learning_rate * min(1, self.step / max(1, self.training.warmup_steps))
        for weights, momentum, gradient in zip((self.encoder, self.decoder), self.momentum, gradients, strict=True):
            momentum *= 0.9
            momentum += gradient
            weights -= rate * momentum
        return True

    def read_metrics(self) -> dict[str, Any]:
        means = np.mean(self.sums, axis=0) if self.sums else [math.nan] * (len(self.losses) + 1)
        metrics: dict[str, Any] = dict(zip((*self.losses, "grad_norm"), map(float, means), strict=True))
        metrics |= {"learning_rate": self.training.learning_rate, "nonfinite_step": None if self.bad < 0 else self.bad}
        metrics |= {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        self._forget()
        return metrics

    def features(self, images: np.ndarray) -> np.ndarray:
        return (self._flat(images) @ self.encoder).astype(np.float32)

    def attention(self, images: np.ndarray) -> np.ndarray:
        """Errors of each token's reconstruction from the whole image.

        They change in every step.
        """
        pixels = self._flat(images)
        error = np.abs(pixels @ self.encoder @ self.decoder - pixels)
        error = error.reshape(len(images), self.schedule.counts.num_tokens, -1).mean(2)
        return (error / error.max(1, keepdims=True)).astype(np.float32)

    def reconstruct(self, images: np.ndarray, sample: np.ndarray) -> Reconstruction:
        assert self.config.predicts == "pixels"
        plan = self._plan(sample, 0, self.attention(images) if self.config.needs_weights else None)
        pixels = self._flat(images)
        is_decoded, is_thrown = self._masks(plan)
        predicted = np.where(is_decoded | is_thrown, 0, pixels) @ self.encoder @ self.decoder
        if not self.config.is_reconstructed:
            predicted = np.where(is_thrown, np.nan, predicted)
        patches = np.where(is_decoded | is_thrown, predicted, pixels).reshape(*plan.order.shape, -1)
        return Reconstruction(plan.order, self.schedule, patches.astype(np.float32))

    def compare(self, images: np.ndarray, sample: np.ndarray) -> Comparison:
        assert self.config.predicts == "features"
        plan = self._plan(sample, 0)
        patches = patchify(images / 255.0, self.config.patch_size)
        rng = np.random.default_rng(0)
        teacher = patches @ rng.normal(size=(patches.shape[-1], TEACHER_DIM)) + rng.normal(size=TEACHER_DIM)
        student = teacher + 0.3 * rng.normal(size=teacher.shape)
        if not self.config.is_reconstructed:
            np.put_along_axis(student, plan.thrown[..., None], np.nan, axis=1)
        return Comparison(plan.order, self.schedule, student.astype(np.float32), teacher.astype(np.float32))

    def async_save(self, directory: Path) -> Future[None]:
        saved: Future[None] = Future()
        try:
            saved.set_result(self._save(directory))
        except Exception as error:
            saved.set_exception(error)
        return saved

    def _save(self, directory: Path) -> None:
        save_file({"encoder": self.encoder, "decoder": self.decoder}, directory / "weights.safetensors")
        if Engine.save_error is not None:
            raise Engine.save_error
        with (directory / "training_state.npz").open("wb") as file:
            counts = [self.step, self.bad, self.skipped, self.skipped_in_a_row]
            sums = np.reshape(self.sums, (-1, len(self.losses) + 1))
            np.savez(file, first=self.momentum[0], second=self.momentum[1], counts=counts, sums=sums)

    def restore(self, directory: Path) -> None:
        self.load_weights(directory / "weights.safetensors")
        with np.load(directory / "training_state.npz", allow_pickle=False) as state:
            self.momentum = [state["first"], state["second"]]
            self.step, self.bad, self.skipped, self.skipped_in_a_row = state["counts"].tolist()
            self.sums = [tuple(row) for row in state["sums"].tolist()]

    def any(self, flag: bool) -> bool:
        return flag

    def close(self) -> None:
        self.is_closed = True

    def load_weights(self, path: Path) -> None:
        weights = load_file(path)
        if weights["encoder"].shape != self.encoder.shape:
            raise ValueError(f"weights: expected shape {self.encoder.shape}, got {weights['encoder'].shape} in {path}")
        self.encoder, self.decoder = weights["encoder"], weights["decoder"]

    def init_weights(self, source: Path) -> str:
        self.load_weights(source)
        return f"Initial weights: {source}"


class EncoderEngine(Engine):
    """The linear encoder alone; call number `fails_at` of `features` fails."""

    calls: ClassVar[int] = 0
    fails_at: ClassVar[int | None] = None

    def __init__(self, config: MethodConfig, training: TrainingConfig, weights: Path | None = None,
                 image_size: tuple[int, ...] | None = None) -> None:  # fmt: skip
        assert image_size in (None, config.image_size)
        super().__init__(config, training)
        if weights is not None:
            self.load_weights(weights)

    def features(self, images: np.ndarray, pool: str | None = "mean", layer: int | None = None) -> np.ndarray:
        self.asked = (pool, layer)
        EncoderEngine.calls += 1
        if EncoderEngine.calls == EncoderEngine.fails_at:
            raise OSError("no space left")
        return super().features(images)


class ClassifierEngine(Engine):
    """Softmax regression on the linear encoder; its head is the `decoder`.

    The encoder learns too, unless it is frozen.
    """

    def __init__(self, config: MethodConfig, classifier: ClassifierConfig, num_classes: int, training: TrainingConfig,
                 weights: Path | None = None) -> None:  # fmt: skip
        super().__init__(config, training)
        self.classifier = classifier
        self.losses = ("loss", "accuracy")
        if weights is not None:
            self.load_weights(weights)
        self.decoder = np.zeros((DIM, num_classes))
        self.momentum = [np.zeros_like(self.encoder), np.zeros_like(self.decoder)]

    def train_step(self, images: np.ndarray, sample: np.ndarray, targets: np.ndarray) -> None:
        time.sleep(self.delay)
        self.seen.append(sample)
        assert images.dtype == np.uint8
        assert targets.dtype == np.float32
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
        pixels = self._flat(images)
        encoded = pixels @ self.encoder
        logits = encoded @ self.decoder
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        loss = float(-np.mean(np.sum(targets * np.log(chances), axis=1)))
        slope = (chances - targets) / len(images)
        gradients = [pixels.T @ (slope @ self.decoder.T) * (not self.classifier.is_frozen), encoded.T @ slope]
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gradients))
        if self._update(gradients):
            self.sums.append((loss, float(np.mean(logits.argmax(1) == targets.argmax(1))), norm))

    def predict(self, images: np.ndarray) -> np.ndarray:
        return (self.features(images) @ self.decoder).astype(np.float32)
