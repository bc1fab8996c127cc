"""Arms, worlds (data and common options), and studies (arms in one world)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from benchmarks.quality.config import Options, config_of

DENSE, PARTIAL, DEFAULT = "dense", "partial, random", "PR-MIM, cells"
PATCHES = "visible, kernel, 2"
"""PR-MIM at 0.5 whose thrown tokens predict patches, as decoded ones do: the default before they predicted cells."""


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Parameters
    ----------
    options
        Options of ``prmim pretrain``, on top of the world's.
    detached
        Detach the loss on thrown tokens from the features that rebuild them; see :mod:`.detached`.
    equal_compute
        Train for as many multiply-accumulates as the dense arm, that is, for more epochs.
    """

    options: Options
    detached: bool = False
    equal_compute: bool = False


@dataclass(frozen=True)
class World:
    """Data and options shared by all arms of a study.

    Parameters
    ----------
    data
        Name of the data set; see :func:`benchmarks.quality.data.find`.
    pretrain, finetune
        Options of ``prmim pretrain`` and of ``prmim evaluate --protocol finetune``.
    minutes
        Minutes between two checkpoints.
    """

    data: str
    pretrain: Options
    finetune: Options
    minutes: float = 2.0


@dataclass(frozen=True)
class Study:
    """Arms trained in one world with several seeds.

    Parameters
    ----------
    name
        Name of the study and of its file of records.
    world
        Data and common options.
    arms
        Names of the arms, in the order of table rows.
    epochs
        Epochs of pre-training.
    seeds
        Number of trainings per arm.
    finetuned
        Also fine-tune classifiers, which takes longest.
    """

    name: str
    world: World
    arms: tuple[str, ...]
    epochs: int
    seeds: int
    finetuned: bool = True

    def options(self, arm: str) -> dict[str, Any]:
        """Return the options of ``prmim pretrain`` that define an arm of the study."""
        return {**self.world.pretrain, **ARMS[arm].options}

    def has(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record was trained with the current options of the study.

        Whole configurations are compared: an omitted option equals its default, and an option that only the record has
        counts too. Raises ValueError or TypeError if the record's options are not valid options of ``prmim pretrain``.
        """
        arm = record["arm"]
        return (
            arm in self.arms
            and _comparable(self.options(arm)) == _comparable(record["options"])
            and (ARMS[arm].equal_compute or record["epochs"] == self.epochs)
            and (not self.finetuned or json.loads(json.dumps(self.world.finetune)) == record.get("finetune_options"))
        )


def _comparable(options: Options) -> object:
    # Epochs depend on the arm's compute, the held-out share on the images at hand; any backend may train an arm.
    ignored = ("epochs", "holdout", "backend")
    return config_of({name: value for name, value in options.items() if name not in ignored})


FACTORS = {
    "furthest_from": ("visible", "none"),
    "reconstruction": ("kernel", "interpolate", "conv"),
    "stages": (1, 2, 4),
}
"""Choices that the paper leaves open: start of furthest sampling, reconstruction, number of stages."""

PATCH_TARGET = {"thrown_target": "patch"}

GRID = {
    ", ".join(map(str, choice)): Arm({**dict(zip(FACTORS, choice, strict=True)), **PATCH_TARGET})
    for choice in product(*FACTORS.values())
}
"""PR-MIM at 0.5 with every combination of these choices; thrown tokens predict patches."""

PARTIAL_CELLS = {"reconstruction": "none", "extra_cells": "decoded"}

CELL_ARMS: dict[str, Arm] = {
    DEFAULT: Arm({}),
    "PR-MIM, 1 cell": Arm({"cells": 1}),
    "PR-MIM, 4 x 4 cells": Arm({"cells": 4}),
    "PR-MIM, cells over windows": Arm({"cell_norm": "window"}),
    "PR-MIM, cells of masked tokens": Arm({"extra_cells": "decoded"}),
    "PR-MIM, cells of all tokens": Arm({"extra_cells": "known"}),
    "PR-MIM 0.65, cells": Arm({"throw_ratio": 0.65}),
    "PR-MIM, cells, low-pass": Arm({"low_pass": 40 / 224 * 32}),
    "PR-MIM, random, cells": Arm({"throwing": "random"}),
    "dense, cells": Arm({"throw_ratio": 0.0, "extra_cells": "decoded"}),
    "partial, furthest, cells": Arm(PARTIAL_CELLS),
    "partial 0.65, furthest, cells": Arm({"throw_ratio": 0.65, **PARTIAL_CELLS}),
}
"""Arms in which some token predicts cells. In the last three, no thrown token is supervised.

``low_pass`` is PixMIM's radius at the size of the images of CIFAR-10.
"""

ARMS: dict[str, Arm] = {
    DENSE: Arm({"throw_ratio": 0.0}),
    PARTIAL: Arm({"throwing": "random", "reconstruction": "none"}),
    "partial, furthest": Arm({"reconstruction": "none"}),
    **GRID,
    "PR-MIM 0.25": Arm({"throw_ratio": 0.25, **PATCH_TARGET}),
    "PR-MIM 0.65": Arm({"throw_ratio": 0.65, **PATCH_TARGET}),
    "partial 0.25, random": Arm({"throwing": "random", "reconstruction": "none", "throw_ratio": 0.25}),
    "partial 0.65, random": Arm({"throwing": "random", "reconstruction": "none", "throw_ratio": 0.65}),
    "PR-MIM, detached": Arm(PATCH_TARGET, detached=True),
    "PR-MIM, equal compute": Arm(PATCH_TARGET, equal_compute=True),
    "PR-MIM, thrown weight 0.5": Arm({"thrown_weight": 0.5, **PATCH_TARGET}),
    "PR-MIM, random": Arm({"throwing": "random", **PATCH_TARGET}),
    **CELL_ARMS,
}
"""All arms by name. Omitted options have the defaults of ``prmim pretrain``: PR-MIM at 0.5."""

DIGITS = World(data="digits", pretrain={}, finetune={})
"""A quick check that everything works."""

CIFAR = World(
    data="cifar10",
    pretrain={
        "image_size": 32,
        "patch_size": 4,
        "crop_scale": (0.2, 1.0),
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "decoder_dim": 96,
        "decoder_depth": 4,
        "decoder_heads": 4,
        "batch_size": 128,
        "base_learning_rate": 2e-3,
        "clip_grad": 1.0,
        "precision": "bfloat16",
    },
    finetune={
        # Fine-tuning is too short for the regularization of the published recipe.
        "crop_scale": (0.2, 1.0),
        "rand_augment": 0.0,
        "erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path": 0.0,
        "layer_decay": 0.85,
        "test_crop": 1.0,
        "batch_size": 128,
        "base_learning_rate": 4e-3,
        "epochs": 3,
    },
)
"""Two CPU cores: 8 x 8 tokens, encoder width 128."""

CIFAR_GRID16 = replace(CIFAR, pretrain={**CIFAR.pretrain, "patch_size": 2})
"""The same images with 16 x 16 tokens: 4.7 times the multiply-accumulates."""

IMAGENETTE = World(
    data="imagenette",
    pretrain={
        "image_size": 112,
        "patch_size": 8,
        "model": "vit_tiny",
        "decoder_dim": 192,
        "decoder_depth": 8,
        "decoder_heads": 6,
        "batch_size": 512,
        "base_learning_rate": 6e-4,
        "holdout": 0.2,
        "clip_grad": 1.0,
        "precision": "bfloat16",
        "compile": True,
        "workers": 8,
    },
    finetune={"batch_size": 256, "epochs": 50, "workers": 8},
)
"""One GPU: 14 x 14 tokens, ViT-Ti, decoder of the same width; a fifth of the training images is held out."""

OTHER_ARMS = (
    *("PR-MIM 0.25", "PR-MIM 0.65", "partial 0.25, random", "partial 0.65, random"),
    *("PR-MIM, detached", "PR-MIM, equal compute"),
)
MAIN_ARMS = (DENSE, PARTIAL, "partial, furthest", PATCHES, *OTHER_ARMS)
BEST_SCREENED_ARMS = ("none, conv, 2", "none, kernel, 2")
"""Ahead of the rest on linear accuracy in ``screen`` with the same number of stages: worth more seeds."""
MILDER_ARMS = ("PR-MIM, random", "PR-MIM, thrown weight 0.5")
"""Between PR-MIM and plain partial reconstruction: random throwing; half the weight on thrown tokens."""
SCREENED_ARMS = (DENSE, PARTIAL, "partial, furthest", *GRID, *OTHER_ARMS, "PR-MIM, thrown weight 0.5")
DIGITS_ARMS = (DENSE, PARTIAL, "partial, furthest", PATCHES, "PR-MIM, random", "PR-MIM, detached")
"""Furthest sampling and reconstruction, each with and without the other."""
DIGITS_CELL_ARMS = (DEFAULT, "PR-MIM, 1 cell", "dense, cells", "partial, furthest, cells")
"""Patches of the digits have 2 x 2 pixels, so there are no finer cells."""

STUDIES = {
    study.name: study
    for study in (
        Study("digits", DIGITS, (*DIGITS_ARMS, *DIGITS_CELL_ARMS), epochs=60, seeds=3),
        Study("screen", CIFAR, SCREENED_ARMS, epochs=4, seeds=1, finetuned=False),
        Study("confirm", CIFAR, (*MAIN_ARMS, *BEST_SCREENED_ARMS), epochs=4, seeds=3),
        Study("long", CIFAR, (*MAIN_ARMS, *BEST_SCREENED_ARMS, *MILDER_ARMS, *CELL_ARMS), epochs=20, seeds=3),
        Study("grid8", CIFAR, (DENSE, PARTIAL, PATCHES), epochs=10, seeds=3),
        Study("grid16", CIFAR_GRID16, (DENSE, PARTIAL, PATCHES), epochs=10, seeds=3),
        Study("imagenette", IMAGENETTE, MAIN_ARMS, epochs=200, seeds=3),
    )
}
"""All studies by name. ``screen`` selects the arms that ``confirm`` trains with several seeds."""
