"""The commands of `prmim`: options, functions and error reports."""

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
    inherited,
    pretrain_options,
    read_classify_options,
    read_config,
    split_words,
    suggest,
)
from prmim_train.config.layers import merge_layers, recipe_names
from prmim_train.config.packages import check_installed
from prmim_train.config.training import DIGITS, SAMPLING, SOURCE_OPTIONS
from prmim_train.run.processes import FailedElsewhereError, adopt_srun, is_main, launched

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_SIGNAL = 128  # plus the number of the signal, as in shells


@dataclass(frozen=True)
class Command:
    """A command of `prmim`.

    Parameters
    ----------
    summary, description
        Help as a phrase, and as a few sentences.
    groups
        Returns the options by title of the group.
    run
        Runs the command. Arguments: the command, its name, and the texts of the given options.
    places
        Options that can also be given by position, in this order.
    """

    summary: str
    description: str
    groups: Callable[[], dict[str, list[Option]]]
    run: Callable[["Command", str, dict[str, str]], None]
    places: tuple[str, ...] = ()

    def options(self) -> list[Option]:
        """Return the options of all groups."""
        return [item for items in self.groups().values() for item in items]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Words after `prmim`. None: the arguments of the process.

    Returns
    -------
    int
        Exit code: 0 on success, 1 if a run failed, 2 if the options or the data are wrong. If a signal stopped a run,
        128 plus the number of the signal, such as 130 after Ctrl-C.

    Notes
    -----
    Errors are printed in one line. `--traceback`, or the environment variable `PRMIM_TRACEBACK=1`, adds the traceback.
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
        text = f"{type(error).__name__}: {text} (PRMIM_TRACEBACK=1 shows the traceback)"
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
        "  --help       show this help; after a command, show its options",
        "  --version    show the version of prmim",
        "  --traceback  show the traceback of an error",
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
    sheet = "Also draw the first training samples with their masks to this file: .png, .pdf or .svg."
    own = [_config_option("pretrain", "evaluate"), command_option("sheet", str | None, sheet)]
    return {"": own, **pretrain_options()}


def _config_option(*commands: str, note: str = "") -> Option:
    names = ", ".join(name for command in commands for name in recipe_names(command))
    text = f"A YAML file of options, or the name of a packaged recipe: {names}.{note}"
    return command_option("config", str | None, text)


def _pretrain(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.pretrain import pretrain

    options = command.options()
    pretrain(read_config(given, _parser(command, name), options))


def _inspect(command: Command, name: str, given: dict[str, str]) -> None:
    if _explain_recipe(given):
        return
    from prmim_train.report.inspect import inspect_run

    options = [item for item in command.options() if item.name != "sheet"]
    sheet = given.get("sheet")
    given = {option: text for option, text in given.items() if option != "sheet"}
    config = read_config(given, _parser(command, name), options)
    if sheet is not None:
        from prmim_train.report.sheet import sheet_command

        sheet_command(config, sheet)
    print(inspect_run(config))


def _explain_recipe(given: dict[str, str]) -> bool:
    """Describe a packaged recipe.

    Returns True for a recipe of `evaluate`, which has nothing else to inspect.
    """
    from prmim_train.report.recipe import recipe_lines

    name = given.get("config", "")
    is_of_evaluate = name in recipe_names("evaluate")
    if is_of_evaluate and len(given) > 1:
        other = next(option for option in given if option != "config")
        raise ValueError(f"{other}: expected no other option with {name}, a recipe of evaluate, got {given[other]}")
    if is_of_evaluate or name in recipe_names():
        print("\n".join(recipe_lines(name)), end="\n" * (1 if is_of_evaluate else 2))
    return is_of_evaluate


KEYS = tuple(name for name in SOURCE_OPTIONS if name != "data")
"""Options of the source of images, without `data`."""

FROZEN = ("data", *KEYS, "holdout", "image_size", "test_data", "device", "checkpoint", "allow_changes")
"""Options of a classifier's training that the evaluation of frozen features has, too."""

RUN_OPTION = command_option("run", str, "Folder of the run.")


def _evaluate_groups() -> dict[str, list[Option]]:
    limit = (
        "Maximum number of training images and of test images. Not given: as in the run. For knn and linear with lbfgs."
    )
    others = "Also evaluate an untrained encoder and raw pixels. For knn and linear with lbfgs."
    groups = classify_options()
    named = {item.name: item for items in groups.values() for item in items}
    frozen = [named[name] for name in FROZEN]
    own = {
        f"For finetune and linear with lars: {title.lower()}": [item for item in items if item not in frozen]
        for title, items in groups.items()
    }
    return {
        "": [
            RUN_OPTION,
            command_option("protocol", str | None, "knn, linear or finetune. Null: knn, and linear with lbfgs."),
            command_option(
                "solver", str | None, "For linear: lbfgs (fast, the default) or lars (MAE's published probe)."
            ),
            _config_option("evaluate", note=" For finetune and linear with lars."),
            *frozen,
            command_option("eval_limit", int, limit),
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
    own = _trained_options() if is_trained else {*FROZEN, "eval_limit", "baselines"}
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


def _trained_options() -> set[str]:
    """Return the names of the options of a classifier's training, without the protocol."""
    return {item.name for items in classify_options().values() for item in items}


def _with_classify_file(arguments: dict[str, Any], config: str, command: Command, name: str) -> dict[str, Any]:
    """Merge the command line over a file of classifier options."""
    trained = {"protocol", *_trained_options()}
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
    kinds = "Picture to draw: reconstructions (similarity for maskalign), schedule or loss. Null: all."
    return {
        "": [
            RUN_OPTION,
            command_option("data", str, "Images, in place of those of the run; see prmim pretrain --help."),
            command_option("holdout", float, "Fraction of held-out images, in place of the run's."),
            command_option("device", str, "Device, in place of the run's: auto, cpu, cuda or mps."),
            command_option("kind", str | None, kinds),
            command_option("pictures", int, "Number of images to draw."),
            command_option("allow_changes", bool, "Draw even if the images of the run have changed.", False),
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
            *(named[name] for name in KEYS),
            command_option("clips", bool, "The images are clips: videos, folders of frames, or arrays.", False),
            named["volumes"],
            command_option("channels", int | None, "Channels to convert images to. Null: as in the files, 1 or 3."),
            command_option("limit", int | None, "Maximum number of images to read, evenly spaced. Null: all."),
        ]
    }


def _stats(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.report.stats import stats_command

    stats_command(**{"data": DIGITS, **_arguments(command, name, given)})


def _features_groups() -> dict[str, list[Option]]:
    named = {item.name: item for items in pretrain_options().values() for item in items}
    size = find_option(ClassifierConfig, "image_size")
    run = command_option("run", str, "Folder of the run, or a file of weights.")
    return {
        "": [
            run,
            command_option("data", str, "Images: see prmim pretrain --help. Not given: those of the run."),
            *(inherited(named[name]) for name in KEYS),
            command_option("out", str, "File to write: .npz or .parquet."),
            command_option("pool", str, "mean: the mean of the patch tokens; cls: the class token.", "mean"),
            command_option(
                "layer",
                int | None,
                "Block whose output is written, from 1; 0: the input of the first. Null: the encoder's output.",
            ),
            size,
            command_option("checkpoint", int | None, "Step of the run's checkpoint. Null: the last one."),
            command_option("batch_size", int, "Images per forward pass, in each process.", 64),
            *(inherited(named[name]) for name in (*SAMPLING, "device", "precision", "backend")),
        ]
    }


def _features(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.evaluate.embeddings import features_command

    features_command(**_run_arguments(command, name, given, out="the file to write, as in --out features.npz"))


CHECKPOINT_OPTION = command_option("checkpoint", int | None, "Step of the checkpoint. Null: the newest good one.")


def _export_groups() -> dict[str, list[Option]]:
    return {
        "": [
            command_option("out", str, "File to write, or folder for hf. Must not exist."),
            command_option("run", str, "Folder of the run, or a file of weights."),
            Option("to", str, None, Rule(help="Format of the export.", choices=FORMATS)),
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
            command_option("repo", str, "Repository on the hub, owner/name. Created if it does not exist."),
            RUN_OPTION,
            CHECKPOINT_OPTION,
            command_option("private", bool, "Create a new repository as private.", False),
            command_option(
                "pictures", bool, "Upload the pictures of this checkpoint, which show some images of the run.", True
            ),
        ]
    }


def _push(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.interop.hub import push_command

    push_command(**_run_arguments(command, name, given, repo="the name of a repository, owner/name"))


def _import_groups() -> dict[str, list[Option]]:
    size = find_option(MethodConfig, "image_size")
    return {
        "": [
            command_option("source", str, f"Weights: {EXPECTED}."),
            command_option("out", str, "File to write, .safetensors. Must not exist."),
            command_option("backend", str, "Framework that reads the source: torch, or jax for safetensors.", "torch"),
            command_option("encoder_only", bool, "Import the encoder only.", False),
        ],
        "Metadata, used where the source has none": [
            command_option(
                "num_heads", int | None, "Attention heads of the encoder. Null: as published, or width / 64."
            ),
            command_option("decoder_heads", int | None, "Attention heads of the decoder. Null: width / 32."),
            command_option("image_size", size.type | None, f"{size.help} Null: a square."),
            command_option("norm_pix", bool | None, "Whether MAE's target patches were normalized. Null: true."),
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
    """Convert the options of a command.

    ``needed`` describes the required options, for the error message.
    """
    for option, expected in needed.items():
        if option not in given:
            raise ValueError(f"{option}: expected {expected}, got nothing")
    return convert(_parser(command, name), command.options(), given)


def _parser(command: Command, name: str) -> ArgumentParser:
    return build_parser(name, command.description, command.groups(), command.places)


SHARED_COMMANDS = ("pretrain", "evaluate", "features")
"""Commands that can be distributed over processes."""

EVALUATIONS = ("knn", "linear", "finetune")
SOLVERS = ("lbfgs", "lars")
TRAINED = ("finetune", "linear")
"""Protocols that train a classifier on the encoder; linear only with LARS."""

COMMANDS = {
    "pretrain": Command(
        "pre-train an encoder on your images, or on the embedded digits",
        "Pre-train an encoder, evaluate its frozen features, and draw pictures. The defaults are MAE's published "
        "recipe; for the embedded digits, the packaged recipe 'digits'. Published recipes of all methods are packaged, "
        "for example --config simmim_vit_base.",
        _pretrain_groups,
        _pretrain,
    ),
    "inspect": Command(
        "show data, tokens and cost of a run, without training",
        "Show data, tokens per stage, computation, memory and learning rate of a run of pretrain with the same "
        "options. Does not train, and writes no file except the picture of --sheet. For a packaged recipe, also show "
        "its paper, the published number, and the differences from the published run.",
        _inspect_groups,
        _inspect,
    ),
    "stats": Command(
        "show statistics of images: sizes, types, range, mean, duplicates",
        "Read the images and show their sizes, channels, types, range of values, mean and standard deviation per "
        "channel, unreadable files, and duplicates (equal pixels). Print options of pretrain that fit these images. "
        "Writes no file.",
        _stats_groups,
        _stats,
    ),
    "evaluate": Command(
        "evaluate an encoder with frozen features, a linear probe or fine-tuning",
        "Classify held-out images with the encoder of a run's last checkpoint. knn, and linear with lbfgs, use frozen "
        "features, and compare them with an untrained encoder and raw pixels. finetune, and linear with lars, train a "
        "classifier in steps. Their defaults are MAE's published recipes, or smaller ones for the embedded digits. "
        "Published recipes of all methods are packaged, for example --config simmim_vit_base_finetune.",
        _evaluate_groups,
        _evaluate,
    ),
    "features": Command(
        "write the features of images to a file, with names and labels",
        "Write the features of all images of a source to an .npz or .parquet file, with names and labels. Repeat the "
        "command to continue after an interruption. Start it with torchrun to distribute the images over processes.",
        _features_groups,
        _features,
    ),
    "picture": Command(
        "draw reconstructions, sampling and loss curves of a run",
        "Draw pictures of a run's last checkpoint, and write them into the folder of the run.",
        _picture_groups,
        _picture,
    ),
    "export": Command(
        "export the weights of a run to transformers, timm or PyTorch",
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
        "convert a checkpoint of other code to a file of prmim",
        "Convert a checkpoint of the authors of MAE, Pixio, CrossMAE, SimMIM, MaskAlign or LocalMIM, a ViT, ViTMAE or "
        "ViTForMaskedImageModeling of transformers, or a ViT of timm. The format is detected from the names of the "
        "tensors. Prints the format, the encoder, and everything that was assumed or left out. Never executes code of "
        "the source.",
        _import_groups,
        _import,
        places=("source", "out"),
    ),
}
