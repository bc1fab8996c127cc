"""Arms, worlds (data and common options), and studies (arms in one world)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

from prmim_train.config.pretrain import pretrain_config
from prmim_train.report.inspect import cost_reports
from prmim_train.run.budget import training_budget

Options = Mapping[str, Any]
"""Command-line options by name."""

DENSE, PARTIAL, DEFAULT = "dense", "partial, random", "PR-MIM, cells"
PATCHES = "visible, kernel, 2"
"""PR-MIM at 0.5 whose thrown tokens predict patches, as decoded tokens do: the former default."""


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Parameters
    ----------
    options
        Options of ``prmim pretrain``, on top of the world's.
    detached
        Detach the loss on thrown tokens from the known features; see :mod:`.detached`.
    equal_compute
        Train for as many multiply-accumulates as the dense arm, which means more epochs.
    scaled
        Factors of the world's options.
    """

    options: Options
    detached: bool = False
    equal_compute: bool = False
    scaled: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """Data and options shared by all arms of a study.

    Parameters
    ----------
    data
        Name of the data set; see :func:`benchmarks.quality.data.find`.
    images
        Numbers of training and test images. Records of other images do not count.
    pretrain, finetune
        Options of ``prmim pretrain`` and of ``prmim evaluate --protocol finetune``.
    minutes
        Minutes between two checkpoints.
    """

    data: str
    images: tuple[int, int]
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
        Names of the arms, in the order of table rows; the others are compared with the first.
    epochs
        Epochs of pre-training.
    seeds
        Number of trainings per arm.
    finetuned
        Also fine-tune classifiers, which takes longest.
    baselines
        Also evaluate an untrained encoder and raw pixels.
    first
        Groups of arms that are trained first: all seeds of a group before the next group.
    """

    name: str
    world: World
    arms: tuple[str, ...]
    epochs: int
    seeds: int
    finetuned: bool = True
    baselines: bool = False
    first: tuple[tuple[str, ...], ...] = ()

    def options(self, arm: str) -> dict[str, Any]:
        """Return the options of ``prmim pretrain`` that define an arm of the study."""
        scaled = {name: factor * self.world.pretrain[name] for name, factor in ARMS[arm].scaled.items()}
        return {**self.world.pretrain, **scaled, **ARMS[arm].options}

    def cost_ratio(self, arm: str) -> float:
        """Return the forward MACs of an arm relative to the first arm.

        The first arm is dense or as published. Raises FileNotFoundError if the cost depends on a teacher that is not
        there.
        """
        ours, first = (cost_reports(pretrain_config(**self.options(name))) for name in (arm, self.arms[0]))
        if ours is None or first is None:
            teacher = self.options(arm)["teacher"]
            raise FileNotFoundError(f"teacher: expected the folder of a model, got {teacher}, which does not exist")
        return ours[0].macs / first[0].macs

    def arm_epochs(self, arm: str) -> int:
        """Return the epochs of an arm."""
        return round(self.epochs / self.cost_ratio(arm)) if ARMS[arm].equal_compute else self.epochs

    def steps(self, arm: str) -> int:
        """Return the optimizer steps of an arm."""
        config = pretrain_config(**{**self.options(arm), "epochs": self.arm_epochs(arm)})
        return training_budget(config, self.world.images[0]).total_steps

    def order(self, arms: Sequence[str], seeds: int) -> list[tuple[str, int]]:
        """Return the trainings in order, as arms and seeds.

        Groups of arms in order; within a group, seed by seed.

        Examples
        --------
        >>> study = Study("example", DIGITS, ("a", "b", "c"), epochs=1, seeds=2, first=(("b",),))
        >>> study.order(study.arms, study.seeds)
        [('b', 0), ('b', 1), ('a', 0), ('c', 0), ('a', 1), ('c', 1)]
        """
        rest = [arm for arm in arms if not any(arm in group for group in self.first)]
        groups = [*([arm for arm in group if arm in arms] for group in self.first), rest]
        return [(arm, seed) for group in groups for seed in range(seeds) for arm in group]

    def has(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record was trained with the current options and images of the study.

        Whole configurations are compared: an omitted option equals its default, and an option that only the record has
        counts too. Raises ValueError or TypeError if the record's options are not valid options of ``prmim pretrain``.
        """
        arm = record["arm"]
        return (
            arm in self.arms
            and _comparable(self.options(arm)) == _comparable(record["options"])
            and record["epochs"] == self.arm_epochs(arm)
            and (record["steps"], record["test_images"]) == (self.steps(arm), self.world.images[1])
            and (not self.finetuned or json.loads(json.dumps(self.world.finetune)) == record.get("finetune_options"))
        )


def _comparable(options: Options) -> object:
    # Epochs depend on the arm's compute, the held-out share on the images at hand; any backend may train an arm.
    ignored = ("epochs", "holdout", "backend")
    return pretrain_config(**{name: value for name, value in options.items() if name not in ignored})


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

LONGER, DEEPER, MORE_VISIBLE = (
    f"PR-MIM, cells, {way}, equal compute" for way in ("more epochs", "deeper decoder", "more visible")
)

EQUAL_ARMS = {
    LONGER: Arm({}, equal_compute=True),
    DEEPER: Arm({}, scaled={"decoder_depth": 2}, equal_compute=True),
    MORE_VISIBLE: Arm({"mask_ratio": 0.6}, equal_compute=True),
}
"""Ways to spend the compute that throwing saves. Compute that remains after the change of the model becomes epochs.

More epochs show the encoder more crops. A deeper decoder takes over reconstruction from the encoder, whose features
become more general (Pixio). More visible tokens move compute from the decoder, which is discarded, to the encoder,
which is kept. Half of all tokens stay thrown, so the decoder's sequence keeps its length: visible tokens replace
decoded tokens. The encoder then trains on sequences closer to those in use, and thrown tokens are closer to known
tokens. Unlike a larger encoder or a finer grid, none of the three changes the cost of the encoder in use.
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
    **EQUAL_ARMS,
    "PR-MIM 0.5, cells": Arm({"throw_ratio": 0.5}),
}
"""All arms by name. Omitted options have the defaults of ``prmim pretrain``: PR-MIM at 0.5, with SimMIM at 0.25."""

MASKALIGN, MASKED_TOO = "MaskAlign", "MaskAlign, masked tokens"
MASKALIGN_ARMS = {MASKALIGN: Arm({"reconstruction": "none"}), MASKED_TOO: Arm({})}
"""MaskAlign as published, and with masked tokens also aligned. It has no decoder, and its own targets."""
ARMS |= MASKALIGN_ARMS

WIDER, FUSED, WIDER_FUSED = (f"PR-MIM, cells, {change}" for change in ("wider", "fused", "wider and fused"))
RECIPE_ARMS = {
    WIDER: Arm({"embed_dim": 192}),
    FUSED: Arm({"fusion": "mff"}),
    WIDER_FUSED: Arm({"embed_dim": 192, "fusion": "mff"}),
}
"""Candidates for the recipe ``digits``: an encoder of width 192; a decoder that reads several encoder blocks (MFF)."""
ARMS |= RECIPE_ARMS

DIGITS = World(
    data="digits",
    images=(1438, 359),
    pretrain={
        "channels": 1,
        "image_size": 16,
        "patch_size": 2,
        "crop_scale": (0.8, 1.0),
        "flip": False,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "decoder_dim": 64,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "norm_pix": False,
        "batch_size": 32,
        "base_learning_rate": 8e-3,
        "precision": "float32",
        "compile": False,
    },
    finetune={},
)
"""A quick check that everything works: 8 x 8 tokens, encoder width 96."""

DIGITS_TRAIN = replace(DIGITS, data="digits_train", images=(1150, 288), pretrain={**DIGITS.pretrain, "holdout": 0.2})
"""The training images of the embedded digits only; a fifth of them is held out, by seed."""

CIFAR = World(
    data="cifar10",
    images=(25_000, 10_000),
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

GRID14 = World(
    data="imagenette",
    images=(9469, 2000),
    pretrain={
        **CIFAR.pretrain,
        "image_size": 112,
        "patch_size": 8,
        "embed_dim": 96,
        "num_heads": 3,
        "decoder_dim": 64,
        "decoder_depth": 3,
        "decoder_heads": 2,
    },
    finetune={**CIFAR.finetune, "epochs": 5},
)
"""One CPU core: the paper's 14 x 14 tokens with 49 visible, encoder width 96; 83 M multiply-accumulates per image."""

TEACHER = "runs/grid14-teacher"
"""Folder of MaskAlign's teacher, the encoder of a training of ``grid14``.

``prmim export runs/grid14-teacher --run runs/quality/grid14/dense-0 --to hf --encoder_only`` writes it. Its forward
pass takes 179 M multiply-accumulates per image, the student's 50 M, so a step costs 1.3 times that of the dense MAE. A
published teacher, CLIP ViT-B/16, takes 17.6 G: 350 times as much as the student.
"""

GRID14_MASKALIGN = replace(
    GRID14,
    pretrain={
        **{"method": "maskalign", "teacher": TEACHER, "teacher_layers": 3},
        **{name: value for name, value in GRID14.pretrain.items() if not name.startswith("decoder_")},
    },
)
"""The images and the encoder of ``grid14`` for MaskAlign."""

SIMMIM = replace(
    CIFAR,
    pretrain={
        "method": "simmim",
        **{name: value for name, value in CIFAR.pretrain.items() if not name.startswith("decoder_")},
    },
)
"""The images of CIFAR-10 again. SimMIM has no decoder: its encoder sees the masked tokens that are not thrown."""

IMAGENETTE = World(
    data="imagenette",
    images=(9469, 2000),
    pretrain={
        "image_size": 112,
        "patch_size": 8,
        "model": "vit_tiny",
        "decoder_dim": 192,
        "decoder_depth": 8,
        "decoder_heads": 6,
        "batch_size": 512,
        "base_learning_rate": 6e-4,
        "clip_grad": 1.0,
        "precision": "bfloat16",
        "compile": True,
        "workers": 8,
    },
    finetune={"batch_size": 256, "epochs": 50, "workers": 8},
)
"""One GPU: 14 x 14 tokens, ViT-Ti, decoder of the same width."""

OTHER_ARMS = (
    *("PR-MIM 0.25", "PR-MIM 0.65", "partial 0.25, random", "partial 0.65, random"),
    *("PR-MIM, detached", "PR-MIM, equal compute"),
)
MAIN_ARMS = (DENSE, PARTIAL, "partial, furthest", PATCHES, *OTHER_ARMS)
BEST_SCREENED_ARMS = ("none, conv, 2", "none, kernel, 2")
"""Best arms by linear accuracy in ``screen`` with the same number of stages, trained with more seeds."""
MILDER_ARMS = ("PR-MIM, random", "PR-MIM, thrown weight 0.5")
"""Between PR-MIM and partial reconstruction: random throwing; half the weight on thrown tokens."""
SCREENED_ARMS = (DENSE, PARTIAL, "partial, furthest", *GRID, *OTHER_ARMS, "PR-MIM, thrown weight 0.5")
DIGITS_ARMS = (DENSE, PARTIAL, "partial, furthest", PATCHES, "PR-MIM, random", "PR-MIM, detached")
"""Furthest sampling and reconstruction, each with and without the other."""
LONG_ARMS = (*MAIN_ARMS, *BEST_SCREENED_ARMS, *MILDER_ARMS, *CELL_ARMS, *EQUAL_ARMS)
SIMMIM_ARMS = (
    *(DENSE, DEFAULT, "partial, furthest, cells"),
    *(PARTIAL, "dense, cells", PATCHES, "PR-MIM 0.5, cells"),
)
GRID14_GROUPS = (
    (DENSE, DEFAULT, PARTIAL),
    (LONGER, DEEPER),
    ("dense, cells", "partial, furthest, cells"),
    ("PR-MIM 0.65, cells", MORE_VISIBLE),
    ("partial 0.65, furthest, cells",),
)
"""Lossless, and better than partial reconstruction? Better at equal compute? Due to which of the two ideas?"""
DIGITS_CELL_ARMS = (DEFAULT, "PR-MIM, 1 cell", "dense, cells", "partial, furthest, cells")
"""Patches of the digits have 2 x 2 pixels, so there are no finer cells."""

STUDIES = {
    study.name: study
    for study in (
        Study("digits", DIGITS, (*DIGITS_ARMS, *DIGITS_CELL_ARMS), epochs=60, seeds=3),
        Study(
            "recipe", DIGITS_TRAIN, (DENSE, DEFAULT, *RECIPE_ARMS), epochs=60, seeds=3, finetuned=False, baselines=True
        ),
        Study("screen", CIFAR, SCREENED_ARMS, epochs=4, seeds=1, finetuned=False),
        Study("confirm", CIFAR, (*MAIN_ARMS, *BEST_SCREENED_ARMS), epochs=4, seeds=3),
        Study("long", CIFAR, LONG_ARMS, epochs=20, seeds=3),
        Study("grid8", CIFAR, (DENSE, PARTIAL, PATCHES), epochs=10, seeds=3),
        Study("grid16", CIFAR_GRID16, (DENSE, PARTIAL, PATCHES), epochs=10, seeds=3),
        Study("grid14", GRID14, tuple(chain(*GRID14_GROUPS)), epochs=25, seeds=3, first=GRID14_GROUPS),
        Study("simmim", SIMMIM, SIMMIM_ARMS, epochs=10, seeds=3, first=(SIMMIM_ARMS[:3],)),
        Study("maskalign", GRID14_MASKALIGN, tuple(MASKALIGN_ARMS), epochs=25, seeds=3),
        Study("imagenette", IMAGENETTE, MAIN_ARMS, epochs=200, seeds=3),
    )
}
"""All studies by name. ``screen`` selects the arms that ``confirm`` trains with several seeds."""
