"""Several class tokens or none, with learned positions, up to a classifier."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import prmim_jax.classifier
import prmim_torch.classifier
from prmim_jax.interop import named_weights
from prmim_methods import ClassifierConfig, MAEConfig
from prmim_reference import mae

SIZES = {"image_size": (8, 12), "patch_size": (4, 4), "embed_dim": 16, "depth": 1, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)


def make_config(class_tokens, **changes):
    return MAEConfig(**{**SIZES, **DECODER, "position": "learned", **changes}, class_tokens=class_tokens)


def build(config):
    return prmim_torch.MAE(config), prmim_jax.MAE(config)


def run_both(here, there):
    """Return the results of a module of each framework on the same images."""
    with torch.no_grad():
        return here(torch.from_numpy(IMAGES)).numpy(), np.asarray(there(jnp.asarray(IMAGES)))


def weights_of(here, there):
    return {name: array.numpy() for name, array in here.state_dict().items()}, named_weights(there)


@pytest.mark.parametrize("class_tokens", [0, 3])
def test_features_and_classifiers_pool_the_class_tokens(tmp_path, class_tokens):
    config, path = make_config(class_tokens), tmp_path / "weights.safetensors"
    methods = build(config)
    prmim_torch.save_weights(methods[0], path)
    prmim_jax.load_weights(methods[1], path)
    encoded = mae.encode(path, IMAGES, patch_size=(4, 4), num_heads=2)
    wanted = {"mean": encoded[:, class_tokens:].mean(1), "cls": encoded[:, :class_tokens]}
    for pool in ("mean", "cls") if class_tokens else ("mean",):
        expected = wanted[pool] if pool == "mean" else wanted[pool].mean(1)
        for features in run_both(*(lambda images, m=m, pool=pool: m.features(images, pool) for m in methods)):
            np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
        for protocol in ("finetune", "linear"):
            probe = ClassifierConfig(protocol=protocol, pool=pool)
            classifiers = []
            for package in (prmim_torch, prmim_jax):
                classifiers.append(package.Classifier(config, probe, 5))
                package.classifier.load_pretrained(classifiers[-1], path)
            here, there = weights_of(*classifiers)
            assert here.keys() == there.keys()
            np.testing.assert_array_equal(here["encoder.pos_embed"], there["encoder.pos_embed"])
            is_trained = [p.requires_grad for name, p in classifiers[0].named_parameters() if "pos_embed" in name]
            assert is_trained == [protocol == "finetune"]


def test_without_class_tokens_none_can_be_pooled():
    config = make_config(0)
    for method, images in zip(build(config), (torch.from_numpy(IMAGES), jnp.asarray(IMAGES)), strict=True):
        with pytest.raises(ValueError, match=r"^pool: expected 'mean' for an encoder without class tokens, got 'cls'$"):
            method.features(images, "cls")
    for package in (prmim_torch, prmim_jax):
        with pytest.raises(ValueError, match=r"^pool: expected 'mean' for an encoder without class tokens, got 'cls'$"):
            package.Classifier(config, ClassifierConfig(pool="cls"), 5)


def test_initial_weights_have_equal_names_and_distributions():
    here, there = weights_of(*build(make_config(40, image_size=(40, 40), embed_dim=64)))
    assert here.keys() == there.keys()
    for name in ("encoder.cls_token", "encoder.pos_embed", "decoder.pos_embed"):
        assert here[name].shape == there[name].shape
        for weights in (here[name], there[name]):
            assert abs(weights.mean()) < 0.002
            assert weights.std() == pytest.approx(0.02, rel=0.1)
    assert here["encoder.cls_token"].shape == (1, 40, 64)
    assert here["decoder.pos_embed"].shape == (1, 140, 8)


def test_class_tokens_have_zeros_in_a_sine_cosine_table():
    for weights in weights_of(*build(make_config(2, position="absolute"))):
        assert not weights["encoder.pos_embed"][0, :2].any()
        assert weights["encoder.pos_embed"][0, 2:].any(axis=1).all()
        assert weights["decoder.pos_embed"].shape == (1, 8, 8)


def test_weights_of_other_numbers_of_class_tokens_are_refused(tmp_path):
    prmim_torch.save_weights(prmim_torch.MAE(make_config(3)), tmp_path / "weights.safetensors")
    for package in (prmim_torch, prmim_jax):
        with pytest.raises(ValueError, match=r"^weights: class_tokens: expected 2, got 3"):
            package.load_weights(package.MAE(make_config(2)), tmp_path / "weights.safetensors")
        with pytest.raises(ValueError, match=r"^weights: position: expected .*, got 'learned'"):
            package.load_weights(package.MAE(make_config(3, position="absolute")), tmp_path / "weights.safetensors")
