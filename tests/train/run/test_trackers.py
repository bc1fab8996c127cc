"""Trackers: TensorBoard if installed; fakes that record calls for the others."""

import importlib.util
import json
import signal
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from prmim_train.cli.commands import main
from prmim_train.pretrain import pretrain
from prmim_train.run.directory import RunDirectory
from prmim_train.run.loop import Interrupted
from prmim_train.run.trackers import check_tracker, open_tracker


class Service:
    """State of a fake tracking service: runs by ID.

    Each has parameters, metrics and number of closes.
    """

    def __init__(self):
        self.runs, self.calls, self.active = {}, [], None

    def begin(self, known, **details):
        run = known or f"run{len(self.runs)}"
        self.active = self.runs.setdefault(run, {"steps": [], "params": None, "ends": 0})
        self.calls.append(details)
        return run

    def log(self, numbers, step):
        self.active["steps"].append((step, numbers))

    def end(self):
        self.active["ends"] += 1


def install(monkeypatch, name, **content):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def wandb(monkeypatch):
    service = Service()

    def init(*, id, config, **details):
        name = service.begin(id, **details)
        service.active["params"] = config
        return SimpleNamespace(id=name, log=service.log, finish=service.end)

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    install(monkeypatch, "wandb", init=init)
    return service


@pytest.fixture
def mlflow(monkeypatch):
    service = Service()

    def start_run(*, run_id, **details):
        return SimpleNamespace(info=SimpleNamespace(run_id=service.begin(run_id, **details)))

    def log_params(params):
        assert service.active["params"] is None  # MLflow does not allow changes
        service.active["params"] = params

    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    names = {"start_run": start_run, "log_params": log_params, "log_metrics": service.log, "end_run": service.end}
    install(monkeypatch, "mlflow", **names, set_experiment=service.calls.append)
    return service


class EventFileWriter:
    """Fake of TensorBoard's writer: records the events of each opened writer."""

    def __init__(self, folder):
        self.folder, self.events, self.is_closed = folder, [], False
        EventFileWriter.opened.append(self)

    def add_event(self, event):
        self.events.append(event)

    def flush(self):
        pass

    def close(self):
        self.is_closed = True


@pytest.fixture
def tensorboard(monkeypatch):
    """Install a fake TensorBoard. Returns the writers opened."""
    names = ("tensorboard", "tensorboard.compat", "tensorboard.compat.proto", "tensorboard.summary")
    for name in (*names, "tensorboard.summary.writer"):
        install(monkeypatch, name)
    summary = type("Summary", (SimpleNamespace,), {"Value": SimpleNamespace})
    session_log = type("SessionLog", (SimpleNamespace,), {"START": 1})
    install(monkeypatch, "tensorboard.compat.proto.event_pb2", Event=SimpleNamespace, SessionLog=session_log)
    install(monkeypatch, "tensorboard.compat.proto.summary_pb2", Summary=summary)
    install(monkeypatch, "tensorboard.summary.writer.event_file_writer", EventFileWriter=EventFileWriter)
    EventFileWriter.opened = []
    return EventFileWriter.opened


def lines(config):
    return [json.loads(line) for line in (config.run_path / "metrics.jsonl").read_text().splitlines()]


def stop_at(monkeypatch, fake, step):
    """Raise SIGINT during a step of the next run."""
    take = fake.train_step

    def train_step(self, images, sample):
        if self.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        take(self, images, sample)

    monkeypatch.setattr(fake, "train_step", train_step)


def run_in_two_parts(tiny, fake, monkeypatch, tracker, step=7):
    """Run 12 steps with a stop in between. Returns the configuration."""
    with monkeypatch.context() as patch:
        stop_at(patch, fake, step)
        with pytest.raises(Interrupted):
            pretrain(tiny(tracker=tracker))
    pretrain(tiny(tracker=tracker, resume=True))
    return tiny(tracker=tracker)


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_resumed_run_goes_on_in_the_same_place(tracker, tiny, fake, monkeypatch, request):
    service = request.getfixturevalue(tracker)
    config = run_in_two_parts(tiny, fake, monkeypatch, tracker)
    (run,) = service.runs.values()
    assert [step for step, _ in run["steps"]] == [1, 2, 4, 6, 8, 10, 12]
    for (step, numbers), line in zip(run["steps"], lines(config), strict=True):
        assert {"step": step, **numbers} == {name: value for name, value in line.items() if value is not None}
    assert run["params"]["batch_size"] == 120
    assert run["ends"] == 2
    assert json.loads((config.run_path / "tracker.json").read_text()) == {tracker: "run0"}


def test_runs_are_filed_under_one_name(tiny, wandb, mlflow, tmp_path):
    pretrain(tiny(tracker="wandb"))
    assert wandb.calls == [{"project": "prmim", "name": "run", "dir": str(tmp_path / "run"), "resume": "allow"}]
    pretrain(tiny(tracker="mlflow", out=str(tmp_path / "other")))
    assert mlflow.calls == ["prmim", {"run_name": "other"}]


def test_the_environment_names_another_project(tiny, wandb, mlflow, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    pretrain(tiny(tracker="wandb"))
    assert wandb.calls[0]["project"] == "mine"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    pretrain(tiny(tracker="mlflow", out=str(tmp_path / "other")))
    assert mlflow.calls == [{"run_name": "other"}]


def test_tensorboard_is_told_what_the_lines_say(tiny, fake, monkeypatch, tensorboard):
    config = run_in_two_parts(tiny, fake, monkeypatch, "tensorboard")
    first, second = tensorboard
    assert first.folder == second.folder == str(config.run_path / "tensorboard")
    assert first.is_closed
    assert second.is_closed
    start, *events = second.events
    assert (start.step, start.session_log.status) == (8, 1)  # later steps of the first file are ignored
    events = first.events + events
    assert [event.step for event in events] == [1, 2, 4, 6, 8, 10, 12]
    for event, line in zip(events, lines(config), strict=True):
        told = {value.tag: value.simple_value for value in event.summary.value}
        assert {"step": event.step, **told} == {name: value for name, value in line.items() if value is not None}


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs TensorBoard to read what is written")
def test_tensorboard_reads_what_is_written(tiny, fake, monkeypatch):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    config = run_in_two_parts(tiny, fake, monkeypatch, "tensorboard")
    losses = {}
    for path in sorted((config.run_path / "tensorboard").iterdir()):
        for event in loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "loss":
                    losses[event.step] = value.tensor.float_val[0]
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines(config)})


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_told_in_one_line(tracker, tiny_words, fake, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, tracker, None)
    assert main(["pretrain", *tiny_words, "--tracker", tracker]) == 2
    line = f"prmim: error: tracker: {tracker} is not installed; pip install 'prmim[{tracker}]'\n"
    assert capsys.readouterr().err == line
    assert not fake.made
    assert not (tmp_path / "run").exists()


def test_a_service_that_goes_down_does_not_end_the_run(tiny, wandb, capsys, monkeypatch):
    def log(numbers, step):
        if step == 4:
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(wandb, "log", log)
    assert pretrain(tiny(tracker="wandb"))["steps"] == 12
    line = capsys.readouterr().err
    assert line.startswith("prmim: warning: tracker wandb failed and is disabled: no route to host; all metrics")
    assert line.count("\n") == 1
    assert len(lines(tiny())) == 7


def test_a_service_that_cannot_be_reached_at_the_start_is_an_error(tiny, wandb, fake, monkeypatch):
    def init(**details):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(RuntimeError, match="api_key not configured"):
        pretrain(tiny(tracker="wandb"))
    assert fake.made[0].step == 0
    assert fake.made[0].is_closed


def test_none_needs_nothing(tmp_path):
    check_tracker("none")
    tracker = open_tracker("none", RunDirectory(tmp_path), {}, 0)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert list(tmp_path.iterdir()) == []
