"""Pre-train and explore features: python examples/explore_features.py [FOLDER]."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import draw_columns
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from prmim_torch import load_encoder
from prmim_train.config.layers import read_options
from prmim_train.config.pretrain import PretrainConfig, pretrain_config
from prmim_train.data.batches import evaluation_batches
from prmim_train.data.sources import open_source
from prmim_train.pretrain import pretrain
from prmim_train.run.directory import RunDirectory

SMALL: dict[str, Any] = {
    "channels": 1,
    "image_size": 16,
    "patch_size": 2,
    "crop_scale": (0.8, 1.0),
    "flip": False,
    "norm_pix": False,  # 2 x 2 pixels are too few for statistics of a patch
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 4,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_heads": 4,
    "epochs": 12,
    "batch_size": 64,
    "base_learning_rate": 8e-3,
    "compile": False,
    "log_every": 100,
    "eval_limit": 0,  # twelve epochs are too few to evaluate features
}
"""Options of ``prmim pretrain`` for images of a few pixels: about a minute on a CPU."""


def write_digits(folder: Path) -> Path:
    """Write the digits of scikit-learn as images, with a folder for each class."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(image * (255 / 16))).save(path)
    return folder


def encode(run: Path, config: PretrainConfig, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return evenly spaced images of a run, and their patch features.

    Images are as drawn; features are (number, patches, dim).
    """
    size = tuple(2 * side for side in config.method.image_size)  # twice the resolution: four times as many patches
    encoder = load_encoder(run, image_size=size)
    source = open_source(config.data, channels=config.method.channels)
    indices = np.linspace(0, len(source), min(number, len(source)), endpoint=False).astype(int)
    images, tokens = [], []
    with evaluation_batches(source, indices, batch_size=64, image_size=size) as batches, torch.inference_mode():
        for batch in batches:
            images.append(batch.images / 255)
            tokens.append(encoder(torch.from_numpy(batch.images), pool=None)[:, config.method.class_tokens :].numpy())
    shown = np.concatenate(images)
    return shown[..., 0] if shown.shape[-1] == 1 else shown, np.concatenate(tokens)


def nearest(features: np.ndarray, number: int) -> np.ndarray:
    """Return the most similar images by cosine: indices (images, number).

    The image itself comes first.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.argsort(-(unit @ unit.T), axis=1)[:, :number]


def colour_tokens(tokens: np.ndarray) -> np.ndarray:
    """Map three principal components to colours: (images, tokens, 3).

    The components are those of all tokens.
    """
    components = PCA(3, random_state=0).fit_transform(tokens.reshape(-1, tokens.shape[-1]))
    low, high = np.percentile(components, (2, 98), axis=0)
    return np.clip((components - low) / (high - low), 0, 1).reshape(*tokens.shape[:2], 3)


def main(folder: Path | None = None, out: Path = Path("runs/examples"), number: int = 500, **options: Any) -> None:
    """Train once, then draw nearest neighbours and patch features."""
    run = out / "explore_features"
    data = write_digits(out / "digits") if folder is None else folder
    recipe = SMALL if folder is None else read_options("photos_vit_tiny")
    config = pretrain_config(**{**recipe, "data": str(data), "out": str(run), **options})
    if not RunDirectory.holds_run(run):
        pretrain(config)
    images, tokens = encode(run, config, number)

    # Digits are aligned, so patches are compared by position. Photographs are compared by the mean over patches.
    features = tokens.reshape(len(tokens), -1) if folder is None else tokens.mean(axis=1)
    queries = np.linspace(0, len(images), 6, endpoint=False).astype(int)
    found = nearest(features, 8)[queries]
    titles = ["image", *(f"neighbour {rank}" for rank in range(1, 8))]
    draw_columns(out / "neighbours.png", {title: images[found[:, rank]] for rank, title in enumerate(titles)})

    grid = [2 * side for side in config.method.grid.shape]
    colours = colour_tokens(tokens).reshape(len(images), *grid, 3)
    columns = {}
    for place in range(4):
        columns[f"image {place + 1}"] = images[queries + place]
        columns[f"features {place + 1}"] = colours[queries + place]
    draw_columns(out / "patch_features.png", columns)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
