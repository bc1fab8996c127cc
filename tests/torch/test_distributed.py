"""Several processes under torchrun: equality, agreement, and faults.

Results equal those of one process.

A launch takes seconds, so each launch runs many jobs; the tests look at their results.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prmim_torch.distributed import num_processes

SCRIPT = Path(__file__).with_name("distributed_worker.py")
LOSSES = ("loss", "loss_decoded", "loss_thrown")


@pytest.fixture(scope="module")
def worker():
    return importlib.import_module("tests.torch.distributed_worker")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    for processes in "124":
        (path / processes).mkdir()
    return path


def launch(processes, shared, *jobs):
    """Run jobs in several processes; return exit status, output and seconds."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    started = time.perf_counter()
    run = subprocess.Popen(
        [*torchrun, str(SCRIPT), str(shared), *jobs],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = run.communicate(timeout=150)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    return run.returncode, output, time.perf_counter() - started


def results_of(processes, shared, *jobs):
    code, output, _ = launch(processes, shared, *jobs)
    assert code == 0, output
    assert "Warning" not in output
    return [json.loads((shared / str(processes) / f"rank_{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def one(worker, shared):
    """Return the results of a single process, without torchrun."""
    return {
        "curves": {
            f"{name} {parallel}": worker.draw(name, parallel, shared / "1" / name / parallel)
            for name in worker.CURVES
            for parallel in worker.PARALLEL
        },
        "classifiers": worker.classifiers(shared, shared / "1"),
    }


@pytest.fixture(scope="module")
def two(one, shared):
    # Two processes resume the runs of one, and their own.
    return results_of(2, shared, "curves", "classifiers", "looks", "agreement", "holdings", "compiled")


@pytest.fixture(scope="module")
def four(two, shared):
    return results_of(4, shared, "curves")


@pytest.fixture(params=[2, 4])
def several(request):
    return request.param, request.getfixturevalue({2: "two", 4: "four"}[request.param])


def assert_same_run(curve, expected, losses=LOSSES):
    """Compare measurements up to rounding errors of float32."""
    for measured, wanted in zip(curve, expected[-len(curve) :], strict=True):
        for name in (*losses, "grad_norm"):
            assert measured[name] == pytest.approx(wanted[name], rel=1e-5, nan_ok=True)
        assert measured["learning_rate"] == wanted["learning_rate"]
        assert measured["nonfinite_step"] == wanted["nonfinite_step"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_several_processes_make_the_run_of_one(one, several, shared, name, parallel):
    processes, results = several
    expected = one["curves"][f"{name} ddp"]
    assert len(expected) == 6
    assert_same_run(results[0]["curves"][f"{name} {parallel}"], expected)
    here, there = (
        load_file(shared / str(number) / name / parallel / "end" / "weights.safetensors") for number in (processes, 1)
    )
    for weight in there:
        if weight.endswith("qkv.bias"):  # the gradient of the keys' bias is rounding error
            here[weight], there[weight] = (torch.cat(part[weight].chunk(3)[::2]) for part in (here, there))
        torch.testing.assert_close(here[weight], there[weight], rtol=1e-4, atol=1e-6, msg=weight)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_two_processes_make_the_classifier_of_one(one, two, shared, name, parallel):
    """Batch norm over all rows: the average of the weights is the same."""
    expected, ranks = one["classifiers"][f"{name} ddp"], [rank["classifiers"][f"{name} {parallel}"] for rank in two]
    assert_same_run(ranks[0]["curve"], expected["curve"], ("loss", "accuracy"))
    assert [step["nonfinite_step"] for step in expected["curve"]] == [None, None, None, 4, 4, 4]
    here, there = (
        load_file(shared / number / name / parallel / "end" / "weights.safetensors") for number in ("2", "1")
    )
    for weight in there:
        if not weight.endswith("qkv.bias"):
            torch.testing.assert_close(here[weight], there[weight], rtol=1e-4, atol=1e-6, msg=weight)
    for rank in ranks:
        np.testing.assert_equal(rank, ranks[0])
        np.testing.assert_equal(rank["resumed"], rank["curve"][3:])
        np.testing.assert_equal(rank["again"], rank["logits"])
        np.testing.assert_allclose(rank["logits"], expected["logits"], rtol=1e-4, atol=1e-6)


def test_batch_norm_of_each_process(worker, two, shared):
    """A step equals a one-process step that accumulates the shares.

    Running statistics are means over the processes.
    """
    engine = worker.make_classifier("device_probe", accumulate=2)
    expected = worker.train_classifier(engine, worker.STEPS, np.r_[0:16:2, 1:16:2])
    ranks = [rank["classifiers"]["device_probe ddp"] for rank in two]
    assert_same_run(ranks[0]["curve"], expected, ("loss", "accuracy"))
    weights = load_file(shared / "2" / "device_probe" / "ddp" / "end" / "weights.safetensors")
    torch.testing.assert_close(weights["head.weight"], engine.module.head.weight.detach(), rtol=1e-4, atol=1e-6)
    encoder, mean, variance = worker.METHODS["mae"](worker.CONFIGS["mae"]).eval(), 0, 0
    finite = [step for step in range(worker.STEPS) if step + 1 != worker.STEP_SPOILT]
    for number, step in enumerate(finite, start=1):
        seen = encoder.features(torch.from_numpy(worker.draw_classes(step)[0]), "cls").detach().numpy()
        halves = seen[::2], seen[1::2]
        mean += (np.mean([half.mean(0) for half in halves], 0) - mean) / number
        variance += (np.mean([half.var(0, ddof=1) for half in halves], 0) - variance) / number
    np.testing.assert_allclose(weights["fc_norm.running_mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights["fc_norm.running_var"], variance, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        np.testing.assert_equal(rank, ranks[0])
        np.testing.assert_equal(rank["resumed"], rank["curve"][3:])


def test_one_process_is_the_same_either_way(one):
    for name in ("mae", "simmim"):
        np.testing.assert_equal(one["curves"][f"{name} fsdp"], one["curves"][f"{name} ddp"])


def test_a_step_that_is_not_finite_in_one_process_counts_for_none(one, several):
    results = several[1]
    for rank in results:
        curve = rank["curves"]["mae fsdp"]
        assert [step["nonfinite_step"] for step in curve] == [None, None, None, 4, 4, 4]
        assert np.isnan(curve[3]["loss"])
        assert np.isfinite([curve[4]["loss"], curve[4]["grad_norm"]]).all()


def test_all_processes_measure_the_same(several):
    results = several[1]
    for rank in results[1:]:
        np.testing.assert_equal(rank["curves"], results[0]["curves"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_a_resumed_run_goes_on_bit_for_bit(several, name, parallel):
    curves = several[1][0]["curves"]
    resumed = curves[f"{name} {parallel} resumed"]
    assert len(resumed) == 3
    np.testing.assert_equal(resumed, curves[f"{name} {parallel}"][3:])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("source", ["1 ddp", "2 ddp", "2 fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(one, several, source, parallel):
    assert_same_run(several[1][0]["curves"][f"mae {parallel} from {source}"], one["curves"]["mae ddp"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_takes_up_the_run_of_several(worker, one, several, shared, parallel):
    resumed = worker.resume("mae", "ddp", shared / str(several[0]) / "mae" / parallel)
    assert_same_run(resumed, one["curves"]["mae ddp"])


def test_each_process_writes_its_share(several, shared):
    processes = several[0]
    for parallel in ("ddp", "fsdp"):
        folder = shared / str(processes) / "mae" / parallel / "end" / "training_state"
        sizes = [path.stat().st_size for path in folder.iterdir()]
        assert len(sizes) == processes
        assert max(sizes) < 1.5 * min(sizes) + 8192


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_looking_at_images_does_not_disturb(worker, one, two, shared, parallel):
    expected = worker.look("ddp", shared / "1" / "mae" / "ddp")
    for number, rank in enumerate(two):
        seen = rank["looks"][parallel]
        np.testing.assert_allclose(seen["attention"], expected["attention"][number:], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen["features"], expected["features"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen["patches"], expected["patches"], rtol=1e-4, atol=1e-5)
        np.testing.assert_equal(seen["curve"], rank["curves"][f"mae {parallel} from 1 ddp"])


def test_processes_agree(two):
    for rank in two:
        result = rank["agreement"]
        assert result["device"] == "cpu (1 threads), one of 2 processes"
        assert result["any"] == [True, False, True]
        assert result["missing"].startswith("FileNotFoundError: [Errno 2] No such file")
        assert "torn/training_state, which is corrupt or of another kind" in result["torn"]
        assert result["step"] == 0
        assert result["full"] == "OSError: [Errno 28] No space left on device"
        assert result["left"][-2:] == ["training_state", "weights.safetensors"]
        assert len(result["left"]) == 4
        assert result["step again"] == 0


def test_each_process_holds_its_share(two):
    ddp, fsdp = ([rank["holdings"][parallel] for rank in two] for parallel in ("ddp", "fsdp"))
    assert [rank["moments"] for rank in ddp] == [rank["learned"] for rank in ddp]
    assert sum(rank["moments"] for rank in fsdp) == fsdp[0]["learned"] == ddp[0]["learned"]
    assert max(rank["moments"] for rank in fsdp) < 0.6 * fsdp[0]["learned"]
    assert all(rank["frozen"] for rank in ddp + fsdp)


def test_gradients_travel_once_a_step(two):
    for rank in two:
        assert rank["holdings"]["ddp"]["buckets"] == 1
        assert rank["holdings"]["fsdp"]["reduce_scatters"] == 4  # three blocks, and the rest
        assert rank["holdings"]["fsdp"]["all_reduces"] == 1  # losses and norm


def test_a_step_of_several_processes_never_waits_for_the_device(two):
    for rank in two:
        assert [rank["holdings"][parallel]["readings"] for parallel in ("ddp", "fsdp")] == [[], []]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_processes_take_the_same_steps(two, parallel):
    compiled, plain = (two[0]["compiled"][f"{parallel} {kind}"] for kind in ("compiled", "plain"))
    for step, expected in zip(compiled, plain, strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.parametrize("fault", ["hang", "die"])
def test_a_process_that_leaves_takes_the_others_along(shared, fault):
    code, output, seconds = launch(2, shared, fault)
    assert code != 0
    assert seconds < 40
    assert "distributed_worker.py FAILED" in output
    if fault == "hang":
        assert "Timed out" in output
        assert (shared / "2" / "left").exists()


@pytest.mark.parametrize("text", ["", "two", "-1", "0"])
def test_a_strange_environment_is_named(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ValueError, match=r"^WORLD_SIZE: expected a positive integer in the environment, got "):
        num_processes()


def test_torchrun_is_missed_if_only_half_of_its_environment_is_there(worker, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="environment variable RANK expected, but not set"):
        worker.make_engine("mae")


def test_others_that_do_not_appear_are_not_waited_for_for_ever(worker, monkeypatch):
    monkeypatch.setattr("prmim_torch.distributed.LAUNCH_TIMEOUT", timedelta(seconds=1))
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConnectionError, match=r"^MASTER_ADDR: expected 2 processes to join at localhost:\d+, but not "):
        worker.make_engine("mae")


def test_one_process_alone_agrees_with_itself(worker):
    engine = worker.make_engine("mae", parallel="fsdp")
    assert (engine.rank, engine.world_size) == (0, 1)
    assert [engine.any(True), engine.any(False)] == [True, False]
    engine.close()
    assert len(worker.train(engine, 1)) == 1
