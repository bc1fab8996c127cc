"""What is trained and compared: arms, the worlds that they are trained in, and the studies made of both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

Options = Mapping[str, Any]
"""Options of the command line by name."""

DENSE, PARTIAL, DEFAULT = "dense", "partial, random", "visible, kernel, 2"


@dataclass(frozen=True)
class Arm:
    """What differs from one training to another.

    Parameters
    ----------
    options
        Options of ``prmim pretrain``, above those of the world.
    detached
        Whether the loss on thrown tokens stops at the features that they are rebuilt from: :mod:`.detached`.
    equal_compute
        Whether it trains for as many multiply-accumulates as the dense arm, and so for more epochs.
    """

    options: Options
    detached: bool = False
    equal_compute: bool = False


@dataclass(frozen=True)
class World:
    """What arms of a study have in common.

    Parameters
    ----------
    data
        Name of the images: see :func:`benchmarks.quality.data.find`.
    pretrain, finetune
        Options of ``prmim pretrain`` and of ``prmim evaluate --protocol finetune``.
    minutes
        Between two checkpoints.
    """

    data: str
    pretrain: Options
    finetune: Options
    minutes: float = 2.0


@dataclass(frozen=True)
class Study:
    """A table.

    Parameters
    ----------
    name
        Its name.
    world
        Where it takes place.
    arms
        Names of arms, in the order of its rows.
    epochs
        Of pre-training.
    seeds
        How many trainings of every arm there are.
    finetuned
        Whether classifiers are fine-tuned too, which takes longest.
    """

    name: str
    world: World
    arms: tuple[str, ...]
    epochs: int
    seeds: int
    finetuned: bool = True

    def has(self, result: Mapping[str, Any]) -> bool:
        """Say whether a result is of the options that the study has now, and not of earlier ones."""
        if result["arm"] not in self.arms:
            return False
        arm = ARMS[result["arm"]]
        told = {**self.world.pretrain, **arm.options}
        told = {name: value for name, value in told.items() if name != "holdout"}  # which depends on the images given
        found = {name: result["options"].get(name) for name in told}
        return (
            _is_same(told, found)
            and (arm.equal_compute or result["epochs"] == self.epochs)
            and (not self.finetuned or _is_same(self.world.finetune, result["finetune_options"]))
        )


def _is_same(options: Options, others: Options) -> bool:
    """Compare options as JSON tells them."""
    return bool(json.loads(json.dumps(options)) == others)


FACTORS = {
    "furthest_from": ("visible", "none"),
    "variant": ("kernel", "interpolate", "conv"),
    "stages": (1, 2, 4),
}
"""Choices that the paper leaves open: what sampling keeps away from, how features are mixed, in how many steps."""

GRID = {
    ", ".join(map(str, choice)): Arm(dict(zip(FACTORS, choice, strict=True))) for choice in product(*FACTORS.values())
}
"""PR-MIM at 0.5 with every combination of those choices."""

ARMS: dict[str, Arm] = {
    DENSE: Arm({"throwing": "none"}),
    PARTIAL: Arm({"throwing": "random", "variant": "none"}),
    "partial, furthest": Arm({"variant": "none"}),
    **GRID,
    "PR-MIM 0.25": Arm({"throw_ratio": 0.25}),
    "PR-MIM 0.65": Arm({"throw_ratio": 0.65}),
    "partial 0.25, random": Arm({"throwing": "random", "variant": "none", "throw_ratio": 0.25}),
    "partial 0.65, random": Arm({"throwing": "random", "variant": "none", "throw_ratio": 0.65}),
    "PR-MIM, detached": Arm({}, detached=True),
    "PR-MIM, equal compute": Arm({}, equal_compute=True),
    "PR-MIM, thrown weight 0.5": Arm({"thrown_weight": 0.5}),
    "PR-MIM, random": Arm({"throwing": "random"}),
}
"""All arms by name. What an arm does not say is the default of ``prmim pretrain``, PR-MIM at 0.5."""

DIGITS = World(data="digits", pretrain={}, finetune={})
"""For a look at whether everything works."""

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
        # Too short for the regularisation of the published recipe.
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
"""For two CPU cores: 8 x 8 tokens, an encoder of width 128."""

CIFAR_GRID16 = replace(CIFAR, pretrain={**CIFAR.pretrain, "patch_size": 2})
"""The same images on 16 x 16 tokens, for 4.7 times the multiply-accumulates."""

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
"""For a GPU: 14 x 14 tokens, ViT-Ti, as wide a decoder; of the training images a fifth is held out."""

OTHER_ARMS = (
    *("PR-MIM 0.25", "PR-MIM 0.65", "partial 0.25, random", "partial 0.65, random"),
    *("PR-MIM, detached", "PR-MIM, equal compute"),
)
MAIN_ARMS = (DENSE, PARTIAL, "partial, furthest", DEFAULT, *OTHER_ARMS)
BEST_SCREENED_ARMS = ("none, conv, 2", "none, kernel, 2")
"""What was ahead of the default on linear accuracy, with as many stages: worth more seeds."""
MILDER_ARMS = ("PR-MIM, random", "PR-MIM, thrown weight 0.5")
"""Between the default and plain partial reconstruction: rebuilt, but thrown at random; thrown at half the weight."""
SCREENED_ARMS = (DENSE, PARTIAL, "partial, furthest", *GRID, *OTHER_ARMS, "PR-MIM, thrown weight 0.5")
DIGITS_ARMS = (DENSE, PARTIAL, "partial, furthest", DEFAULT, "PR-MIM, random", "PR-MIM, detached")
"""Sampling and reconstruction, each with and without the other."""

STUDIES = {
    study.name: study
    for study in (
        Study("digits", DIGITS, DIGITS_ARMS, epochs=60, seeds=3),
        Study("screen", CIFAR, SCREENED_ARMS, epochs=4, seeds=1, finetuned=False),
        Study("confirm", CIFAR, (*MAIN_ARMS, *BEST_SCREENED_ARMS), epochs=4, seeds=3),
        Study("long", CIFAR, (*MAIN_ARMS, *BEST_SCREENED_ARMS, *MILDER_ARMS), epochs=20, seeds=3),
        Study("grid8", CIFAR, (DENSE, PARTIAL, DEFAULT), epochs=10, seeds=3),
        Study("grid16", CIFAR_GRID16, (DENSE, PARTIAL, DEFAULT), epochs=10, seeds=3),
        Study("imagenette", IMAGENETTE, MAIN_ARMS, epochs=200, seeds=3),
    )
}
"""By name. A screening picks what is worth the time of a confirmation."""
