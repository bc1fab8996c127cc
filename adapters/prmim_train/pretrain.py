"""One pre-training run, from the options to the pictures."""

import shlex
from math import ceil
from pathlib import Path
from typing import Any

from prmim_methods.checkpoints import find_source
from prmim_methods.sizes import Transformer
from prmim_train.config.packages import check_installed
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.data.batches import Batch, BatchIterator
from prmim_train.evaluate.features import evaluate_run, format_evaluation, probe_run
from prmim_train.report.inspect import format_brief
from prmim_train.report.pictures import draw_run
from prmim_train.run.attention import AttentionMaps
from prmim_train.run.directory import RunDirectory
from prmim_train.run.engine import Engine, create_engine
from prmim_train.run.loop import Job, train
from prmim_train.run.origin import Origin, run_origin
from prmim_train.run.prepare import leave_out_trained, open_data, training_batches, why_not
from prmim_train.run.processes import launched, say
from prmim_train.run.size import check_size

__all__ = ["Pretraining", "pretrain"]


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pre-train a model, evaluate it, and draw pictures.

    In a distributed run, every process calls this function. Only the main process prints and writes files.

    Parameters
    ----------
    config
        Options of the run.

    Returns
    -------
    dict
        Content of `summary.json`: final loss, speed, unreadable images, and (in the main process) the evaluation of
        the frozen features.

    Raises
    ------
    ValueError, TypeError
        If an option does not fit the data or the backend.
    OSError
        If data cannot be read or a checkpoint cannot be written. The last good checkpoint stays intact.
    Interrupted
        On Ctrl-C, SIGTERM or SIGHUP, after the current step and a checkpoint. In a distributed run, after the next
        logged step.
    NonFiniteLoss
        If the loss or a gradient is not finite, after a rescue checkpoint.
    FailedElsewhereError
        If something failed in the main process, which raises the original error.
    """
    return train(Pretraining(config))


class Pretraining(Job[Engine]):
    """Pre-training on masked images.

    At the end, evaluates frozen features and draws pictures.

    Parameters
    ----------
    config
        Options of the run.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config: PretrainConfig = config
        if config.pictures:
            check_installed("pictures", "matplotlib", otherwise="--pictures 0")
        self.data = open_data(config)
        if config.eval_limit and not why_not(self.data):
            check_installed("eval_limit", "sklearn", otherwise="--eval_limit 0")
        if config.resume:
            self.data = leave_out_trained(self.data, RunDirectory(config.run_path))
        self.budget = self.data.budget
        self.attention = (
            AttentionMaps(RunDirectory(config.run_path), config, self.data) if config.method.needs_weights else None
        )
        self.command = shlex.join(["prmim", "pretrain", "--out", str(config.run_path), "--resume"])
        if config.probe_every is not None:
            if reason := why_not(self.data):
                raise ValueError(f"probe_every: expected labelled images, some of them held out, but {reason}")
            self.measure_epochs = config.probe_every
        if not config.resume:
            self._initial_weights()

    @property
    def size(self) -> Transformer:
        """Size of the encoder."""
        return self.config.method.encoder_size

    def create_engine(self) -> Engine:
        """Build the engine, after checking that a training step fits into memory."""
        check_size(self.config, images=ceil(self.config.micro_batch / launched().world_size))
        return create_engine(self.config, self.budget)

    def begin(self, engine: Engine) -> None:
        """Load `init_weights`, if given, and print which parts were loaded."""
        if weights := self._initial_weights():
            try:
                say(engine.init_weights(weights))
            except ValueError as error:
                raise ValueError(f"init_weights: {str(error).removeprefix('source: ')}") from error

    def _initial_weights(self) -> Path | None:
        """Find the file or folder of `init_weights`, if given.

        Raises an error if it does not exist.
        """
        if self.config.init_weights is None:
            return None
        return find_source(self.config.init_weights, "init_weights")

    def describe(self, engine: Engine) -> str:
        """Summarize the run in a few lines."""
        return format_brief(self.config, self.data, engine)

    def batches(self, engine: Engine) -> BatchIterator[Batch]:
        """Iterate over random crops of the training images."""
        return training_batches(
            self.config,
            self.data,
            batch_size=self.config.batch_size,
            start_step=engine.step,
            total_steps=self.budget.total_steps,
            workers=self.config.workers,
            rank=engine.rank,
            world_size=engine.world_size,
        )

    def take_step(self, engine: Engine, batch: Batch) -> None:
        """Mask the images, and take one optimizer step.

        Masks follow the attention maps if the method needs them.
        """
        if self.attention is None:
            engine.train_step(batch.images, batch.index)
        else:
            engine.train_step(batch.images, batch.index, self.attention.weights(engine, batch))

    def measure(self, engine: Engine) -> dict[str, Any]:
        """Evaluate the current frozen features."""
        return probe_run(self.config, self.data, engine)

    def origin(self) -> Origin:
        """Return the origin: images, split and teacher."""
        return run_origin(self.config, self.data.source, self.data.train)

    def facts(self) -> dict[str, Any]:
        """Return method, data, and numbers of images."""
        return {
            "method": self.config.method.name,
            "data": self.data.source.description,
            "train_images": len(self.data.train),
            "held_out_images": len(self.data.held_out),
        }

    def conclude(self, run: RunDirectory, engine: Engine, summary: dict[str, Any]) -> None:
        """Evaluate the frozen features and draw pictures."""
        if self.config.eval_limit:
            say("Evaluating the frozen features ...")
            summary["evaluation"] = evaluate_run(self.config, self.data, engine)
            if engine.rank == 0:
                say(format_evaluation(summary["evaluation"]))
        if self.config.pictures:
            for path in draw_run(run, self.config, self.data, engine):
                say(f"Picture: {path}")

    def restart_hint(self, weights: Path) -> str:
        """Explain how to start a new run from the weights of this one."""
        return f"to reuse only the weights: --init_weights {weights} --out ANOTHER"
