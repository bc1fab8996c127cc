"""Step times of a study's arms.

Trainings that run at the same time slow each other down, so arms are timed in turns in one process.
"""

import statistics
from contextlib import ExitStack, closing
from functools import partial

import numpy as np

from benchmarks.quality.arms import ARMS, DENSE, Study
from benchmarks.quality.config import config_of
from benchmarks.report import Report, ratio, take_turns
from prmim_train.run.budget import training_budget
from prmim_train.run.engine import Engine, create_engine

WARM_UP = 2


def time_steps(study: Study, arms: list[str], repeats: int, backend: str, report: Report) -> None:
    """Print step times relative to dense, for arms with distinct training steps."""
    timed = [DENSE, *(arm for arm in arms if arm != DENSE and not (ARMS[arm].detached or ARMS[arm].equal_compute))]
    configs = {arm: config_of({**study.options(arm), "backend": backend}) for arm in timed}
    batch = configs[DENSE].batch_size
    shape = (batch, *configs[DENSE].method.image_size, configs[DENSE].method.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def step(engine: Engine) -> None:
        engine.train_step(images, np.arange(batch))
        engine.read_metrics()

    with ExitStack() as stack:
        engines = {
            arm: stack.enter_context(closing(create_engine(config, training_budget(config, 10**6))))
            for arm, config in configs.items()
        }
        times = take_turns({arm: partial(step, engine) for arm, engine in engines.items()}, repeats, warm_up=WARM_UP)
    rows = {
        arm: (1e3 * statistics.median(seconds) / batch, ratio(seconds, times[DENSE]), study.cost_ratio(arm))
        for arm, seconds in times.items()
    }
    report.table("training step", {"ms per image": ".3f", "to dense": ".2f", "MACs to dense": ".3f"}, rows)
