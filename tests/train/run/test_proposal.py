"""Options for small data sets: one table of what is proposed, and why."""

import pytest

from prmim_train.config.layers import read_options, recipe_names
from prmim_train.config.pretrain import change, pretrain_config
from prmim_train.run.budget import training_budget
from prmim_train.run.proposal import LEAST_IMAGES, doubts, propose

IMAGENET = 1_281_167
TINY = {"model": "vit_tiny", "decoder_dim": 128, "decoder_heads": 4}
SMALL = {"model": "vit_small", "decoder_dim": 256, "decoder_heads": 8}

# Training images to what is proposed for the defaults, ViT-B for ImageNet, and the steps of such a run.
TABLE = {
    1: ({**TINY, "batch_size": 1, "base_learning_rate": 9.6e-3, "epochs": 1600}, 1600),
    11: ({**TINY, "batch_size": 8, "base_learning_rate": 3.4e-3, "epochs": 1600}, 2200),
    100: ({**TINY, "batch_size": 32, "base_learning_rate": 1.7e-3, "epochs": 1600}, 5000),
    900: ({**TINY, "batch_size": 32, "base_learning_rate": 1.7e-3}, 22500),
    1438: ({**TINY, "batch_size": 32, "base_learning_rate": 1.7e-3}, 35950),
    10_000: ({**TINY, "batch_size": 128, "base_learning_rate": 8.5e-4}, 62500),
    90_000: ({**SMALL, "batch_size": 1024, "base_learning_rate": 3e-4}, 70312),
    200_000: ({}, 39062),
    IMAGENET: ({}, 250228),
}


@pytest.mark.parametrize("images", TABLE)
def test_the_table(images):
    config = pretrain_config()
    proposed, steps = TABLE[images]
    assert propose(config, training_budget(config, images)) == proposed
    changed = change(config, **proposed)
    budget = training_budget(changed, images)
    assert budget.total_steps == steps
    assert doubts(changed, budget) == []
    assert propose(changed, budget) == {}


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "digits"])
def test_every_recipe_suits_imagenet_and_shrinks_to_a_few_images(name):
    config = pretrain_config(**read_options(name))
    own = training_budget(config, IMAGENET)
    assert doubts(config, own) == []
    found = training_budget(config, 900)
    assert doubts(config, found)
    changed = change(config, **propose(config, found))
    left = doubts(changed, training_budget(changed, 900))
    # A student is as deep as its teacher.
    assert left == [text for text in left if text.startswith("the encoder has ")] * (config.method.name == "maskalign")


def test_the_recipe_of_the_digits_suits_them():
    config = pretrain_config(**read_options("digits"))
    assert doubts(config, training_budget(config, 1438)) == []


@pytest.mark.parametrize(
    ("options", "images", "expected"),
    [
        ({}, 11, ["a batch of", "the run takes 2 steps in all", "the warm-up takes 0 steps", "the encoder has"]),
        ({"batch_size": 32, "model": "vit_tiny"}, 900, []),
        ({"batch_size": 32, "model": "vit_tiny", "epochs": 30}, 900, ["the run takes 844 steps"]),
        ({"batch_size": 32, "model": "vit_tiny", "warmup_epochs": 0.5}, 900, ["the warm-up takes 14 steps"]),
        ({"batch_size": 32, "model": "vit_tiny", "warmup_epochs": 0.0}, 900, []),  # asked for
        ({"batch_size": 32, "embed_dim": 192, "num_heads": 3}, 900, []),  # as small as the smallest
        ({"batch_size": 32, "embed_dim": 384, "num_heads": 6}, 900, ["the encoder has 23,660 parameters per training"]),
    ],
)
def test_doubts(options, images, expected):
    config = pretrain_config(**options)
    found = doubts(config, training_budget(config, images))
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected


def test_only_what_is_wrong_is_replaced():
    config = pretrain_config(batch_size=64, accumulate=64, model="vit_tiny", epochs=30, min_learning_rate=1e-6)
    proposed = propose(config, training_budget(config, 900))
    rates = {"base_learning_rate": 2.1e-4, "min_learning_rate": 7.1e-7}
    assert proposed == {"batch_size": 32, "accumulate": 1, **rates, "epochs": 356}
    own = pretrain_config(batch_size=32, embed_dim=384, num_heads=6, epochs=400)
    assert propose(own, training_budget(own, 900)) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": (32, 32, 32), "patch_size": (8, 8, 8), "volumes": True, "decoder_dim": 192, "decoder_heads": 6},
        {"decoder_dim": 36, "decoder_heads": 12},
    ],
)
def test_a_decoder_that_cannot_be_made_smaller_keeps_its_size(options):
    config = pretrain_config(**options)
    proposed = propose(config, training_budget(config, 900))
    assert proposed["model"] == "vit_tiny"
    assert not {"decoder_dim", "decoder_heads"} & set(proposed)


def test_the_smallest_model_wants_this_many_images():
    config = pretrain_config(batch_size=64)
    assert LEAST_IMAGES == 10_677
    assert propose(config, training_budget(config, LEAST_IMAGES))["model"] == "vit_tiny"
