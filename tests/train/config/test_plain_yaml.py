"""Files of options: what plain YAML means, and what is refused."""

import pytest
import yaml

from prmim_train.config.layers import LARGEST_FILE, dump_options, parse_options, read_options, recipe_names
from prmim_train.config.plain_yaml import PlainLoader
from prmim_train.config.pretrain import pretrain_config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("+5", 5),
        ("0", 0),
        ("0x1f", 31),
        ("1.5", 1.5),
        ("1.0e-05", 1e-5),
        ("-.5", "-.5"),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, 2.5, null, a]", [1, 2.5, None, "a"]),
        ("'5'", "5"),
        # Text, since YAML 1.1 and 1.2 do not agree.
        ("010", "010"),
        ("0o10", "0o10"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("1e-3", "1e-3"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("yes", "yes"),
        ("on", "on"),
        ("2026-01-01", "2026-01-01"),
        ("<<", "<<"),
        ("=", "="),
        ("٣", "٣"),
    ],
)
def test_scalars(text, value):
    (found,) = parse_options(f"option: {text}", "f.yaml").values()
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_mean_the_same_as_in_yaml_1_1(name):
    text = dump_options(pretrain_config(**read_options(name)))
    assert yaml.load(text, PlainLoader) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["1e3", "010", "yes", "null", "1:30", "0x10", "2026-01-01", "a: b", "*a", "- x", ""])
def test_text_survives_writing_and_reading(text):
    assert parse_options(yaml.safe_dump({"data": text}), "f.yaml") == {"data": text}


LAUGHS = "a: &a [x, x]\n" + "".join(f"b{k}: &b{k} [*a, *a]\n" for k in range(8))
MERGES = "a: &a {x: 1}\n" + "".join(f"b{k}: &b{k} {{<<: [*a, *a]}}\n" for k in range(8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("epochs: 1\nepochs: 2", "line 2: duplicate option epochs"),
        ("epochs: 1\n'epochs': 2", "line 2: duplicate option epochs"),
        (LAUGHS, "line 1: anchors and aliases are not allowed"),
        (MERGES, "line 1: anchors and aliases are not allowed"),
        ("epochs: *a", "line 1: anchors and aliases are not allowed"),
        ("epochs: !!int 010", "line 1: tags are not allowed"),
        ("epochs: ! 5", "line 1: tags are not allowed"),
        ("<<: {epochs: 1}", "line 1: expected a value or a list of values"),
        ("betas: [[1, 2]]", "line 1: expected a value or a list of values"),
        ("model: {depth: 1}", "line 1: expected a value or a list of values"),
        ("epochs: " + "[" * 10_000, "line 1: expected a value or a list of values"),
        ("epochs: " + "{a: " * 10_000, "line 1: expected a value or a list of values"),
        ("- " * 10_000, "line 1: expected a value or a list of values"),
        ("? [a]\n: 1", "line 1: found unhashable key"),
        ("epochs: 1\n---\nepochs: 2", "line 2: but found another document"),
    ],
    ids=lambda value: value[:30],
)
def test_what_expands_or_repeats_is_refused(content, reason):
    with pytest.raises(ValueError, match=r"^config: ") as caught:
        parse_options(content, "f.yaml")
    assert str(caught.value) == f"config: expected YAML, got an error in f.yaml {reason}"


def test_a_merge_key_is_an_option_that_nobody_knows():
    assert parse_options("<<: 1", "f.yaml") == {"<<": 1}


def test_files_are_of_bounded_size(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("#" * LARGEST_FILE)
    assert read_options(path) == {}
    path.write_text("#" * (LARGEST_FILE + 1))
    with pytest.raises(ValueError, match=r"^config: expected at most 65,536 characters, got more in .*a\.yaml$"):
        read_options(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"epochs: \xff\xfe\0")
    with pytest.raises(ValueError, match=r"^config: expected YAML, got an error in .*a\.yaml: ") as caught:
        read_options(tmp_path / "a.yaml")
    assert str(caught.value).isprintable()
