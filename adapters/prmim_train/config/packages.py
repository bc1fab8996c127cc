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
    "av": "video",
    "nibabel": "medical",
    "datasets": "hf",
    "lmdb": "lmdb",
    "fsspec": "remote",
    "aiohttp": "remote",
    "s3fs": "remote",
}
"""Package to the extra of prmim that installs it."""
_NAMES = {"av": "PyAV", "sklearn": "scikit-learn"}


def check_installed(option: str, *packages: str, otherwise: str = "") -> None:
    """Check that optional packages are installed, without importing them.

    Call it before the work starts, so that a missing package does not end a long training.

    Parameters
    ----------
    option
        Option that needs the packages.
    packages
        Import names.
    otherwise
        Alternative that needs no package, for the message.

    Raises
    ------
    ImportError
        If a package is not installed. The message names the extra that installs it.

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
            wanted = f"'prmim[{_EXTRAS[package]}]'" if package in _EXTRAS else name
            raise ImportError(f"{option}: {name} is not installed; pip install {wanted}{advice}")
