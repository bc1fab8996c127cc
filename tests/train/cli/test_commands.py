"""The command line: options, messages, exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from prmim_methods import METHODS
from prmim_methods.record import options as record_options
from prmim_train.cli.commands import COMMANDS, main
from prmim_train.cli.options import build_parser, convert
from prmim_train.config.classify import ClassifyConfig
from prmim_train.config.pretrain import PretrainConfig


def fail(words, capsys, code=2):
    """Run a command that must fail; return its one line."""
    assert main(words) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    line = captured.err.rstrip("\n")
    assert line.startswith("prmim: error: ")
    assert line.isprintable()
    assert len(line) < 500
    return line.removeprefix("prmim: error: ")


WRONG = [
    (["--epoch", "3"], "--epoch: unknown option; did you mean --epochs?"),
    (["--mask-ration", "3"], "--mask_ration: unknown option; did you mean --mask_ratio?"),
    (["--zzz"], "--zzz: unknown option"),
    (["epochs", "3"], "epochs: expected an option, as in --config VALUE, got 'epochs'"),
    (["--epochs"], "epochs: expected a whole number of at least 1, got nothing"),
    (["--epochs", "--flip"], "epochs: expected a whole number of at least 1, got nothing"),
    (["--epochs", "many"], "epochs: expected a whole number of at least 1, got 'many'"),
    (["--epochs", "1.5"], "epochs: expected a whole number of at least 1, got '1.5'"),
    (["--epochs", "1" + 400 * "0"], "epochs: expected whole numbers up to 2147483647, got 1000"),
    (["--epochs", "1:30"], "epochs: expected a whole number of at least 1, got '1:30'"),
    (["--epochs", "1_000"], "epochs: expected a whole number of at least 1, got '1_000'"),
    (["--epochs", "٣"], "epochs: expected a whole number of at least 1, got '٣'"),
    (["--epochs", "!!int 5"], "epochs: expected a whole number of at least 1, got '!!int 5'"),
    (["--epochs", "x" * 10**6], "epochs: expected a whole number of at least 1, got 'xxxx"),
    (["--clip_grad", ".nan"], "clip_grad: expected a number above 0, or null, got '.nan'"),
    (["--clip_grad", "1e400"], "clip_grad: expected a number above 0, or null, got inf"),
    (["--image_size", "32,1:30"], "image_size: expected a whole number of at least 1, or one for each axis, got '32,1"),
    (["--data", "\x1b[2J"], r"data: expected text without control characters, got '\x1b[2J'"),
    (["--\x1b[2J", "1"], r"--\x1b[2J: unknown option"),
    (["--" + "x" * 10**6, "1"], "--xxxx"),
    (["\x1b[2J"], r"\x1b[2J: expected an option, as in --config VALUE, got"),
    (["--stages", "10000000"], "stages: expected a whole number in [1, 1000], got 10000000"),
    (["--epochs", "0"], "epochs: expected a whole number of at least 1, got 0"),
    (["--mask_ratio", "1.5"], "mask_ratio: expected a number in (0, 1), got 1.5"),
    (["--mask_ratio", "null"], "mask_ratio: expected a number in (0, 1), got 'null'"),
    (["--throw_ratio", "0.8"], "throw_ratio: expected at most mask_ratio 0.75, got 0.8"),
    (["--cells", "3"], "cells: expected a divisor of the patch 2 x 2, or null, got 3"),
    (["--cells", "0"], "cells: expected a whole number of at least 1, or null, got 0"),
    (["--thrown_target", "cell"], "thrown_target: expected one of cells, patch, got 'cell'"),
    (["--method", "maskalign", "--cells", "2"], "cells: method maskalign has no such option"),
    (["--image_size", "33"], "patch_size: expected sizes that divide the image (33, 33), got (2, 2)"),
    (["--image_size", "a,b"], "image_size: expected a whole number of at least 1, or one for each axis, got 'a,b'"),
    (["--crop_scale", "0.5"], "crop_scale: expected two ascending numbers in (0, 1], got '0.5'"),
    (["--flip=perhaps"], "flip: expected true or false, got 'perhaps'"),
    (["--clip_grad", "x"], "clip_grad: expected a number above 0, or null, got 'x'"),
    (["--backend", "tensorflow"], "backend: expected torch or jax, got 'tensorflow'"),
    (["--backend", "core"], "backend: expected torch or jax, got 'core'"),
    (["--backend", "methods"], "backend: expected torch or jax, got 'methods'"),
    (["--backend", "train"], "backend: expected torch or jax, got 'train'"),
    (["--backend", "reference"], "backend: expected torch or jax, got 'reference'"),
    (["--backend", "a" * 300], "backend: expected torch or jax, got 'aaaa"),
    (["--backend", "../x"], "backend: expected torch or jax, got '../x'"),
    (["--data", "/nowhere/at/all"], "data: nothing at /nowhere/at/all"),
    (["--method", "beit"], f"method: expected one of {', '.join(METHODS)}, got 'beit'"),
    (["--method", "simmim", "--decoder_dim", "32"], "decoder_dim: method simmim has no such option"),
    (["--method", "simmim", "--mask_unit", "3"], "mask_unit: expected a divisor of the grid 8 x 8, got 3"),
    (["--method", "maskalign"], "teacher: expected the folder of a vision transformer, or its name on the hub, got"),
    (["--teacher", "clip"], "teacher: method mae has no such option"),
    (["--config", "nowhere"], "config: expected a YAML file or one of the recipes "),
    (["--config", "mae_vit_bas"], "config: expected a YAML file or one of the recipes "),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[repr(" ".join(words))[:40] for words, _ in WRONG])
@pytest.mark.parametrize("command", ["pretrain", "inspect"])
def test_a_wrong_option_gives_one_line(command, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fail([command, *words], capsys).startswith(message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["inspect", "--epochs", "3"],
            "epochs: expected no other option with mae_vit_base_linear, a recipe of evaluate",
        ),
        (
            ["pretrain"],
            "config: expected options of prmim pretrain, got those of evaluate; use prmim evaluate --run RUN",
        ),
    ],
)
def test_a_recipe_of_evaluate_is_none_of_other_commands(words, message, capsys):
    assert fail([*words, "--config", "mae_vit_base_linear"], capsys).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "epoch: unknown option in"),
        ("epochs: many", "epochs: expected a whole number of at least 1, got 'many'"),
        ("epochs: 1.5", "epochs: expected a whole number of at least 1, got 1.5"),
        ("flip: null", "flip: expected true or false, got None"),
        ("mask_ratio: 1.5", "mask_ratio: expected a number in (0, 1), got 1.5"),
        ("cells: [2, 2]", "cells: expected a whole number of at least 1, or null, got [2, 2]"),
        ("cell_norm: 3", "cell_norm: expected one of image, window, none, got 3"),
        ("flip: 3", "flip: expected true or false, got 3"),
        (
            "image_size: [16, x]",
            "image_size: expected a whole number of at least 1, or one for each axis, got [16, 'x']",
        ),
        ('"\\e[2J": 3', r"\x1b[2J: unknown option in"),
        ("epochs: 1:30", "epochs: expected a whole number of at least 1, got '1:30'"),
        ("betas: [0.9, 1:30]", "betas: expected two numbers in [0, 1), got [0.9, '1:30']"),
        ("epochs: 1\nepochs: 2", "config: expected YAML, got an error in"),
        ("init_seed: 3", "init_seed: unknown option in"),
        ("config: other.yaml", "config: unknown option in"),
        ("epochs: [", "config: expected YAML, got an error in"),
    ],
)
def test_a_wrong_file_gives_one_line(content, message, capsys, tmp_path):
    (tmp_path / "options.yaml").write_text(content)
    assert fail(["pretrain", "--config", str(tmp_path / "options.yaml")], capsys).startswith(message)


def test_an_unknown_command_gives_one_line(capsys):
    assert fail(["pretain"], capsys).endswith("got 'pretain'; did you mean pretrain?")


def test_a_missing_framework_gives_one_line(capsys, tmp_path, monkeypatch):
    (tmp_path / "prmim_absent.py").write_text("import a_framework_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = fail(["pretrain", "--backend", "absent", "--out", str(tmp_path / "run")], capsys)
    assert line.endswith("absent needs a_framework_nobody_has, which is not installed; pip install 'prmim[absent]'")


def test_an_unexpected_error_gives_one_line_or_a_traceback(tiny_words, fake, capsys, monkeypatch):
    def explode(self, images, sample):
        raise KeyError("a bug")

    monkeypatch.setattr(fake, "train_step", explode)
    assert (
        fail(["pretrain", *tiny_words], capsys, code=1) == "KeyError: 'a bug' (PRMIM_TRACEBACK=1 shows the traceback)"
    )
    assert main(["pretrain", *tiny_words, "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("PRMIM_TRACEBACK", "1")
    assert main(["pretrain", *tiny_words]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_exits_with_1(tiny_words, fake, capsys, monkeypatch):
    monkeypatch.setattr(fake, "bad_steps", (3,))
    assert "got a non-finite step 3" in fail(["pretrain", *tiny_words], capsys, code=1)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_states_every_option_once(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # one line for each option
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in COMMANDS[command].options():
        value = "" if option.is_flag else "VALUE "
        assert text.count(f"--{option.name} {value}{option.help}") == text.count(option.help) == 1
        assert option.help.endswith(".")


OWN = {
    "pretrain": {"config", "method"},
    "inspect": {"config", "method", "sheet"},
    "evaluate": {"run", "protocol", "solver", "config", "eval_limit", "baselines"},
}
"""Options that belong to a command and to no record."""


@pytest.mark.parametrize("command", OWN)
def test_options_come_from_the_records(command):
    records = (ClassifyConfig,) if command == "evaluate" else (PretrainConfig, *METHODS.values())
    declared = {}
    for item in (item for record in records for item in record_options(record)):
        declared.setdefault(item.name, []).append(item)
    hidden = {"protocol"} if command == "evaluate" else {"init_seed"}  # a command's own option; follows from the seed
    found = {item.name: item for item in COMMANDS[command].options() if item.name not in OWN[command]}
    assert set(found) == set(declared) - hidden
    for name, item in found.items():
        first = declared[name][0]
        assert all(one.help in item.help for one in declared[name])
        assert item.type == first.type
        # Methods can differ in the choices of an option.
        assert item.rule.choices == {key: value for one in declared[name] for key, value in one.rule.choices.items()}
        assert item.rule.choices or item.expected == first.expected
        assert item.default in (first.default, None)


def test_options_are_grouped_as_in_the_records(capsys):
    assert main(["pretrain", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = ["Data:", "Method:", "Options that differ between methods:", "Optimization:", "Run:"]
    assert [line for line in lines if line in titles] == titles
    first = [next(line.split()[0] for line in lines[lines.index(title) + 1 :]) for title in titles]
    assert first == ["--data", "--method", "--mask_ratio", "--seed", "--backend"]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_command(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("prmim ")


@pytest.mark.parametrize("command", ["pretrain", "evaluate"])
def test_help_does_not_load_a_framework(command):
    code = f"import sys; from prmim_train.cli.commands import main; main(['{command}', '--help']); "
    code += "print([m for m in ('torch', 'jax', 'sklearn', 'matplotlib', 'grain') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_digits_use_their_recipe_and_say_so(fake, capsys, tmp_path):
    words = ["pretrain", "--backend", "fake", "--out", str(tmp_path / "run"), "--epochs", "1", "--no_flip"]
    assert main([*words, "--eval_limit", "0", "--pictures", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("No --data given: the embedded digits, with the packaged")
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (options["channels"], options["embed_dim"], options["epochs"]) == (1, 96, 1)


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("epochs", "010", 10),
        ("epochs", " 5 ", 5),
        ("epochs", "0x10", 16),
        ("base_learning_rate", "1e-3", 1e-3),
        ("base_learning_rate", "1", 1.0),
        ("clip_grad", "null", None),
        ("clip_grad", ".5", 0.5),
        ("image_size", "32", (32, 32)),
        ("image_size", "32,064", (32, 64)),
        ("image_size", [32, "064"], (32, 64)),
        ("crop_scale", "[0.2, 1]", (0.2, 1.0)),
        ("crop_scale", [0.2, "1e-0"], (0.2, 1.0)),
        ("mean", "~", None),
        ("out", "null", None),
        ("out", "010", "010"),
        ("out", "1:30", "1:30"),
        ("data", "[a]", "[a]"),
        ("flip", "YES", True),
        ("flip", "0", False),
        ("flip", False, False),
    ],
)
def test_values_of_options(option, text, value):
    command = COMMANDS["pretrain"]
    parser = build_parser("pretrain", command.description, command.groups())
    found = convert(parser, command.options(), {option: text})[option]
    assert (type(found), found) == (type(value), value)


def test_layers_file_over_recipe_and_words_over_file(fake, tmp_path):
    (tmp_path / "options.yaml").write_text("epochs: 3\nstages: 4\nbase_learning_rate: 1e-3\n")
    words = ["--config", str(tmp_path / "options.yaml"), "--stages", "3", "--out", str(tmp_path / "run")]
    words += ["--backend", "fake", "--eval_limit", "0", "--pictures", "0"]
    assert main(["pretrain", *words]) == 0
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (options["epochs"], options["stages"], options["base_learning_rate"]) == (3, 3, 1e-3)
    assert options["decoder_dim"] == 64  # of the digits' recipe


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], False),  # as in the recipe of the digits
        (["--compile"], True),
        (["--compile", "null"], None),
        (["--no_compile"], False),
        (["--compile=on"], True),
    ],
)
def test_a_flag_may_be_null(tiny_words, tmp_path, words, value):
    assert main(["pretrain", *tiny_words, *words]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["compile"] is value


def test_common_spellings(tiny_words, tmp_path):
    words = [*tiny_words, "--flip", "--no-norm-pix", "--image-size=24,16", "--compile", "false", "--mean", "[0.3]"]
    assert main(["pretrain", *words]) == 0
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (options["flip"], options["norm_pix"], options["compile"]) == (True, False, False)
    assert (options["image_size"], options["mean"]) == ([24, 16], [0.3])


@pytest.mark.parametrize(
    ("words", "method", "counts"),
    [
        (["--method", "simmim"], "simmim", "24 visible, 24 decoded, 16 thrown"),
        (["--method", "simmim", "--throw_ratio", "0"], "simmim", "24 visible, 40 decoded, 0 thrown"),
        (
            ["--method", "maskalign", "--teacher", "TEACHER", "--fusion", "sum"],
            "maskalign",
            "19 visible, 45 masked, reconstructed in stages",
        ),
        (["--method", "mae"], "mae", "16 visible, 16 decoded, 32 thrown"),
    ],
)
def test_another_method_on_the_digits_recipe(words, method, counts, fake, teacher, capsys, tmp_path):
    words = [str(teacher) if word == "TEACHER" else word for word in words]
    words += [
        "--backend",
        "fake",
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "1",
        "--eval_limit",
        "0",
        "--pictures",
        "0",
    ]
    assert main(["pretrain", *words]) == 0
    assert counts in capsys.readouterr().out
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (options["method"], options["embed_dim"]) == (method, 96)
    assert ("decoder_dim" in options) == (method == "mae")
    assert ("throw_by" in options) == (method == "simmim")


def test_the_same_command_resumes_a_run_of_another_method(fake, tmp_path):
    words = [
        "pretrain",
        "--backend",
        "fake",
        "--method",
        "simmim",
        "--mask_ratio",
        "0.5",
        "--drop_path",
        "0.2",
        "--resume",
    ]
    words += ["--out", str(tmp_path / "run"), "--epochs", "1", "--eval_limit", "0", "--pictures", "0"]
    assert main(words) == 0
    before = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (before["mask_ratio"], before["drop_path"]) == (0.5, 0.2)
    assert main([word if word != "1" else "2" for word in words]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == {**before, "epochs": 2}


def test_help_names_the_methods_of_an_option(capsys):
    assert main(["pretrain", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Default: 512 for mae, 256 for localmim, 384 for videomae." in text
    rates = "0.0 for mae, 0.1 for simmim, 0.1 for maskalign, 0.0 for videomae"
    owners = "mae, simmim, maskalign, videomae"
    assert f"rates rise linearly from 0 at the first block. For {owners} only. Default: {rates}." in text
    assert "For mae, videomae: Positions of the encoder and the decoder: absolute (" in text
    assert "For simmim: Positions of the encoder: relative (" in text
    assert "For mae, simmim: How the decoded tokens are chosen" in text
    assert "For mae, videomae: Input of the decoder from the encoder: none (" in text
    assert "For maskalign: Initial mixture of the student's layers" in text
    ratios = "0.75 for mae, 0.6 for simmim, 0.7 for maskalign, 0.75 for localmim, 0.9 for videomae"
    assert f"is masked. Default: {ratios}." in text


def test_resume_needs_only_the_folder(tiny_words, tmp_path, capsys):
    assert main(["pretrain", *tiny_words]) == 0
    before = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]) == 0
    after = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert after == {**before, "epochs": 2}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 24
    capsys.readouterr()
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_options_of_a_resumed_run_are_checked_against_the_run(tiny_words, tmp_path, capsys):
    assert main(["pretrain", *tiny_words]) == 0  # batches of 120; the recipe of the digits has 32
    resume = ["pretrain", "--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]
    assert main([*resume, "--accumulate", "3"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["accumulate"] == 3
    capsys.readouterr()
    message = "batch_size: expected a multiple of accumulate 7, got 120"
    assert fail([*resume, "--accumulate", "7"], capsys).startswith(message)


def test_inspect_describes_the_run_that_would_be_resumed(tiny_words, tmp_path, capsys):
    assert main(["pretrain", *tiny_words, "--mask_ratio", "0.5"]) == 0
    capsys.readouterr()
    assert main(["inspect", *tiny_words, "--mask_ratio", "0.5", "--epochs", "3"]) == 0
    expected = capsys.readouterr().out
    assert main(["inspect", "--out", str(tmp_path / "run"), "--resume", "--epochs", "3"]) == 0
    assert capsys.readouterr().out in expected  # which also says where its data come from


OWN_STRATEGY = """
def last_first(grid, counts, noise, is_visible):
    return (grid.num_tokens * is_visible - sum(grid.coordinates(noise))).argsort(1)[:, : counts.decoded]

def too_few(grid, counts, noise, is_visible):
    return last_first(grid, counts, noise, is_visible)[:, 1:]

def mix(dim, grid):
    return lambda features, known, thrown: features[:, : thrown.shape[1]]
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "prmim_own_strategies.py").write_text(OWN_STRATEGY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    yield "prmim_own_strategies"
    sys.modules.pop("prmim_own_strategies", None)


def test_a_run_with_functions_of_ones_own_is_stored_and_resumed(own_module, tiny_words, tmp_path, fake, capsys):
    words = ["--throwing", f"{own_module}:last_first", "--reconstruction", f"{own_module}:mix"]
    assert main(["pretrain", *tiny_words, *words]) == 0
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert f"throwing: {own_module}:last_first\n" in stored
    assert f"reconstruction: {own_module}:mix\n" in stored
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]) == 0
    assert "MACs forward per image, without your mixing module (" in capsys.readouterr().out
    assert [engine.schedule.throwing.__name__ for engine in fake.made] == ["last_first"] * len(fake.made)
    assert main(["inspect", *tiny_words, *words]) == 0
    report = " ".join(capsys.readouterr().out.split())
    assert f"chosen by {own_module}:last_first" in report
    assert f"stage 1 4 from 8 known, {own_module}:mix" in report
    assert "stages unknown" in report
    assert "total of the others" in report


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("too_few", "got ValueError: throwing too_few: expected decoded tokens of shape (2, 4), got (2, 3)"),
        ("mix", "got TypeError: mix() takes 2 positional arguments but 4 were given"),
    ],
)
def test_a_function_is_tried_before_a_run(own_module, tiny_words, name, reason, capsys, fake):
    assert main(["pretrain", *tiny_words, "--throwing", f"{own_module}:{name}"]) == 2
    expected = f"prmim: error: throwing: expected {own_module}:{name} to choose decoded tokens, {reason}"
    assert capsys.readouterr().err.strip() == expected
    assert fake.made == []


def test_the_same_command_starts_and_resumes_a_run(tiny_words, tmp_path, capsys):
    assert main(["pretrain", *tiny_words, "--resume"]) == 0
    assert f"No run in {tmp_path / 'run'} yet: --resume starts a new one." in capsys.readouterr().out
    assert main(["pretrain", *tiny_words, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_second_run_in_a_folder_gives_one_line(tiny_words, capsys):
    assert main(["pretrain", *tiny_words]) == 0
    capsys.readouterr()
    assert "already holds a run" in fail(["pretrain", *tiny_words], capsys)


def test_evaluate_and_picture_read_the_run(tiny_words, tmp_path, capsys):
    assert main(["pretrain", *tiny_words]) == 0
    run = str(tmp_path / "run")
    capsys.readouterr()
    assert main(["evaluate", "--run", run, "--protocol", "knn", "--eval_limit", "300"]) == 0
    text = capsys.readouterr().out
    assert "checkpoint of step 12" in text
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    with np.load(tmp_path / "run" / "evaluation" / "predictions.npz") as predictions:
        for name, found in result["protocols"].items():
            assert (predictions[name] == predictions["truth"]).sum() == found["correct"]
    assert result["trained"]["knn"] > 0.5
    assert "linear" not in result["trained"]
    assert main(["picture", "--run", run, "--pictures", "2"]) == 0
    assert {p.name for p in (tmp_path / "run").glob("*.png")} == {"reconstructions.png", "schedule.png", "loss.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate"], "run: expected the folder of a run, as in --run"),
        (["evaluate", "--run", "nowhere"], "run: expected the folder of a run, but there is no config.yaml in nowhere"),
        (
            ["evaluate", "--run", "RUN", "--protocol", "svm"],
            "protocol: expected one of knn, linear, finetune, got 'svm'",
        ),
        (["evaluate", "--run", "RUN", "--eval_limit", "9"], "eval_limit: expected at least 1 image"),
        (["evaluate", "--run", "RUN", "--eval_limit", "9", "--holdout", "0"], "data: expected labelled images"),
        (["evaluate", "--run", "RUN", "--eval_limit", "9", "--data", "PLAIN"], "data: expected labelled images"),
        (["evaluate", "--run", "RUN", "--device", "tpu"], "device: expected auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        (
            ["picture", "--run", "RUN", "--kind", "movie"],
            "kind: expected reconstructions or similarity or schedule or loss, got 'movie'",
        ),
        (
            ["picture", "--run", "RUN", "--kind", "similarity"],
            "kind: expected reconstructions or schedule or loss of a run of method mae, got 'similarity'",
        ),
        (["picture", "--run", "EMPTY"], "run: expected a checkpoint in"),
        (["picture", "--run", "EMPTY", "--kind", "loss"], "run: expected at least two lines in"),
    ],
)
def test_wrong_options_of_a_run_give_one_line(words, message, tiny_words, tmp_path, capsys):
    from prmim_train.run.directory import RunDirectory

    assert main(["pretrain", *tiny_words]) == 0
    empty = RunDirectory(tmp_path / "empty")
    empty.write_config((tmp_path / "run" / "config.yaml").read_text())
    np.savez(tmp_path / "plain.npz", images=np.zeros((9, 16, 16), dtype=np.uint8))
    names = {"RUN": tmp_path / "run", "EMPTY": empty.path, "PLAIN": tmp_path / "plain.npz"}
    if "--eval_limit" in words and len(words) == 5:
        words[words.index("9")] = "0"
    capsys.readouterr()
    assert fail([str(names.get(word, word)) for word in words], capsys).startswith(message)


def test_a_run_on_all_images_is_evaluated_on_others(tiny_words, tmp_path, capsys):
    rng, names = np.random.default_rng(0), np.array([str(digit) for digit in range(10)])
    images = rng.integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "others.npz", images=images, labels=np.arange(30) % 10, names=names)
    words = ["--holdout", "0", "--eval_limit", "50", "--pictures", "2"]
    assert main(["pretrain", *tiny_words, *words]) == 0
    out = capsys.readouterr().out
    reason = "no images are held out (holdout is 0, or all were trained on); set --test_data of prmim evaluate"
    assert f"No evaluation: {reason}." in out
    assert "No images are held out: the pictures show training images." in out
    run = tmp_path / "run"
    assert (run / "reconstructions.png").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["train_images"], summary["held_out_images"]) == (1797, 0)
    assert reason in fail(["evaluate", "--run", str(run)], capsys)
    assert main(["evaluate", "--run", str(run), "--test_data", str(tmp_path / "others.npz")]) == 0
    assert "Accuracy on 30 held-out images" in capsys.readouterr().out


def test_ctrl_c_outside_the_loop(tiny_words, fake, monkeypatch, capsys):
    def interrupt(self, images):
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "features", interrupt)
    assert main(["pretrain", *tiny_words, "--eval_limit", "100"]) == 130
    assert capsys.readouterr().err == "prmim: interrupted\n"
