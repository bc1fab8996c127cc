import re

import pytest

from prmim_core import Transformer, cost
from prmim_train.config import PretrainConfig
from prmim_train.inspect import cost_reports, inspect_run


def row(text, name):
    (found,) = re.findall(rf"^ *{re.escape(name)}  +(.+)$", text, flags=re.MULTILINE)
    return found


def test_the_report_tells_what_pretrain_would_do(tiny, fake):
    text = inspect_run(tiny(accumulate=4, warmup_epochs=0.5))
    assert row(text, "found") == "digits: 1,797 images of 8 x 8 pixels in 10 classes"
    assert row(text, "to train on") == "1,438 images"
    assert row(text, "held out") == "359 images (20.0 %)"
    assert row(text, "grid") == "4 x 4 = 16 patches of 4 x 4 pixels"
    assert (row(text, "visible"), row(text, "thrown")) == ("4", "8 (50.0 % of all)")
    assert row(text, "decoded") == "4, chosen by furthest sampling from the visible ones"
    assert row(text, "stage 1") == "4 rebuilt from 8 known, kernel"
    assert row(text, "stage 2") == "4 rebuilt from 12 known, kernel"
    assert row(text, "decoder sequence") == "9 (dense: 17)"
    assert row(text, "supervised") == "12 of 12 masked"
    assert row(text, "effective batch") == "120 images per step, 4 parts of 30 after each other"
    assert row(text, "peak learning rate") == "0.01 x 120 / 256 = 0.004687"
    assert row(text, "steps") == "12 (1 epochs of 11.98 steps)"
    assert row(text, "warm-up").startswith("6 steps")
    assert row(text, "encoder + decoder").startswith("16,384 ")  # 256 pixels x 32, twice
    assert "30 images at once" in text


def test_it_writes_nothing(tiny, fake, tmp_path):
    inspect_run(tiny())
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_are_those_of_the_core():
    ours, dense = cost_reports(PretrainConfig(precision="float32"))
    config = PretrainConfig()
    sizes = {"encoder": Transformer(768, 12, 12), "decoder": Transformer(512, 8, 16)}
    assert ours.macs == cost(config.schedule, patch_dim=768, **sizes).macs
    assert 1 - ours.macs / dense.macs == pytest.approx(0.28, abs=0.01)
    assert ours.macs < 7.0e9


def test_dense_saves_nothing(tiny, fake):
    text = inspect_run(tiny(throwing="none"))
    assert row(text, "decoded") == "12, all masked ones: nothing is thrown"
    assert "stage 1" not in text
    assert re.search(r"total .* 0.0 %", text)


def test_without_the_framework_the_rest_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "prmim_absent.py").write_text("import a_framework_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = inspect_run(tiny(backend="absent"))
    assert "absent needs a_framework_nobody_has" in row(text, "unknown")
    assert row(text, "decoder sequence")


def test_unsupervised_tokens_are_not_counted(tiny, fake):
    text = inspect_run(tiny(variant="none"))
    assert row(text, "supervised") == "4 of 12 masked"
    assert "rebuilt from" not in text
