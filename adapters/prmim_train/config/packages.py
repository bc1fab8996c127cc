"""Optional packages: errors that say which extra installs them."""

from importlib.util import find_spec

__all__ = ["check_installed"]

_EXTRAS = {
    "sklearn": "evaluate",
    "scipy": "evaluate",
    "matplotlib": "evaluate",
    "huggingface_hub": "hf",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "pyarrow": "parquet",
}
"""Package to the extra of prmim that installs it."""
_NAMES = {"sklearn": "scikit-learn"}


def check_installed(option: str, *packages: str, otherwise: str = "") -> None:
    """Check that optional packages are installed, without importing them.

    Call it before the work starts: a long training must not end with a missing package.

    Parameters
    ----------
    option
        What needs the packages.
    packages
        Import names.
    otherwise
        What to do without the packages, for the message.

    Raises
    ------
    ImportError
        If one is not installed. The message names the extra that installs it.

    Examples
    --------
    >>> check_installed("tracker", "wandb", otherwise="--tracker none")  # doctest: +SKIP
    Traceback (most recent call last):
    ImportError: tracker: wandb is not installed; pip install 'prmim[wandb]', or --tracker none
    """
    for package in packages:
        if find_spec(package) is None:
            advice = f", or {otherwise}" if otherwise else ""
            name = _NAMES.get(package, package)
            raise ImportError(f"{option}: {name} is not installed; pip install 'prmim[{_EXTRAS[package]}]'{advice}")
