"""The commands of `prmim`: their options, what they run, and how errors are reported."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from jsonargparse import ArgumentParser

from prmim_methods import ClassifierConfig, MethodConfig
from prmim_methods.checkpoints import EXPECTED
from prmim_methods.export import FORMATS
from prmim_methods.messages import one_line, shown
from prmim_methods.record import Option, Rule, find_option
from prmim_train.cli.options import (
    build_parser,
    classify_options,
    command_option,
    convert,
    pretrain_options,
    read_classify_options,
    read_config,
    split_words,
    suggest,
)
from prmim_train.config.layers import merge_layers, recipe_names
from prmim_train.config.packages import check_installed
from prmim_train.config.training import DIGITS
from prmim_train.run.processes import FailedElsewhereError, adopt_srun, is_main, launched, say

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_SIGNAL = 128  # plus the signal's number, as shells count


@dataclass(frozen=True)
class Command:
    """One command.

    Parameters
    ----------
    summary, description
        Help in a phrase, and in a few sentences.
    groups
        Returns its options by title of the group.
    run
        Carries it out, with the command, its name and the texts of the given options.
    places
        The options whose values may also stand without their names, in this order.
    """

    summary: str
    description: str
    groups: Callable[[], dict[str, list[Option]]]
    run: Callable[["Command", str, dict[str, str]], None]
    places: tuple[str, ...] = ()

    def options(self) -> list[Option]:
        """Return its options."""
        return [item for items in self.groups().values() for item in items]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        The words after `prmim`; None: those of the process.

    Returns
    -------
    int
        The exit code: 0; 1 if a run failed; 2 if the options or the data are wrong; 128 and the signal's number if
        a signal stopped a run, such as 130 after Ctrl-C.
        An error is reported in one line. `--traceback`, or the environment variable `PRMIM_TRACEBACK=1`, adds the
        traceback.
    """
    from prmim_train.run.loop import Interrupted, NonFiniteLoss

    words = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = os.environ.get("PRMIM_TRACEBACK", "0") not in ("", "0")
    if "--traceback" in words:
        words.remove("--traceback")
        wants_traceback = True
    adopt_srun()
    try:
        _dispatch(words)
    except Interrupted as stop:
        if is_main():
            print(f"prmim: {stop}", file=sys.stderr)
        return EXIT_SIGNAL + stop.signal_number
    except KeyboardInterrupt:
        print("prmim: interrupted", file=sys.stderr)
        return EXIT_SIGNAL + signal.SIGINT
    except Exception as error:
        if wants_traceback:
            traceback.print_exc()
        if is_main() or not isinstance(error, NonFiniteLoss | FailedElsewhereError):  # the main process reports those
            print(_one_line(error), file=sys.stderr)
        is_usage = isinstance(error, ValueError | TypeError | ImportError | _FILE_ERRORS)
        return EXIT_USAGE if is_usage or getattr(error, "errno", None) == errno.ENAMETOOLONG else EXIT_FAILURE
    return 0


# A missing or unexpected file is a user error; a full disk is a failure.
_FILE_ERRORS = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError


def _one_line(error: Exception) -> str:
    text = str(error) or "no further message"
    if not isinstance(error, ValueError | TypeError | OSError | ImportError | ArithmeticError):
        text = f"{type(error).__name__}: {text} (PRMIM_TRACEBACK=1 shows where)"
    who = "" if is_main() else f" process {launched().rank}:"
    return f"prmim:{who} error: {one_line(text)}"


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if words[0] == "--version":
        print(f"prmim {metadata.version('prmim')}")
        return
    name, *rest = words
    if name not in COMMANDS:
        raise ValueError(f"command: expected {', '.join(COMMANDS)}, got {shown(name)}{suggest(name, COMMANDS)}")
    command = COMMANDS[name]
    if name not in SHARED_COMMANDS and launched().world_size > 1:
        raise ValueError(
            f"command: expected one process for {name}, got {launched().world_size}; only "
            f"{', '.join(SHARED_COMMANDS[:-1])} and {SHARED_COMMANDS[-1]} take more"
        )
    if "-h" in rest or "--help" in rest:
        _parser(command, name).print_help()
        return
    command.run(command, name, split_words(rest, command.options(), command.places))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: prmim COMMAND [--option VALUE] ...",
        "",
        "Cheap masked image modelling: the decoder reconstructs only part of the masked patches.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "options:",
        "  --help       this text; after a command, its options",
        "  --version    the version of prmim",
        "  --traceback  after an error, show the traceback",
        "",
        "first steps:",
        "  prmim pretrain                                   train on the embedded digits",
        "  prmim inspect --data FOLDER --config photos_vit_tiny",
        "  prmim pretrain --data FOLDER --config photos_vit_tiny",
    ]
    return "\n".join(lines)


def _pretrain_groups() -> dict[str, list[Option]]:
    return {"": [_config_option("pretrain")], **pretrain_options()}


def _inspect_groups() -> dict[str, list[Option]]:
    return {"": [_config_option("pretrain", "evaluate")], **pretrain_options()}


def _config_option(*commands: str, note: str = "") -> Option:
    names = ", ".join(name for command in commands for name in recipe_names(command))
    text = f"A YAML file of options, or the name of a packaged recipe: {names}.{note}"
    return command_option("config", str | None, text)


def _pretrain(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.pretrain import pretrain

    options = command.options()
    pretrain(read_config(given, _parser(command, name), options, say))


def _inspect(command: Command, name: str, given: dict[str, str]) -> None:
    if _explain_recipe(given):
        return
    from prmim_train.report.inspect import inspect_run

    options = command.options()
    given = {option: text for option, text in given.items() if option != "resume"}
    print(inspect_run(read_config(given, _parser(command, name), options, say)))


def _explain_recipe(given: dict[str, str]) -> bool:
    """Print what a packaged recipe is; return whether that is all, since `evaluate` takes it."""
    from prmim_train.report.recipe import recipe_lines

    name = given.get("config", "")
    is_of_evaluate = name in recipe_names("evaluate")
    if is_of_evaluate and len(given) > 1:
        other = next(option for option in given if option != "config")
        raise ValueError(f"{other}: expected no other option with {name}, a recipe of evaluate, got {given[other]}")
    if is_of_evaluate or name in recipe_names():
        print("\n".join(recipe_lines(name)), end="\n" * (1 if is_of_evaluate else 2))
    return is_of_evaluate


RUN_OPTION = command_option("run", str, "Folder of the run.")


def _evaluate_groups() -> dict[str, list[Option]]:
    limit = "Most images to learn from, and to classify. Not given: as in the run. For knn, and linear by lbfgs, only."
    others = "Also classify by an untrained encoder and by raw pixels. For knn, and linear by lbfgs, only."
    groups = classify_options()
    named = {item.name: item for items in groups.values() for item in items}
    frozen = [
        named[name] for name in ("data", "holdout", "image_size", "test_data", "device", "checkpoint", "allow_changes")
    ]
    own = {
        f"For finetune, and linear by lars: {title.lower()}": [item for item in items if item not in frozen]
        for title, items in groups.items()
    }
    return {
        "": [
            RUN_OPTION,
            command_option("protocol", str | None, "knn, linear or finetune. Null: knn, and linear by lbfgs."),
            command_option(
                "solver", str | None, "For linear: lbfgs (fast, the default) or lars (MAE's published probe)."
            ),
            _config_option("evaluate", note=" For finetune, and linear by lars, only."),
            *frozen,
            command_option("eval_limit", int | None, limit),
            command_option("baselines", bool, others, True),
        ],
        **own,
    }


def _evaluate(command: Command, name: str, given: dict[str, str]) -> None:
    arguments = _run_arguments(command, name, given)
    config = arguments.pop("config", None)
    if config is not None:
        arguments = _with_classify_file(arguments, config, command, name)
    protocol, solver = arguments.get("protocol"), arguments.pop("solver", None)
    for option, value, known in (("protocol", protocol, EVALUATIONS), ("solver", solver, SOLVERS)):
        if value is not None and value not in known:
            raise ValueError(f"{option}: expected one of {', '.join(known)}, got {value!r}")
    if solver is not None and protocol != "linear":
        raise ValueError(f"solver: expected --protocol linear with it, got {protocol or 'no protocol'}")
    is_trained = protocol == "finetune" or solver == "lars"
    trained = {item.name for items in classify_options().values() for item in items}
    own = trained if is_trained else FROZEN_OPTIONS
    for option in arguments:
        if option not in {"run", "protocol", *own}:
            wanted = "knn, or linear by lbfgs" if is_trained else "finetune, or linear --solver lars"
            got = " ".join(word for word in (protocol, solver) if word) or "no protocol"
            raise ValueError(f"{option}: expected --protocol {wanted} with it, got {got}")
    check_installed("evaluate", "sklearn", "scipy", "matplotlib")
    if is_trained:
        from prmim_train.evaluate.classifier import classify_command

        classify_command(**arguments)
    else:
        from prmim_train.evaluate.features import evaluate_command

        evaluate_command(**arguments)


def _with_classify_file(arguments: dict[str, Any], config: str, command: Command, name: str) -> dict[str, Any]:
    """Return the arguments of the command line above the options of a file, which trains a classifier."""
    trained = {item.name for items in classify_options().values() for item in items} | {"protocol"}
    items = [item for item in command.options() if item.name in trained]
    options = read_classify_options(config, _parser(command, name), items)
    protocol = options.setdefault("protocol", arguments.get("protocol"))
    if protocol not in TRAINED:
        raise ValueError(f"protocol: expected {' or '.join(TRAINED)} with --config, got {protocol or 'no protocol'}")
    expected = {"protocol": protocol, **({"solver": "lars"} if protocol == "linear" else {})}
    for option, value in expected.items():
        if (asked := arguments.get(option, value)) != value:
            raise ValueError(f"{option}: expected {value} with --config {config}, got {asked}")
    return merge_layers(options, arguments, expected)


def _picture_groups() -> dict[str, list[Option]]:
    kinds = "reconstructions (similarity for maskalign), schedule or loss. Null: all of them."
    return {
        "": [
            RUN_OPTION,
            command_option("data", str | None, "Other images than those of the run: see prmim pretrain --help."),
            command_option("holdout", float | None, "Another held-out share than that of the run."),
            command_option("device", str | None, "Another device than that of the run: auto, cpu, cuda or mps."),
            command_option("kind", str | None, kinds),
            command_option("pictures", int | None, "Number of images shown."),
            command_option("allow_changes", bool, "Draw although the images of the run have changed.", False),
        ]
    }


def _picture(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.report.pictures import picture_command

    picture_command(**_run_arguments(command, name, given))


def _stats_groups() -> dict[str, list[Option]]:
    named = {item.name: item for items in pretrain_options().values() for item in items}
    return {
        "": [
            named["data"],
            named["image_key"],
            command_option("channels", int | None, "Channels to convert images to. Null: as in the files, 1 or 3."),
            command_option("limit", int | None, "Most images to read, evenly spaced. Null: all of them."),
        ]
    }


def _stats(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.report.stats import stats_command

    stats_command(**{"data": DIGITS, **_arguments(command, name, given)})


def _features_groups() -> dict[str, list[Option]]:
    named = {item.name: item for items in pretrain_options().values() for item in items}
    size = find_option(ClassifierConfig, "image_size")
    run = command_option("run", str, "Folder of the run, or a file of weights.")
    inherited = [
        command_option(name, named[name].type | None, f"{named[name].help} Not given: as in the run.")
        for name in ("device", "precision", "backend")
    ]
    return {
        "": [
            run,
            command_option("data", str | None, "Images: see prmim pretrain --help. Not given: those of the run."),
            command_option("out", str, "The file to write: .npz or .parquet."),
            command_option("pool", str, "mean: the mean of the patch tokens; cls: the class token.", "mean"),
            command_option("layer", int | None, "Block whose output is written, from 1. Null: the encoder's output."),
            size,
            command_option("checkpoint", int | None, "Step of the run's checkpoint. Null: the last one."),
            command_option("batch_size", int, "Images of a forward pass, in each process.", 64),
            *inherited,
        ]
    }


def _features(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.evaluate.embeddings import features_command

    features_command(**_run_arguments(command, name, given, out="the file to write, as in --out features.npz"))


CHECKPOINT_OPTION = command_option("checkpoint", int | None, "Step of the checkpoint. Null: the newest good one.")


def _export_groups() -> dict[str, list[Option]]:
    return {
        "": [
            command_option("out", str, "The file to write, or for hf the folder. Nothing may exist there."),
            command_option("run", str, "Folder of the run, or a file of weights."),
            Option("to", str, None, Rule(help="The format.", choices=FORMATS)),
            CHECKPOINT_OPTION,
            command_option("encoder_only", bool, "For hf and safetensors: leave out the decoder.", False),
        ]
    }


def _export(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.interop.export import export_command

    export_command(**_run_arguments(command, name, given, to=f"one of {', '.join(FORMATS)}", out="a path to write"))


def _push_groups() -> dict[str, list[Option]]:
    return {
        "": [
            command_option("repo", str, "Repository of the hub, owner/name; created if there is none."),
            RUN_OPTION,
            CHECKPOINT_OPTION,
            command_option("private", bool, "Only you can read a new repository.", False),
            command_option("pictures", bool, "Upload the pictures of the run, which show some of its images.", True),
        ]
    }


def _push(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.interop.hub import push_command

    push_command(**_run_arguments(command, name, given, repo="the name of a repository, owner/name"))


def _import_groups() -> dict[str, list[Option]]:
    size = find_option(MethodConfig, "image_size")
    return {
        "": [
            command_option("source", str, f"The weights: {EXPECTED}."),
            command_option("out", str, "The .safetensors file to write. Nothing may exist there."),
            command_option(
                "backend", str, "The framework that reads the source: torch, or jax for safetensors.", "torch"
            ),
            command_option("encoder_only", bool, "Leave out all but the encoder.", False),
        ],
        "What weights do not tell; what the source says takes precedence": [
            command_option(
                "num_heads", int | None, "Attention heads of the encoder. Null: as published, or width / 64."
            ),
            command_option("decoder_heads", int | None, "Attention heads of the decoder. Null: width / 32."),
            command_option("image_size", size.type | None, f"{size.help} Null: a square."),
            command_option("norm_pix", bool | None, "Whether MAE's target patches were normalised. Null: true."),
        ],
    }


def _import(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.interop.importing import import_command

    needed = {
        "source": "the weights to import, as in prmim import SOURCE OUT",
        "out": "the file to write, as in prmim import SOURCE OUT",
    }
    import_command(**_arguments(command, name, given, **needed))


def _run_arguments(command: Command, name: str, given: dict[str, str], **needed: str) -> dict[str, Any]:
    """Return the arguments of a command on a run; see `_arguments`."""
    return _arguments(command, name, given, run="the folder of a run, as in --run runs/mae-digits", **needed)


def _arguments(command: Command, name: str, given: dict[str, str], **needed: str) -> dict[str, Any]:
    """Convert the options of a command; ``needed`` are those that must be given, and what they are."""
    for option, expected in needed.items():
        if option not in given:
            raise ValueError(f"{option}: expected {expected}, got nothing")
    return convert(_parser(command, name), command.options(), given)


def _parser(command: Command, name: str) -> ArgumentParser:
    return build_parser(name, command.description, command.groups(), command.places)


SHARED_COMMANDS = ("pretrain", "evaluate", "features")
"""Commands that may run in several processes."""

EVALUATIONS = ("knn", "linear", "finetune")
SOLVERS = ("lbfgs", "lars")
TRAINED = ("finetune", "linear")
"""Protocols that can train a classifier by steps."""
FROZEN_OPTIONS = {"data", "holdout", "image_size", "test_data", "device", "checkpoint", "eval_limit", "baselines"}
FROZEN_OPTIONS |= {"allow_changes"}

COMMANDS = {
    "pretrain": Command(
        "train on your images, or on the embedded digits",
        "Pre-train, evaluate the frozen features, and draw pictures. Defaults are the published recipe of MAE; for the "
        "embedded digits, the packaged recipe 'digits'. The published recipes of all methods are packaged: for example "
        "--config simmim_vit_base.",
        _pretrain_groups,
        _pretrain,
    ),
    "inspect": Command(
        "show what a run would do and cost; trains nothing",
        "Show what pretrain would do with the same options: data found, tokens per stage, computation, memory, "
        "learning rate. Trains nothing and writes nothing. For a packaged recipe, also paper, published number, and "
        "differences from the published run.",
        _inspect_groups,
        _inspect,
    ),
    "stats": Command(
        "measure the images: sizes, types, range, mean, duplicates",
        "Read the images, and show sizes, channels, types, the range of values, mean and standard deviation per "
        "channel, unreadable files, duplicates (equal pixels), and options of pretrain that fit. Writes nothing.",
        _stats_groups,
        _stats,
    ),
    "evaluate": Command(
        "classify held-out images with frozen features, a linear probe or fine-tuning",
        "Classify held-out images with the frozen features of a run's last checkpoint (knn, linear), compared with an "
        "untrained encoder and raw pixels. Or train a classifier on the encoder: finetune, or linear with --solver "
        "lars. Defaults are the published recipes of MAE; for the embedded digits, smaller ones. The published recipes "
        "of all methods are packaged: for example --config simmim_vit_base_finetune.",
        _evaluate_groups,
        _evaluate,
    ),
    "features": Command(
        "write the features of images to a file, with names and labels",
        "Write the features of all images of a source to a file .npz or .parquet, with names and labels. A repeated "
        "command continues an interrupted one. Several processes, started by torchrun, share the images.",
        _features_groups,
        _features,
    ),
    "picture": Command(
        "draw the reconstructions, the sampling and the loss of a run",
        "Draw pictures of a run's last checkpoint into its folder.",
        _picture_groups,
        _picture,
    ),
    "export": Command(
        "write the weights of a run for transformers, timm or PyTorch",
        "Write the weights of a run's last checkpoint in the format of another library, and print how to load them.",
        _export_groups,
        _export,
        places=("out",),
    ),
    "push": Command(
        "upload the weights of a run to the Hugging Face hub",
        "Upload the weights of a run's last checkpoint, its options and pictures, and a model card with its numbers to "
        "the Hugging Face hub, in one commit. `hf auth login` stores your token.",
        _push_groups,
        _push,
        places=("repo",),
    ),
    "import": Command(
        "convert weights of other code to a file of prmim",
        "Convert a checkpoint of the authors of MAE, Pixio, CrossMAE, SimMIM, MaskAlign or LocalMIM, a ViT, ViTMAE or "
        "ViTForMaskedImageModeling of transformers, or a ViT of timm. The names of the tensors tell the format. Prints "
        "format and encoder, and all that was assumed or left out. Executes no code of the source.",
        _import_groups,
        _import,
        places=("source", "out"),
    ),
}
