"""The command `prmim`."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from jsonargparse import ArgumentParser

from prmim_train.checks import check_name
from prmim_train.config import GROUP_STARTS
from prmim_train.options import (
    Option,
    build_parser,
    classify_options,
    config_options,
    convert,
    read_config,
    split_words,
    suggest,
)
from prmim_train.processes import FailedElsewhereError, is_main, launched, say

EXIT_USAGE = 2
EXIT_FAILURE = 1
EXIT_SIGNAL = 128  # plus the signal's number, as shells count


@dataclass(frozen=True)
class Command:
    """One command: its help, its options, and what it does."""

    summary: str
    description: str
    options: Callable[[], list[Option]]
    run: Callable[["Command", str, dict[str, str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        The words behind `prmim`; by default those of the process.

    Returns
    -------
    int
        The exit code: 0; 1 where a run failed; 2 where the options or the data were wrong; 130 after Ctrl-C.
        Whatever goes wrong is told in one line, of several processes by each one for itself, unless all are concerned
        alike; the environment variable `PRMIM_TRACEBACK=1`, or `--traceback`, adds
        where in the code it happened.
    """
    from prmim_train.loop import Interrupted, NonFiniteLoss

    words = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = os.environ.get("PRMIM_TRACEBACK", "0") not in ("", "0")
    if "--traceback" in words:
        words.remove("--traceback")
        wants_traceback = True
    try:
        _dispatch(words)
    except Interrupted as stop:
        if is_main():
            print(f"prmim: {stop}", file=sys.stderr)
        return EXIT_SIGNAL + stop.signal_number
    except KeyboardInterrupt:
        print("prmim: interrupted", file=sys.stderr)
        return EXIT_SIGNAL + signal.SIGINT
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        if wants_traceback:
            traceback.print_exc()
        if is_main() or not isinstance(error, NonFiniteLoss | FailedElsewhereError):  # those are told by the main one
            print(_one_line(error), file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ValueError | TypeError | ImportError | _FILE_ERRORS) else EXIT_FAILURE
    return 0


# A file that is not there, or that is there and should not be, is the user's business; a full disk is a failure.
_FILE_ERRORS = FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no further message"
    if not isinstance(error, ValueError | TypeError | OSError | ImportError | ArithmeticError):
        text = f"{type(error).__name__}: {text} (PRMIM_TRACEBACK=1 shows where)"
    who = "" if is_main() else f" process {launched().rank}:"
    return f"prmim:{who} error: {text}"


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if words[0] == "--version":
        print(f"prmim {metadata.version('prmim')}")
        return
    name, *rest = words
    if name not in COMMANDS:
        raise ValueError(f"command: expected {', '.join(COMMANDS)}, got {name!r}{suggest(name, COMMANDS)}")
    command = COMMANDS[name]
    if name not in SHARED_COMMANDS and launched().world_size > 1:
        raise ValueError(
            f"command: expected one process for {name}, got {launched().world_size}; only "
            f"{' and '.join(SHARED_COMMANDS)} take more"
        )
    if "-h" in rest or "--help" in rest:
        _parser(command, name).print_help()
        return
    command.run(command, name, split_words(rest, command.options()))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: prmim COMMAND [--option VALUE] ...",
        "",
        "Masked image modelling, made cheap: the decoder rebuilds only part of the hidden patches.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "options:",
        "  --help       this text; after a command, its options",
        "  --version    the version of prmim",
        "  --traceback  after an error, show where in the code it happened",
        "",
        "first steps:",
        "  prmim pretrain                                   train on the embedded digits",
        "  prmim inspect --data FOLDER --config photos_vit_tiny",
        "  prmim pretrain --data FOLDER --config photos_vit_tiny",
    ]
    return "\n".join(lines)


CONFIG_OPTION = Option("config", str | None, "A YAML file of options, or the name of a packaged recipe: {recipes}.")


def _pretrain_options() -> list[Option]:
    from prmim_train.layers import recipe_names

    config = replace(CONFIG_OPTION, help=CONFIG_OPTION.help.format(recipes=", ".join(recipe_names())))
    return [config, *config_options()]


def _pretrain(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.loop import pretrain

    options = command.options()
    pretrain(read_config(given, _parser(command, name), options, say))


def _inspect(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.inspect import inspect_run

    options = command.options()
    given = {option: text for option, text in given.items() if option != "resume"}
    print(inspect_run(read_config(given, _parser(command, name), options, say)))


def _run_options() -> list[Option]:
    return [
        Option("run", str, "Folder of the run."),
        Option("data", str | None, "Other images than those of the run: see prmim pretrain --help."),
        Option("holdout", float | None, "Another held-out share than that of the run."),
        Option("device", str | None, "Another device than that of the run: auto, cpu or cuda."),
    ]


def _evaluate_options() -> list[Option]:
    limit = "Most images to learn from, and to classify. Not given: as in the run. For knn, and linear by lbfgs, only."
    others = "Whether to classify by an untrained encoder and by raw pixels too. For knn, and linear by lbfgs."
    options = {option.name: option for option in classify_options()}
    frozen = [options.pop(name) for name in ("data", "holdout", "test_data", "device", "checkpoint")]
    return [
        Option("run", str, "Folder of the run."),
        Option("protocol", str | None, "knn, linear or finetune. Null: knn, and linear by lbfgs."),
        Option("solver", str | None, "For linear: lbfgs (quick, the default) or lars (MAE's published probe)."),
        *frozen,
        Option("eval_limit", int | None, limit),
        Option("baselines", bool, others, True),
        *options.values(),
    ]


def _evaluate(command: Command, name: str, given: dict[str, str]) -> None:
    arguments = _run_arguments(command, name, given)
    protocol, solver = arguments.get("protocol"), arguments.pop("solver", None)
    if protocol is not None:
        check_name("protocol", protocol, EVALUATIONS)
    if solver is not None:
        check_name("solver", solver, SOLVERS)
        if protocol != "linear":
            raise ValueError(f"solver: expected --protocol linear with it, got {protocol or 'no protocol'}")
    is_trained = protocol == "finetune" or solver == "lars"
    own = {option.name for option in classify_options()} if is_trained else FROZEN_OPTIONS
    for option in arguments:
        if option not in {"run", "protocol", *own}:
            wanted = "knn, or linear by lbfgs" if is_trained else "finetune, or linear --solver lars"
            got = " ".join(word for word in (protocol, solver) if word) or "no protocol"
            raise ValueError(f"{option}: expected --protocol {wanted} with it, got {got}")
    if is_trained:
        from prmim_train.classify import classify_command

        classify_command(**arguments)
    else:
        from prmim_train.evaluate import evaluate_command

        evaluate_command(**arguments)


def _picture_options() -> list[Option]:
    return [
        *_run_options(),
        Option(
            "kind",
            str | None,
            "reconstructions (similarity for maskalign), schedule or loss; all of them where none is named.",
        ),
        Option("pictures", int | None, "Number of images shown."),
    ]


def _picture(command: Command, name: str, given: dict[str, str]) -> None:
    from prmim_train.pictures import picture_command

    picture_command(**_run_arguments(command, name, given))


def _run_arguments(command: Command, name: str, given: dict[str, str]) -> dict[str, Any]:
    options = command.options()
    if "run" not in given:
        raise ValueError("run: expected the folder of a run, as in --run runs/mae-digits, got nothing")
    return convert(_parser(command, name), options, given)


def _parser(command: Command, name: str) -> ArgumentParser:
    return build_parser(name, command.description, command.options(), HELP_GROUPS.get(name))


SHARED_COMMANDS = ("pretrain", "evaluate")
"""Commands that several processes can work on."""

EVALUATIONS = ("knn", "linear", "finetune")
SOLVERS = ("lbfgs", "lars")
FROZEN_OPTIONS = {"data", "holdout", "test_data", "device", "checkpoint", "eval_limit", "baselines"}

HELP_GROUPS = {
    "pretrain": GROUP_STARTS,
    "inspect": GROUP_STARTS,
    "evaluate": {
        "crop_scale": "For finetune, and linear by lars: data",
        "pool": "For finetune, and linear by lars: model",
        "epochs": "For finetune, and linear by lars: optimisation",
        "backend": "For finetune, and linear by lars: run",
    },
}

COMMANDS = {
    "pretrain": Command(
        "train on your images, or on the embedded digits",
        "Pre-train, evaluate the frozen features, and draw pictures. Options not given are those of the published MAE "
        "recipe; on the embedded digits, those of the packaged recipe 'digits'. The published recipes of all methods "
        "are packaged, as in --config simmim_vit_base.",
        _pretrain_options,
        _pretrain,
    ),
    "inspect": Command(
        "show what a run would do and cost; trains nothing",
        "Show what pretrain would do with the same options: data found, tokens per stage, computation, memory, "
        "learning rate. Trains nothing and writes nothing.",
        _pretrain_options,
        _inspect,
    ),
    "evaluate": Command(
        "classify held-out images: by frozen features, by a linear probe, by fine-tuning",
        "Classify held-out images by the frozen features of a run's last checkpoint (knn, linear), and for comparison "
        "by those of an untrained encoder and by raw pixels. Or train a classifier on its encoder: finetune, or linear "
        "with --solver lars; options not given are those of the published MAE recipes (on the embedded digits: smaller "
        "ones).",
        _evaluate_options,
        _evaluate,
    ),
    "picture": Command(
        "draw what a run rebuilds, its sampling and its loss",
        "Draw pictures of a run's last checkpoint into its folder.",
        _picture_options,
        _picture,
    ),
}
