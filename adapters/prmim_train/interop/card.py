"""The model card of a run: its weights, how to load them, and measurements."""

from collections.abc import Mapping, Sequence
from typing import Any

from prmim_methods.encoder import times
from prmim_methods.messages import printable
from prmim_train.config.pretrain import PretrainConfig
from prmim_train.evaluate.features import format_evaluation
from prmim_train.report.inspect import brief_cost

__all__ = ["model_card"]

MEASURED = {
    "train_images": ("images", "{:,}"),
    "held_out_images": ("images held out", "{:,}"),
    "steps": ("steps", "{:,}"),
    "epochs": ("epochs", "{:g}"),
    "loss": ("final loss", "{:.4f}"),
    "images_per_second": ("images per second", "{:,.1f}"),
    "seconds": ("seconds", "{:,.0f}"),
    "device": ("device", "{}"),
    "precision": ("precision", "{}"),
}
"""Entries of the summary in the card, with title and format."""


def model_card(
    repo: str,
    config: PretrainConfig,
    step: int,
    summary: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    pictures: Sequence[str],
    *,
    is_earlier: bool = False,
) -> str:
    """Return the text of `README.md` in a repository of the hub.

    Parameters
    ----------
    repo
        Name of the repository.
    config
        Options of the run.
    step
        Step of the checkpoint.
    summary
        Content of `summary.json`. Empty if the run did not end with this checkpoint.
    evaluation
        Accuracies of the features of this checkpoint. None: not evaluated.
    pictures
        Paths of pictures in the repository.
    is_earlier
        Whether the run is finished, and the checkpoint is not its last one.
    """
    method, size = config.method, config.method.encoder_size
    shape = ", ".join(map(str, (*method.image_size, method.channels)))
    lines = [
        "---",
        "library_name: prmim",
        "pipeline_tag: image-feature-extraction",
        f"tags: [prmim, masked-image-modeling, {method.name}]",
        "---",
        "",
        f"# {repo.partition('/')[2]}",
        "",
        f"An encoder of {size.depth} blocks of width {size.dim} with {size.heads} heads, pre-trained by {method.title} "
        f"on images of {times(method.image_size)} pixels.",
        "",
        "## Load the encoder",
        "",
        "```python",
        "import prmim_torch  # prmim_jax has the same function",
        "",
        f'encoder = prmim_torch.load_encoder("{repo}")',
        f"features = encoder(images)  # uint8 (batch, {shape}) to (batch, {size.dim})",
        "```",
        "",
        "## Accuracy of frozen features",
        "",
        *_fenced(format_evaluation(evaluation) if evaluation else "Not evaluated."),
        "",
        "## Pre-training",
        "",
        "| | |",
        "|---|---|",
        *_rows(config, step, summary, is_earlier),
        "",
        "`config.yaml` holds all options: `prmim pretrain --config config.yaml` repeats the run on the same data.",
    ]
    for picture in pictures:
        lines += ["", f"![{picture}]({picture})"]
    return "\n".join(lines) + "\n"


def _rows(config: PretrainConfig, step: int, summary: Mapping[str, Any], is_earlier: bool) -> list[str]:
    method = config.method
    known = {
        title: text.format(summary[name])
        for name, (title, text) in MEASURED.items()
        if summary.get(name) is not None  # null: no step was finite, or too few were timed
    }
    other = ", an earlier checkpoint" if is_earlier else " of an unfinished run"
    rows = {
        "data": summary.get("data", config.data),
        "checkpoint": f"step {step:,}" + ("" if summary else other),
        **known,
        "tokens": f"grid of {times(method.grid.shape)}; {method.summary()}",
        "patches": f"{times(method.patch_size)} pixels",
        "pixels": f"mean {list(method.pixel_mean)}, deviation {list(method.pixel_std)}",
        "cost": brief_cost(config),
        "batch": f"{config.batch_size:,} images",
        "peak learning rate": f"{config.learning_rate:.4g}",
        "weight decay": f"{config.weight_decay:g}",
    }
    return [f"| {title} | {printable(str(text)).replace('|', '/')} |" for title, text in rows.items()]


def _fenced(text: str) -> list[str]:
    return ["```text", text, "```"]
