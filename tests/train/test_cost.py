import json
import re
from importlib import resources

import pytest

from prmim_core import Transformer, cost, maskalign_cost, simmim_cost
from prmim_train.config import PretrainConfig
from prmim_train.cost import cost_reports
from prmim_train.layers import read_options

VIT_BASE = Transformer(768, 12, 12)
BASE = {"patch_dim": 768, "encoder": VIT_BASE}


@pytest.fixture
def clip_base(tmp_path):
    """The size of CLIP ViT-B/16."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"patch_size": 16}}))
    return str(tmp_path)


@pytest.mark.parametrize(("precision", "compute_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_mae_costs_what_the_core_says(precision, compute_bytes):
    config = PretrainConfig(precision=precision)
    ours, dense = cost_reports(config)
    assert ours == cost(config.schedule, **BASE, decoder=Transformer(512, 8, 16), compute_bytes=compute_bytes)
    assert 1 - ours.macs / dense.macs == pytest.approx(0.28, abs=0.01)
    assert ours.macs < 7.0e9


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_simmim_costs_what_the_core_says(position):
    config = PretrainConfig(method="simmim", position=position)
    ours, dense = cost_reports(config)
    expected = simmim_cost(config.schedule, **BASE, relative_position=position == "relative", compute_bytes=2)
    assert ours == expected
    assert 1 - ours.macs / dense.macs == pytest.approx(0.254, abs=0.001)


@pytest.mark.parametrize("changes", [{}, {"variant": "none"}, {"thrown_weight": 0.0}, {"throwing": "none"}], ids=str)
def test_maskalign_costs_what_the_core_says(changes, clip_base):
    config = PretrainConfig(method="maskalign", teacher=clip_base, teacher_layers=3, **changes)
    ours, plain = cost_reports(config)
    sizes = {**BASE, "teacher": VIT_BASE, "teacher_patch_dim": 768, "teacher_tokens": 196, "layers": 3}
    variant = "none" if changes else "kernel"
    assert ours == maskalign_cost(config.schedule, **sizes, variant=variant, compute_bytes=2)
    assert plain == maskalign_cost(config.schedule, **sizes, variant="none", compute_bytes=2)
    assert round(ours.parts["teacher"].macs / 1e9, 3) == 17.563


def test_of_a_teacher_that_is_not_there_the_cost_is_unknown(monkeypatch):
    monkeypatch.setattr("prmim_train.cost.read_teacher", lambda name: None)
    assert cost_reports(PretrainConfig(method="maskalign", teacher="owner/model")) is None


@pytest.mark.parametrize("ending", ["", "_dense"])
@pytest.mark.parametrize("method", ["mae", "simmim", "maskalign"])
def test_recipes_state_their_cost(method, ending, clip_base):
    name = f"{method}_vit_base{ending}"
    options = read_options(name)
    if method == "maskalign":
        assert options["teacher"] == "openai/clip-vit-base-patch16"
        options["teacher"] = clip_base
    ours, other = cost_reports(PretrainConfig(**options))
    text = (resources.files("prmim_train") / "recipes" / f"{name}.yaml").read_text()
    stated = text[text.index("# cost") : text.index("# published")]
    macs = [f"{report.macs / 1e9:.3f}" for report in (ours, other)]
    if method == "maskalign":
        macs.insert(1, f"{ours.parts['teacher'].macs / 1e9:.3f}")
    memory = [f"{report.activation_bytes / 1e6:.0f}" for report in (ours, other)]
    assert re.findall(r"([\d.]+) G", stated) == (macs[:-1] if ending else macs)
    assert re.findall(r"(\d+) MB", stated) == (memory[:1] if ending else memory)
