import pytest

from prmim_train.cli.commands import main
from prmim_train.pretrain import pretrain
from prmim_train.run.processes import FailedElsewhereError, launched, on_main, say

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3"}
JAX = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(names):
        for name in (*TORCHRUN, *JAX):
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    set_to({})
    return set_to


class Process:
    """One process of several. `others`: what the others pass to `any`."""

    def __init__(self, rank, others=False):
        self.rank, self.others = rank, others

    def any(self, flag):
        return flag or self.others


@pytest.mark.parametrize(
    ("names", "place"),
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1)),
        (TORCHRUN, (3, 4)),
        (JAX, (1, 2)),
        ({name: JAX[name] for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}, (0, 1)),
        ({"WORLD_SIZE": "1", **JAX}, (1, 2)),
    ],
)
def test_the_environment_says_which_process_this_is(names, place, environment):
    environment(names)
    assert launched() == place


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE: expected a whole number from 1 to 999999 .*, got 'two'"),
        ({"WORLD_SIZE": "٣", "RANK": "0"}, "WORLD_SIZE: expected a whole number from 1 to 999999 .*, got '٣'"),
        (
            {**JAX, "JAX_NUM_PROCESSES": "9" * 5000},
            "JAX_NUM_PROCESSES: expected .*, got '9{40,60} ... 9+'",
        ),
        ({"WORLD_SIZE": "2"}, "RANK: expected a whole number from 0 to 999999 in the environment, got ''"),
    ],
)
def test_a_strange_environment_is_named(names, message, environment, capsys):
    environment(names)
    with pytest.raises(ValueError, match=message):
        launched()
    say("said all the same")
    assert capsys.readouterr().out == "said all the same\n"


def test_the_main_process_alone_speaks(environment, capsys):
    environment({**TORCHRUN, "RANK": "0"})
    say("by 0")
    environment(TORCHRUN)
    say("by 3")
    assert capsys.readouterr().out == "by 0\n"


def test_only_the_main_process_does_what_is_its_own():
    assert on_main(Process(0), lambda: 7) == 7
    assert on_main(Process(1), lambda: 1 / 0) is None


def test_what_fails_in_the_main_process_fails_in_all():
    with pytest.raises(ZeroDivisionError):
        on_main(Process(0), lambda: 1 / 0)
    with pytest.raises(FailedElsewhereError, match="the main process failed"):
        on_main(Process(1, others=True), lambda: 7)


def test_the_batch_must_be_shared_out_evenly(tiny, environment):
    environment(TORCHRUN)
    message = r"batch_size: expected a multiple of the 4 processes times accumulate \(4\), got 120"
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(accumulate=4))


def test_the_devices_of_a_process_must_share_the_batch_evenly(tiny, fake, monkeypatch):
    monkeypatch.setattr(fake, "num_devices", 3)
    message = r"batch_size: expected a multiple of the 3 devices times accumulate \(1\), got 64"
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(batch_size=64))
    assert not tiny().run_path.exists()


def test_an_engine_that_knows_of_no_others_is_refused(tiny, environment):
    environment(TORCHRUN)
    with pytest.raises(ValueError, match="backend: expected one that joins the 4 launched processes, got fake"):
        pretrain(tiny())
    assert not tiny().run_path.exists()


def test_an_error_says_which_process_it_comes_from(environment, capsys):
    environment(TORCHRUN)
    assert main(["pretrain", "--epochs", "many"]) == 2
    assert (
        capsys.readouterr().err
        == "prmim: process 3: error: epochs: expected a whole number of at least 1, got 'many'\n"
    )


@pytest.mark.parametrize("command", ["inspect", "picture"])
def test_other_commands_take_one_process(command, environment, capsys):
    environment(TORCHRUN)
    assert main([command]) == 2
    assert (
        f"command: expected one process for {command}, got 4; only pretrain, evaluate and features take"
        in capsys.readouterr().err
    )
