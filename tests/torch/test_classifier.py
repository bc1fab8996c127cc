"""Classifiers: input of the head, trained parameters, optimizers, checkpoints."""

import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prmim_core import counter_noise
from prmim_methods import ClassifierConfig, TrainingConfig, create_config
from prmim_methods.classifier import BLOCK_TABLE, copy_table
from prmim_methods.positions import SHARED_TABLE
from prmim_methods.record import options as options_of
from prmim_methods.weight_files import dump_architecture
from prmim_torch import METHODS, Classifier, ClassifierEngine, load_weights, save_weights
from prmim_torch.classifier import BatchNorm, load_pretrained
from prmim_torch.interop import named_weights, write_weights
from tests.torch.reading import assert_no_reading

TRAINING = {
    "seed": 3,
    "total_steps": 8,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "betas": (0.9, 0.999),
}
PLAIN = {"drop_path": 0.0, "layer_decay": 1.0}
INIT_SEED = 3
SAMPLE = np.arange(8)
CLASSES = 5

FINETUNE = {"drop_path": 0.5, "layer_decay": 0.7, "ema_decay": 0.9, "clip_grad": 1.0}
PROBE = {"protocol": "linear", "pool": "cls", "learning_rate": 0.5, "weight_decay": 0.0}
KINDS = {"finetune": FINETUNE, "probe": PROBE}
BLOCK_TABLES = [BLOCK_TABLE.format(block) for block in range(2)]
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def make_options(**given):
    """Return options of a classifier; by default, fine-tuning is plain."""
    is_linear = given.get("protocol") == "linear"
    return ClassifierConfig(**{**({} if is_linear else PLAIN), **given})


@pytest.fixture
def make_config(tiny, tiny_simmim):
    """Return a function from options to the record of a method."""

    def make(name="mae", **options):
        return create_config(name, **{**{"mae": tiny, "simmim": tiny_simmim}[name], "init_seed": INIT_SEED, **options})

    return make


@pytest.fixture
def make_engine(make_config, device):
    """Return a factory of engines, by options of classifier and training.

    By default, drop path is off.
    """
    names = {item.name for item in options_of(ClassifierConfig)}

    def make(name="mae", weights=None, num_classes=CLASSES, **given):
        options = {key: value for key, value in given.items() if key in names}
        training = {key: value for key, value in given.items() if key not in names}
        training = TrainingConfig(**{**TRAINING, "device": device.type, **training})
        return ClassifierEngine(make_config(name), make_options(**options), num_classes, training, weights)

    return make


def make_classifier(config, num_classes=CLASSES, init_seed=0, **options):
    return Classifier(config, make_options(**options), num_classes, init_seed)


def make_pair(config, path, **options):
    """Return a method and a classifier with its encoder."""
    method, classifier = METHODS[config.name](config), make_classifier(config, **options)
    if config.position == "relative":
        torch.nn.init.normal_(method.encoder.rel_pos_bias.relative_position_bias_table)
    save_weights(method, path)
    load_pretrained(classifier, path)
    return method.eval(), classifier


@pytest.fixture
def images(make_images):
    return make_images(8, 16, 16, 3)


@pytest.fixture
def targets():
    """Return soft targets, as from mixup."""
    return np.random.default_rng(1).dirichlet(np.ones(CLASSES), 8).astype(np.float32)


def train(engine, images, targets, steps):
    for _ in range(steps):
        engine.train_step(images, SAMPLE, targets)
    return engine


def weights_of(engine):
    return {name: tensor.detach().cpu().clone() for name, tensor in engine.module.state_dict().items()}


def assert_same(weights, others):
    assert set(weights) == set(others)
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def spread_out(engine, path):
    """Perturb an engine's weights.

    The initial weights give the encoder hardly any gradient.
    """
    module, generator = engine.module, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    save_weights(module, path)
    engine.load_weights(path)
    return engine


# --- module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "simmim"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_what_the_head_sees(make_config, images, tmp_path, name, pool, protocol):
    pixels = torch.from_numpy(images)
    method, classifier = make_pair(make_config(name), tmp_path / "weights.safetensors", pool=pool, protocol=protocol)
    logits = classifier.eval()(pixels)
    assert logits.shape == (8, CLASSES)
    assert logits.dtype == torch.float32
    seen = method.features(pixels, pool)
    if protocol == "linear":
        seen = seen / np.sqrt(1 + 1e-6)
    elif pool == "mean":
        method.encoder.norm = torch.nn.Identity()
        seen = F.layer_norm(method.features(pixels), (16,), eps=1e-6)
    torch.testing.assert_close(logits, seen @ classifier.head.weight.T)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_names_are_those_of_a_vision_transformer(make_config, name):
    config = make_config(name)
    encoder = METHODS[name](config).encoder
    names = {f"encoder.{key}" for key in encoder.state_dict()} - {"encoder.mask_token"}
    own_norm, head = {"encoder.norm.weight", "encoder.norm.bias"}, {"head.weight", "head.bias"}
    tuned = (names - {SHARED_TABLE}) | {name for name in BLOCK_TABLES if SHARED_TABLE in names}
    assert set(make_classifier(config).state_dict()) == (tuned - own_norm) | head | {"fc_norm.weight", "fc_norm.bias"}
    assert set(make_classifier(config, pool="cls").state_dict()) == tuned | head
    statistics = {f"fc_norm.{name}" for name in STATISTICS}
    assert set(make_classifier(config, protocol="linear").state_dict()) == names | head | statistics


@pytest.mark.parametrize(("protocol", "std"), [("finetune", 2e-5), ("linear", 0.01)])
def test_the_head_starts_small_and_by_its_seed(make_config, protocol, std):
    state = torch.get_rng_state()
    one, same, other = (make_classifier(make_config(), 400, seed, protocol=protocol) for seed in (1, 1, 2))
    assert one.head.weight.std().item() == pytest.approx(std, rel=0.05)
    assert not one.head.bias.any()
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(one.encoder.cls_token, other.encoder.cls_token)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "tables"), [("mae", ["encoder.pos_embed"]), ("simmim", BLOCK_TABLES)])
def test_position_tables_learn(make_config, name, tables):
    parameters = dict(make_classifier(make_config(name)).named_parameters())
    assert all(parameters[table].requires_grad for table in tables)
    frozen = make_classifier(make_config(name), protocol="linear")
    assert not any(parameter.requires_grad for parameter in frozen.encoder.parameters())


def test_branches_are_dropped_by_the_noise_and_in_training_alone(make_config, images):
    pixels = torch.from_numpy(images)
    noise = [counter_noise(0, step, torch.arange(8), 16) for step in (0, 1)]
    classifier = make_classifier(make_config(), drop_path=0.9)
    with torch.no_grad():
        classifier.head.weight.normal_()
    one, again, other = (classifier(pixels, draw) for draw in (noise[0], noise[0], noise[1]))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match=r"^noise: expected integers for drop path in training mode, got None$"):
        classifier(pixels)
    with pytest.raises(ValueError, match=r"^noise: expected shape \(8, 16\), got \(8, 15\)$"):
        classifier(pixels, noise[0][:, 1:])
    classifier.eval()
    assert torch.equal(classifier(pixels), classifier(pixels, noise[0]))


def test_batch_norm():
    rng = np.random.default_rng(0)
    norm, running = BatchNorm(3), [np.zeros(3), np.ones(3)]
    for number in range(1, 14):
        x = rng.normal(2, 3, (8, 3)).astype(np.float32)
        mean, variance = x.mean(0), x.var(0)
        np.testing.assert_allclose(
            norm(torch.from_numpy(x)), (x - mean) / np.sqrt(variance + 1e-6), rtol=1e-4, atol=1e-5
        )
        share = max(1 / number, 0.1)
        latest = (mean, x.var(0, ddof=1))
        running = [(1 - share) * old + share * new for old, new in zip(running, latest, strict=True)]
    np.testing.assert_allclose(norm.running_mean, running[0], rtol=1e-5)
    np.testing.assert_allclose(norm.running_var, running[1], rtol=1e-5)
    norm.eval()
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    expected = (x - running[0]) / np.sqrt(running[1] + 1e-6)
    np.testing.assert_allclose(norm(torch.from_numpy(x)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm(torch.from_numpy(x[:1])), expected[:1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_mean, running[0], rtol=1e-5)


def test_one_row_is_a_batch_too():
    norm = BatchNorm(2)
    assert norm(torch.tensor([[1.0, -1.0]])).tolist() == [[0.0, 0.0]]
    assert torch.isfinite(norm.running_var).all()


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_it_learns(make_engine, images, name):
    hard = np.eye(CLASSES, dtype=np.float32)[np.arange(8) % CLASSES]
    engine = make_engine(name, total_steps=60, learning_rate=1e-2)
    first = train(engine, images, hard, 1).read_metrics()
    assert first["loss"] == pytest.approx(np.log(CLASSES), rel=1e-2)
    train(engine, images, hard, 55).read_metrics()
    last = train(engine, images, hard, 4).read_metrics()
    assert last["loss"] < 0.2
    assert last["accuracy"] == 1.0
    assert (engine.predict(images).argmax(1) == hard.argmax(1)).all()
    assert engine.step == 60


def test_what_is_measured(make_engine, images, targets, tmp_path):
    engine = spread_out(make_engine(), tmp_path / "weights.safetensors")
    logits = engine.predict(images).astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    metrics = train(engine, images, targets, 1).read_metrics()
    assert metrics["loss"] == pytest.approx(-(targets * np.log(chances)).sum(1).mean(), rel=1e-5)
    assert metrics["accuracy"] == np.mean(logits.argmax(1) == targets.argmax(1))
    assert metrics["grad_norm"] > 0


def test_a_frozen_encoder_gets_no_gradient_and_stays_in_evaluation_mode(make_engine, images, targets):
    engine = make_engine(**PROBE)
    before = weights_of(engine)
    train(engine, images, targets, 3)
    engine.predict(images)
    assert engine.module.training
    assert not any(part.training for part in engine.module.encoder.modules())
    assert all(parameter.grad is None for parameter in engine.module.encoder.parameters())
    after = weights_of(engine)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"head.weight", "head.bias", *(f"fc_norm.{name}" for name in STATISTICS)}
    assert engine.num_parameters == 17 * CLASSES


@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_follow_the_batches(make_engine, make_config, images, targets, accumulate):
    engine = train(make_engine(**PROBE, accumulate=accumulate), images, targets, 2)
    seen = METHODS["mae"](make_config()).features(torch.from_numpy(images), "cls").detach().numpy()
    after = weights_of(engine)
    parts = np.split(seen, accumulate)
    expected = {"mean": np.mean([p.mean(0) for p in parts], 0), "var": np.mean([p.var(0, ddof=1) for p in parts], 0)}
    for name, values in expected.items():  # the same in both steps
        np.testing.assert_allclose(after[f"fc_norm.running_{name}"], values, rtol=1e-3, atol=1e-5)


def test_a_short_probe_predicts_what_it_has_learned(make_engine, images):
    """The running statistics do not depend on their initial values."""
    hard = np.eye(CLASSES, dtype=np.float32)[np.arange(8) % CLASSES]
    engine = train(make_engine(**{**PROBE, "trust": 3.0}), images, hard, 8)
    assert (engine.predict(images).argmax(1) == hard.argmax(1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_changes_nothing(make_engine, images, targets, kind):
    engine = train(make_engine(**{**KINDS[kind], "ema_decay": 0.9}), images, targets, 3)
    before, moments = weights_of(engine), {name: value.clone() for name, value in engine._state().items()}
    spoilt = targets.copy()
    spoilt[0, 0] = np.nan
    train(engine, images[::-1], spoilt, 2)
    assert_same(weights_of(engine), before)
    changed = {name for name, value in engine._state().items() if not torch.equal(value, moments[name])}
    assert changed == {"step", "nonfinite_step", "skipped"}
    metrics = train(engine, images, targets, 1).read_metrics()
    assert (metrics["nonfinite_step"], metrics["skipped"], metrics["skipped_in_a_row"]) == (4, 2, 0)
    assert np.isfinite(metrics["loss"])
    assert not torch.equal(weights_of(engine)["head.weight"], before["head.weight"])


def test_layer_decay(make_engine, images, targets, tmp_path):
    """The first step of AdamW has the length of the learning rate, for any gradient."""
    options = {"layer_decay": 0.5, "warmup_steps": 0, "weight_decay": 0.0}
    for name in ("mae", "simmim"):
        engine = spread_out(make_engine(name, **options), tmp_path / "weights.safetensors")
        before = weights_of(engine)
        after = weights_of(train(engine, images, targets, 1))
        for weight in before:
            power = 0
            if weight.startswith("encoder."):
                power = 2 - int(weight.split(".")[2]) if ".blocks." in weight else 3
            moved = (after[weight] - before[weight]).abs().max().item()
            assert moved == pytest.approx(1e-3 * 0.5**power, rel=0.02), weight


def test_steps_are_those_of_a_plain_loop(make_config, images, targets, make_engine, device):
    """With decay for matrices alone: position tables and the class token have none."""
    engine = make_engine(layer_decay=0.5, weight_decay=0.3, drop_path=0.4, clip_grad=0.2, ema_decay=0.8)
    model = make_classifier(make_config(), init_seed=TRAINING["seed"], drop_path=0.4).to(device)
    groups = []
    for name, parameter in model.named_parameters():
        power = 0
        if name.startswith("encoder."):
            power = 2 - int(name.split(".")[2]) if ".blocks." in name else 3
        is_decayed = name.endswith("weight") and "norm" not in name
        groups.append({"params": [parameter], "weight_decay": 0.3 * is_decayed, "scale": 0.5**power})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pixels, wanted = torch.from_numpy(images).to(device), torch.from_numpy(targets).to(device)
    for step in range(5):
        engine.train_step(images, SAMPLE, targets)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * TrainingConfig(**TRAINING).learning_rate_at(step)
        logits = model(pixels, counter_noise(3, step, torch.from_numpy(SAMPLE), 16).to(device))
        optimizer.zero_grad()
        (-(wanted * logits.log_softmax(1)).sum(1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        for name, parameter in model.named_parameters():
            average[name] = 0.8 * average[name] + 0.2 * parameter.detach()
    for name, parameter in model.named_parameters():
        if not name.endswith("qkv.bias"):  # the gradient of the keys' bias is rounding error
            torch.testing.assert_close(
                weights_of(engine)[name], parameter.detach().cpu(), rtol=1e-4, atol=2e-6, msg=name
            )
    model.load_state_dict(average)
    np.testing.assert_allclose(engine.predict(images), model.eval()(pixels).detach().cpu(), rtol=1e-3, atol=1e-6)


def test_lars_is_what_it_says(make_engine, make_config, images, targets):
    """Compare with update and gradient of the head, written out in float64."""
    engine = make_engine(**{**PROBE, "weight_decay": 0.1, "trust": 0.02, "momentum": 0.8})
    method = METHODS["mae"](make_config())
    seen = method.features(torch.from_numpy(images), "cls").detach().numpy().astype(np.float64)
    seen = (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-6)
    weights = weights_of(engine)
    weight, bias = (weights[f"head.{name}"].numpy().astype(np.float64) for name in ("weight", "bias"))
    velocity = [np.zeros_like(weight), np.zeros_like(bias)]
    for step in range(6):
        logits = seen @ weight.T + bias
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        slope = (chances - targets) / len(images)
        update = slope.T @ seen + 0.1 * weight
        update *= 0.02 * np.linalg.norm(weight) / np.linalg.norm(update)
        velocity = [0.8 * velocity[0] + update, 0.8 * velocity[1] + slope.sum(0)]
        rate = TrainingConfig(**{**TRAINING, "learning_rate": 0.5}).learning_rate_at(step)
        weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    after = weights_of(train(engine, images, targets, 6))
    np.testing.assert_allclose(after["head.weight"], weight, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(after["head.bias"], bias, rtol=1e-3, atol=1e-6)


def test_lars_takes_weights_of_zero(make_engine, images, targets):
    engine = make_engine(**PROBE)
    with torch.no_grad():
        engine.module.head.weight.zero_()
    train(engine, images, targets, 2)
    assert engine.module.head.weight.any()
    assert engine.read_metrics()["nonfinite_step"] is None


def test_predictions_are_of_the_running_mean(make_engine, make_config, images, targets):
    engine = make_engine(ema_decay=0.6, learning_rate=1e-2)
    expected = weights_of(engine)
    for _ in range(4):
        now = weights_of(train(engine, images, targets, 1))
        expected = {name: 0.6 * expected[name] + 0.4 * now[name] for name in now}
    logits = engine.predict(images)
    assert_same(weights_of(engine), now)
    twin = make_classifier(make_config()).eval()
    for weights, is_it in ((expected, True), (now, False)):
        twin.load_state_dict(weights)
        assert np.allclose(logits, twin(torch.from_numpy(images)).detach(), rtol=1e-3, atol=1e-5) is is_it


def test_a_running_mean_starts_from_the_weights_that_are_loaded(make_engine, images, tmp_path):
    engine = spread_out(make_engine(ema_decay=0.9), tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(engine.predict(images), spread_out(make_engine(), tmp_path / "w").predict(images))


def test_predictions_do_not_depend_on_the_batch(make_engine, images, targets):
    for options in KINDS.values():
        engine = train(make_engine(**options), images, targets, 3)
        whole = engine.predict(images)
        assert whole.shape == (8, CLASSES)
        assert whole.dtype == np.float32
        parts = [engine.predict(images[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 8))]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-6)
        # Predictions do not change the training.
        straight = train(make_engine(**options), images, targets, 4)
        assert_same(weights_of(train(engine, images, targets, 1)), weights_of(straight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_bit_for_bit(make_engine, images, targets, tmp_path, kind, device):
    if device.type == "cuda":
        pytest.skip("kernels need not be deterministic")
    options = {**KINDS[kind], "ema_decay": 0.9}
    straight = train(make_engine(**options), images, targets, 7)
    train(make_engine(**options), images, targets, 4).save(tmp_path)
    resumed = make_engine(**options)
    resumed.restore(tmp_path)
    assert resumed.step == 4
    train(resumed, images, targets, 3)
    assert_same(weights_of(resumed), weights_of(straight))
    assert resumed.read_metrics() == straight.read_metrics()
    np.testing.assert_array_equal(resumed.predict(images), straight.predict(images))


def test_another_training_is_not_taken_up(make_engine, images, targets, tmp_path):
    train(make_engine(ema_decay=0.9), images, targets, 1).save(tmp_path)
    fewer_classes = make_engine(num_classes=4)
    for other, message in (
        (make_engine(), "directory: expected no tensor 'average."),
        (make_engine(pool="cls"), "weights: pool: expected 'cls', got 'mean'"),
        (fewer_classes, "weights: num_classes: expected 4, got 5"),
    ):
        before = weights_of(other)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            other.restore(tmp_path)
        assert_same(weights_of(other), before)


def test_parts_of_a_batch_add_up_to_it(make_engine, images, targets):
    whole, parts = (train(make_engine(**FINETUNE, accumulate=n), images, targets, 4) for n in (1, 4))
    measured, expected = parts.read_metrics(), whole.read_metrics()
    for name in ("loss", "accuracy", "grad_norm"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_trains_float32_weights(make_engine, images, targets, kind):
    engine = train(make_engine(**KINDS[kind], precision="bfloat16"), images, targets, 3)
    assert engine.read_metrics()["nonfinite_step"] is None
    assert {tensor.dtype for tensor in weights_of(engine).values()} == {torch.float32}
    assert engine.predict(images).dtype == np.float32


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")  # torch's own, on import
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_engine_takes_the_same_steps(make_engine, images, targets, device, monkeypatch, kind):
    if device.type == "cpu":  # generating code takes a minute
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled, plain = (train(make_engine(**KINDS[kind], compile=flag), images, targets, 3) for flag in (True, False))
    for name, tensor in weights_of(compiled).items():
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(tensor, weights_of(plain)[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device(make_engine, images, targets, device, kind):
    options = {**KINDS[kind], "ema_decay": 0.9, "clip_grad": 1.0, "accumulate": 2}
    engine = train(make_engine(**options), images, targets, 2)
    assert_no_reading(lambda: train(engine, images, targets, 2), device)


# --- initial weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_it_starts_from_the_weights_of_a_method(make_config, make_engine, images, tmp_path, name):
    path = tmp_path / "weights.safetensors"
    method, expected = make_pair(make_config(name, init_seed=9), path, pool="cls", init_seed=TRAINING["seed"])
    engine = make_engine(name, weights=path, pool="cls")
    logits = expected.eval()(torch.from_numpy(images)).detach()
    np.testing.assert_allclose(engine.predict(images), logits, rtol=1e-4, atol=1e-8)
    assert torch.equal(weights_of(engine)["encoder.cls_token"], method.encoder.cls_token)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_without_a_file_it_starts_as_a_new_method(make_config, make_engine, name):
    weights = weights_of(make_engine(name, pool="cls"))
    expected = METHODS[name](make_config(name)).encoder.state_dict()
    for key, tensor in copy_table({f"encoder.{key}": tensor for key, tensor in expected.items()}, 2).items():
        assert key in {"encoder.mask_token", SHARED_TABLE} or torch.equal(weights[key], tensor), key


def test_weights_of_another_model_are_refused(make_config, make_engine, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(METHODS["mae"](make_config(depth=3)), path)
    with pytest.raises(ValueError, match=r"^weights: depth: expected 2, got 3$"):
        make_engine(weights=path)
    save_weights(METHODS["simmim"](make_config("simmim")), path)
    with pytest.raises(ValueError, match=r"^weights: (position|depth): expected "):
        make_engine(weights=path)
    save_weights(make_classifier(make_config(), 2), path)
    with pytest.raises(ValueError, match=r"^architecture: expected that of a method or an encoder, got a classifier$"):
        make_engine(weights=path)
    with pytest.raises(FileNotFoundError):
        make_engine(weights=tmp_path / "missing.safetensors")
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"^path: expected a safetensors file, got "):
        make_engine(weights=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("encoder.norm.bias"),
            "path: expected a tensor 'encoder.norm.bias', got none in .*",
        ),
        (
            lambda weights: weights.update({"encoder.norm.bias": torch.zeros(9)}),
            r"path: encoder.norm.bias: expected shape \(16,\), got \(9,\) in .*",
        ),
    ],
    ids=["missing", "shape"],
)
def test_a_file_must_have_the_tensors_of_the_encoder(make_config, tmp_path, change, message):
    path, method = tmp_path / "weights.safetensors", METHODS["mae"](make_config())
    weights = named_weights(method)
    change(weights)
    write_weights(weights, dump_architecture(method), path)
    classifier = make_classifier(make_config(init_seed=4), pool="cls")
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_pretrained(classifier, path)
    assert_same(classifier.state_dict(), before)


def test_weights_of_a_classifier_go_there_and_back(make_config, make_engine, images, targets, tmp_path):
    engine = train(make_engine(**PROBE), images, targets, 3)
    engine.save(tmp_path)
    classifier = make_classifier(make_config(), protocol="linear", pool="cls").eval()
    load_weights(classifier, tmp_path / "weights.safetensors")
    np.testing.assert_allclose(
        engine.predict(images), classifier(torch.from_numpy(images)).detach(), rtol=1e-4, atol=1e-6
    )


def test_wrong_batches(make_engine, images, targets):
    engine = make_engine()
    with pytest.raises(TypeError, match=r"^targets: expected float32, got float64$"):
        engine.train_step(images, SAMPLE, targets.astype(np.float64))
    with pytest.raises(ValueError, match=r"^targets: expected shape \(8, 5\), got \(8, 4\)$"):
        engine.train_step(images, SAMPLE, targets[:, 1:])
    with pytest.raises(ValueError, match=r"^sample: expected shape \(8,\), got \(7,\)$"):
        engine.train_step(images, SAMPLE[1:], targets)
    with pytest.raises(TypeError, match=r"^images: expected torch.uint8, got torch.float32$"):
        engine.predict(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"^images: expected a batch that accumulate=3 divides, got 8$"):
        make_engine(accumulate=3).train_step(images, SAMPLE, targets)
    assert engine.step == 0
