"""Upload of a run to the Hugging Face hub, in one commit.

The commit holds weights, options, pictures and a model card.
"""

import importlib
from typing import Any

from prmim_methods.files import expanded
from prmim_methods.hub import NAME
from prmim_methods.messages import one_line, shown
from prmim_methods.weight_files import WEIGHTS_FILE
from prmim_train.config.packages import check_installed
from prmim_train.interop.card import model_card
from prmim_train.run.directory import CONFIG, RunDirectory
from prmim_train.run.files import read_json
from prmim_train.run.manifest import step_of
from prmim_train.run.prepare import find_checkpoint, read_run_config

__all__ = ["push_to_hub"]


def push_to_hub(
    run: str, repo: str, *, private: bool = False, checkpoint: int | None = None, pictures: bool = True
) -> str:
    """Upload a run to the Hugging Face hub, in one commit.

    The commit holds weights, options, pictures and a model card.

    Parameters
    ----------
    run
        Folder of the run.
    repo
        Name of the repository, `owner/name`. Created if it does not exist.
    private
        Whether a new repository is private.
    checkpoint
        Step of the checkpoint. None: the newest good checkpoint.
    pictures
        Whether to upload the pictures of this checkpoint, which show some images of the run.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    ImportError
        If `huggingface_hub` is not installed.
    ValueError
        If the name is invalid, or the hub rejects the upload or cannot be reached.
    FileNotFoundError, OSError
        If there is no run, no checkpoint, or only damaged ones.
    """
    if not NAME.fullmatch(repo):
        raise ValueError(f"repo: expected owner/name, got {shown(repo)}")
    check_installed("repo", "huggingface_hub")
    files = _files(RunDirectory.open(expanded(run)), repo, checkpoint, with_pictures=pictures)
    hub = importlib.import_module("huggingface_hub")
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        added = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repo, added, commit_message="Weights pre-trained with prmim").commit_url)
    except Exception as error:  # any error of the client or the network
        raise ValueError(f"repo: expected one that can be written, got {shown(repo)} ({one_line(error)})") from None


def push_command(run: str, repo: str, **options: Any) -> None:
    """Upload a run, see `push_to_hub`, and print the address."""
    print(f"Uploaded: {push_to_hub(run, repo, **options)}")


def _files(run: RunDirectory, repo: str, checkpoint: int | None, *, with_pictures: bool) -> dict[str, bytes | str]:
    """Return the files to upload: name in the repository to content or path."""
    config = read_run_config(run)
    found = find_checkpoint(run, checkpoint)
    step = step_of(found)
    last = run.read_summary() or {}
    summary = last if last.get("steps") == step else {}
    evaluation = read_json(run.path / "evaluation.json") or {}
    is_evaluated = evaluation.get("step") == step
    pictures = []
    if with_pictures and found == run.checkpoints()[-1]:
        # Pictures show what was the newest checkpoint; pictures of an evaluation show the evaluated checkpoint.
        patterns = ("*.png", "evaluation/*.png") if is_evaluated else ("*.png",)
        drawn = [path for pattern in patterns for path in sorted(run.path.glob(pattern)) if path.is_file()]
        pictures = [path for path in drawn if path.stat().st_mtime >= found.stat().st_mtime]
    named = {path.relative_to(run.path).as_posix(): str(path) for path in pictures}
    accuracies = evaluation if is_evaluated else summary.get("evaluation")
    is_earlier = step < last.get("steps", 0)
    card = model_card(repo, config, step, summary, accuracies, list(named), is_earlier=is_earlier)
    weights: dict[str, bytes | str] = {WEIGHTS_FILE: str(found / WEIGHTS_FILE), CONFIG: str(run.path / CONFIG)}
    return {"README.md": card.encode(), **weights, **named}
