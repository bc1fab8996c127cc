"""The entry point, before the command line is imported."""

import signal
import sys
from types import ModuleType

from prmim_train import __main__ as entry


def test_ctrl_c_while_importing_is_one_line(monkeypatch, capsys):
    class Slow(ModuleType):
        @property
        def main(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(entry, "keep_output", lambda: None)
    monkeypatch.setitem(sys.modules, "prmim_train.cli.commands", Slow("commands"))
    assert entry.main() == 128 + signal.SIGINT
    assert capsys.readouterr().err == "prmim: interrupted\n"
