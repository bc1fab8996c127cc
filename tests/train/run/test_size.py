"""Sizes that no machine can hold: refused by formula, before anything is built."""

import json
import time

import pytest

from prmim_train.report.inspect import inspect_run
from prmim_train.run.engine import create_engine
from prmim_train.run.prepare import open_data
from prmim_train.run.size import check_batch, check_size, excess

ABSURD = [
    ({"depth": 10**6}, "depth: expected at most 1,000 blocks to build, got 1,000,000"),
    ({"decoder_depth": 1001}, "decoder_depth: expected at most 1,000 blocks to build, got 1,001"),
    ({"embed_dim": 2**30}, "model: expected weights that fit into memory, got 5.53e+10 GB"),
    (
        {"image_size": 8000, "patch_size": 2},
        "image_size: expected at most 1,048,576 patches of an image, got 16,000,000",
    ),
    (
        {"image_size": 2048, "patch_size": 2},
        "model: expected a training step that fits into memory, got 0.5 GB of weights with gradients and optimizer, "
        "and 8,2",
    ),
    (
        {"image_size": 2048, "patch_size": 2, "method": "simmim", "throw_ratio": 0},
        "model: expected a training step that fits into memory",
    ),
    ({"image_size": 2**31 - 2, "patch_size": 2**30 - 1}, "model: expected weights that fit into memory"),
    ({"image_size": 2048, "patch_size": 2, "device": "cuda"}, "model: expected a training step that fits into memory"),
]


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """A machine of 16 GB."""
    monkeypatch.setattr("prmim_train.run.size.physical_memory", lambda: 16 * 10**9)


@pytest.mark.parametrize(("changes", "reason"), ABSURD, ids=[str(changes)[:60] for changes, _ in ABSURD])
def test_absurd_sizes(changes, reason, tiny, fake):
    started = time.monotonic()
    config = tiny(**changes)
    data = open_data(config)
    with pytest.raises(ValueError, match=r"^(model|depth|decoder_depth|image_size): ") as caught:
        create_engine(config, data.budget)
    assert str(caught.value).startswith(reason)
    text = inspect_run(config)
    assert f"too large           {reason}" in text
    assert "\n  learned             " in text
    assert max(map(len, text.splitlines())) < 400
    assert fake.made == []
    assert time.monotonic() - started < 5


def test_common_sizes_are_not_refused(tiny):
    for name in ("tiny", "base", "huge"):
        sizes = {"model": f"vit_{name}", "embed_dim": None, "num_heads": None, "depth": None}
        assert excess(tiny(image_size=224, patch_size=16, **sizes)) == ""
    assert excess(tiny(depth=1000, stages=1000)) == ""


def test_the_cpu_holds_what_the_machine_has(tiny, monkeypatch):
    config = tiny(image_size=256, patch_size=2)
    assert excess(config) == ""
    monkeypatch.setattr("prmim_train.run.size.physical_memory", lambda: 10**9)
    assert excess(config).startswith("model: expected a training step that fits into memory")
    assert excess(tiny(image_size=256, patch_size=2, device="auto")) == ""  # an accelerator may hold it


def test_the_batch_counts_in_training(tiny):
    config = tiny(batch_size=2**31 - 1)
    check_size(config)  # other commands need one image at a time
    with pytest.raises(ValueError, match=r"of activations for 2,147,483,647 images at once$"):
        check_size(config, images=config.micro_batch)


def test_a_batch_of_a_classifier_fits_into_memory(tiny):
    config = tiny(batch_size=2**31 - 1)
    message = r"^batch_size: expected images that fit into memory, got 549\.8 GB of images at once$"
    with pytest.raises(ValueError, match=message):
        check_batch(config, config.method)
    check_batch(tiny(), config.method)


def test_shards_of_weights_are_smaller(tiny, monkeypatch):
    monkeypatch.setattr("prmim_train.run.size.physical_memory", lambda: 10**6)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1000")
    assert excess(tiny(embed_dim=256, device="cuda")).startswith("model: expected weights that fit into memory")
    assert excess(tiny(embed_dim=256, device="cuda", parallel="fsdp")) == ""


def test_a_teacher_counts(tiny, teacher):
    content = json.loads((teacher / "config.json").read_text())
    large = {"hidden_size": 16384, "num_attention_heads": 1, "intermediate_size": 16384, "num_hidden_layers": 1000}
    (teacher / "config.json").write_text(json.dumps(content | large))
    config = tiny(method="maskalign", teacher=str(teacher), fusion="sum")
    assert excess(config).startswith("model: expected weights that fit into memory, got 6,4")
