"""The program `prmim`, also as `python -m prmim_train`: what must happen before anything heavy is imported."""

import os
import sys


def main() -> int:
    """Run the command line; say in one line what is missing where its packages are not installed.

    Returns
    -------
    int
        The exit code; see :func:`prmim_train.cli.main`.
    """
    # GNU OpenMP's threads spin for milliseconds when they wait, on a core that somebody else may need: with a second
    # process on the same two cores a step of the digits took 1.9 s in place of 0.03 s. A short spin is free.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from prmim_train.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("prmim"):
            raise
        message = f"the command line needs {error.name}, which is not installed; pip install 'prmim[train]'"
        print(f"prmim: error: {message}", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
