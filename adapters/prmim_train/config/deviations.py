"""Differences between the packaged recipes and the published runs.

`prmim inspect --config NAME` prints those of a recipe; `docs/deviations.md` lists all of them.
"""

from dataclasses import dataclass

from prmim_train.config.layers import read_header, read_options, recipe_names
from prmim_train.config.pretrain import pretrain_config

STAGES = {
    "pretrain": "pre-training",
    "throwing": "thrown or rebuilt tokens",
    "finetune": "fine-tuning",
    "linear": "linear probe",
}
"""Parts of a recipe. Thrown or rebuilt tokens are the addition of PR-MIM to a published recipe."""

EVERY_STAGE = ("pretrain", "finetune", "linear")
CLASSIFIERS = ("finetune", "linear")


@dataclass(frozen=True)
class Deviation:
    """A difference from a published run.

    Parameters
    ----------
    stages
        Keys of `STAGES` that it applies to.
    item
        What differs.
    published
        What the authors do.
    source
        Where it was read: repository and file, or paper.
    ours
        What this project does.
    reason
        Why.
    methods
        Methods that it applies to. Empty: all.
    """

    stages: tuple[str, ...]
    item: str
    published: str
    source: str
    ours: str
    reason: str
    methods: tuple[str, ...] = ()


DEVIATIONS = (
    Deviation(
        EVERY_STAGE,
        "precision",
        "float16 with loss scaling",
        "MAE engine_pretrain.py, engine_finetune.py; SimMIM main_simmim.py (apex O1); MaskAlign engine_pretrain.py",
        "bfloat16 or float32, without loss scaling",
        "chosen by hardware (`precision: auto`); bfloat16 has the range of float32 and needs no scaling",
    ),
    Deviation(
        EVERY_STAGE,
        "last batch of an epoch",
        "dropped if it is not full",
        "`drop_last=True` in all main files",
        "batches are always full and may straddle two epochs",
        "every image counts equally; a batch may be larger than the data set",
    ),
    Deviation(
        EVERY_STAGE,
        "random numbers",
        "global generators, seeded per process",
        "all main files",
        "crops, masks, drop path and augmentation follow from seed, epoch or step, and image",
        "the same on any number of processes and after a resume; masks and drop path also on both frameworks",
    ),
    Deviation(
        EVERY_STAGE,
        "random crop",
        "cut out, then resized: the filter sees the crop alone",
        "torchvision `RandomResizedCrop`; timm `RandomResizedCropAndInterpolation`",
        "resized from the image in one pass: near its edges, the filter also sees pixels outside the crop",
        "saves a copy",
    ),
    Deviation(
        EVERY_STAGE,
        "large JPEG files",
        "decoded at full size",
        "torchvision `ImageFolder`",
        "decoded at 1/2, 1/4 or 1/8 where the crop is then still twice as large as the result, or larger",
        "reading is faster",
    ),
    Deviation(
        EVERY_STAGE,
        "orientation and transparency",
        "the EXIF orientation and the alpha channel are ignored",
        "torchvision `ImageFolder`",
        "images are turned upright; transparent pixels become white",
        "images look as in a viewer",
    ),
    Deviation(
        ("pretrain",),
        "number of visible tokens",
        "int(N * (1 - ratio)) in floating point: 100 tokens at 0.9 keep 9",
        "MAE models_mae.py; MaskAlign models_pretrain.py",
        "exact arithmetic: 100 tokens at 0.9 keep 10; the recipes keep the same 49 and 58 of 196",
        "rounding errors do not change counts; `--rounding float` computes as published",
        ("mae", "maskalign"),
    ),
    Deviation(
        ("pretrain",),
        "embedded patches",
        "all",
        "MAE models_mae.py; SimMIM models/simmim.py; MaskAlign models_pretrain.py",
        "the visible ones",
        "the same result at less cost",
    ),
    Deviation(
        ("pretrain",),
        "predicted tokens",
        "all; the loss ignores visible ones",
        "MAE models_mae.py; SimMIM models/simmim.py",
        "the masked ones",
        "the same loss at less cost",
        ("mae", "simmim"),
    ),
    Deviation(
        ("pretrain",),
        "filter of the crops",
        "bilinear",
        "SimMIM data/data_simmim.py",
        "bicubic",
        "one filter for all methods",
        ("simmim",),
    ),
    Deviation(
        ("pretrain", "finetune"),
        "attention keys",
        "no bias",
        "SimMIM models/vision_transformer.py",
        "a bias",
        "the same blocks for all methods; the softmax ignores the bias, whose gradient is 0",
        ("simmim",),
    ),
    Deviation(
        ("pretrain",),
        "order of a patch's predicted values",
        "channel, row, column",
        "SimMIM models/simmim.py (pixel shuffle)",
        "row, column, channel",
        "one order for all methods; the same function",
        ("simmim",),
    ),
    Deviation(
        ("pretrain", "finetune"),
        "lowest rates and batch size",
        "start of the warm-up and lowest rate are scaled by batch / 512",
        "SimMIM main_simmim.py, main_finetune.py",
        "`warmup_learning_rate` and `min_learning_rate` are not scaled; the recipes have the values for 2,048 images",
        "as in the other methods, whose lowest rates are not scaled",
        ("simmim",),
    ),
    Deviation(
        ("pretrain", "finetune"),
        "learning rate of a step",
        "that of the step before: the scheduler runs after the optimizer",
        "SimMIM main_simmim.py, main_finetune.py",
        "its own",
        "one step is 1/625 of an epoch",
        ("simmim",),
    ),
    Deviation(
        ("pretrain",),
        "heads and layer mixes of the student",
        "one for each of the teacher's 12 blocks, those below the last 5 with weight 0 in the loss",
        "MaskAlign models_pretrain.py",
        "one for each of the last 5 blocks",
        "the others are never trained",
        ("maskalign",),
    ),
    Deviation(
        ("throwing",),
        "thrown tokens",
        "the readable text of PR-MIM leaves operator, order, targets and weights open",
        "arXiv 2411.15746, abstract and introduction",
        "the decisions in docs/paper.md",
        "needed to implement the method",
        ("mae", "simmim"),
    ),
    Deviation(
        ("throwing",),
        "place of thrown tokens",
        "SimMIM throws none; PR-MIM on SimMIM is not described",
        "SimMIM models/simmim.py",
        "thrown tokens leave the encoder; the stages work on its output; a quarter of all tokens is thrown",
        "SimMIM has no decoder to shrink",
        ("simmim",),
    ),
    Deviation(
        ("throwing",),
        "masked tokens",
        "not used; PR-MIM on MaskAlign is not described",
        "MaskAlign models_pretrain.py",
        "their features are rebuilt from the visible ones and aligned too, each token with weight 1",
        "supervises all tokens",
        ("maskalign",),
    ),
    Deviation(
        ("throwing",),
        "weight decay of the reconstruction",
        "unknown",
        "arXiv 2411.15746 (no text)",
        "none",
        "decay towards 0 would give near and far tokens the same weight",
    ),
    Deviation(
        ("finetune",),
        "random erasing and mixing",
        "on normalised floating-point pixels",
        "timm random_erasing.py, mixup.py",
        "on uint8 pixels: noise is rounded and clipped to 0..255; mixup rounds its share to 1/256, and pixels",
        "images stay uint8 up to the device",
    ),
    Deviation(
        ("finetune",),
        "partner in mixup and cutmix",
        "the image at the mirrored place of the process's batch; each process draws its own mix",
        "timm mixup.py",
        "the image half a batch further on; one mix is drawn for the batch of all processes",
        "the same on any number of processes",
    ),
    Deviation(
        ("finetune",),
        "layer decay and lowest rates",
        "start of the warm-up and lowest rate are the same for all layers",
        "SimMIM optimizer.py, lr_scheduler.py",
        "the layer's factor scales the whole schedule",
        "as in the other methods; differs by at most 1e-6",
        ("simmim",),
    ),
    Deviation(
        CLASSIFIERS,
        "initial weights of the head",
        "normal, cut at +-2",
        "MAE main_finetune.py, main_linprobe.py; SimMIM models/vision_transformer.py",
        "normal",
        "2 is at least 100 standard deviations",
    ),
    Deviation(
        CLASSIFIERS,
        "test image",
        "short side resized to 256, then 224 x 224 cut out at whole pixels",
        "MAE util/datasets.py, main_linprobe.py; SimMIM data/data_finetune.py",
        "the central box of 0.875 of the short side is resized to 224 x 224 in one pass; its edges may be fractional",
        "any image size; saves a pass",
    ),
    Deviation(
        CLASSIFIERS,
        "reported accuracy",
        "every epoch is tested; the best one is tracked",
        "MAE main_finetune.py, main_linprobe.py; SimMIM main_finetune.py",
        "the last step counts",
        "the best of many tests on the same images is optimistic",
    ),
    Deviation(
        ("linear",),
        "rows of the batch norm's statistics",
        "one device: 512 (MAE), 2,048 (MaskAlign)",
        "MAE FINETUNE.md; MaskAlign README.md",
        "one device, and each part of its batch that `accumulate` makes",
        "one device can train with any batch size; `--batch_norm all` takes the rows of all devices",
    ),
    Deviation(
        ("linear",),
        "running statistics of the batch norm",
        "start at 0 and 1, momentum 0.1; those of the first process count",
        "PyTorch `BatchNorm1d`, `DistributedDataParallel`",
        "start as the mean of the batches so far, momentum 0.1 from the tenth batch on; the mean over the devices",
        "short runs; all processes hold the same statistics",
    ),
)


def deviations_of(recipe: str) -> list[Deviation]:
    """Return the differences of a packaged recipe from the published run; none for recipes without a paper.

    Examples
    --------
    >>> [found.item for found in deviations_of("simmim_vit_base_finetune")][-3:]
    ['initial weights of the head', 'test image', 'reported accuracy']
    >>> deviations_of("digits")
    []
    """
    if read_header(recipe)["paper"].startswith("none"):
        return []
    method, stages = recipe.partition("_")[0], recipe_stages(recipe)
    return [
        found for found in DEVIATIONS if stages & {*found.stages} and (not found.methods or method in found.methods)
    ]


def recipe_stages(recipe: str) -> set[str]:
    """Return the stages of a packaged recipe, keys of `STAGES`."""
    if recipe in recipe_names("evaluate"):
        return {read_options(recipe, "evaluate")["protocol"]}
    is_rebuilt = pretrain_config(**read_options(recipe)).method.is_reconstructed
    return {"pretrain", "throwing"} if is_rebuilt else {"pretrain"}
