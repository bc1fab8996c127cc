"""Entry point of `prmim` and `python -m prmim_train`.

Sets environment variables before heavy imports.
"""

import os
import signal
import sys

from prmim_train.run.output import keep_output


def main() -> int:
    """Run the command line, or name the missing package in one line.

    Returns
    -------
    int
        Exit code; see :func:`prmim_train.cli.commands.main`.
    """
    # GNU OpenMP threads spin for milliseconds while they wait, and block the core. With a second process on the same
    # two cores, a step on the digits took 1.9 s instead of 0.03 s. A short spin costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_output()
    try:
        from prmim_train.cli.commands import main as run
    except KeyboardInterrupt:  # imports take a third of a second
        print("prmim: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("prmim"):
            raise
        message = f"the command line needs {error.name}, which is not installed; pip install 'prmim[train]'"
        print(f"prmim: error: {message}", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
