"""Classifiers: input of the head, trained parameters, optimizers, checkpoints."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import counter_noise
from prmim_jax import METHODS, Classifier, ClassifierEngine, load_weights, save_weights
from prmim_jax.classifier import BatchNorm, load_pretrained
from prmim_jax.interop import named_variables, named_weights, put_weights, write_weights
from prmim_methods import ClassifierConfig, TrainingConfig, create_config
from prmim_methods.classifier import BLOCK_TABLE, copy_table
from prmim_methods.positions import SHARED_TABLE
from prmim_methods.record import options as options_of
from prmim_methods.weight_files import dump_architecture

TRAINING = {
    "seed": 3,
    "total_steps": 8,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "betas": (0.9, 0.999),
    "precision": "float32",
    "device": "cpu",
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
def make_engine(make_config):
    """Return a factory of engines, by options of classifier and training.

    By default, drop path is off.
    """
    names = {item.name for item in options_of(ClassifierConfig)}

    def make(name="mae", method_options=None, weights=None, num_classes=CLASSES, **given):
        options = {key: value for key, value in given.items() if key in names}
        training = TrainingConfig(**{**TRAINING, **{key: value for key, value in given.items() if key not in names}})
        config = make_config(name, **(method_options or {}))
        return ClassifierEngine(config, make_options(**options), num_classes, training, weights)

    return make


def make_classifier(config, num_classes=CLASSES, init_seed=0, **options):
    return Classifier(config, make_options(**options), num_classes, init_seed)


def make_pair(config, path, **options):
    """Return a method and a classifier with its encoder, in evaluation mode."""
    method, classifier = METHODS[config.name](config), make_classifier(config, **options)
    if config.position == "relative":
        table = method.encoder.rel_pos_bias.relative_position_bias_table
        table.set_value(jnp.asarray(np.random.default_rng(0).normal(size=table.shape), jnp.float32))
    save_weights(method, path)
    load_pretrained(classifier, path)
    method.eval()
    classifier.eval()
    return method, classifier


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
    return named_weights(engine.module)


def learned(module):
    return {name for name, variable in named_variables(module).items() if isinstance(variable, nnx.Param)}


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def spread_out(engine, path):
    """Perturb an engine's weights.

    The initial weights give the encoder hardly any gradient.
    """
    module, rng = engine.module, np.random.default_rng(0)
    for variable in named_variables(module).values():
        if isinstance(variable, nnx.Param):
            variable.set_value(variable[...] + 0.1 * rng.normal(size=variable.shape).astype(np.float32))
    save_weights(module, path)
    engine.load_weights(path)
    return engine


def call(module, images, *noise):
    """Call a module, compiled, without changing it."""
    graph, state = nnx.split(module)
    return np.asarray(jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, images, *noise))


def features(method, images, pool):
    graph, state = nnx.split(method)
    return np.asarray(jax.jit(lambda state, images: nnx.merge(graph, state).features(images, pool))(state, images))


# --- module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "simmim"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_what_the_head_sees(make_config, images, tmp_path, name, pool, protocol):
    method, classifier = make_pair(make_config(name), tmp_path / "weights.safetensors", pool=pool, protocol=protocol)
    logits = call(classifier, images)
    assert logits.shape == (8, CLASSES)
    assert logits.dtype == np.float32
    if protocol == "linear":
        seen = features(method, images, pool) / np.sqrt(1 + 1e-6)
    elif pool == "cls":
        seen = features(method, images, pool)
    else:
        method.encoder.norm = nnx.data(None)
        seen = features(method, images, pool)
        seen = (seen - seen.mean(1, keepdims=True)) / np.sqrt(seen.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(logits, seen @ np.asarray(classifier.head.weight[...]).T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_names_are_those_of_a_vision_transformer(make_config, name):
    config = make_config(name)
    names = {f"encoder.{key}" for key in named_weights(METHODS[name](config).encoder)} - {"encoder.mask_token"}
    own_norm, head = {"encoder.norm.weight", "encoder.norm.bias"}, {"head.weight", "head.bias"}
    tuned = (names - {SHARED_TABLE}) | {name for name in BLOCK_TABLES if SHARED_TABLE in names}
    assert set(named_weights(make_classifier(config))) == (tuned - own_norm) | head | {"fc_norm.weight", "fc_norm.bias"}
    assert set(named_weights(make_classifier(config, pool="cls"))) == tuned | head
    statistics = {f"fc_norm.{name}" for name in STATISTICS}
    assert set(named_weights(make_classifier(config, protocol="linear"))) == names | head | statistics


@pytest.mark.parametrize(("protocol", "std"), [("finetune", 2e-5), ("linear", 0.01)])
def test_the_head_starts_small_and_by_its_seed(make_config, protocol, std):
    weights = [named_weights(make_classifier(make_config(), 400, seed, protocol=protocol)) for seed in (1, 1, 2)]
    one, same, other = (each["head.weight"] for each in weights)
    assert one.std() == pytest.approx(std, rel=0.05)
    assert not weights[0]["head.bias"].any()
    assert (one == same).all()
    assert (one != other).any()
    assert (weights[0]["encoder.cls_token"] == weights[2]["encoder.cls_token"]).all()


@pytest.mark.parametrize(
    ("name", "table"), [("mae", "pos_embed"), ("simmim", "blocks.attn.relative_position_bias_table")]
)
def test_position_tables_learn(make_config, name, table):
    classifier = make_classifier(make_config(name))
    assert f"encoder.{table}" in learned(classifier) == set(named_variables(classifier))
    assert learned(make_classifier(make_config(name), protocol="linear")) == {"head.weight", "head.bias"}


def test_branches_are_dropped_by_the_noise_and_in_training_alone(make_config, images):
    noise = [counter_noise(0, step, jnp.arange(8), 16) for step in (0, 1)]
    classifier = make_classifier(make_config(depth=2), drop_path=0.9)
    one, again, other = (call(classifier, images, draw) for draw in (noise[0], noise[0], noise[1]))
    assert (one == again).all()
    assert (one != other).any()
    pixels = jnp.asarray(images)
    with pytest.raises(ValueError, match=r"^noise: expected integers for drop path in training mode, got None$"):
        classifier(pixels)
    with pytest.raises(ValueError, match=r"^noise: expected shape \(8, 16\), got \(8, 15\)$"):
        classifier(pixels, noise[0][:, 1:])
    classifier.eval()
    assert (call(classifier, images) == call(classifier, images, noise[0])).all()


def test_batch_norm():
    rng = np.random.default_rng(0)
    norm, running = BatchNorm(3), [np.zeros(3), np.ones(3)]
    for number in range(1, 14):
        x = rng.normal(2, 3, (8, 3)).astype(np.float32)
        mean, variance = x.mean(0), x.var(0)
        expected = (x - mean) / np.sqrt(variance + 1e-6)
        np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
        share = max(1 / number, 0.1)
        latest = (mean, x.var(0, ddof=1))
        running = [(1 - share) * old + share * new for old, new in zip(running, latest, strict=True)]
    np.testing.assert_allclose(norm.running_mean[...], running[0], rtol=1e-5)
    np.testing.assert_allclose(norm.running_var[...], running[1], rtol=1e-5)
    norm.eval()
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    expected = (x - running[0]) / np.sqrt(running[1] + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x[:1])), expected[:1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_mean[...], running[0], rtol=1e-5)


def test_one_row_is_a_batch_too():
    norm = BatchNorm(2)
    assert norm(jnp.array([[1.0, -1.0]])).tolist() == [[0.0, 0.0]]
    assert np.isfinite(norm.running_var[...]).all()


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mae", "simmim-scan"])
def test_it_learns_and_nothing_is_compiled_again(make_engine, images, monkeypatch, kind):
    traced = []
    forward = Classifier.__call__
    monkeypatch.setattr(Classifier, "__call__", lambda self, *inputs: traced.append(1) or forward(self, *inputs))
    hard = np.eye(CLASSES, dtype=np.float32)[np.arange(8) % CLASSES]
    name, _, scan = kind.partition("-")
    engine = make_engine(name, {"scan_blocks": bool(scan)}, total_steps=60, learning_rate=1e-2)
    first = train(engine, images, hard, 1).read_metrics()
    assert first["loss"] == pytest.approx(np.log(CLASSES), rel=1e-2)
    train(engine, images, hard, 55).read_metrics()
    last = train(engine, images, hard, 4).read_metrics()
    assert len(traced) == 1
    assert engine._train._cache_size() == 1
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


@pytest.mark.parametrize("scan", [False, True])
def test_a_frozen_encoder_stays_as_it_is(make_engine, images, targets, scan):
    engine = make_engine("mae", {"scan_blocks": scan}, **PROBE)
    before = weights_of(engine)
    train(engine, images, targets, 3)
    engine.predict(images)
    after = weights_of(engine)
    changed = {name for name in after if (after[name] != before[name]).any()}
    assert changed == {"head.weight", "head.bias", *(f"fc_norm.{name}" for name in STATISTICS)}
    assert engine.num_parameters == 17 * CLASSES


@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_follow_the_batches(make_engine, make_config, images, targets, accumulate):
    engine = train(make_engine(**{**PROBE, "accumulate": accumulate}), images, targets, 2)
    seen = features(METHODS["mae"](make_config()), images, "cls")
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
    before, state = weights_of(engine), jax.tree.map(np.array, engine._saved_state())
    spoilt = targets.copy()
    spoilt[0, 0] = np.nan
    train(engine, images[::-1], spoilt, 2)
    assert_same(weights_of(engine), before)
    after = engine._saved_state()
    for name in set(state) - {"step", "nonfinite_step", "skipped"}:
        assert_same(after[name], state[name])
    metrics = train(engine, images, targets, 1).read_metrics()
    assert (metrics["nonfinite_step"], metrics["skipped"], metrics["skipped_in_a_row"]) == (4, 2, 0)
    assert np.isfinite(metrics["loss"])
    assert (weights_of(engine)["head.weight"] != before["head.weight"]).any()


@pytest.mark.parametrize(("name", "scan"), [("mae", False), ("simmim", True)])
def test_layer_decay(make_engine, images, targets, tmp_path, name, scan):
    """The first step of AdamW has the length of the learning rate, for any gradient."""
    options = {"layer_decay": 0.5, "warmup_steps": 0, "weight_decay": 0.0}
    engine = spread_out(
        make_engine(name, {"depth": 2, "scan_blocks": scan}, **options), tmp_path / "weights.safetensors"
    )
    before = weights_of(engine)
    after = weights_of(train(engine, images, targets, 1))
    for weight in before:
        power = 0
        if weight.startswith("encoder."):
            power = 2 - int(weight.split(".")[2]) if ".blocks." in weight else 3
        assert np.abs(after[weight] - before[weight]).max() == pytest.approx(1e-3 * 0.5**power, rel=0.02), weight


def test_scanned_blocks_take_the_same_steps(make_engine, assert_close, images, targets, tmp_path):
    loop, scan = (make_engine("mae", {"depth": 2, "scan_blocks": flag}, **FINETUNE) for flag in (False, True))
    assert_same(weights_of(loop), weights_of(scan))
    assert_close(
        weights_of(train(scan, images, targets, 4)), weights_of(train(loop, images, targets, 4)), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(scan.predict(images), loop.predict(images), rtol=1e-3, atol=1e-6)
    loop.save(tmp_path)
    scan.restore(tmp_path)
    assert_same(weights_of(scan), weights_of(loop))
    np.testing.assert_allclose(scan.predict(images), loop.predict(images), rtol=1e-4, atol=1e-7)


def test_lars_is_what_it_says(make_engine, make_config, images, targets):
    """Compare with update and gradient of the head, written out in float64."""
    engine = make_engine(**{**PROBE, "weight_decay": 0.1, "trust": 0.02, "momentum": 0.8})
    seen = features(METHODS["mae"](make_config()), images, "cls").astype(np.float64)
    seen = (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-6)
    weights = weights_of(engine)
    weight, bias = (weights[f"head.{name}"].astype(np.float64) for name in ("weight", "bias"))
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


def test_lars_takes_weights_of_zero(make_engine, images, targets, tmp_path):
    engine = make_engine(**PROBE)
    module = engine.module
    module.head.weight.set_value(jnp.zeros_like(module.head.weight[...]))
    save_weights(module, tmp_path / "weights.safetensors")
    engine.load_weights(tmp_path / "weights.safetensors")
    train(engine, images, targets, 2)
    assert weights_of(engine)["head.weight"].any()
    assert engine.read_metrics()["nonfinite_step"] is None


def test_predictions_are_of_the_running_mean(make_engine, make_config, images, targets):
    engine = make_engine(ema_decay=0.6, learning_rate=1e-2)
    expected = weights_of(engine)
    for _ in range(4):
        now = weights_of(train(engine, images, targets, 1))
        expected = {name: 0.6 * expected[name] + 0.4 * now[name] for name in now}
    logits = engine.predict(images)
    assert_same(weights_of(engine), now)
    twin = make_classifier(make_config())
    twin.eval()
    for weights, is_it in ((expected, True), (now, False)):
        put_weights(twin, weights)
        assert np.allclose(logits, call(twin, images), rtol=1e-3, atol=1e-5) is is_it


def test_a_running_mean_starts_from_the_weights_that_are_loaded(make_engine, images, targets, tmp_path):
    engine = spread_out(make_engine(ema_decay=0.9), tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(engine.predict(images), spread_out(make_engine(), tmp_path / "w").predict(images))
    assert train(engine, images, targets, 1).read_metrics()["nonfinite_step"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_the_batch(make_engine, images, targets, kind):
    options = KINDS[kind]
    engine = train(make_engine(**options), images, targets, 3)
    whole = engine.predict(images)
    assert whole.shape == (8, CLASSES)
    assert whole.dtype == np.float32
    parts = [engine.predict(images[rows]) for rows in (slice(0, 2), slice(2, 8))]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-6)
    # Predictions do not change the training.
    straight = train(make_engine(**options), images, targets, 4)
    assert_same(weights_of(train(engine, images, targets, 1)), weights_of(straight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_bit_for_bit(make_engine, images, targets, tmp_path, kind):
    options, sizes = {**KINDS[kind], "ema_decay": 0.9}, {"depth": 2, "scan_blocks": True}
    straight = train(make_engine("mae", sizes, **options), images, targets, 7)
    train(make_engine("mae", sizes, **options), images, targets, 4).save(tmp_path)
    resumed = make_engine("mae", sizes, **options)
    resumed.restore(tmp_path)
    assert resumed.step == 4
    train(resumed, images, targets, 3)
    assert_same(weights_of(resumed), weights_of(straight))
    assert resumed.read_metrics() == straight.read_metrics()
    np.testing.assert_array_equal(resumed.predict(images), straight.predict(images))
    assert resumed._train._cache_size() == 1


def test_another_training_is_not_taken_up(make_engine, tmp_path):
    make_engine(ema_decay=0.9).save(tmp_path)
    fewer_classes = make_engine(num_classes=4)
    for other, message in (
        (make_engine(), "directory: expected a training state, got "),
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
    assert {array.dtype for array in weights_of(engine).values()} == {np.dtype("float32")}
    assert engine.predict(images).dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device_and_reuses_its_memory(make_engine, images, targets, kind):
    engine = train(make_engine(**{**KINDS[kind], "ema_decay": 0.9}), images, targets, 2)
    before = jax.tree.leaves(engine._state)
    with jax.transfer_guard_device_to_host("disallow"):
        train(engine, images, targets, 2)
    assert all(array.is_deleted() for array in before)


# --- initial weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_it_starts_from_the_weights_of_a_method(make_config, make_engine, images, tmp_path, name):
    path = tmp_path / "weights.safetensors"
    method, expected = make_pair(make_config(name, init_seed=9), path, pool="cls", init_seed=TRAINING["seed"])
    engine = make_engine(name, weights=path, pool="cls")
    np.testing.assert_allclose(engine.predict(images), call(expected, images), rtol=1e-4, atol=1e-8)
    assert_same(weights_of(engine)["encoder.cls_token"], np.asarray(method.encoder.cls_token[...]))


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_without_a_file_it_starts_as_a_new_method(make_config, make_engine, name):
    weights = weights_of(make_engine(name, pool="cls"))
    expected = named_weights(METHODS[name](make_config(name)).encoder)
    for key, array in copy_table({f"encoder.{key}": array for key, array in expected.items()}, 2).items():
        assert key in {"encoder.mask_token", SHARED_TABLE} or (weights[key] == array).all(), key


def test_weights_of_another_model_are_refused(make_config, make_engine, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(METHODS["mae"](make_config(depth=3)), path)
    with pytest.raises(ValueError, match=r"^weights: depth: expected 1, got 3$"):
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
            lambda weights: weights.update({"encoder.norm.bias": np.zeros(9)}),
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
    before = named_weights(classifier)
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_pretrained(classifier, path)
    assert_same(named_weights(classifier), before)


def test_weights_of_a_classifier_go_there_and_back(make_config, make_engine, images, targets, tmp_path):
    engine = train(make_engine(**PROBE), images, targets, 3)
    engine.save(tmp_path)
    classifier = make_classifier(make_config(), protocol="linear", pool="cls")
    classifier.eval()
    load_weights(classifier, tmp_path / "weights.safetensors")
    np.testing.assert_allclose(engine.predict(images), call(classifier, images), rtol=1e-4, atol=1e-6)


def test_wrong_batches(make_engine, images, targets):
    engine = make_engine()
    with pytest.raises(TypeError, match=r"^targets: expected float32, got float64$"):
        engine.train_step(images, SAMPLE, targets.astype(np.float64))
    with pytest.raises(ValueError, match=r"^targets: expected shape \(8, 5\), got \(8, 4\)$"):
        engine.train_step(images, SAMPLE, targets[:, 1:])
    with pytest.raises(ValueError, match=r"^sample: expected shape \(8,\), got \(7,\)$"):
        engine.train_step(images, SAMPLE[1:], targets)
    with pytest.raises(TypeError, match=r"^images: expected uint8, got float32$"):
        engine.predict(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"^images: expected a batch that accumulate=3 divides, got 8$"):
        make_engine(accumulate=3).train_step(images, SAMPLE, targets)
    assert engine.step == 0
