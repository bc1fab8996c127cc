"""Differences between the packaged recipes and the published runs.

`prmim inspect --config NAME` prints those of a recipe; `docs/reference/deviations.md` lists all of them.
"""

from dataclasses import dataclass
from itertools import takewhile

from prmim_methods import METHODS
from prmim_train.config.layers import read_header, read_options, recipe_names
from prmim_train.config.pretrain import pretrain_config

STAGES = {
    "pretrain": "pre-training",
    "throwing": "thrown or reconstructed tokens",
    "finetune": "fine-tuning",
    "linear": "linear probe",
}
"""Parts of a recipe. PR-MIM adds thrown or reconstructed tokens to a published recipe."""

EVERY_STAGE = ("pretrain", "finetune", "linear")
CLASSIFIERS = ("finetune", "linear")

FAMILIES = {
    **{name: config.title for name, config in METHODS.items()},
    "mff": "MFF",
    "pixmim": "PixMIM",
    "crossmae": "CrossMAE",
    "pixio": "Pixio",
    "amt": "AMT",
}
"""Method or variant, by the first word of a recipe's name."""

LIKE_MAE = ("mae", "mff", "pixmim", "crossmae")
AREA_CROPS = ("mae", "crossmae", "pixio", "simmim", "maskalign", "localmim")
FLOAT16 = ("mae", "mff", "pixmim", "crossmae", "simmim", "maskalign", "localmim")


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
        Where this was read: repository and file, or paper.
    ours
        What this project does.
    reason
        Why.
    methods
        Methods that it applies to, keys of `FAMILIES`. Empty: all.
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
        FLOAT16,
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
        AREA_CROPS,
    ),
    Deviation(
        EVERY_STAGE,
        "large JPEG files",
        "decoded at full size",
        "torchvision `ImageFolder`",
        "decoded at 1/2, 1/4 or 1/8 if the crop is then still at least twice as large as the result",
        "reading is faster",
        AREA_CROPS,
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
        "MAE models_mae.py; MaskAlign models_pretrain.py; LocalMIM ViT/models_mim.py",
        "exact arithmetic: 100 tokens at 0.9 keep 10; the recipes keep the same 49 and 58 of 196",
        "rounding errors do not change counts; `--rounding float` computes as published",
        (*LIKE_MAE, "maskalign", "localmim"),
    ),
    Deviation(
        ("pretrain",),
        "number of masked tubes",
        "int(N * ratio) in floating point: 50 tubes at 0.58 mask 28",
        "VideoMAE V2 dataset/masking_generator.py",
        "exact arithmetic: 50 tubes at 0.58 mask 29; the recipes mask the same 176 of 196",
        "rounding errors do not change counts; `--rounding float` computes as published",
        ("videomae",),
    ),
    Deviation(
        ("pretrain",),
        "embedded patches",
        "all",
        "MAE models_mae.py; SimMIM models/simmim.py; MaskAlign models_pretrain.py; LocalMIM ViT/models_mim.py",
        "the visible ones",
        "the same result at less cost",
    ),
    Deviation(
        ("pretrain",),
        "predicted tokens",
        "all; the loss ignores visible ones",
        "MAE models_mae.py; SimMIM models/simmim.py; Pixio pretraining/; LocalMIM ViT/models_mim.py",
        "the masked ones",
        "the same loss at less cost",
        ("mae", "mff", "pixmim", "pixio", "simmim", "localmim"),
    ),
    Deviation(
        ("pretrain",),
        "epoch",
        "1,605 steps, for any data",
        "Pixio pretraining/",
        "one pass over the data: 156 steps of 8,192 images for ImageNet-1k",
        "as in the other methods; `--epochs` sets the length",
        ("pixio",),
    ),
    Deviation(
        ("pretrain",),
        "size of the encoder",
        "H/16, 1B/16 and 5B/16",
        "Pixio pretraining/",
        "`pixio_vit_base` has B/16, with the learning rate of H/16 and without drop path",
        "a recipe for few GPUs; throwing saves most there",
        ("pixio",),
    ),
    Deviation(
        ("pretrain",),
        "drop path of the blocks",
        "rate 0.4; we did not read its distribution over the blocks",
        "Pixio pretraining/",
        "rises linearly from 0 at the first block to 0.4 at the last",
        "as in the other methods",
        ("pixio",),
    ),
    Deviation(
        ("pretrain",),
        "predicted tokens",
        "all that the decoder mask keeps; the loss ignores visible ones",
        "VideoMAE V2 modeling_pretrain.py, engine_for_pretraining.py",
        "the masked ones",
        "the same loss at less cost",
        ("videomae",),
    ),
    Deviation(
        ("pretrain",),
        "clips of a video",
        "a step has 1,024 videos, with four separately drawn clips of each; 200 epochs",
        "VideoMAE V2 run_mae_pretraining.py, dataset/pretrain_datasets.py",
        "a step has 4,096 videos, and a clip of each; 800 epochs",
        "as many steps and clips; each clip is decoded separately",
        ("videomae",),
    ),
    Deviation(
        ("pretrain",),
        "crops of clips",
        "sides of 1, 0.875, 0.75 or 0.66 of the short side",
        "VideoMAE V2 dataset/pretrain_datasets.py",
        "random areas of 0.4356 to 1, with sides of 3/4 to 4/3",
        "one kind of crop for all methods; the same range",
        ("videomae",),
    ),
    Deviation(
        ("pretrain",),
        "lowest rate and batch size",
        "the lowest rate is scaled by videos / 256",
        "VideoMAE V2 run_mae_pretraining.py",
        "`min_learning_rate` is not scaled; the recipes have the value for 1,024 videos",
        "as in the other methods, whose lowest rates are not scaled",
        ("videomae",),
    ),
    Deviation(
        ("pretrain",),
        "half of the channels of the position table",
        "the first encodes the row of a token, the second the column",
        "mmpretrain utils/position_encoding.py",
        "the first encodes the column, the second the row, as in MAE",
        "one table for all methods; the same up to the order of channels",
        ("mff", "pixmim"),
    ),
    Deviation(
        ("pretrain",),
        "final norm of the encoder",
        "none",
        "CrossMAE models_cross.py",
        "a layer norm that takes no part in the loss and keeps its initial weights",
        "the same encoder for all methods; evaluation reads its normalized output",
        ("crossmae",),
    ),
    Deviation(
        ("pretrain",),
        "pixels of the histograms of oriented gradients",
        "normalized with mean and deviation of each channel",
        "LocalMIM ViT/models_mim.py",
        "not normalized",
        "the same function; integer gradients are exact, so rounding does not move gradients on the edge of a bin",
        ("localmim",),
    ),
    Deviation(
        ("pretrain",),
        "heads",
        "transposed convolutions on the grid of all tokens",
        "LocalMIM ViT/models_mim.py",
        "linear layers on each token, initial weights as in all linear layers",
        "the same function, for any tokens: the kernel is as large as the stride",
        ("localmim",),
    ),
    Deviation(
        ("pretrain",),
        "layer norm of the last decoder",
        "its own",
        "LocalMIM ViT/models_mim.py",
        "the final norm of the encoder",
        "the same function; frozen features are taken after this norm",
        ("localmim",),
    ),
    Deviation(
        ("throwing",),
        "targets of thrown tokens",
        "unknown",
        "arXiv 2411.15746 (no text on LocalMIM)",
        "those of the decoded tokens, at every scale, from features that each decoder's stages reconstruct",
        "one head per scale; each decoder reconstructs at almost no cost",
        ("localmim",),
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
        ("pretrain",),
        "ratios",
        "0.45 masked and 0.40 thrown of 196 tokens, rounded down; 0.44 and 0.26 of 49 units, rounded up",
        "AMT mae-AMT/models_mae.py; SimMIM-AMT data/amtdatasets.py",
        "`mask_ratio` counts masked and thrown tokens; the ratios of the recipes give the same counts",
        "one vocabulary for all methods",
        ("amt",),
    ),
    Deviation(
        ("pretrain",),
        "masks before the first attention maps",
        "nothing is thrown: MAE masks 0.75 at random",
        "AMT mae-AMT/models_mae.py",
        "a uniform draw with the counts of the recipe",
        "one program and one cost per step for the whole run",
        ("amt",),
    ),
    Deviation(
        ("pretrain",),
        "crop of the attention maps",
        "offsets are divided as integers, so that only the first rows and columns of a map are used",
        "AMT amtdatasets.py",
        "cropped and mirrored like the image; a token has the mean of the map over its area",
        "the published code has a defect",
        ("amt",),
    ),
    Deviation(
        ("pretrain",),
        "time of the attention maps",
        "the end of an epoch",
        "AMT mae-AMT/main_pretrain.py",
        "the step nearest to the end of an epoch; maps are stored in float16",
        "batches may straddle two epochs; half the memory",
        ("amt",),
    ),
    Deviation(
        ("pretrain",),
        "loss of AMT on SimMIM",
        "compares whole images with predictions of a part of their tokens, whose shape differs",
        "AMT SimMIM-AMT models/simmim.py",
        "SimMIM's, over the pixels of the decoded tokens",
        "the published code has a defect",
        ("amt",),
    ),
    Deviation(
        ("pretrain",),
        "batch size and decay of AMT on SimMIM",
        "unknown",
        "the configuration of SimMIM-AMT was not at hand",
        "2,048 images; a tenth of the learning rate over the last eighth, as in SimMIM",
        "needed for a recipe",
        ("amt",),
    ),
    Deviation(
        ("throwing",),
        "thrown tokens",
        "the accessible text of PR-MIM does not specify operator, order, targets and weights",
        "arXiv 2411.15746, abstract and introduction",
        "the decisions in docs/design/paper.md",
        "needed to implement the method",
        (*LIKE_MAE, "pixio", "simmim", "localmim", "videomae"),
    ),
    Deviation(
        ("throwing",),
        "features of visible tokens",
        "the decoder has none; PR-MIM on CrossMAE is not described",
        "CrossMAE models_cross.py",
        "one more mix of the encoder's layers, normalized and projected to the width of the decoder",
        "thrown tokens are reconstructed from visible and decoded ones, as in MAE",
        ("crossmae",),
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
        "their features are reconstructed from the visible ones and also aligned, each token with weight 1",
        "supervises all tokens",
        ("maskalign",),
    ),
    Deviation(
        ("throwing",),
        "choice of the decoded tokens",
        "a running cell over all tokens, visible ones included; PR-MIM on clips is not described",
        "VideoMAE V2 dataset/masking_generator.py, modeling_pretrain.py",
        "furthest sampling among the masked tokens, distances counted in cubes; the others are reconstructed",
        "supervises all masked tokens, and decodes no token twice",
        ("videomae",),
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
        "on normalized floating-point pixels",
        "timm random_erasing.py, mixup.py",
        "on uint8 pixels: noise is rounded and clipped to 0..255; mixup rounds its share to 1/256, and pixels",
        "images stay uint8 up to the device",
    ),
    Deviation(
        ("finetune",),
        "partner in mixup and cutmix",
        "the image at the mirrored position of the process's batch; each process draws its own mix",
        "timm mixup.py",
        "the image half a batch away; one mix is drawn for the batch of all processes",
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
    """Return the differences of a packaged recipe from the published run.

    Empty for recipes without a paper.

    Examples
    --------
    >>> [found.item for found in deviations_of("simmim_vit_base_finetune")][-3:]
    ['initial weights of the head', 'test image', 'reported accuracy']
    >>> deviations_of("digits")
    []
    """
    if read_header(recipe)["paper"].startswith("none"):
        return []
    methods, stages = recipe_methods(recipe), recipe_stages(recipe)
    return [
        found for found in DEVIATIONS if stages & {*found.stages} and (not found.methods or methods & {*found.methods})
    ]


def recipe_methods(recipe: str) -> set[str]:
    """Return the keys of `FAMILIES` that the name of a packaged recipe starts with.

    Examples
    --------
    >>> sorted(recipe_methods("amt_simmim_vit_base")), recipe_methods("mae_vit_base_linear")
    (['amt', 'simmim'], {'mae'})
    """
    return set(takewhile(FAMILIES.__contains__, recipe.split("_")))


def recipe_stages(recipe: str) -> set[str]:
    """Return the stages of a packaged recipe, keys of `STAGES`."""
    if recipe in recipe_names("evaluate"):
        return {read_options(recipe, "evaluate")["protocol"]}
    is_reconstructed = pretrain_config(**read_options(recipe)).method.is_reconstructed
    return {"pretrain", "throwing"} if is_reconstructed else {"pretrain"}
