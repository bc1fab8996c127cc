"""Compares a framework's `take` and `rebuild` with the core in NumPy.

docs/guides/foreign_frameworks.md defines both functions.

The script of a page calls it in a process of its own; the packages of the page are not imported here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from prmim_core import (
    Grid,
    Schedule,
    TokenCounts,
    counter_noise,
    interpolate,
    make_plan,
    stage_weights,
    take_tokens,
)

SCHEDULES = [
    Schedule(Grid((14, 14)), TokenCounts(49, 49, 98)),
    Schedule(Grid((9,), (3,)), TokenCounts(2, 1, 6), stages=3),
    Schedule(Grid((2, 4, 4), (4, 1, 1)), TokenCounts(4, 8, 20), stages=1, throwing="random"),
]


def compare(
    take: Callable[..., Any],
    rebuild: Callable[..., Any],
    to_framework: Callable[..., Any],
    to_numpy: Callable[..., Any],
    *,
    is_foreign: bool,
) -> None:
    """Assert that gathers and stages equal NumPy's to 1e-5.

    The core must reject arrays of the framework.

    Parameters
    ----------
    take, rebuild
        The functions of the page.
    to_framework, to_numpy
        Convert arrays.
    is_foreign
        Whether the core refuses the arrays of the framework. If not, it must make the same plan of them.
    """
    for schedule in SCHEDULES:
        length = schedule.grid.num_tokens
        noise = counter_noise(3, 0, np.arange(3), length)
        plan = make_plan(schedule, noise)
        values = np.random.default_rng(0).normal(size=(3, length, 6)).astype(np.float32)
        for index in (plan.order, plan.visible, plan.masked, plan.stage(1)):
            taken = to_numpy(take(to_framework(values), to_framework(index)))
            np.testing.assert_array_equal(taken, take_tokens(values, index))
        features = values[:, : schedule.num_known(1)]
        rebuilt = to_numpy(rebuild(to_framework(features), [to_framework(matrix) for matrix in stage_weights(plan)]))
        np.testing.assert_allclose(rebuilt, interpolate(features, plan), rtol=0, atol=1e-5)
        if not is_foreign:
            np.testing.assert_array_equal(to_numpy(make_plan(schedule, to_framework(noise)).order), plan.order)
            continue
        try:
            make_plan(schedule, to_framework(noise))
        except TypeError as error:
            message = str(error)
        else:
            raise AssertionError("make_plan: expected to refuse the arrays of this framework")
        if (
            "stage_weights(plan)" not in message
            or "docs/guides/foreign_frameworks.md" not in message
            or "\n" in message
        ):
            raise AssertionError(f"make_plan: expected an error that names the way in, got {message!r}")
    print("golden comparisons passed")  # noqa: T201
