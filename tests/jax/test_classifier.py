"""Classifiers: what they see, what learns and how fast, what a probe leaves alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import counter_noise
from prmim_core.training import learning_rate_at
from prmim_jax import Classifier, ClassifierEngine, create_method, load_weights, save_weights
from prmim_jax.classifier import BatchNorm
from prmim_jax.interop import named_variables

TRAINING = {"seed": 3, "total_steps": 8, "warmup_steps": 2, "learning_rate": 1e-3, "device": "cpu"}
SAMPLE = np.arange(8)
CLASSES = 5

FINETUNE = {"drop_path": 0.5, "layer_decay": 0.7, "ema_decay": 0.9, "clip_grad": 1.0}
PROBE = {"frozen": True, "norm": "batch", "pool": "cls", "optimizer": "lars", "learning_rate": 0.5, "weight_decay": 0.0}
KINDS = {"finetune": FINETUNE, "probe": PROBE}
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


@pytest.fixture
def sizes(tiny, tiny_simmim):
    return {"mae": tiny, "simmim": tiny_simmim}


@pytest.fixture
def make_method(sizes):
    def make(name="mae", **options):
        return create_method(name, **{**sizes[name], **options})

    return make


@pytest.fixture
def make_engine(sizes):
    def make(name="mae", method_options=None, **training):
        options = {"name": name, **sizes[name], **(method_options or {})}
        return ClassifierEngine(options, CLASSES, **{**TRAINING, **training})

    return make


@pytest.fixture
def images(make_images):
    return make_images(8, 16, 16, 3)


@pytest.fixture
def targets():
    """Soft ones, as mixup makes them."""
    return np.random.default_rng(1).dirichlet(np.ones(CLASSES), 8).astype(np.float32)


def train(engine, images, targets, steps):
    for _ in range(steps):
        engine.train_step(images, SAMPLE, targets)
    return engine


def numbers(module):
    return {name: np.array(variable[...]) for name, variable in named_variables(module).items()}


def weights_of(engine):
    return numbers(engine.module)


def learned(module):
    return {name for name, variable in named_variables(module).items() if isinstance(variable, nnx.Param)}


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def without_keys(name, array):
    """Leave out the bias of keys: its gradient is rounding error alone, which AdamW blows up to full steps."""
    return np.delete(array.reshape(3, -1), 1, axis=0) if name.endswith("qkv.bias") else array


def assert_close(weights, others, rtol, atol):
    for name, array in weights.items():
        ours, theirs = without_keys(name, array), without_keys(name, others[name])
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=name)


def spread_out(engine, path):
    """Give an engine weights away from their first values, which leave the encoder hardly any gradient."""
    module, rng = engine.module, np.random.default_rng(0)
    for variable in named_variables(module).values():
        if isinstance(variable, nnx.Param):
            variable.set_value(variable[...] + 0.1 * rng.normal(size=variable.shape).astype(np.float32))
    save_weights(module, path)
    engine.load_weights(path)
    return engine


def call(module, images, *noise):
    """Call a module, compiled, and leave it as it was."""
    graph, state = nnx.split(module)
    return np.asarray(jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, images, *noise))


def features(method, images, pool):
    graph, state = nnx.split(method)
    return np.asarray(jax.jit(lambda state, images: nnx.merge(graph, state).features(images, pool))(state, images))


# --- the module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "simmim"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"frozen": True, "norm": "batch"}], ids=str)
def test_what_the_head_sees(make_method, images, name, pool, options):
    method = make_method(name)
    classifier = Classifier(method, CLASSES, pool=pool, **options)
    classifier.eval()
    logits = call(classifier, images)
    assert logits.shape == (8, CLASSES)
    assert logits.dtype == np.float32
    if "norm" in options:
        seen = features(method, images, pool) / np.sqrt(1 + 1e-6)
    elif pool == "cls":
        seen = features(method, images, pool)
    else:
        method.encoder.norm = classifier.encoder.norm  # none
        seen = features(method, images, pool)
        seen = (seen - seen.mean(1, keepdims=True)) / np.sqrt(seen.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(logits, seen @ np.asarray(classifier.head.weight[...]).T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_names_are_those_of_a_vision_transformer(make_method, name):
    method = make_method(name)
    names = {f"encoder.{key}" for key in named_variables(method.encoder)} - {"encoder.mask_token"}
    own_norm, head = {"encoder.norm.weight", "encoder.norm.bias"}, {"head.weight", "head.bias"}
    assert set(numbers(Classifier(method, 2))) == (names - own_norm) | head | {"fc_norm.weight", "fc_norm.bias"}
    assert set(numbers(Classifier(method, 2, pool="cls"))) == names | head
    statistics = {f"fc_norm.{name}" for name in STATISTICS}
    assert set(numbers(Classifier(method, 2, frozen=True, norm="batch"))) == names | head | statistics


@pytest.mark.parametrize(("frozen", "std"), [(False, 2e-5), (True, 0.01)])
def test_the_head_starts_small_and_by_its_seed(make_method, frozen, std):
    heads = [Classifier(make_method(), 400, frozen=frozen, init_seed=seed).head for seed in (1, 1, 2)]
    one, same, other = (np.asarray(head.weight[...]) for head in heads)
    assert one.std() == pytest.approx(std, rel=0.05)
    assert not heads[0].bias[...].any()
    assert (one == same).all()
    assert (one != other).any()


def test_the_method_stays_as_it_is(make_method):
    method = make_method("simmim")
    before, types = numbers(method), {name: type(variable) for name, variable in named_variables(method).items()}
    for frozen in (False, True):
        classifier = Classifier(method, CLASSES, frozen=frozen)
        for variable in named_variables(classifier).values():
            variable.set_value(variable[...] + 1)
    assert_same(numbers(method), before)
    assert {name: type(variable) for name, variable in named_variables(method).items()} == types


@pytest.mark.parametrize(
    ("name", "table"), [("mae", "pos_embed"), ("simmim", "rel_pos_bias.relative_position_bias_table")]
)
def test_position_tables_learn_and_are_not_decayed(make_method, name, table):
    classifier = Classifier(make_method(name), CLASSES)
    assert f"encoder.{table}" in learned(classifier) == set(numbers(classifier))
    assert {f"encoder.{table}", "encoder.cls_token"} <= classifier.not_decayed()
    assert learned(Classifier(make_method(name), 2, frozen=True, norm="batch")) == {"head.weight", "head.bias"}


def test_branches_are_dropped_by_the_noise_and_in_training_alone(make_method, images):
    noise = [counter_noise(0, step, jnp.arange(8), 16) for step in (0, 1)]
    classifier = Classifier(make_method(depth=2), CLASSES, drop_path=0.9)
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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pool": "max"}, ValueError, "pool: expected 'mean' or 'cls', got 'max'"),
        ({"norm": "batch"}, ValueError, "norm: expected 'layer' for an encoder that is not frozen, got 'batch'"),
        ({"init_seed": 0.5}, TypeError, "init_seed: expected an integer, got 0.5"),
    ],
)
def test_wrong_options_of_a_classifier(make_method, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Classifier(make_method(), 2, **options)


# --- its training --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_frozen_encoder_stays_as_it_is(make_engine, images, targets, norm, scan):
    engine = make_engine("mae", {"scan_blocks": scan}, frozen=True, norm=norm)
    before = weights_of(engine)
    train(engine, images, targets, 3)
    engine.predict(images)
    after = weights_of(engine)
    norms = {"layer": {"weight", "bias"}, "batch": STATISTICS}[norm]
    changed = {name for name in after if (after[name] != before[name]).any()}
    assert changed == {"head.weight", "head.bias", *(f"fc_norm.{name}" for name in norms)}
    assert engine.num_parameters == 17 * CLASSES + (32 if norm == "layer" else 0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_follow_the_batches(make_engine, make_method, images, targets, accumulate):
    engine = train(make_engine(**{**PROBE, "accumulate": accumulate}), images, targets, 2)
    seen = features(make_method(init_seed=TRAINING["seed"]), images, "cls")
    after = weights_of(engine)
    parts = np.split(seen, accumulate)
    expected = {"mean": np.mean([p.mean(0) for p in parts], 0), "var": np.mean([p.var(0, ddof=1) for p in parts], 0)}
    for name, values in expected.items():  # the same in both steps
        np.testing.assert_allclose(after[f"fc_norm.running_{name}"], values, rtol=1e-3, atol=1e-5)


def test_a_short_probe_predicts_what_it_has_learned(make_engine, images):
    """The running statistics are not those with which a batch norm starts."""
    hard = np.eye(CLASSES, dtype=np.float32)[np.arange(8) % CLASSES]
    engine = train(make_engine(**{**PROBE, "optimizer": "adamw", "learning_rate": 0.3}), images, hard, 8)
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
    """The first step of AdamW is as long as the learning rate, whatever the gradient."""
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


def test_scanned_blocks_take_the_same_steps(make_engine, images, targets, tmp_path):
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


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_lars_is_what_it_says(make_engine, make_method, images, targets, norm):
    """Against the update written out in float64, on a head whose gradient is written out too."""
    training = {**PROBE, "norm": norm, "weight_decay": 0.1, "trust": 0.02, "momentum": 0.8}
    engine = make_engine(**training)
    seen = features(make_method(init_seed=3), images, "cls").astype(np.float64)
    if norm == "batch":
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
        rate = learning_rate_at(step, 8, 2, 0.5, 0.0)
        weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    after = weights_of(train(engine, images, targets, 6))
    np.testing.assert_allclose(after["head.weight"], weight, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(after["head.bias"], bias, rtol=1e-3, atol=1e-6)


def test_lars_takes_weights_of_zero(make_engine, images, targets, tmp_path):
    """There is nothing to be relative to."""
    engine = make_engine(**PROBE)
    module = engine.module
    module.head.weight.set_value(jnp.zeros_like(module.head.weight[...]))
    save_weights(module, tmp_path / "weights.safetensors")
    engine.load_weights(tmp_path / "weights.safetensors")
    train(engine, images, targets, 2)
    assert weights_of(engine)["head.weight"].any()
    assert engine.read_metrics()["nonfinite_step"] is None


def test_predictions_are_of_the_running_mean(make_engine, make_method, images, targets):
    engine = make_engine(ema_decay=0.6, learning_rate=1e-2)
    expected = weights_of(engine)
    for _ in range(4):
        now = weights_of(train(engine, images, targets, 1))
        expected = {name: 0.6 * expected[name] + 0.4 * now[name] for name in now}
    logits = engine.predict(images)
    assert_same(weights_of(engine), now)
    twin = Classifier(make_method(), CLASSES)
    twin.eval()
    for weights, is_it in ((expected, True), (now, False)):
        for name, variable in named_variables(twin).items():
            variable.set_value(jnp.asarray(weights[name]))
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
    # And looking leaves the training as it was.
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


def test_another_training_is_not_taken_up(make_engine, sizes, tmp_path):
    make_engine(ema_decay=0.9).save(tmp_path)
    fewer_classes = ClassifierEngine({"name": "mae", **sizes["mae"]}, 4, **TRAINING)
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


# --- where it starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_it_starts_from_the_weights_of_a_method(make_method, make_engine, images, tmp_path, name):
    method = make_method(name, init_seed=9)
    save_weights(method, tmp_path / "weights.safetensors")
    engine = make_engine(name, weights=tmp_path / "weights.safetensors", pool="cls")
    expected = Classifier(method, CLASSES, pool="cls", init_seed=TRAINING["seed"])
    expected.eval()
    np.testing.assert_allclose(engine.predict(images), call(expected, images), rtol=1e-4, atol=1e-8)
    assert_same(weights_of(engine)["encoder.cls_token"], np.asarray(method.encoder.cls_token[...]))


def test_weights_of_another_model_are_refused(make_method, make_engine, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(make_method(decoder_depth=2), path)
    with pytest.raises(ValueError, match=r"^weights: decoder_depth: expected 1, got 2$"):
        make_engine(weights=path)
    save_weights(make_method("simmim"), path)
    with pytest.raises(ValueError, match=r"^weights: method: expected 'mae', got 'simmim'$"):
        make_engine(weights=path)
    save_weights(Classifier(make_method(), 2), path)
    with pytest.raises(ValueError, match=r"^weights: method: expected 'mae', got None$"):
        make_engine(weights=path)
    with pytest.raises(FileNotFoundError):
        make_engine(weights=tmp_path / "missing.safetensors")
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"^path: expected a safetensors file, got "):
        make_engine(weights=path)


def test_weights_of_a_classifier_go_there_and_back(make_method, make_engine, images, targets, tmp_path):
    engine = train(make_engine(**PROBE), images, targets, 3)
    engine.save(tmp_path)
    classifier = Classifier(make_method(), CLASSES, frozen=True, norm="batch", pool="cls")
    classifier.eval()
    load_weights(classifier, tmp_path / "weights.safetensors")
    np.testing.assert_allclose(engine.predict(images), call(classifier, images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pool": "max"}, ValueError, "pool: expected 'mean' or 'cls', got 'max'"),
        ({"norm": "batch"}, ValueError, "norm: expected 'layer' for an encoder that is not frozen, got 'batch'"),
        ({"frozen": "yes"}, TypeError, "frozen: expected True or False, got 'yes'"),
        ({"drop_path": -0.1}, ValueError, "drop_path: expected a number in [0, 1), got -0.1"),
        ({"optimizer": "sgd"}, ValueError, "optimizer: expected 'adamw' or 'lars', got 'sgd'"),
        (
            {"optimizer": "lars"},
            ValueError,
            "optimizer: expected 'adamw' for an encoder that is not frozen, got 'lars'",
        ),
        ({"layer_decay": 2.0}, ValueError, "layer_decay: expected a number in (0, 1], got 2.0"),
        ({"momentum": -1.0}, ValueError, "momentum: expected a number in [0, 1), got -1.0"),
        ({"trust": -1.0}, ValueError, "trust: expected a positive number, got -1.0"),
        ({"ema_decay": 0.0}, ValueError, "ema_decay: expected a number in (0, 1) or None, got 0.0"),
        ({"seed": -1}, ValueError, "seed: expected an integer in [0, 2**32), got -1"),
        ({"clip_grad": 0.0}, ValueError, "clip_grad: expected a positive number or None, got 0.0"),
        ({"parallel": "both", "frozen": True}, ValueError, "parallel: expected 'ddp' or 'fsdp', got 'both'"),
        ({"precision": "float16"}, ValueError, "precision: expected 'float32' or 'bfloat16', got 'float16'"),
    ],
    ids=str,
)
def test_wrong_options(sizes, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ClassifierEngine({"name": "mae", **sizes["mae"]}, CLASSES, **{**TRAINING, **options})


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
