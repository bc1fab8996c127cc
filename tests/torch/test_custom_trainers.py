"""Support of custom trainers: weight decay by name, plans in DataLoader workers."""

from fnmatch import fnmatch
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from prmim_core import Grid, Schedule, TokenCounts, counter_noise
from prmim_torch import PixelLoss, ProgressiveReconstruction, create_method, make_plan, no_weight_decay
from prmim_torch.trainer import parameter_groups

GRID = Grid((4, 4))
SCHEDULE = Schedule(GRID, TokenCounts(4, 4, 8))
OPTIONS = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}
NARROW = {"decoder_dim": 8, "decoder_heads": 2}
METHODS = {"mae": {"decoder": "cross", **NARROW}, "simmim": {"reconstruction": "conv"}, "localmim": NARROW}


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.place = nn.Linear(8, 8), nn.Parameter(torch.zeros(1, 16, 8))
        self.pixel_loss = PixelLoss(ProgressiveReconstruction(8, GRID), (4, 4))

    def no_weight_decay(self):
        return {"place", *no_weight_decay(self)}


def decayed_by_timm(model):
    """Return what ``timm.optim.param_groups_weight_decay`` decays.

    By its documentation, names may be patterns.
    """
    exempt = model.no_weight_decay()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not name.endswith(".bias") and not any(fnmatch(name, each) for each in exempt)
    }


def decayed_by_us(model):
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.05)[0]["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in decayed}


def test_no_trainer_decays_the_reconstruction():
    host = Host()
    assert decayed_by_timm(host) == decayed_by_us(host) == {"encoder.weight", "pixel_loss.cell_head.weight"}


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda host: nn.ModuleDict({"host": host})])
def test_what_a_wrapped_model_exempts_is_not_decayed(wrap):
    decayed = {name.partition(".")[2] for name in decayed_by_us(wrap(Host()))}
    assert decayed == {"encoder.weight", "pixel_loss.cell_head.weight"}


def test_trainer_of_transformers_goes_by_the_name():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'prmim[hf]'")
    decayed = partial(transformers.Trainer.get_decay_parameter_names, None)  # it does not read the trainer
    assert set(decayed(Host())) == {"place", "encoder.weight", "pixel_loss.cell_head.weight"}
    named = nn.ModuleDict({name: ProgressiveReconstruction(8, GRID) for name in ("rebuild", "rebuild_norm")})
    assert decayed(named) == ["rebuild.table"]


@pytest.mark.parametrize("name", METHODS)
def test_methods_name_all_that_is_not_decayed(name):
    method = create_method(name, **OPTIONS, **METHODS[name])
    named = {name for name, _ in method.named_parameters()}
    exempt = method.no_weight_decay()
    assert exempt <= named
    assert {key for key in named if key.startswith("reconstruct.")} <= exempt
    assert method.config.not_decayed() <= exempt
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert decayed_by_timm(method) & trained == decayed_by_us(method)


def test_workers_make_plans():
    """Also in new processes, which get the schedule and return the plan."""
    noise = [counter_noise(0, step, torch.arange(3), 16) for step in range(2)]
    loader = DataLoader(
        noise, batch_size=None, num_workers=1, collate_fn=partial(make_plan, SCHEDULE), multiprocessing_context="spawn"
    )
    plans = list(loader)
    for plan, given in zip(plans, noise, strict=True):
        assert torch.equal(plan.order, make_plan(SCHEDULE, given).order)
        assert plan.schedule == SCHEDULE
