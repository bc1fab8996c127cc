import pytest

from prmim_train.config.pretrain import pretrain_config
from prmim_train.run.budget import training_budget


def test_the_budget_counts_every_image():
    config = pretrain_config(batch_size=64, epochs=3)
    assert training_budget(config, 100).total_steps == 5  # 300 / 64, rounded
    assert training_budget(config, 10).total_steps == 1  # a batch may be larger than the data


def test_a_run_needs_an_image():
    with pytest.raises(ValueError, match="holdout: expected to leave"):
        training_budget(pretrain_config(), 0)


def test_the_published_warm_up_is_a_twentieth_of_the_run():
    assert training_budget(pretrain_config(), 1_281_167).warmup_steps == round(40 * 1_281_167 / 4096)
    assert training_budget(pretrain_config(warmup_epochs=10), 1_281_167).warmup_steps == round(10 * 1_281_167 / 4096)


@pytest.mark.parametrize("images", [3, 64, 100, 1438, 1440, 50_000])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_epochs_end_at_the_nearest_step_and_with_the_run(images, every):
    budget = training_budget(pretrain_config(batch_size=64, epochs=30), images)
    ends = [step for step in range(1, budget.total_steps + 1) if budget.is_end_of(every, step)]
    exact = [number * every * images / 64 for number in range(1, 30 // every + 1)]
    assert set(ends) == {round(end) for end in exact} - {0}
    assert ends[-1] == budget.total_steps  # no measurement just before the final one
