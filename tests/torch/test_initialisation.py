"""Modules built on the meta device get the constants and weights of CPU modules."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prmim_core import Grid, Schedule, TokenCounts, counter_noise
from prmim_methods import ClassifierConfig, MAEConfig
from prmim_torch import Classifier, ProgressiveReconstruction, create_method, make_plan
from prmim_torch.vit import Block
from tests import teachers

SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 1, "num_heads": 2}
MAE_SIZES = {**SIZES, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
RECONSTRUCTIONS = ["kernel", "interpolate", "conv"]
METHODS = ["mae", "mae interpolate", "simmim", "maskalign", "linear", "finetune"]


def build(name, teacher=None):
    """Return the module of a name: a reconstruction, a method, or a classifier."""
    if name in RECONSTRUCTIONS:
        return ProgressiveReconstruction(8, Grid((4, 4)), name)
    if name in ("linear", "finetune"):
        return Classifier(MAEConfig(**MAE_SIZES), ClassifierConfig(protocol=name), 3, init_seed=1)
    if name == "maskalign":
        return create_method(name, **SIZES, teacher=teacher, teacher_layers=1, fusion="sum")
    if name == "simmim":
        return create_method(name, **SIZES)
    reconstruction = "interpolate" if name == "mae interpolate" else "kernel"
    return create_method("mae", **MAE_SIZES, reconstruction=reconstruction)


def result(module):
    """Return the output of a module for a fixed input."""
    generator = torch.Generator().manual_seed(0)
    noise = counter_noise(0, 0, torch.arange(2), 16)
    module.eval()
    if isinstance(module, ProgressiveReconstruction):
        plan = make_plan(Schedule(module.grid, TokenCounts(4, 4, 8)), noise)
        return module(torch.randn(2, 8, 8, generator=generator), plan)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return module(images) if isinstance(module, Classifier) else module(images, noise).loss


def whole_state(module):
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in module.state_dict().items()}


def assert_same(module, other):
    here, there = whole_state(module), whole_state(other)
    assert list(here) == list(there)
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), name


def fill_with_nan(module):
    """Stand for uninitialised memory, which can hold anything."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan)
    return module


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(teachers.write_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*RECONSTRUCTIONS, *METHODS])
def test_weights_assigned_to_a_module_on_the_meta_device_give_the_same_output(name, teacher):
    wanted = build(name, teacher)
    with torch.device("meta"):
        module = build(name, teacher)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    module.load_state_dict(wanted.state_dict(), assign=True)
    assert torch.equal(result(module), result(wanted))


@pytest.mark.parametrize("name", METHODS)
def test_reset_parameters_gives_the_weights_of_a_new_module(name, teacher):
    wanted = build(name, teacher)
    with torch.device("meta"):
        module = build(name, teacher)
    fill_with_nan(module).reset_parameters()
    assert_same(module, wanted)
    assert torch.equal(result(module), result(wanted))


@pytest.mark.parametrize("name", [*RECONSTRUCTIONS, *METHODS])
def test_every_part_resets_its_own_weights(name, teacher):
    with torch.device("meta"):
        module = build(name, teacher)
    fill_with_nan(module)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert result(module).isfinite().all()
    for key, tensor in build(name, teacher).state_dict().items():
        if "pos_embed" in key or "table" in key or "running" in key:
            assert torch.equal(module.state_dict()[key], tensor), key


def test_reset_parameters_leaves_the_random_state_alone():
    method = build("simmim")
    before = torch.get_rng_state()
    method.reset_parameters()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view tensor")
@pytest.mark.parametrize("name", ["mae", "simmim", "maskalign", "finetune"])
def test_a_method_sharded_on_the_meta_device(name, teacher, process_group):
    wanted = build(name, teacher)
    with torch.device("meta"):
        module = build(name, teacher)
    for part in (*filter(lambda part: isinstance(part, Block), module.modules()), module):
        fully_shard(part)
    fill_with_nan(module).reset_parameters()
    assert any(isinstance(tensor, DTensor) for tensor in module.state_dict().values())
    assert_same(module, wanted)
    assert torch.equal(result(module), result(wanted))


def host_of(transformers):
    """Return the class of a model of transformers that holds one of our modules."""

    class HostConfig(transformers.PreTrainedConfig):
        model_type = "prmim_host"
        name: str = ""
        teacher: str | None = None

    class Host(transformers.PreTrainedModel):
        config_class = HostConfig

        def __init__(self, config):
            super().__init__(config)
            self.part = build(config.name, config.teacher)
            self.other = torch.nn.Linear(2, 2)  # a model without weights cannot be saved
            self.post_init()

        def _init_weights(self, module):
            """Keep the weights of the part."""

    return Host


@pytest.mark.parametrize("name", [*RECONSTRUCTIONS, *METHODS])
def test_a_round_trip_through_from_pretrained(name, teacher, tmp_path):
    host = host_of(pytest.importorskip("transformers"))
    model = host(host.config_class(name=name, teacher=teacher))
    for tensor in model.state_dict().values():
        tensor += 0.1 * torch.rand(tensor.shape)
    model.save_pretrained(tmp_path)
    loaded, report = host.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert_same(loaded.part, model.part)
    assert torch.equal(result(loaded.part), result(model.part))
