import pytest

from prmim_train.budget import training_budget
from prmim_train.config import PretrainConfig


def test_the_budget_counts_every_image():
    config = PretrainConfig(batch_size=64, epochs=3)
    assert training_budget(config, 100).total_steps == 5  # 300 / 64, rounded
    assert training_budget(config, 10).total_steps == 1  # a batch may be larger than the data


def test_no_image_is_no_run():
    with pytest.raises(ValueError, match="holdout: expected to leave"):
        training_budget(PretrainConfig(), 0)


def test_the_published_warm_up_is_a_twentieth():
    assert training_budget(PretrainConfig(), 1_281_167).warmup_steps == round(40 * 1_281_167 / 4096)
    assert training_budget(PretrainConfig(warmup_epochs=10), 1_281_167).warmup_steps == round(10 * 1_281_167 / 4096)
