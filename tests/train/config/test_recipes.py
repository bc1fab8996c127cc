"""Packaged recipes: headers, and learning rates against published formulas."""

import sys
from math import cos, pi
from types import SimpleNamespace

import pytest

from prmim_train.config.classify import classify_config
from prmim_train.config.layers import read_header, read_options, read_recipe, recipe_names
from prmim_train.config.pretrain import pretrain_config
from prmim_train.run.budget import training_budget
from prmim_train.run.engine import create_classifier_engine, create_engine

EVERY = [*recipe_names(), *recipe_names("evaluate")]
PUBLISHED = [name for name in EVERY if not read_header(name)["paper"].startswith("none")]
STEPS_PER_EPOCH = 5


def mae_rate(per_256, batch, warmup, epochs, lowest):
    """MAE's schedule, shared by MaskAlign: the cosine starts after the warm-up.

    Half a cosine is a squared one.
    """
    peak = per_256 * batch / 256

    def rate(epoch):
        phase = (epoch - warmup) / (epochs - warmup)
        return peak * epoch / warmup if epoch < warmup else lowest + (peak - lowest) * cos(pi / 2 * phase) ** 2

    return epochs, batch, rate


def simmim_rate(per_512, start_per_512, batch, warmup, epochs, after):
    """SimMIM's warm-up, then `after` of peak and epoch.

    The start of the warm-up is scaled by the batch too.
    """
    peak, start = per_512 * batch / 512, start_per_512 * batch / 512

    def rate(epoch):
        done = epoch / warmup
        return (1 - done) * start + done * peak if done < 1 else after(peak, epoch)

    return epochs, batch, rate


def mae_pretraining(batch=4096):
    return mae_rate(1.5e-4, batch, 40, 800, 0.0)


def amt_mae_pretraining(batch=4096):
    return mae_rate(1.5e-4, batch, 40, 400, 0.0)


def amt_simmim_pretraining(batch=2048):
    return simmim_rate(1e-4, 5e-7, batch, 10, 200, lambda peak, epoch: peak if epoch < 175 else 0.1 * peak)


def pixio_pretraining(batch=8192):
    return mae_rate(2.5e-5, batch, 40, 400, 0.0)


def maskalign_pretraining(batch=1024):
    return mae_rate(1.5e-4, batch, 20, 200, 1e-5)


def localmim_pretraining(batch=2048):
    return mae_rate(2e-4, batch, 40, 1600, 1e-6)


def videomae_pretraining(batch=4096):
    """The rate is scaled by the videos of a step, which has four clips of each."""
    epochs, _, rate = mae_rate(1e-3, batch // 4, 4 * 20, 4 * 200, 1e-5 * 1024 / 256)
    return epochs, batch, rate


def simmim_pretraining(batch=2048):
    return simmim_rate(1e-4, 5e-7, batch, 10, 800, lambda peak, epoch: peak if epoch < 700 else 0.1 * peak)


def simmim_finetuning(batch=2048):
    def after(peak, epoch):
        lowest = 2.5e-7 * batch / 512
        return lowest + (peak - lowest) * cos(pi / 2 * epoch / 100) ** 2

    return simmim_rate(1.25e-3, 2.5e-7, batch, 20, 100, after)


SCHEDULES = {
    "amt_mae_vit_base": amt_mae_pretraining,
    "amt_simmim_vit_base": amt_simmim_pretraining,
    "mae_vit_base": mae_pretraining,
    "mae_vit_base_dense": mae_pretraining,
    "mff_vit_base": mae_pretraining,
    "mff_vit_base_dense": mae_pretraining,
    "pixmim_vit_base": mae_pretraining,
    "pixmim_vit_base_dense": mae_pretraining,
    "crossmae_vit_base": mae_pretraining,
    "crossmae_vit_base_dense": mae_pretraining,
    # Of 147 masked tokens, 49 are kept.
    "crossmae_vit_base_partial": lambda batch=4096: mae_rate(49 / 147 * 1.5e-4, batch, 40, 800, 0.0),
    "pixio_vit_base": pixio_pretraining,
    "pixio_vit_huge": pixio_pretraining,
    "simmim_vit_base": simmim_pretraining,
    "simmim_vit_base_dense": simmim_pretraining,
    "videomae_vit_base": videomae_pretraining,
    "videomae_vit_base_dense": videomae_pretraining,
    "videomae_vit_base_dual": videomae_pretraining,
    "maskalign_vit_base": maskalign_pretraining,
    "maskalign_vit_base_dense": maskalign_pretraining,
    "localmim_vit_base": localmim_pretraining,
    "localmim_vit_base_dense": localmim_pretraining,
    "mae_vit_base_finetune": lambda batch=1024: mae_rate(5e-4, batch, 5, 100, 1e-6),
    "simmim_vit_base_finetune": simmim_finetuning,
    "maskalign_vit_base_finetune": lambda batch=1024: mae_rate(3e-4, batch, 5, 100, 1e-6),
    "mae_vit_base_linear": lambda batch=16384: mae_rate(0.1, batch, 10, 90, 0.0),
    "maskalign_vit_base_linear": lambda batch=16384: mae_rate(0.025, batch, 10, 90, 0.0),
}


def test_every_recipe_of_a_paper_has_a_schedule():
    assert set(SCHEDULES) == set(PUBLISHED)


@pytest.fixture
def training(monkeypatch):
    """Return the engine options of a packaged recipe, with some options changed.

    An epoch has five steps.
    """
    engine = SimpleNamespace(
        Engine=lambda method, training: training,
        ClassifierEngine=lambda method, config, num_classes, training, weights: training,
    )
    monkeypatch.setitem(sys.modules, "prmim_stub", engine)

    def make(name, **changes):
        base = pretrain_config(data="photos", backend="stub")
        if name in recipe_names("evaluate"):
            config = classify_config(base, {**read_options(name, "evaluate"), **changes})
            budget = training_budget(config, STEPS_PER_EPOCH * config.batch_size)
            return config, create_classifier_engine(config, base, budget, num_classes=2, weights=None)
        config = pretrain_config(**{**read_options(name), "data": "photos", "backend": "stub", **changes})
        return config, create_engine(config, training_budget(config, STEPS_PER_EPOCH * config.batch_size))

    return make


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_the_published_ones(name, training):
    epochs, batch, rate = SCHEDULES[name]()
    config, told = training(name)
    assert (config.epochs, config.batch_size, told.total_steps) == (epochs, batch, epochs * STEPS_PER_EPOCH)
    steps = range(told.total_steps)
    expected = [rate(step / STEPS_PER_EPOCH) for step in steps]
    assert [told.learning_rate_at(step) for step in steps] == pytest.approx(expected, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_scaled_by_the_batch(name, training):
    rate = SCHEDULES[name](batch=512)[-1]
    _, told = training(name, batch_size=512)
    steps = range(0, told.total_steps, 7)
    expected = [rate(step / STEPS_PER_EPOCH) for step in steps]
    # A listed difference: SimMIM's lowest rates are scaled too, ours are not.
    unscaled = 2e-6 if "simmim" in name else 1e-18
    assert [told.learning_rate_at(step) for step in steps] == pytest.approx(expected, rel=1e-9, abs=unscaled)


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_states_paper_command_hardware_number_and_whether_we_measured_it(name):
    header = read_header(name)
    assert {"title", "paper", "command", "hardware", "expected", "measured"} <= set(header)
    assert all(header.values())
    assert read_recipe(name).startswith(f"# {header['title'][:40]}")
    command = "evaluate --run RUN" if name in recipe_names("evaluate") else "pretrain"
    assert header["command"].split(" --data")[0].startswith(f"prmim {command}")
    if name in PUBLISHED:
        assert f"--config {name} " in header["command"]
        assert "arXiv" in header["paper"]
        assert header["expected"].startswith("published: ")
        assert header["measured"] == "not by us"


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_papers_train_on_all_images_and_warm_up_for_epochs(name):
    options = read_options(name, "evaluate" if name in recipe_names("evaluate") else "pretrain")
    assert options["holdout"] == 0
    assert options["warmup_epochs"] > 0
    assert "holdout" not in read_header(name)["command"]
