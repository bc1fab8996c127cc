"""The trainer of prmim, and the command `prmim`.

The package imports no array framework. It imports the engine of `prmim_torch` or `prmim_jax` by name when a run starts.
"""
