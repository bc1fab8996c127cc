"""Killed, stopped and damaged runs end like undisturbed ones.

`soak.py` runs the long form.
"""

import json
import random
import shutil

import pytest

SEED = 5
EPOCHS = 7  # as in conftest.py


@pytest.mark.parametrize(
    ("backend", "fault", "kills"),
    [
        *[(backend, "sigkill", 2) for backend in ("torch", "jax")],
        # The trainer handles these alike on all backends; soak.py tries them on JAX too.
        *[("torch", fault, 1) for fault in ("sigterm", "truncate")],
    ],
)
def test_a_run_that_is_hurt_ends_as_if_nothing_had_happened(backend, fault, kills, soak, undisturbed, tmp_path):
    folder, run, pace = undisturbed(backend)
    (tmp_path / "programs").symlink_to(folder / "programs")
    hurt = soak.Soak(backend, fault, kills=kills, seed=SEED, folder=tmp_path, epochs=EPOCHS, say=lambda line: None)
    report = hurt.run(run, pace)
    assert report.hurt == kills
    assert report.runs >= 1


def test_a_run_of_two_processes_is_that_of_one(soak, undisturbed):
    one, two = (soak.lines(undisturbed("torch", processes)[1]) for processes in (1, 2))
    assert len(one) == len(two)
    for line, other in zip(one, two, strict=True):
        assert other == pytest.approx(line, rel=1e-4)


def test_a_run_of_two_processes_of_which_one_is_killed_ends_as_if_nothing_had_happened(
    soak, undisturbed, tmp_path, monkeypatch
):
    folder, run, pace = undisturbed("torch", 2)
    (tmp_path / "programs").symlink_to(folder / "programs")
    hurt = soak.Soak(
        "torch", "sigkill", kills=1, seed=SEED, folder=tmp_path, epochs=EPOCHS, say=lambda line: None, processes=2
    )
    monkeypatch.setattr(hurt, "_draw_rank", lambda: 1)
    assert hurt.run(run, pace).hurt == 1


@pytest.fixture
def pair(soak, undisturbed, tmp_path):
    """A run and its copy."""
    _, run, _ = undisturbed("torch")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    soak.compare(run, copy)
    return run, copy


def change_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def last_checkpoint(run):
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def test_another_number_in_the_metrics_is_noticed(pair, soak):
    run, copy = pair
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[3])
    lines[3] = json.dumps({**record, "loss": record["loss"] * (1 + 1e-15)})
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(soak.Failure, match=r"metrics.jsonl, line 4: expected"):
        soak.compare(run, copy)


def test_other_times_are_not_compared(pair, soak):
    run, copy = pair
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({**record, "seconds": 0, "images_per_second": None}) + "\n" for record in records]
    (copy / "metrics.jsonl").write_text("".join(lines))
    soak.compare(run, copy)


def test_a_missing_line_is_noticed(pair, soak):
    run, copy = pair
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(soak.Failure, match=rf"expected {len(lines)} lines, got {len(lines) - 1}"):
        soak.compare(run, copy)


def test_another_weight_is_noticed(pair, soak):
    run, copy = pair
    change_last_byte(last_checkpoint(copy) / "weights.safetensors")
    with pytest.raises(soak.Failure, match=r"weights.safetensors: not byte for byte"):
        soak.compare(run, copy)


def test_another_training_state_is_noticed(pair, soak):
    run, copy = pair
    change_last_byte(next((last_checkpoint(copy) / "training_state").glob("*.safetensors")))
    with pytest.raises(soak.Failure, match=r"training_state, .*: not bit for bit"):
        soak.compare(run, copy)


def test_another_training_state_of_jax_is_noticed(soak, undisturbed, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    jax = pytest.importorskip("jax")
    _, run, _ = undisturbed("jax")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    state = last_checkpoint(copy) / "training_state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(state)
        changed = jax.tree.map(lambda value: value + 1, tree)
        checkpointer.save(state, {**tree, "mu": changed["mu"]}, force=True)
    with pytest.raises(soak.Failure, match=r"training_state, .*mu.*: not bit for bit"):
        soak.compare(run, copy)


def test_what_is_half_written_is_noticed(pair, soak):
    run, copy = pair
    (copy / "checkpoints" / ".step_00000004.partial").mkdir()
    with pytest.raises(soak.Failure, match=r"half written and never deleted: checkpoints/.step_00000004.partial"):
        soak.compare(run, copy)


def test_a_failure_says_how_to_repeat_it(pair, soak, tmp_path, monkeypatch):
    run, _ = pair
    hurt = soak.Soak("torch", "sigkill", kills=2, seed=71, folder=tmp_path, epochs=EPOCHS, say=print)

    def live(self, run, pace):
        raise soak.Failure("something differs")

    monkeypatch.setattr(soak.Soak, "_live", live)
    with pytest.raises(soak.Failure, match=r"torch, sigkill, seed 71, after 0 of 2 \(7 epochs\).*something differs"):
        hurt.run(run, soak.Pace(1.0, 1.0))


def test_the_same_seed_draws_the_same_damage(soak, tmp_path):
    results = []
    for _ in range(2):
        draw = random.Random(3)
        for number in range(12):
            (tmp_path / str(number)).write_bytes(bytes(range(100)))
        what = [soak.damage(tmp_path / str(number), draw) for number in range(12)]
        left = [path.read_bytes() if path.exists() else None for path in map(tmp_path.joinpath, map(str, range(12)))]
        assert bytes(range(100)) not in left
        results.append((what, left))
    assert results[0] == results[1]
    assert set(results[0][0]) == {"a file cut", "a byte changed", "a file deleted"}
