"""The engine: steps, guards, checkpoints."""

import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prmim_core import counter_noise, make_plan, patchify
from prmim_jax import MAE, METHODS, Engine, create_method, interop, trainer
from prmim_jax.interop import named_variables, named_weights
from prmim_jax.trainer import decay_mask
from prmim_methods import TrainingConfig, create_config
from prmim_methods.sizes import Transformer

TRAINING = {
    "seed": 3,
    "total_steps": 8,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "device": "cpu",
}
SAMPLE = np.arange(8)


# Methods whose steps are tested alike.
KINDS = {
    "mae": {},
    "scan": {"depth": 3, "scan_blocks": True},
    "simmim": {"name": "simmim", "drop_path": 0.5, "scan_blocks": True},
}


@pytest.fixture
def make_engine(tiny, tiny_simmim):
    def make(method_options=None, **training):
        options = {"name": "mae", **(method_options or {})}
        sizes = {"mae": tiny, "simmim": tiny_simmim}[options["name"]]
        return Engine(create_config(**{**sizes, **options}), TrainingConfig(**{**TRAINING, **training}))

    return make


@pytest.fixture
def images(make_images):
    return make_images(8, 16, 16, 3)


def train(engine, images, steps):
    for _ in range(steps):
        engine.train_step(images, SAMPLE)
    return engine


def weights_of(engine):
    return named_weights(engine.method)


def moments_of(engine):
    return jax.tree.map(np.array, engine._saved_state())


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_nothing_is_compiled_again(make_engine, images, monkeypatch, kind):
    images = images // 16 + np.linspace(0, 239, 16, dtype=np.uint8)[:, None]  # a ramp and some noise
    traced = []
    method = METHODS[KINDS[kind].get("name", "mae")]
    call = method.__call__
    monkeypatch.setattr(method, "__call__", lambda self, *inputs: traced.append(1) or call(self, *inputs))
    engine = make_engine(KINDS[kind], total_steps=60, learning_rate=1e-2, clip_grad=1.0)
    train(engine, images, 1)
    assert len(traced) == 1
    train(engine, images, 4)
    first = engine.read_metrics()
    train(engine, images, 50)
    engine.read_metrics()
    train(engine, images, 5)
    last = engine.read_metrics()
    assert last["loss"] < 0.6 * first["loss"]
    assert engine.step == 60
    assert len(traced) == 1
    assert engine._train._cache_size() == 1


@pytest.mark.parametrize("options", [{"reconstruction": "conv"}, KINDS["simmim"]], ids=["mae", "simmim-scan"])
def test_bfloat16_trains_float32_weights(make_engine, images, options):
    engine = train(make_engine(options, precision="bfloat16", compile=False), images, 3)
    metrics = engine.read_metrics()
    assert metrics["nonfinite_step"] is None
    assert 0 < metrics["loss"] < 10
    assert {array.dtype for array in weights_of(engine).values()} == {np.dtype("float32")}


@pytest.mark.parametrize("kind", ["mae", "simmim"])
def test_parts_of_a_batch_add_up_to_it(make_engine, assert_close, images, kind):
    whole = train(make_engine(KINDS[kind], clip_grad=1.0), images, 4)
    parts = train(make_engine(KINDS[kind], clip_grad=1.0, accumulate=4), images, 4)
    measured, expected = parts.read_metrics(), whole.read_metrics()
    for name in ("loss", "loss_decoded", "loss_thrown", "grad_norm"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-4)
    assert_close(weights_of(parts), weights_of(whole), rtol=1e-3, atol=1e-5)


def test_the_engine_follows_the_decay_it_is_given(make_engine, images):
    engine = make_engine(decay="step")
    engine._train = lambda state, *inputs: state  # nothing is compiled: the rates are what is looked at
    rates = [train(engine, images, 1).read_metrics()["learning_rate"] for _ in range(8)]
    assert rates == [0.0, 0.0005, *[0.001] * 5, pytest.approx(0.0001)]


def test_metrics_are_means_since_the_last_reading(make_engine, images):
    step_by_step, at_once = make_engine(clip_grad=1.0), make_engine(clip_grad=1.0)
    readings = [train(step_by_step, images, 1).read_metrics() for _ in range(3)]
    means = train(at_once, images, 3).read_metrics()
    for name in ("loss", "loss_decoded", "loss_thrown", "grad_norm"):
        assert means[name] == pytest.approx(np.mean([reading[name] for reading in readings]), rel=1e-6)
    assert [reading["learning_rate"] for reading in readings] == [0.0, 0.0005, 0.001]
    assert np.isnan(at_once.read_metrics()["loss"])


def test_decay_spares_biases_norms_and_the_reconstruction(tiny):
    mask = decay_mask(create_method("mae", **tiny))
    decayed = {name for name, is_decayed in mask.items() if is_decayed}
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} < decayed
    assert not {"reconstruct.table", "encoder.norm.weight", "decoder.pred.bias"} & decayed
    assert all(name.endswith(("weight", "token")) and "norm" not in name for name in decayed)
    assert not decay_mask(create_method("mae", **tiny, reconstruction="conv"))["reconstruct.kernel"]


def test_decay_spares_what_the_recipe_spares(tiny_simmim):
    mask = decay_mask(create_method("simmim", **tiny_simmim))
    decayed = {name for name, is_decayed in mask.items() if is_decayed}
    assert {"encoder.mask_token", "encoder.rel_pos_bias.relative_position_bias_table", "head.weight"} < decayed
    spared = {
        "encoder.cls_token",
        "encoder.blocks.ls1.gamma",
        "encoder.blocks.norm1.weight",
        "reconstruct.table",
        "head.bias",
    }
    assert not spared & decayed
    assert spared < set(mask)


def test_decay_spares_the_same_of_a_wrapped_method(tiny_simmim):
    method = create_method("simmim", **tiny_simmim)
    wrapped = decay_mask(nnx.Dict({"method": method}))
    assert wrapped == {f"method.{name}": is_decayed for name, is_decayed in decay_mask(method).items()}


def test_scanned_blocks_take_the_same_steps(make_engine, assert_close, images, tmp_path):
    """With decay and clipping; and each continues what the other saved."""
    training = {"clip_grad": 1.0, "weight_decay": 1.0, "learning_rate": 1e-2}
    loop, scan = (make_engine({"depth": 3, "scan_blocks": scan}, **training) for scan in (False, True))
    assert loop.num_parameters == scan.num_parameters
    assert_same(weights_of(loop), weights_of(scan))
    assert_close(weights_of(train(scan, images, 4)), weights_of(train(loop, images, 4)), rtol=1e-3, atol=1e-5)
    for folder, giver, taker in (("a", loop, scan), ("b", scan, loop)):
        (tmp_path / folder).mkdir()
        giver.save(tmp_path / folder)
        taker.restore(tmp_path / folder)
        assert_same(weights_of(taker), weights_of(giver))
        assert_same(moments_of(taker), moments_of(giver))
        train(taker, images, 1)
        assert taker._train._cache_size() == 1


def test_branches_are_dropped_in_training_steps_alone(make_engine, images):
    """By the noise, so that equal steps drop equal branches."""
    options = {"name": "simmim", "drop_path": 0.9}
    engine, never = make_engine(options), make_engine({**options, "drop_path": 0.0})
    pictures, others = engine.reconstruct(images, SAMPLE), never.reconstruct(images, SAMPLE)
    np.testing.assert_array_equal(pictures.patches, others.patches)
    losses = [train(trained, images, 1).read_metrics()["loss"] for trained in (engine, never, make_engine(options))]
    assert losses[0] == losses[2] != losses[1]


@jax.custom_vjp
def poisoned(loss, factor):
    """Return the loss; its gradient times a factor."""
    return loss


poisoned.defvjp(lambda loss, factor: (loss, factor), lambda factor, gradient: (gradient * factor, None))


def test_a_step_that_is_not_finite_changes_nothing(make_engine, images, monkeypatch, tmp_path):
    call = MAE.__call__

    def call_spoilt(self, images, noise):
        output = call(self, images, noise)
        output.loss = jnp.where(images.max() == 0, jnp.nan, output.loss)
        # 1e30 is finite, but its square is not.
        output.loss = poisoned(output.loss, jnp.where(images.min() == 255, 1e30, 1.0))
        return output

    monkeypatch.setattr(MAE, "__call__", call_spoilt)
    engine = train(make_engine(clip_grad=0.1), images, 3)
    engine.read_metrics()
    weights, before = weights_of(engine), moments_of(engine)
    for value in (0, 255):  # a loss, and a gradient, that is not finite
        train(engine, np.full_like(images, value), 1)
        assert_same(weights_of(engine), weights)
    after = moments_of(engine)
    assert (after["step"], after["nonfinite_step"]) == (5, 4)
    assert after["skipped"].tolist() == [2, 2]
    for name in ("count", "mu", "nu", "sums"):
        assert_same(after[name], before[name])

    train(engine, images, 1)
    metrics = engine.read_metrics()
    assert metrics["nonfinite_step"] == 4
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (2, 0)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert engine.step == 6
    assert (weights_of(engine)["encoder.norm.bias"] != weights["encoder.norm.bias"]).any()
    assert engine.read_metrics()["nonfinite_step"] == 4

    # A row goes on over readings, and over a resume.
    train(engine, np.full_like(images, 0), 2)
    assert engine.read_metrics()["skipped_in_a_row"] == 2
    engine.save(tmp_path)
    engine.restore(tmp_path)
    metrics = train(engine, np.full_like(images, 0), 1).read_metrics()
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 3)


@pytest.mark.parametrize("kind", ["mae", "scan"])
def test_a_step_never_waits_for_the_device_and_reuses_its_memory(make_engine, images, kind):
    engine = train(make_engine(KINDS[kind], clip_grad=1.0), images, 2)
    before = jax.tree.leaves(engine._state)
    with jax.transfer_guard_device_to_host("disallow"), jax.log_compiles(True):
        train(engine, images, 2)
    assert all(array.is_deleted() for array in before)
    # The compiler promises to write every output over its input.
    batch = engine._inputs(images, SAMPLE)
    compiled = engine._train.lower(engine._state, engine._buffers, batch, 0, 0.0).compile()
    aliases = compiled.as_text().partition("input_output_alias={")[2].partition("\n")[0]
    assert aliases.count("may-alias") + aliases.count("must-alias") == len(before)


def test_a_batch_may_be_changed_after_the_call(make_engine, images):
    kept, changed = make_engine(clip_grad=1.0), make_engine(clip_grad=1.0)
    train(kept, images, 3)
    # Memory that JAX would read in place: aligned to 64 bytes.
    memory = np.zeros(images.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    batch = memory[start : start + images.nbytes].reshape(images.shape)
    for _ in range(3):
        batch[:] = images
        changed.train_step(batch, SAMPLE)
        batch[:] = 0
    assert changed.read_metrics() == kept.read_metrics()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_bit_for_bit(make_engine, images, tmp_path, kind):
    straight = train(make_engine(KINDS[kind], clip_grad=1.0), images, 7)
    broken = train(make_engine(KINDS[kind], clip_grad=1.0), images, 4)
    (tmp_path / "partial").mkdir()
    broken.save(tmp_path / "partial")
    (tmp_path / "partial").rename(tmp_path / "whole")
    resumed = make_engine(KINDS[kind], clip_grad=1.0)
    resumed.restore(tmp_path / "whole")
    assert resumed.step == 4
    train(resumed, images, 3)
    assert_same(weights_of(resumed), weights_of(straight))
    assert resumed.read_metrics() == straight.read_metrics()
    assert resumed._train._cache_size() == 1


def test_a_new_engine_can_be_saved_and_restored(make_engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time over the first
        make_engine().save(".")
    engine = make_engine()
    engine.restore(".")
    assert engine.step == 0
    assert_same(weights_of(engine), weights_of(make_engine()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_state", "weights.safetensors"]


def test_training_goes_on_while_the_state_of_then_is_written(make_engine, images, tmp_path, monkeypatch):
    (tmp_path / "then").mkdir()
    (tmp_path / "meanwhile").mkdir()
    engine = train(make_engine(), images, 2)
    engine.save(tmp_path / "then")
    write, may_write = interop.write_weights, threading.Event()

    def write_late(*arguments):
        assert may_write.wait(30)
        return write(*arguments)

    monkeypatch.setattr("prmim_jax.trainer.write_weights", write_late)
    saving = engine.async_save(tmp_path / "meanwhile")
    train(engine, images, 3)
    assert not saving.done()
    may_write.set()
    saving.result()
    then, meanwhile = (make_engine({"init_seed": number}) for number in (4, 5))
    then.restore(tmp_path / "then")
    meanwhile.restore(tmp_path / "meanwhile")
    assert_same(weights_of(meanwhile), weights_of(then))
    assert meanwhile.read_metrics() == then.read_metrics()
    assert (weights_of(engine)["encoder.norm.bias"] != weights_of(then)["encoder.norm.bias"]).any()


def test_what_fails_in_the_background_is_said_when_it_is_asked_for(make_engine, tmp_path, monkeypatch):
    def fail(weights, metadata, path):
        raise OSError(28, "No space left on device")

    engine = make_engine()
    engine.async_save(tmp_path)
    monkeypatch.setattr("prmim_jax.trainer.write_weights", fail)
    saving = engine.async_save(tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        saving.result()


def test_nothing_is_saved_where_no_folder_is(make_engine, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^directory: expected an existing folder, got .*missing$"):
        make_engine().async_save(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_is_refused(make_engine, tmp_path):
    make_engine().save(tmp_path)
    other = make_engine({"decoder_depth": 2})
    before = weights_of(other)
    for refuse, place in ((other.restore, tmp_path), (other.load_weights, tmp_path / "weights.safetensors")):
        with pytest.raises(ValueError, match=r"^weights: decoder_depth: expected 2, got 1$"):
            refuse(place)
    assert_same(weights_of(other), before)


def test_a_damaged_training_state_is_refused(make_engine, tmp_path):
    engine = make_engine()
    engine.save(tmp_path)
    other = make_engine({"init_seed": 4})
    state = tmp_path / "training_state"
    whole = engine._saved_state()
    for name, array in (("count", np.zeros(2, np.int32)), ("step", None)):
        spoiled = {**whole, name: array}
        if array is None:
            del spoiled[name]
        engine._saved_state = lambda spoiled=spoiled: spoiled
        engine.save(tmp_path)
        with pytest.raises(ValueError, match=r"^directory: expected a training state"):
            other.restore(tmp_path)
    for file in state.rglob("*"):
        if file.is_file():
            file.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"^directory: expected a training state, got .*training_state, which is"):
        other.restore(tmp_path)
    shutil.rmtree(state)
    with pytest.raises(FileNotFoundError):
        other.restore(tmp_path)
    assert other.step == 0
    other.load_weights(tmp_path / "weights.safetensors")
    assert_same(weights_of(other), weights_of(engine))


def test_only_the_seed_of_the_weights_decides_on_the_weights(make_engine):
    assert_same(weights_of(make_engine(seed=1)), weights_of(make_engine(seed=2)))
    one, other = (make_engine({"init_seed": seed}).method.encoder.cls_token[...] for seed in (1, 2))
    assert (one != other).any()


def test_features_and_pictures(make_engine, images):
    engine = make_engine()
    features = engine.features(images)
    assert features.shape == (8, 16)
    assert features.dtype == np.float32
    reconstruction = engine.reconstruct(images, SAMPLE)
    schedule = engine.method.config.schedule
    assert reconstruction.schedule == schedule
    expected = make_plan(schedule, counter_noise(3, 0, SAMPLE, 16))
    np.testing.assert_array_equal(reconstruction.order, expected.order)
    truth = patchify(images, (4, 4)) / 255
    assert reconstruction.patches.shape == truth.shape
    assert reconstruction.patches.dtype == np.float32
    for image in range(8):
        is_close = np.isclose(reconstruction.patches[image], truth[image], atol=1e-6).all(-1)
        assert sorted(np.flatnonzero(is_close)) == sorted(expected.visible[image])
    assert np.isfinite(reconstruction.patches).all()
    assert np.isnan(make_engine({"reconstruction": "none"}).reconstruct(images, SAMPLE).patches).mean() == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_rebuilt_and_not_compared(make_engine, images, kind):
    engine = make_engine(KINDS[kind])
    with pytest.raises(TypeError, match=r"^method: expected one that predicts features, got one that predicts pixels$"):
        engine.compare(images, SAMPLE)
    patches = engine.reconstruct(images, SAMPLE).patches
    assert patches.shape == (8, 16, 48)
    assert np.isfinite(patches).all()


def test_it_says_what_it_is(make_engine):
    engine = make_engine(device="auto")
    assert engine.device.startswith(("cpu", "cuda"))
    learned = [v for v in named_variables(engine.method).values() if isinstance(v, nnx.Param)]
    assert engine.num_parameters == sum(variable.size for variable in learned)


def test_a_missing_device_is_named(make_engine):
    for device in ("cuda", "cpu:99"):
        if device == "cuda" and jax.default_backend() == "gpu":
            continue
        with pytest.raises(
            ValueError, match=rf"^device: expected an available device, got '{device}', but JAX finds no"
        ):
            make_engine(device=device)


def test_wrong_batches(make_engine, images):
    with pytest.raises(ValueError, match=r"^images: expected a batch that accumulate=3 divides, got 8$"):
        make_engine(accumulate=3).train_step(images, SAMPLE)
    with pytest.raises(ValueError, match=r"^images: expected at least one image, got an empty batch$"):
        make_engine().train_step(images[:0], SAMPLE[:0])
    engine = make_engine()
    with pytest.raises(ValueError, match=r"^sample: expected shape \(8,\), got \(7,\)$"):
        engine.train_step(images, SAMPLE[1:])
    with pytest.raises(TypeError, match=r"^sample: expected integers, got float64$"):
        engine.train_step(images, SAMPLE / 2)
    for wrong in (2**32, -1):
        with pytest.raises(ValueError, match=rf"^sample: expected integers in \[0, 2\*\*32\), got {wrong}$"):
            engine.train_step(images, np.where(SAMPLE == 3, wrong, SAMPLE))
    with pytest.raises(TypeError, match=r"^images: expected uint8, got float32$"):
        engine.train_step(images.astype(np.float32), SAMPLE)
    assert engine.step == 0


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, ("float32", "auto: XLA is slower in bfloat16 on CPUs")),
        ("gpu", "8.0", ("bfloat16", "auto: compute capability 8.0")),
        ("gpu", "7.5", ("float32", "auto: compute capability 7.5 is below 8.0")),
        ("gpu", "gfx90a", ("float32", "auto: the compute capability is unknown")),
        ("tpu", None, ("bfloat16", "auto: a TPU multiplies in bfloat16")),
    ],
)
def test_the_precision_follows_the_device(platform, capability, expected):
    device = SimpleNamespace(platform=platform, **({} if capability is None else {"compute_capability": capability}))
    assert trainer.precision_on("auto", device) == expected


def test_the_slowdown_of_bfloat16_is_measured_on_a_cpu(make_engine):
    size = Transformer(dim=8, depth=1, heads=2)
    assert make_engine(precision="auto").measure_slowdown(size) is None
    assert make_engine(precision="bfloat16").measure_slowdown(size) > 0
