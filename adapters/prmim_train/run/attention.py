"""Attention maps of the training images (AMT).

With `throwing: weighted`, they determine which tokens are masked and thrown.

A map holds the attention of the encoder's class token to every patch of a whole, uncropped image. All maps are computed
after `attention_start` epochs, recomputed every `attention_every` epochs, and stored in the run directory. A resumed
run reads the maps that its last steps used. Each process computes the maps of a part of the images.
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from prmim_methods.weight_files import write_atomically
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.data.batches import Batch, evaluation_batches
from prmim_train.data.transforms import crop_maps
from prmim_train.run.directory import RunDirectory
from prmim_train.run.engine import Engine
from prmim_train.run.files import open_file
from prmim_train.run.manifest import step_of
from prmim_train.run.prepare import RunData
from prmim_train.run.processes import is_main, on_main, say

__all__ = ["AttentionMaps"]

PREFIX = "attention_"


class AttentionMaps:
    """The maps of a run. Every process of a distributed run has all of them.

    Parameters
    ----------
    run
        The run. Its folder holds the maps of each pass that a checkpoint needs.
    config
        Options of the run.
    data
        Images of the run.
    """

    def __init__(self, run: RunDirectory, config: PretrainConfig, data: RunData) -> None:
        self.run, self.config, self.source, self.records = run, config, data.source, data.train
        self.steps = data.budget.steps_of(config.attention_start, config.attention_every)
        self.step: int | None = None
        """Step after which the maps were computed, or None before."""
        self.maps = np.empty((0, 0), np.float16)
        """float16 (training images, N), in [0, 1]."""

    def weights(self, engine: Engine, batch: Batch) -> NDArray[np.float32]:
        """Return the weight of every token, float32 (batch, N).

        Due maps are computed or read first. The map of an image is cropped and mirrored like the image. Before the
        first pass, all weights are 1.

        Raises
        ------
        FileNotFoundError
            If a resumed run has lost its maps.
        ValueError
            If their file is damaged.
        """
        due = self._due(engine.step)
        if due != self.step:
            if due == engine.step:
                self._compute(engine, due)
            self.maps, self.step = self._read(due), due
        grid = self.config.method.grid
        if self.step is None:
            return np.ones((len(batch.index), grid.num_tokens), np.float32)
        maps = self.maps[np.searchsorted(self.records, batch.index)]
        return crop_maps(maps.reshape(-1, *grid.shape), batch.boxes).reshape(maps.shape)

    def _due(self, step: int) -> int | None:
        """Return the step of the last pass up to a step."""
        return max((due for due in self.steps if due <= step), default=None)

    def _compute(self, engine: Engine, step: int) -> None:
        """Compute the maps with the current weights, and write them.

        All processes must call it.
        """
        tokens = self.config.method.grid.num_tokens
        shares = [self._share(rank, engine.world_size) for rank in range(engine.world_size)]
        part = self._share_of_maps(engine, self.records[shares[engine.rank]])
        np.save(self._part(engine.rank), part)
        engine.any(False)  # barrier: all parts are written

        def gather() -> None:
            maps = np.ones((len(self.records), tokens), np.float16)
            for rank, share in enumerate(shares):
                maps[share] = np.load(self._part(rank), allow_pickle=False)
                self._part(rank).unlink()
            write_atomically(self._path(step), lambda file: np.savez(file, maps=maps))
            self._delete_old()

        on_main(engine, gather)
        say(f"Attention maps: {len(self.records):,} images after step {step}.")

    def _share(self, rank: int, world_size: int) -> NDArray[np.int64]:
        """Return the rows of a process.

        All processes get equally many, so some rows are repeated.
        """
        number = len(self.records)
        rows = np.resize(np.arange(number), -(-number // world_size) * world_size)
        return rows[rank::world_size]

    def _share_of_maps(self, engine: Engine, records: NDArray[np.int64]) -> NDArray[np.float16]:
        """Compute the maps of some images, float16 (images, N).

        Maps of unreadable images are 1.
        """
        size, method = self.config.evaluation_batch, self.config.method
        place = {int(record): row for row, record in enumerate(records)}
        found = np.ones((len(records), method.grid.num_tokens), np.float16)
        images = np.zeros((size, *method.image_size, method.channels), self.source.depth or np.uint8)
        number = -(-len(records) // size)
        with evaluation_batches(
            self.source, records, batch_size=size, image_size=method.image_size, share=None
        ) as batches:
            # All processes must make equally many calls, even with unreadable images, and with batches of one size.
            for _ in tqdm(range(number), desc="attention maps", disable=None if is_main() else True, leave=False):
                batch = next(batches, None)
                if batch is not None:
                    images[: len(batch.images)] = batch.images
                attention = engine.attention(images)
                if batch is not None:
                    rows = [place[record] for record in batch.index.tolist()]
                    found[rows] = attention[: len(rows)].astype(np.float16)
                engine.any(False)  # barrier: no process waits for long
        return found

    def _read(self, step: int | None) -> NDArray[np.float16]:
        assert step is not None
        path, shape = self._path(step), (len(self.records), self.config.method.grid.num_tokens)
        try:
            with io.BufferedReader(open_file(path)) as file, np.load(file, allow_pickle=False) as arrays:
                maps: NDArray[np.float16] = arrays["maps"]
            if maps.dtype != np.float16 or maps.shape != shape:
                raise ValueError(f"expected float16 {shape}, got {maps.dtype} {maps.shape}")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"run: expected the attention maps of step {step} in {path}, got no such file; attention_start, "
                "attention_every and the images must be those of the steps already taken"
            ) from None
        except Exception as error:  # of zip, zlib and NumPy's headers
            raise ValueError(f"run: expected the attention maps of step {step} in {path}, which is damaged") from error
        return maps

    def _delete_old(self) -> None:
        """Delete maps that no checkpoint needs.

        A pending checkpoint keeps all later maps.
        """
        first = next((self._due(step_of(checkpoint)) for checkpoint in self.run.checkpoints()), None)
        for step in self.steps:
            if first is not None and step < first:
                self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.run.path / f"{PREFIX}{step:08d}.npz"

    def _part(self, rank: int) -> Path:
        return self.run.path / f".attention.partial-{rank}.npy"
