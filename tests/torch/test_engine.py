"""The engine: steps, schedules, guards, checkpoints."""

import functools
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from prmim_core import counter_noise, make_plan, patchify
from prmim_methods import TrainingConfig, create_config
from prmim_torch import Engine, create_method
from prmim_torch.trainer import parameter_groups
from tests.torch.reading import NoReading, assert_no_reading

TRAINING = {"seed": 3, "total_steps": 8, "warmup_steps": 2, "learning_rate": 1e-3, "precision": "float32"}
INIT_SEED = 3
SAMPLE = np.arange(8)


@pytest.fixture
def make_engine(tiny, device):
    def make(method_options=None, **training):
        config = create_config("mae", **{**tiny, "init_seed": INIT_SEED, **(method_options or {})})
        return Engine(config, TrainingConfig(**{**TRAINING, "device": device.type, **training}))

    return make


@pytest.fixture
def images(make_images):
    return make_images(8, 16, 16, 3)


def train(engine, images, steps):
    for _ in range(steps):
        engine.train_step(images, SAMPLE)
    return engine


def weights_of(engine):
    return {name: tensor.detach().cpu().clone() for name, tensor in engine.method.state_dict().items()}


def assert_close(weights, others, rtol, atol):
    for name, tensor in weights.items():
        if name.endswith("qkv.bias"):
            # The softmax ignores a bias of the keys, so its gradient is rounding error, which AdamW turns into full
            # steps.
            query, _, value = tensor.chunk(3)
            tensor = torch.cat([query, value])
            other = torch.cat(others[name].chunk(3)[::2])
        else:
            other = others[name]
        torch.testing.assert_close(tensor, other, rtol=rtol, atol=atol, msg=name)


def assert_same(weights, others):
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def test_the_loss_falls(make_engine, images):
    images = images // 16 + np.linspace(0, 239, 16, dtype=np.uint8)[:, None]  # a ramp and some noise
    engine = make_engine(total_steps=60, learning_rate=1e-2)
    train(engine, images, 5)
    first = engine.read_metrics()
    train(engine, images, 50)
    engine.read_metrics()
    train(engine, images, 5)
    last = engine.read_metrics()
    assert last["loss"] < 0.5 * first["loss"]
    assert engine.step == 60


@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv", "none"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_variant_trains(make_engine, images, reconstruction, precision):
    engine = train(make_engine({"reconstruction": reconstruction}, precision=precision), images, 3)
    metrics = engine.read_metrics()
    assert metrics["nonfinite_step"] is None
    assert 0 < metrics["loss"] < 10
    assert {parameter.dtype for parameter in engine.method.parameters()} == {torch.float32}


def test_steps_are_those_of_a_plain_loop(tiny, images):
    clip, weight_decay = 0.5, 0.1
    training = TrainingConfig(**TRAINING, clip_grad=clip, weight_decay=weight_decay, device="cpu")
    engine = Engine(create_config("mae", **tiny), training)
    method = create_method("mae", **tiny)
    optimizer = torch.optim.AdamW(parameter_groups(method, weight_decay), betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(5):
        engine.train_step(images, SAMPLE)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        output = method(torch.from_numpy(images), counter_noise(3, step, torch.from_numpy(SAMPLE), 16))
        optimizer.zero_grad()
        output.loss.backward()
        losses.append(output.loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(method.parameters(), clip).item())
        optimizer.step()
    metrics = engine.read_metrics()
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert min(norms) > clip  # else nothing is clipped
    assert_close(weights_of(engine), method.state_dict(), rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_add_up_to_it(make_engine, images):
    whole = train(make_engine(), images, 4)
    parts = train(make_engine(accumulate=4), images, 4)
    measured, expected = parts.read_metrics(), whole.read_metrics()
    for name in ("loss", "loss_decoded", "loss_thrown", "grad_norm"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-4)
    assert_close(weights_of(parts), weights_of(whole), rtol=1e-3, atol=1e-5)


def test_metrics_are_means_since_the_last_reading(make_engine, images):
    step_by_step, at_once = make_engine(), make_engine()
    readings = [train(step_by_step, images, 1).read_metrics() for _ in range(3)]
    means = train(at_once, images, 3).read_metrics()
    for name in ("loss", "loss_decoded", "loss_thrown", "grad_norm"):
        assert means[name] == pytest.approx(np.mean([reading[name] for reading in readings]), rel=1e-6)
    assert [reading["learning_rate"] for reading in readings] == [0.0, 0.0005, 0.001]
    assert np.isnan(at_once.read_metrics()["loss"])


def test_decay_spares_biases_norms_and_the_reconstruction(tiny):
    method = create_method("mae", **tiny)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in parameter_groups(method, 0.05))
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} < decayed
    assert {"reconstruct.table", "encoder.norm.weight", "decoder.pred.bias"} < spared
    assert all(name.endswith(("weight", "token")) and "norm" not in name for name in decayed)
    assert len(decayed) + len(spared) == len(names)
    convolution = create_method("mae", **tiny, reconstruction="conv")
    assert id(convolution.reconstruct.kernel) in {id(p) for p in parameter_groups(convolution, 0.05)[1]["params"]}


def test_decay_spares_what_the_recipe_spares(tiny_simmim):
    method = create_method("simmim", **tiny_simmim)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in parameter_groups(method, 0.05))
    assert {"encoder.mask_token", "encoder.rel_pos_bias.relative_position_bias_table", "head.weight"} < decayed
    assert {"encoder.cls_token", "encoder.blocks.0.ls1.gamma", "reconstruct.table", "head.bias"} < spared


def state_file(directory):
    """Return the one file that a single process writes besides the weights."""
    (path,) = (directory / "training_state").iterdir()
    return path


def state_of(engine, directory):
    directory.mkdir()
    engine.save(directory)
    return load_file(state_file(directory))


@pytest.mark.parametrize("clip_grad", [None, 0.1])
@pytest.mark.parametrize("poison", ["loss", "gradient", "norm"])
def test_a_step_that_is_not_finite_changes_nothing(make_engine, images, tmp_path, poison, clip_grad):
    engine = train(make_engine(clip_grad=clip_grad), images, 3)
    engine.read_metrics()
    weights, state = weights_of(engine), state_of(engine, tmp_path / "before")

    def spoil(module, arguments, output):
        output.loss = output.loss * float("nan")

    if poison == "loss":
        handle = engine.method.register_forward_hook(spoil)
    else:  # 1e30 is finite, but its square is not
        factor = float("inf") if poison == "gradient" else 1e30
        handle = engine.method.encoder.norm.bias.register_hook(lambda gradient: gradient * factor)
    engine.train_step(images, SAMPLE)
    engine.train_step(images, SAMPLE)
    handle.remove()
    assert_same(weights_of(engine), weights)
    after = state_of(engine, tmp_path / "after")
    assert {name for name in state if not torch.equal(after[name], state[name])} == {
        "step",
        "nonfinite_step",
        "skipped",
    }
    assert after["skipped"].tolist() == [2, 2]
    assert [after[name].item() for name in ("step", "updates", "nonfinite_step")] == [5, 3, 4]

    engine.train_step(images, SAMPLE)
    metrics = engine.read_metrics()
    assert (metrics["nonfinite_step"], metrics["skipped"], metrics["skipped_in_a_row"]) == (4, 2, 0)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert engine.step == 6
    assert not torch.equal(weights_of(engine)["encoder.norm.bias"], weights["encoder.norm.bias"])
    metrics = engine.read_metrics()
    assert (metrics["nonfinite_step"], metrics["skipped"], metrics["skipped_in_a_row"]) == (4, 0, 0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_never_waits_for_the_device(make_engine, images, device):
    engine = train(make_engine(clip_grad=1.0, accumulate=2), images, 2)
    assert_no_reading(lambda: train(engine, images, 2), device)
    with NoReading(), pytest.raises(AssertionError, match=r"_local_scalar_dense waits"):
        engine.read_metrics()


def test_a_resumed_run_goes_on_bit_for_bit(make_engine, images, tmp_path, device):
    if device.type == "cuda":
        pytest.skip("kernels need not be deterministic")
    straight = train(make_engine(clip_grad=1.0), images, 7)
    train(make_engine(clip_grad=1.0), images, 4).save(tmp_path)
    resumed = make_engine(clip_grad=1.0)
    resumed.restore(tmp_path)
    assert resumed.step == 4
    train(resumed, images, 3)
    assert_same(weights_of(resumed), weights_of(straight))
    assert resumed.read_metrics() == straight.read_metrics()


def test_a_resumed_run_goes_on(make_engine, images, tmp_path):
    straight = train(make_engine(precision="bfloat16"), images, 3)
    straight.save(tmp_path)
    resumed = make_engine(precision="bfloat16")
    resumed.restore(tmp_path)
    assert_same(weights_of(resumed), weights_of(straight))
    assert train(resumed, images, 1).read_metrics()["loss"] == pytest.approx(
        train(straight, images, 1).read_metrics()["loss"], rel=1e-3
    )


def test_options_of_the_resuming_engine_hold(make_engine, images, tmp_path):
    train(make_engine(weight_decay=0.05), images, 3).save(tmp_path)
    resumed = make_engine(weight_decay=0.3, betas=(0.8, 0.9))
    resumed.restore(tmp_path)
    group = resumed._optimizer.param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.3, (0.8, 0.9))


def test_a_new_engine_can_be_saved_and_restored(make_engine, images, tmp_path):
    make_engine().save(tmp_path)
    engine = make_engine()
    engine.restore(tmp_path)
    assert engine.step == 0
    assert_same(weights_of(train(engine, images, 2)), weights_of(train(make_engine(), images, 2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_state", "weights.safetensors"]
    assert state_file(tmp_path).suffix == ".safetensors"


def test_a_training_state_has_names(make_engine, images, tmp_path):
    engine = train(make_engine(), images, 2)
    state = state_of(engine, tmp_path / "state")
    names = [name for name, _ in engine.method.named_parameters()]
    moments = {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in names}
    assert set(state) == moments | {"step", "updates", "sums", "nonfinite_step", "skipped"}
    assert all(torch.any(state[name] != 0) for name in moments)
    assert state["step"] == state["updates"] == 2


def test_a_checkpoint_replaces_an_older_one(make_engine, images, tmp_path):
    engine = make_engine()
    for _ in range(2):
        train(engine, images, 1)
        engine.save(tmp_path)
    resumed = make_engine()
    resumed.restore(tmp_path)
    assert resumed.step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_state", "weights.safetensors"]


def test_a_training_state_that_cannot_be_written_is_an_error(make_engine, images, tmp_path, monkeypatch):
    engine = train(make_engine(), images, 1)
    engine.save(tmp_path)
    before = state_file(tmp_path).read_bytes()

    def fail(writer, plan, planner):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", fail)
    train(engine, images, 1)
    with pytest.raises(OSError, match="No space left on device"):
        engine.save(tmp_path)
    assert state_file(tmp_path).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_training_goes_on_while_the_state_of_then_is_written(make_engine, images, tmp_path, monkeypatch):
    (tmp_path / "then").mkdir()
    (tmp_path / "meanwhile").mkdir()
    engine = train(make_engine(), images, 2)
    engine.save(tmp_path / "then")
    write, may_write = HuggingFaceStorageWriter.write_data, threading.Event()

    def write_late(*arguments):
        assert may_write.wait(30)
        return write(*arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_late)
    saving = engine.async_save(tmp_path / "meanwhile")
    train(engine, images, 3)
    assert not saving.done()
    may_write.set()
    saving.result()
    assert_same(load_file(state_file(tmp_path / "meanwhile")), load_file(state_file(tmp_path / "then")))
    then, meanwhile = (load_file(tmp_path / name / "weights.safetensors") for name in ("then", "meanwhile"))
    assert_same(meanwhile, then)
    assert any((then[name] != value.cpu()).any() for name, value in weights_of(engine).items())


def test_what_fails_in_the_background_is_said_when_it_is_asked_for(make_engine, tmp_path, monkeypatch):
    def fail(weights, metadata, path):
        raise OSError(28, "No space left on device")

    engine = make_engine()
    engine.async_save(tmp_path)
    monkeypatch.setattr("prmim_torch.trainer.write_weights", fail)
    saving = engine.async_save(tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        saving.result()


def test_nothing_is_saved_where_no_folder_is(make_engine, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^directory: expected an existing folder, got .*missing$"):
        make_engine().async_save(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_is_refused(make_engine, images, tmp_path):
    train(make_engine(), images, 1).save(tmp_path)
    other = make_engine({"decoder_depth": 2})
    before = weights_of(other)
    with pytest.raises(ValueError, match=r"^weights: decoder_depth: expected 2, got 1$"):
        other.restore(tmp_path)
    assert_same(weights_of(other), before)
    with pytest.raises(ValueError, match=r"^weights: decoder_depth: expected 2, got 1$"):
        other.load_weights(tmp_path / "weights.safetensors")


@pytest.fixture
def saved(make_engine, images, tmp_path):
    train(make_engine(), images, 1).save(tmp_path)
    return tmp_path


def assert_refused(make_engine, directory, message):
    engine = make_engine({"init_seed": 4})
    before = weights_of(engine)
    with pytest.raises(ValueError, match=rf"^directory: {message}$"):
        engine.restore(directory)
    assert_same(weights_of(engine), before)
    assert engine.step == 0
    assert not engine._optimizer.state


@pytest.mark.parametrize("damage", ["empty", "text", "torn", "one byte short", "file", "no place", "strange place"])
def test_a_damaged_training_state_is_refused(make_engine, saved, damage):
    path = state_file(saved)
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if damage == "file":
        path.unlink()
        path.parent.rmdir()
        path = path.parent
    if "place" in damage:
        place = {} if damage == "no place" else {name: {"saved_offsets": "here"} for name in load_file(path)}
        save_file(load_file(path), path, {**metadata, "DCP_SHARDING_INFO": json.dumps(place)})
    else:
        path.write_bytes(
            {"empty": b"", "text": b"text" * 99, "torn": content[:1000], "one byte short": content[:-1], "file": b""}[
                damage
            ]
        )
    assert_refused(
        make_engine, saved, "expected a training state, got .*training_state, which is corrupt or of another kind"
    )


def put(tensors, name, value):
    return {**tensors, name: value}


NAME = "exp_avg.encoder.norm.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: t[name] for name in t if name != NAME}, f"expected a tensor '{NAME}', got none in .*"),
        (lambda t: put(t, "more", torch.zeros(2)), "expected no tensor 'more', got one in .*"),
        (
            lambda t: put(t, NAME, torch.zeros(17)),
            rf"{NAME}: expected shape \(16,\), got another one or only parts in .*",
        ),
        (lambda t: put(t, "step", torch.zeros(1).long()), r"step: expected shape \(\), got another one or .*"),
        (lambda t: put(t, NAME, torch.zeros(16).double()), f"{NAME}: expected torch.float32, got torch.float64 in .*"),
    ],
    ids=["missing", "more", "shape", "axes", "dtype"],
)
def test_another_training_state_is_refused(make_engine, saved, change, message):
    path = state_file(saved)
    save_file(change(load_file(path)), path)
    assert_refused(make_engine, saved, message)


@pytest.mark.parametrize("rows", [(0, 4), (4, 8), (0, 12, 4, 16), (0, 8, 9, 16), (0, 8, 8, 16, 8, 16), (8, 16, 0, 9)])
def test_a_training_state_of_which_a_part_is_missing_or_twice_is_refused(make_engine, saved, rows):
    path = state_file(saved)
    tensors = load_file(path)
    path.unlink()
    for number, (first, last) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        place = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in tensors.items()}
        piece = {NAME: torch.zeros(16)[first:last].clone()} | (tensors if number == 0 else {})
        piece[NAME] = torch.zeros(16)[first:last].clone()
        place[NAME] = {"saved_offsets": [first]}
        save_file(piece, path.with_name(f"{number}.safetensors"), {"DCP_SHARDING_INFO": json.dumps(place)})
    assert_refused(make_engine, saved, rf"{NAME}: expected shape \(16,\), got another one or only parts in .*")


def test_a_missing_training_state_is_named(make_engine, saved):
    path = state_file(saved)
    weights = load_file(saved / "weights.safetensors")
    path.unlink()
    assert_refused(make_engine, saved, r"expected a tensor 'step', got none in .*")
    path.parent.rmdir()
    engine = make_engine({"init_seed": 4})
    with pytest.raises(FileNotFoundError):
        engine.restore(saved)
    engine.load_weights(saved / "weights.safetensors")
    assert_same(weights_of(engine), weights)


def test_nothing_is_unpickled(make_engine, saved, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something was unpickled")

    for module in (pickle, torch.serialization.pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    engine = make_engine()
    engine.restore(saved)
    assert engine.step == 1


def test_features_and_pictures(make_engine, images):
    engine = train(make_engine(), images, 1)
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
    assert engine.method.training
    assert np.isnan(make_engine({"reconstruction": "none"}).reconstruct(images, SAMPLE).patches).mean() == 0.5


def test_it_says_what_it_is(make_engine, device):
    engine = make_engine()
    assert engine.device.startswith(device.type)
    assert engine.num_parameters == sum(parameter.numel() for parameter in engine.method.parameters())


def test_only_the_seed_of_the_weights_decides_on_the_weights(make_engine):
    assert_same(weights_of(make_engine(seed=1)), weights_of(make_engine(seed=2)))
    one, other = (make_engine({"init_seed": seed}).method.encoder.cls_token for seed in (1, 2))
    assert not torch.equal(one, other)


def test_global_random_state_is_left_alone(make_engine, images):
    state = torch.get_rng_state()
    train(make_engine(), images, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning")  # torch's own, on import
def test_a_compiled_engine_takes_the_same_steps(make_engine, images, device, monkeypatch):
    if device.type == "cpu":
        # Generating code for a forward and a backward pass takes a minute; test_mae.py does it for a forward pass.
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = train(make_engine(compile=True, precision="bfloat16"), images, 3)
    plain = train(make_engine(precision="bfloat16"), images, 3)
    assert compiled._forward is not compiled.method
    assert compiled.read_metrics()["loss"] == pytest.approx(plain.read_metrics()["loss"], rel=1e-3)


def test_an_unusable_device_is_named(make_engine):
    if torch.cuda.is_available():
        pytest.skip("the rest needs a machine without a GPU")
    with pytest.raises(ValueError, match=r"^device: expected an available device, got 'cuda', but torch finds no CUDA"):
        make_engine(device="cuda")
    assert make_engine(device="auto").device.startswith("cpu")


def test_wrong_batches(make_engine, images):
    with pytest.raises(ValueError, match=r"^images: expected a batch that accumulate=3 divides, got 8$"):
        make_engine(accumulate=3).train_step(images, SAMPLE)
    with pytest.raises(ValueError, match=r"^images: expected at least one image, got an empty batch$"):
        make_engine().train_step(images[:0], SAMPLE[:0])
    with pytest.raises(ValueError, match=r"^sample: expected shape \(8,\), got \(7,\)$"):
        make_engine().train_step(images, SAMPLE[1:])
    with pytest.raises(TypeError, match=r"^images: expected torch.uint8, got torch.float32$"):
        make_engine().train_step(images.astype(np.float32), SAMPLE)
