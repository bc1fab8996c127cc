"""From an MAE checkpoint to transformers: python examples/export_encoder.py.

The example needs no network: it first trains a small MAE on digits, and saves it as the authors' code does. With an
official file, start at "Import".
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from transformers import ViTModel

from prmim_core import counter_noise
from prmim_torch import create_method, import_weights, load_encoder
from prmim_train.evaluate.frozen import accuracy
from prmim_train.interop.export import export_command

HEADS = {"num_heads": 4, "decoder_heads": 2}
"""Attention heads, which tensors do not show. prmim knows those of published models."""


def read_digits() -> tuple[torch.Tensor, np.ndarray]:
    """Return the digits, uint8 (1797, 16, 16, 1), and their labels.

    The digits are shown at twice their size.
    """
    digits = load_digits()
    images = np.uint8(digits.images * (255 / 16)).repeat(2, axis=1).repeat(2, axis=2)
    return torch.from_numpy(images[..., None]), digits.target


def train_checkpoint(path: Path, images: torch.Tensor, steps: int) -> None:
    """Train a dense MAE, and save it as facebookresearch/mae does.

    Names and layout of the tensors are those of the authors.
    """
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "channels": 1, "embed_dim": 64, "depth": 3, "decoder_dim": 32}
    method = create_method("mae", **sizes, **HEADS, decoder_depth=1, throw_ratio=0.0, norm_pix=False)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        sample = torch.randint(len(images), (64,))
        loss = method(images[sample], counter_noise(0, step, sample, num_tokens=16)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {steps} steps: loss {loss.item():.3f}")
    names = {name: name.removeprefix("encoder.").replace("decoder.", "decoder_") for name in method.state_dict()}
    names["decoder.mask_token"] = "mask_token"
    model = {names[name]: tensor for name, tensor in method.state_dict().items()}
    torch.save({"model": model, "args": argparse.Namespace(norm_pix_loss=False), "epoch": 0}, path)


def main(out: Path = Path("runs/examples/export_encoder"), steps: int = 300, shown: int = 397) -> float:
    """Train, import, export and load in transformers; return the accuracy.

    The accuracy is that of the exported features.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    images, labels = read_digits()
    train_checkpoint(out / "checkpoint.pth", images[:1400], steps)

    # Import. For an official file: import_weights("mae_pretrain_vit_base.pth", ...), without HEADS.
    imported = import_weights(out / "checkpoint.pth", out / "mae.safetensors", **HEADS)
    print(f"format: {imported.format}", *imported.notes, sep="\n  ")

    # Export: `prmim export OUT --run mae.safetensors --to hf --encoder_only` on the command line.
    export_command(str(out / "mae.safetensors"), "hf", str(out / "vit"), encoder_only=True)

    # Load with transformers, without prmim.
    vit = ViTModel.from_pretrained(out / "vit", add_pooling_layer=False).eval()
    pixels = (images.float().movedim(-1, 1) / 255 - 0.5) / 0.5  # mean and std of preprocessor_config.json
    with torch.inference_mode():
        tokens = vit(pixels).last_hidden_state
        ours = load_encoder(out / "mae.safetensors")(images, pool=None)
    print(f"largest difference of a feature to prmim's: {(tokens - ours).abs().max():.1e}")
    features = tokens[:, 1:].flatten(1).numpy()  # by position; for photographs, the mean over patches is better
    found = accuracy("knn", features[:1400], labels[:1400], features[1400:], labels[1400:])
    print(f"20 nearest neighbours on held-out digits: {found:.1%}")
    draw(out / "exported_features.png", features[-shown:], labels[-shown:])
    return found


def draw(path: Path, features: np.ndarray, labels: np.ndarray) -> None:
    """Draw a t-SNE map of features, with each digit at its position."""
    places = TSNE(random_state=0, perplexity=min(30, len(features) // 4)).fit_transform(features)
    figure = Figure(figsize=(6.4, 5.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    colours = [
        "#e07b28",
        "#2a9d5c",
        "#3f88c5",
        "#b5543c",
        "#7a5195",
        "#7b8794",
        "#d4a017",
        "#3d4651",
        "#c1121f",
        "#4fb0ae",
    ]
    axes.scatter(*places.T, s=0)
    for place, label in zip(places, labels, strict=True):
        axes.text(*place, str(label), color=colours[label], fontsize=7, ha="center", va="center")
    axes.set(xticks=[], yticks=[], title="t-SNE of the features that transformers computes")
    axes.spines[:].set_visible(False)
    figure.savefig(path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
