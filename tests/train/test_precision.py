"""Number format of a run: choice, output, record, and warning if slow."""

import re

import pytest
import yaml

from prmim_methods import Accounting, hardware
from prmim_train.config.layers import read_options, recipe_names
from prmim_train.config.pretrain import PretrainConfig, pretrain_config
from prmim_train.config.training import CHANGEABLE
from prmim_train.pretrain import pretrain
from prmim_train.report.inspect import inspect_run
from prmim_train.run.directory import RunDirectory
from prmim_train.run.size import accounting, expected_precision

NEITHER = "auto: the CPU has neither AMX-BF16 nor AVX512-BF16"


@pytest.fixture
def cpu(monkeypatch):
    """Return a function that simulates CPU flags, without accelerators."""

    def pretend(*flags):
        monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
        monkeypatch.setattr("prmim_train.run.size.may_have_accelerator", lambda: False)
        for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)

    return pretend


@pytest.mark.parametrize(
    ("flags", "line"),
    [(("avx2",), f"float32 ({NEITHER})"), (("avx2", "amx_bf16"), "bfloat16 (auto: the CPU has AMX-BF16)")],
)
def test_a_run_says_what_was_chosen_and_why(cpu, tiny, capsys, tmp_path, flags, line):
    cpu(*flags)
    summary = pretrain(tiny(precision="auto"))
    out, err = capsys.readouterr()
    assert re.findall(r"^Precision: .*$", out, flags=re.MULTILINE) == [f"Precision: {line}; not compiled (as given)"]
    assert "warning" not in err
    assert summary["precision"] == RunDirectory(tmp_path / "run").read_summary()["precision"] == line.split()[0]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == "auto"


@pytest.mark.parametrize(
    ("flags", "slowdown", "is_warned"),
    [(("avx2",), 28.04, True), (("avx2",), 1.05, False), (("avx2", "avx512_bf16"), None, False)],
)
def test_bfloat16_on_a_cpu_that_is_slow_in_it_is_warned_of_once(
    cpu, fake, tiny, monkeypatch, capsys, flags, slowdown, is_warned
):
    cpu(*flags)
    monkeypatch.setattr(fake, "slowdown", slowdown)
    pretrain(tiny(precision="bfloat16"))
    out, err = capsys.readouterr()
    assert "Precision: bfloat16 (as given)" in out
    warning = (
        "prmim: warning: precision: bfloat16 takes 28.0 times as long as float32 on this CPU (measured on a layer of "
        "the encoder); --precision auto avoids it"
    )
    assert [line for line in err.splitlines() if "warning" in line] == [warning] * is_warned


@pytest.mark.parametrize(
    ("options", "has_accelerator", "value", "reason"),
    [
        ({"device": "cpu"}, True, "float32", NEITHER),
        ({"device": "auto"}, False, "float32", NEITHER),
        ({"device": "mps"}, False, "float32", "auto: bfloat16 is not measured on mps"),
        ({"device": "auto", "precision": "float32"}, True, "float32", "as given"),
        ({"device": "cuda:1", "precision": "bfloat16"}, True, "bfloat16", "as given"),
        *[
            (options, True, "bfloat16", "auto: expected on an accelerator; decided when the run starts")
            for options in ({"device": "auto"}, {"device": "cuda"})
        ],
    ],
)
def test_inspect_says_what_is_known_without_a_framework(
    cpu, tiny, monkeypatch, options, has_accelerator, value, reason
):
    cpu("avx2")
    monkeypatch.setattr("prmim_train.run.size.may_have_accelerator", lambda: has_accelerator)
    config = tiny(**{"precision": "auto", **options})
    assert expected_precision(config) == (value, reason)
    assert accounting(config) == Accounting(compute_bytes={"float32": 4, "bfloat16": 2}[value])
    text = inspect_run(config)
    assert re.search(rf"^  precision +{re.escape(f'{value} ({reason})')}$", text, flags=re.MULTILINE)
    assert f"(estimate, fused attention, {value})" in text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_leaves_the_precision_to_the_hardware_but_the_digits(name):
    config = pretrain_config(**read_options(name))
    assert (config.precision, config.compile) == (("float32", False) if name == "digits" else ("auto", None))


def test_the_hardware_decides_by_default_and_a_resumed_run_may_change_it():
    assert (PretrainConfig.precision, PretrainConfig.compile) == ("auto", None)
    assert {"precision", "compile"} <= set(CHANGEABLE)
