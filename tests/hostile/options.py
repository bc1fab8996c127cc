"""Hostile cases of options: YAML and absurd sizes."""

import json
import os
import struct
import time
from unittest import mock

import yaml
from cases import LONGEST_MESSAGE, TINY, case, cases, prmim, refused, write_tiny

from prmim_methods import create_config
from prmim_methods.teacher import read_teacher
from prmim_train.config.layers import LARGEST_FILE, dump_options, parse_options, read_options, recipe_names
from prmim_train.config.pretrain import pretrain_config
from prmim_train.run.processes import launched
from prmim_train.run.size import excess

LAUGHS = "a: &a [x, x, x]\n" + "".join(f"a{k}: &a{k} [*a, *a, *a]\n" for k in range(9))
MERGES = "a: &a {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [*a, *a, *a, *a]}}\n" for k in range(9))

REFUSED = {
    "two equal keys": "epochs: 1\nepochs: 2",
    "two equal keys, one quoted": 'epochs: 1\n"epochs": 2',
    "two equal keys, one escaped": 'epochs: 1\n"\\x65pochs": 2',
    "two equal keys in flow style": "{epochs: 1, epochs: 2}",
    "two keys that are lists": "? [a]\n: 1\n? [a]\n: 2",
    "aliases that double nine times": LAUGHS,
    "merge keys that double nine times": MERGES,
    "an alias of itself": "epochs: &a [*a]",
    "an anchor alone": "epochs: &a 5",
    "an alias of nothing": "epochs: *a",
    "a merge of a mapping": "<<: {epochs: 1}",
    "a merge of a list of mappings": "<<: [{epochs: 1}, {epochs: 2}]",
    "a Python object": "epochs: !!python/object/apply:os.mkdir [made]",
    "a Python name": "epochs: !!python/name:os.system",
    "a tag of an octal number": "epochs: !!int 010",
    "a tag of a set": "epochs: !!set {1, 2}",
    "a tag of binary data": "epochs: !!binary AAAA",
    "a tag on a key": "!!str epochs: 1",
    "a local tag": "epochs: !mine 1",
    "a tag that is not specific": "epochs: ! 1",
    "a declared tag": "%TAG ! tag:yaml.org,2002:python/\n---\nepochs: !name:os.system x",
    "a list in a list": "betas: [[0.9], 0.95]",
    "a mapping in a mapping": "method: {mae: {depth: 1}}",
    "a mapping in a list": "betas: [{a: 1}]",
    "10,000 nested lists": "epochs: " + "[" * 10_000,
    "10,000 nested mappings": "epochs: " + "{a: " * 10_000,
    "10,000 nested blocks": "".join(" " * k + "a:\n" for k in range(300)),
    "10,000 nested keys": "? " * 10_000,
    "two documents": "epochs: 1\n---\nepochs: 2",
    "a list": "- epochs",
    "a number": "5",
    "text": "epochs",
    "numbers as keys": "1: 2",
    "null as a key": "~: 2",
    "true as a key": "true: 2",
    "a list as a key": "[a, b]: 2",
    "a key of 60 kB": "? " + "x" * 60_000 + "\n: [",
    "an open bracket": "epochs: [1",
    "an open quote": 'epochs: "1',
    "a tab": "epochs:\n\t- 1",
    "a null byte": "epochs: \0",
    "an escape character": "epochs: \x1b[2J",
    "a surrogate": "epochs: \udcff",
    "an unknown directive and no document": "%FOO bar\n",
    "a number of 5,000 digits": "epochs: " + "9" * 5000,
    "one character too many": "#" * (LARGEST_FILE + 1),
    "64 MB": "epochs: 1\n" + "#" * 2**26,
}


@cases(10, REFUSED)
def refused_yaml(folder, content):
    started = time.monotonic()
    refused(lambda: parse_options(content, "a.yaml"), ValueError, says="a.yaml")
    assert time.monotonic() - started < 5
    assert not (folder / "made").exists()


@case(10, "a long file of short lines")
def long_file(folder):
    names = [f"a{k}: {k}" for k in range(5000)]
    started = time.monotonic()
    assert len(parse_options("\n".join(names)[:LARGEST_FILE], "a.yaml")) == 5000
    assert time.monotonic() - started < 10


REFUSED_VALUES = {
    "1:30 epochs": ("epochs: 1:30", "got '1:30'"),
    "1_000 epochs": ("epochs: 1_000", "got '1_000'"),
    "0o10 epochs": ("epochs: 0o10", "got '0o10'"),
    "0b11 epochs": ("epochs: 0b11", "got '0b11'"),
    "epochs yes": ("epochs: yes", "got 'yes'"),
    "epochs true": ("epochs: true", "got True"),
    "epochs of a date": ("epochs: 2026-01-01", "got '2026-01-01'"),
    "Arabic digits": ("epochs: ٣", "got '٣'"),
    "sexagesimal numbers in a list": ("betas: [0.9, 1:30]", "betas: expected two numbers"),
    "NaN": ("clip_grad: .nan", "got '.nan'"),
    "infinity": ("clip_grad: .inf", "got '.inf'"),
    "1e400": ("clip_grad: 1e400", "got inf"),
    "a number of 4,000 digits": ("epochs: " + "9" * 4000, "epochs: expected whole numbers up to 2147483647"),
    "a hexadecimal number of 60,000 digits": ("epochs: 0x" + "f" * 60_000, "epochs: "),
    "a list of 10,000 numbers": ("betas: [" + "0, " * 10_000 + "0]", "betas: expected two numbers"),
    "an unknown key with an escape sequence": ('"\\e[2J\\a": 1', r"\x1b[2J\x07: unknown option in a.yaml"),
    "an unknown key that turns the text around": ('"\\u202eepochs": 1', r"\u202eepochs: unknown option in a.yaml"),
    "an unknown key of two lines": ('"a\\nb": 1', "a b: unknown option in a.yaml"),
    "an unknown key of 60 kB": ("? " + "x" * 60_000 + "\n: 1", "unknown option in a.yaml"),
    "a merge key as an option": ("<<: 1", "<<: unknown option in a.yaml"),
    "data with an escape sequence": ('data: "\\e[2J"', "data: expected text without control characters"),
    "a folder with a null byte": ('out: "a\\0b"', "out: expected text without control characters"),
    "a teacher with a new line": ('method: maskalign\nteacher: "a\\nb"', "teacher: expected text without control"),
    "a path of 60 kB": ("out: " + "x" * 60_000, "out: expected at most 4,096 characters"),
    "empty data": ("data: ''", "data: expected text, got ''"),
    "data that are a number": ("data: 5", "data: expected text, got 5"),
    "config in config": ("config: a.yaml", "config: unknown option in a.yaml"),
    "a private option": ("init_seed: 1", "init_seed: unknown option in a.yaml"),
}


@cases(10, REFUSED_VALUES)
def refused_values(folder, content_and_says):
    content, says = content_and_says
    (folder / "a.yaml").write_text(content)
    prmim(folder, "inspect", "--config", "a.yaml", code=2, says=says)


@cases(
    10,
    {
        "010 is ten": ("batch_size: 010", "10 images per step"),
        "1e-3 is a number": ("base_learning_rate: 1e-3", "0.001 x 8 / 256"),
        "yes is a flag": ("recompute_blocks: yes", "blocks recomputed"),
        "a quoted number": ("batch_size: '16'", "16 images per step"),
        "null": ("warmup_epochs: ~\nclip_grad: null\nmean:", "8 images per step"),
        "an empty file": ("", "8 images per step"),
        "a comment alone": ("# nothing", "8 images per step"),
        "a byte order mark": ("\ufeffbatch_size: 16", "16 images per step"),
        "Windows line ends": ("batch_size: 16\r\nstages: 1\r\n", "16 images per step"),
    },
)
def accepted_files(folder, content_and_says):
    content, says = content_and_says
    write_tiny(folder)
    (folder / "a.yaml").write_text(content, newline="")
    words = [*TINY]
    if "batch_size" in content:
        at = words.index("--batch_size")
        del words[at : at + 2]
    prmim(folder, "inspect", *words, "--config", "a.yaml", says=says)


@case(10, "a configuration file that is a FIFO")
def fifo(folder):
    os.mkfifo(folder / "a.yaml")
    prmim(folder, "inspect", "--config", "a.yaml", code=2, says="config: expected a YAML file")


@case(10, "a configuration file without end")
def endless(folder):
    (folder / "a.yaml").symlink_to("/dev/zero")
    prmim(folder, "inspect", "--config", "a.yaml", code=2, says="config: expected a YAML file")


@case(10, "a configuration file in UTF-16")
def utf16(folder):
    (folder / "a.yaml").write_bytes("epochs: 1".encode("utf-16"))
    prmim(folder, "inspect", "--config", "a.yaml", code=2, says="a.yaml")


@case(10, "recipes mean what they meant in YAML 1.1")
def recipes(folder):
    for name in recipe_names():
        config = pretrain_config(**read_options(name))
        assert pretrain_config(**parse_options(dump_options(config), "copy")) == config
        assert pretrain_config(**yaml.safe_load(dump_options(config))) == config


# --------------------------------------------------------------------------------------------------------- absurd sizes

INSPECTED = {
    "a million blocks": ("--depth", "1000000"),
    "two billion decoder blocks": ("--decoder_depth", "2147483647"),
    "16 million tokens": ("--image_size", "8000", "--patch_size", "2"),
    "16 million tokens in 1,000 stages": ("--image_size", "8000", "--patch_size", "2", "--stages", "1000"),
    "16 million tokens without reconstruction": (
        *("--image_size", "8000", "--patch_size", "2", "--reconstruction", "none"),
    ),
    "a width of a billion": ("--embed_dim", "1073741824"),
    "a decoder as wide": ("--decoder_dim", "1073741824"),
    "patches of two billion pixels": ("--image_size", "1073741824", "--patch_size", "268435456"),
    "two billion epochs of one step": ("--batch_size", "2147483647", "--epochs", "2147483647"),
    "two billion images at once": ("--batch_size", "2147483647"),
    "two billion lines between two": ("--log_every", "2147483647"),
    "two billion checkpoints": ("--keep_checkpoints", "2147483647"),
    "a huge learning rate": ("--base_learning_rate", "1e300"),
    "a tiny learning rate": ("--base_learning_rate", "1e-320"),
    "endless minutes": ("--checkpoint_minutes", "1e308"),
    "a huge weight of thrown tokens": ("--thrown_weight", "1e308"),
}


@cases(11, INSPECTED)
def inspected(folder, words):
    write_tiny(folder)
    given = dict(zip(words[::2], words[1::2], strict=True))
    options = dict(zip(TINY[::2], TINY[1::2], strict=True)) | given
    started = time.monotonic()
    output = prmim(folder, "inspect", *(word for option in options.items() for word in option))
    assert time.monotonic() - started < 10
    assert max(map(len, output.splitlines())) <= LONGEST_MESSAGE


REFUSED_OPTIONS = {
    "ten million stages": ("--stages", "10000000"),
    "a number of 4,000 digits": ("--epochs", "9" * 4000),
    "a number of 10 million digits": ("--epochs", "9" * 10**7),
    "a negative number": ("--depth", "-1"),
    "a number of Arabic digits": ("--depth", "١٢"),
    "a number with a null byte": ("--depth", "1\0"),
    "a number with an escape sequence": ("--depth", "1\x1b[2J"),
    "1e6 blocks": ("--depth", "1e6"),
    "NaN": ("--mask_ratio", "nan"),
    "infinity": ("--clip_grad", "inf"),
    "minus infinity": ("--clip_grad", "-inf"),
    "1e400": ("--base_learning_rate", "1e400"),
    "a negative share": ("--holdout", "-0.1"),
    "all held out": ("--holdout", "0.99999999999999999"),
    "2**31 pixels": ("--image_size", "2147483648"),
    "a grid of 2**40 tokens": ("--image_size", "1048576", "--patch_size", "1"),
    "a million workers": ("--workers", "1000000"),
    "a million pictures": ("--pictures", "1000000"),
    "a million channels": ("--channels", "1000000"),
    "10 million means": ("--mean", "0.5," * 10**7 + "0.5"),
    "a seed of 64 bits": ("--seed", "18446744073709551615"),
    "a device of 20 digits": ("--device", "cuda:99999999999999999999"),
    "a device with another digit": ("--device", "cuda:٣"),
    "an unknown option of 10 MB": ("--" + "x" * 10**7, "1"),
    "an unknown option with an escape sequence": ("--\x1b[2J", "1"),
    "a word of 10 MB": ("x" * 10**7,),
    "data of 10 MB": ("--data", "x" * 10**7),
    "data with an escape sequence": ("--data", "\x1b[2J"),
    "a folder with a null byte": ("--out", "a\0b"),
    "a configuration of 10 MB": ("--config", "x" * 10**7),
    "channels that the images do not have": ("--channels", "10000"),
    "data with a name of 300 letters": ("--data", "x" * 300),
    "a configuration with a name of 300 letters": ("--config", "x" * 300),
    "a configuration with a null byte": ("--config", "a\0b"),
    "the backend core": ("--backend", "core"),
    "the backend methods": ("--backend", "methods"),
    "the backend train": ("--backend", "train"),
    "the backend reference": ("--backend", "reference"),
    "a backend of 10 MB": ("--backend", "x" * 10**7),
    "a backend elsewhere": ("--backend", "../../torch"),
    "a method of 10 MB": ("--method", "x" * 10**7),
    "a flag of 10 MB": ("--flip=" + "x" * 10**7,),
}


@cases(11, REFUSED_OPTIONS)
def refused_options(folder, words):
    write_tiny(folder)
    prmim(folder, "inspect", "--data", "tiny.npz", *words, code=2)


@cases(
    11,
    {
        "training on a million blocks": ("--depth", "1000000"),
        "training on 16 million tokens": ("--image_size", "8000", "--patch_size", "2"),
        "training a width of a billion": ("--embed_dim", "1073741824"),
        "training on two billion images at once": ("--batch_size", "2147483647"),
        "training for 2**62 steps": ("--epochs", "2147483647", "--batch_size", "1"),
    },
)
def refused_training(folder, words):
    write_tiny(folder)
    started = time.monotonic()
    prmim(folder, "pretrain", *TINY, *words, "--out", "run", code=2)
    assert time.monotonic() - started < 10
    assert not (folder / "run").exists()


@case(11, "a command of 10 MB")
def long_command(folder):
    prmim(folder, "x" * 10**7, code=2, says="command: expected")


@cases(
    11,
    {
        "two billion test crops": ("--eval_limit", "2147483648"),
        "a negative limit": ("--eval_limit", "-1"),
        "a negative checkpoint": ("--checkpoint", "-1"),
        "a protocol of 10 MB": ("--protocol", "x" * 10**7),
        "a run of 10 MB": ("--run", "x" * 10**7),
        "a run with an escape sequence": ("--run", "\x1b[2J"),
        "a run with a null byte": ("--run", "a\0b"),
    },
)
def refused_evaluation(folder, words):
    prmim(folder, "evaluate", "--run", "nowhere", *words, code=2)


@case(11, "a run of a million blocks", quick=False)
def absurd_run(folder):
    write_tiny(folder)
    prmim(folder, "pretrain", *TINY, "--out", "run")
    path = folder / "run" / "config.yaml"
    path.write_text(path.read_text().replace("depth: 1\n", "depth: 1000000\n", 1))
    for command in ("evaluate", "picture"):
        prmim(folder, command, "--run", "run", code=2)


@case(11, "a classifier of two billion images at once", quick=False)
def absurd_classifier(folder):
    write_tiny(folder)
    prmim(folder, "pretrain", *TINY, "--out", "run")
    words = ("--protocol", "finetune", "--batch_size", "2147483647", "--epochs", "1", "--device", "cpu")
    with mock.patch("prmim_train.run.size.physical_memory", return_value=10**10):
        prmim(folder, "evaluate", "--run", "run", *words, code=2, says="batch_size: expected images that fit")


@cases(
    11,
    {
        "10 million processes": {"RANK": "0", "WORLD_SIZE": "10000000"},
        "a negative number of processes": {"RANK": "0", "WORLD_SIZE": "-2"},
        "a number of processes of 5,000 digits": {"RANK": "0", "WORLD_SIZE": "9" * 5000},
        "Arabic digits as a rank": {"RANK": "٣", "WORLD_SIZE": "4"},
        "an escape sequence as a rank": {"RANK": "\x1b[2J", "WORLD_SIZE": "4"},
        "10 million processes of JAX": {
            "JAX_PROCESS_ID": "0",
            "JAX_NUM_PROCESSES": "10000000",
            "JAX_COORDINATOR_ADDRESS": "localhost:1",
        },
    },
)
def environment(folder, names):
    with mock.patch.dict(os.environ, names):
        refused(launched, ValueError, says="expected a whole number")
        prmim(folder, "pretrain", code=2, says="expected a whole number")


CLIP = {"model_type": "clip_vision_model", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
CLIP |= {"intermediate_size": 128, "patch_size": 8, "image_size": 32}


@cases(
    11,
    {
        "10 million layers": {"num_hidden_layers": 10**7},
        "a width of 2**62": {"hidden_size": 2**62},
        "a width of 4,000 digits": {"hidden_size": 10**4000},
        "a negative width": {"hidden_size": -64},
        "a width of 64.0": {"hidden_size": 64.0},
        "a width of true": {"hidden_size": True},
        "no heads": {"num_attention_heads": 0},
        "a hidden layer of 0": {"intermediate_size": 0},
        "an infinite ratio": {"mlp_ratio": float("inf")},
        "a ratio of NaN": {"mlp_ratio": float("nan")},
        "patches of a billion pixels": {"patch_size": 10**9},
        "images of a billion pixels": {"image_size": 10**9},
        "images smaller than a patch": {"image_size": 4},
        "10 million sides": {"image_size": [32] * 10**5},
        "an epsilon of text": {"layer_norm_eps": "\x1b[2J"},
        "an activation of 1 MB": {"hidden_act": "x" * 10**5},
        "a type of 1 MB": {"model_type": "x" * 10**5},
        "a type that is a list": {"model_type": []},
        "a tower that is a number": {"vision_config": 1},
        "a million channels": {"num_channels": 10**6},
    },
)
def teachers(folder, change):
    (folder / "config.json").write_text(json.dumps(CLIP | change))
    refused(lambda: read_teacher(folder), ValueError, says="teacher: ")


@case(11, "a teacher of 1,000 wide layers")
def large_teacher(folder):
    wide = {"hidden_size": 16384, "intermediate_size": 16384, "num_attention_heads": 1, "num_hidden_layers": 1000}
    (folder / "config.json").write_text(json.dumps(CLIP | wide))
    config = pretrain_config(method="maskalign", teacher=str(folder), fusion="sum", device="cpu")
    with mock.patch("prmim_train.run.size.physical_memory", return_value=10**11):
        assert excess(config).startswith("model: expected weights that fit into memory")


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@cases(
    11,
    {
        "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header of 100 MB, not there": struct.pack("<Q", 10**8) + b"{}",
        "a tensor of 2**62 values": safetensors({"a": {**TENSOR, "shape": [2**62]}}, bytes(4)),
        "a tensor whose size overflows": safetensors({"a": {**TENSOR, "shape": [2**32, 2**32, 4]}}, bytes(4)),
        "a negative side": safetensors({"a": {**TENSOR, "shape": [-1]}}, bytes(4)),
        "100,000 axes": safetensors({"a": {**TENSOR, "shape": [1] * 10**5}}, bytes(4)),
        "offsets beyond the end": safetensors({"a": {**TENSOR, "data_offsets": [0, 2**60]}}, bytes(4)),
        "a name of 1 MB": safetensors({"x" * 10**6: TENSOR}, bytes(4)),
        "metadata of 1 MB": safetensors({"__metadata__": {"prmim_architecture": "[" * 10**6}, "a": TENSOR}, bytes(4)),
        "an architecture of 1 MB": safetensors(
            {"__metadata__": {"prmim_architecture": json.dumps({"method": "x" * 10**6})}, "a": TENSOR}, bytes(4)
        ),
        "an empty header": safetensors({}),
        "a header that is a list": safetensors([]),
        "a nested header": safetensors(b"[" * 10**5),
    },
)
def weights(folder, content):
    from prmim_torch import create_method, load_weights

    sizes = {"image_size": (8, 8), "patch_size": (4, 4), "channels": 1, "embed_dim": 8, "depth": 1, "num_heads": 2}
    method = create_method("mae", **sizes, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    (folder / "w.safetensors").write_bytes(content)
    refused(lambda: load_weights(method, folder / "w.safetensors"), ValueError)


@cases(
    11,
    {
        "a record with a width of 10**4000": {"embed_dim": 10**4000},
        "a record with a width of 2**100000": {"embed_dim": 1 << 10**5},
        "a record with 10 million sides": {"image_size": (8,) * 10**7},
        "a record with a mean of 10 million": {"mean": (0.5,) * 10**7},
        "a record with a ratio of NaN": {"mask_ratio": float("nan")},
        "a record with an object of a long name": {"depth": type("x" * 10**6, (), {})()},
    },
)
def records(folder, options):
    refused(lambda: create_config("mae", **options), ValueError, TypeError)
