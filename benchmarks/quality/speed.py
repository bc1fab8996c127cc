"""Step times of a study's arms.

Trainings that run at the same time slow each other down, so arms are timed in turns in one process.
"""

import statistics
from contextlib import ExitStack, closing
from functools import partial

import numpy as np

from benchmarks.quality.arms import Study
from benchmarks.report import Report, random_images, ratio, take_turns
from benchmarks.step import WARM_UP
from prmim_train.config.pretrain import pretrain_config
from prmim_train.run.budget import training_budget
from prmim_train.run.engine import Engine, create_engine


def time_steps(study: Study, arms: list[str], repeats: int, backend: str, report: Report) -> None:
    """Print step times relative to the first arm.

    Arms of equal options have the same step, which is timed under the name of the first of them.
    """
    first = study.arms[0]
    timed = [
        next(other for other in study.arms if study.options(other) == study.options(arm)) for arm in (first, *arms)
    ]
    costs = {arm: study.cost_ratio(arm) for arm in timed}
    configs = {arm: pretrain_config(**{**study.options(arm), "backend": backend}) for arm in costs}
    batch = configs[first].batch_size
    images = random_images((batch, *configs[first].method.image_size, configs[first].method.channels))

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
        arm: (1e3 * statistics.median(seconds) / batch, ratio(seconds, times[first]), costs[arm])
        for arm, seconds in times.items()
    }
    report.table("training step", {"ms per image": ".3f", f"to {first}": ".2f", f"MACs to {first}": ".3f"}, rows)
