"""Several devices in one or two processes: equality, agreement, faults.

Results equal those of one device.

A launch takes seconds, so each launch runs many jobs, and the tests check their results.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from prmim_jax.distributed import cut, num_processes

SCRIPT = Path(__file__).with_name("distributed_worker.py")
LOSSES = ("loss", "loss_decoded", "loss_thrown")
# Who drew what.
DRAWN = [("local", "mae", "ddp"), ("local", "simmim", "fsdp"), ("two", "mae", "fsdp"), ("two", "simmim", "ddp")]


@pytest.fixture(scope="module")
def worker():
    module = importlib.import_module("tests.jax.distributed_worker")
    before = module.MAE.__call__
    module.let_black_images_spoil_a_step()
    yield module
    module.MAE.__call__ = before


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    for name in ("one", "local", "two"):
        (path / name).mkdir()
    return path


def launch(shared, own, processes, devices, *jobs):
    """Run jobs of the script in several processes.

    Each has some devices. Returns how each process ended, and what it printed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }
    runs = []
    for rank in range(processes):
        if processes > 1:
            number = {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(rank)}
            environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", **number}
        command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), str(shared), own, *jobs]
        with (shared / own / f"log_{rank}").open("w") as log:
            runs.append(
                subprocess.Popen(
                    command, env=dict(environment), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
    try:
        codes = [run.wait(timeout=240) for run in runs]
    finally:
        for run in runs:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    return codes, [(shared / own / f"log_{rank}").read_text() for rank in range(processes)]


def results_of(shared, own, processes, devices, *jobs):
    codes, logs = launch(shared, own, processes, devices, *jobs)
    assert not any(codes), logs
    return [json.loads((shared / own / f"rank_{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def one(worker, shared):
    """What one device does, in this process."""
    results = {}
    for name in ("mae", "simmim"):
        results[name], engine = worker.draw(name, "ddp", None, shared / "one")
        results[name]["engine"] = engine
        if name == "mae":
            results[name] |= worker.look(engine)
    return results


@pytest.fixture(scope="module")
def local(one, shared):
    """What two devices of one process do."""
    return results_of(shared, "local", 1, 2, "local_curves")


@pytest.fixture(scope="module")
def two(one, shared):
    """What two processes of two devices each do."""
    return results_of(shared, "two", 2, 2, "two_curves", "classifiers", "agreement")


@pytest.fixture
def ranks(request, who):
    """What each process has drawn."""
    return [next(iter(rank.values())) for rank in request.getfixturevalue(who)]


def assert_same_run(curve, expected, losses=LOSSES):
    """Compare what was measured, to rounding errors of float32."""
    for measured, wanted in zip(curve, expected[-len(curve) :], strict=True):
        for name in (*losses, "grad_norm"):
            assert measured[name] == pytest.approx(wanted[name], rel=1e-5, nan_ok=True)
        for name in ("learning_rate", "nonfinite_step", "skipped", "skipped_in_a_row"):
            assert measured[name] == wanted[name]


@pytest.mark.parametrize(("who", "name", "parallel"), DRAWN)
def test_several_devices_make_the_run_of_one(one, ranks, shared, who, name, parallel):
    assert len(one[name]["curve"]) == 6
    assert_same_run(ranks[0][f"{name} {parallel}"]["curve"], one[name]["curve"])
    here = load_file(shared / who / name / parallel / "end" / "weights.safetensors")
    there = load_file(shared / "one" / name / "ddp" / "end" / "weights.safetensors")
    assert set(here) == set(there)
    for weight in there:
        if weight.endswith("qkv.bias"):  # of keys, a softmax does not notice it: its gradient is rounding error alone
            here[weight], there[weight] = (part[weight].reshape(3, -1)[::2] for part in (here, there))
        np.testing.assert_allclose(here[weight], there[weight], rtol=1e-4, atol=1e-5, err_msg=weight)


@pytest.fixture(scope="module")
def one_classifier(worker, shared):
    """The classifiers of one device."""
    return worker.classifiers(shared, shared / "one")


@pytest.mark.parametrize(("name", "parallel"), [("finetune", "fsdp"), ("probe", "ddp")])
def test_several_devices_make_the_classifier_of_one(one_classifier, two, shared, name, parallel):
    """With batch norm over all rows, and different rates in the blocks of an array."""
    expected = one_classifier[f"{name} {parallel}"]
    drawn = [rank["classifiers"][f"{name} {parallel}"] for rank in two]
    assert_same_run(drawn[0]["curve"], expected["curve"], ("loss", "accuracy"))
    assert [step["nonfinite_step"] for step in expected["curve"]] == [None, None, None, 4, 4, 4]
    here, there = (
        load_file(shared / place / name / parallel / "end" / "weights.safetensors") for place in ("two", "one")
    )
    assert set(here) == set(there)
    for weight in there:
        if not weight.endswith("qkv.bias"):
            np.testing.assert_allclose(here[weight], there[weight], rtol=1e-4, atol=1e-5, err_msg=weight)
    for rank in drawn:
        np.testing.assert_equal(rank, drawn[0])
        np.testing.assert_equal(rank["resumed"], rank["curve"][3:])
        np.testing.assert_equal(rank["again"], rank["logits"])
        np.testing.assert_allclose(rank["logits"], expected["logits"], rtol=1e-4, atol=1e-6)
        assert rank["programs"] == 1


def test_batch_norm_of_each_device(worker, two, shared):
    """A step equals a one-device step that accumulates the shares.

    Running statistics are means over the devices.
    """
    parts = [np.r_[0:8:2], np.r_[8:16:2], np.r_[1:8:2], np.r_[9:16:2]]
    engine = worker.make_classifier("device_probe", accumulate=len(parts))
    expected = worker.train_classifier(engine, worker.STEPS, np.concatenate(parts))
    drawn = [rank["classifiers"]["device_probe ddp"] for rank in two]
    assert_same_run(drawn[0]["curve"], expected, ("loss", "accuracy"))
    weights = load_file(shared / "two" / "device_probe" / "ddp" / "end" / "weights.safetensors")
    np.testing.assert_allclose(weights["head.weight"], engine.module.head.weight[...], rtol=1e-4, atol=1e-5)
    method, mean, variance = worker.make_engine("mae").module, 0, 0
    method.eval()
    features = jax.jit(lambda method, images: method.features(images, "cls"))
    finite = [step for step in range(worker.STEPS) if step + 1 != worker.STEP_SPOILT]
    for number, step in enumerate(finite, start=1):
        seen = np.asarray(features(method, worker.draw_classes(step)[0]))
        mean += (np.mean([seen[part].mean(0) for part in parts], 0) - mean) / number
        variance += (np.mean([seen[part].var(0, ddof=1) for part in parts], 0) - variance) / number
    np.testing.assert_allclose(weights["fc_norm.running_mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights["fc_norm.running_var"], variance, rtol=1e-4, atol=1e-5)
    for rank in drawn:
        np.testing.assert_equal(rank, drawn[0])
        np.testing.assert_equal(rank["resumed"], rank["curve"][3:])


@pytest.mark.parametrize(("who", "name", "parallel"), DRAWN)
def test_a_run_goes_on_bit_for_bit_and_from_one_device(one, ranks, who, name, parallel):
    for rank in ranks:
        drawn = rank[f"{name} {parallel}"]
        np.testing.assert_equal(drawn["curve"], ranks[0][f"{name} {parallel}"]["curve"])
        assert len(drawn["resumed"]) == 3
        np.testing.assert_equal(drawn["resumed"], drawn["curve"][3:])
        assert_same_run(drawn["from one"], one[name]["curve"])
        assert drawn["programs"] == 1
        assert drawn["compiled by a save"] == 0  # after the first


@pytest.mark.parametrize(("who", "parallel"), [("local", "ddp"), ("two", "fsdp")])
def test_a_step_that_is_not_finite_on_one_device_counts_for_none(one, ranks, parallel):
    for drawn in (one["mae"], *(rank[f"mae {parallel}"] for rank in ranks)):
        curve = drawn["curve"]
        assert [step["nonfinite_step"] for step in curve] == [None, None, None, 4, 4, 4]
        assert [(step["skipped"], step["skipped_in_a_row"]) for step in curve] == [(int(n == 3),) * 2 for n in range(6)]
        assert np.isnan(curve[3]["loss"])
        assert np.isfinite([curve[4]["loss"], curve[4]["grad_norm"]]).all()


def test_steps_may_follow_each_other_unread(local, two):
    for rank in (*local, *two):
        for job in ("local_curves", "two_curves"):
            assert all(drawn["rushed"] == 0 for drawn in rank.get(job, {}).values())


@pytest.mark.parametrize(("who", "name", "parallel"), DRAWN)
def test_one_device_takes_up_the_run_of_several(worker, one, ranks, shared, who, name, parallel):
    engine = one[name]["engine"]
    engine.restore(shared / who / name / parallel / "half")
    assert_same_run(worker.train(engine, 6), one[name]["curve"])


def test_images_look_the_same(one, two):
    for rank in two:
        for what in ("features", "patches", "attention"):
            seen = rank["two_curves"]["mae fsdp"][what]
            np.testing.assert_allclose(seen, one["mae"][what], rtol=1e-4, atol=1e-5)


def test_each_device_holds_its_share(one, local, two):
    assert local[0]["local_curves"]["mae ddp"]["held"] == one["mae"]["held"]
    assert local[0]["local_curves"]["simmim fsdp"]["held"] < 0.55 * one["simmim"]["held"]
    assert two[0]["two_curves"]["simmim ddp"]["held"] == one["simmim"]["held"]
    assert two[0]["two_curves"]["mae fsdp"]["held"] < 0.3 * one["mae"]["held"]


@pytest.mark.parametrize(("who", "name", "parallel"), DRAWN)
def test_devices_talk_once_a_step(ranks, name, parallel):
    """In particular not of the batch, noise or plan, and not in each of its parts."""
    drawn = ranks[0][f"{name} {parallel}"]
    assert drawn["talk in loops"] == 0
    if parallel == "ddp":
        assert drawn["talk"] == {"all-reduce": 1}
    else:  # each of the arrays that are cut is gathered, and its gradient scattered; and some are whole
        assert set(drawn["talk"]) == {"all-gather", "reduce-scatter", "all-reduce"}
        assert drawn["talk"]["all-gather"] == drawn["talk"]["reduce-scatter"] < 44
        assert drawn["talk"]["all-reduce"] == 1


def test_processes_agree(two):
    for rank in two:
        result = rank["agreement"]
        assert result["any"] == [True, False, True]
        assert result["missing"].startswith("FileNotFoundError: [Errno 2] No such file")
        assert result["step"] == 0
        assert rank["two_curves"]["mae fsdp"]["device"].endswith("cores), one of 2 processes")


def test_a_process_that_dies_takes_the_others_along(two, shared):
    codes, logs = launch(shared, "two", 2, 2, "die")
    assert codes[0] != 0
    assert codes[1] == -signal.SIGKILL
    # Seconds without a heartbeat, and those that a process that failed waits for others.
    assert time.time() - (shared / "two" / "left").stat().st_mtime < 45
    assert "Traceback" in logs[0] or "detected fatal errors" in logs[0]


VARIABLES = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize("text", ["", "two", "-1", "0"])
def test_a_strange_environment_is_named(monkeypatch, text):
    for name, value in {**VARIABLES, "JAX_NUM_PROCESSES": text}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^JAX_NUM_PROCESSES: expected a positive integer in the environment, got "):
        num_processes()


@pytest.mark.parametrize("missing", VARIABLES)
def test_half_of_an_environment_is_not_taken_for_none(monkeypatch, missing):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert num_processes() == 2
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=rf"^{missing}: expected in the environment, where JAX_\w+ is, got none$"):
        num_processes()


@pytest.mark.parametrize("number", ["2", "-1", "first"])
def test_a_number_of_no_process_is_refused(worker, monkeypatch, number):
    for name, value in {**VARIABLES, "JAX_PROCESS_ID": number}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^JAX_PROCESS_ID: expected 0 to 1 in the environment, as there are 2 proc"):
        worker.make_engine("mae")


def test_one_process_alone_agrees_with_itself(worker):
    engine = worker.make_engine("mae", "fsdp")
    assert (engine.rank, engine.world_size) == (0, 1)
    assert [engine.any(True), engine.any(False)] == [True, False]
    engine.close()
    assert engine.any(True)


@pytest.mark.parametrize(
    ("shape", "devices", "spec"),
    [
        ((8, 4), 1, ()),
        ((8, 4), 2, ("data",)),
        ((4, 8), 4, (None, "data")),
        ((9, 4), 2, (None, "data")),
        ((4, 4), 2, ("data",)),
        ((9, 5), 2, ()),
        ((0, 3), 2, ()),
        ((), 2, ()),
    ],
)
def test_weights_are_cut_along_the_longest_axis_that_can_be(shape, devices, spec):
    assert cut(shape, devices) == PartitionSpec(*spec)
