"""Programs with dynamic batch size (export and compile); plans as pytrees."""

import io

import pytest
import torch
from torch.export import Dim, export
from torch.utils._pytree import tree_flatten, tree_map, treespec_dumps, treespec_loads
from torch.utils.data import default_collate

from prmim_core import Grid, Plan, Schedule, TokenCounts, counter_noise, random_decoded
from prmim_methods import ClassifierConfig, create_config
from prmim_torch import Classifier, ProgressiveReconstruction, create_method, make_plan

SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 1, "num_heads": 2}
OPTIONS = {"mae": {**SIZES, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}, "simmim": SIZES}
SCHEDULE = Schedule(Grid((4, 6), spacing=(2, 1)), TokenCounts(4, 8, 12), stages=3, unit=(2, 2))


def inputs(batch):
    generator = torch.Generator().manual_seed(batch)
    images = torch.randint(0, 256, (batch, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return images, counter_noise(0, 0, torch.arange(batch), 16)


def plan_of(*samples):
    return make_plan(SCHEDULE, counter_noise(0, 0, torch.tensor(samples), 24))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_exported_method_takes_any_batch_and_returns_the_same(name):
    method = create_method(name, **OPTIONS[name]).eval()
    batch = Dim("batch")
    program = export(method, inputs(4), dynamic_shapes=({0: batch}, {0: batch})).module()
    for size in (1, 3, 40):
        got, wanted = program(*inputs(size)), method(*inputs(size))
        assert torch.equal(got.plan.order, wanted.plan.order)
        assert got.plan.schedule == wanted.plan.schedule
        torch.testing.assert_close(got.loss, wanted.loss)
        torch.testing.assert_close(got.predicted, wanted.predicted)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_exported_classifier_takes_any_batch(name):
    classifier = Classifier(create_config(name, **OPTIONS[name]), ClassifierConfig(), 3).eval()
    for parameter in classifier.parameters():  # tables of relative positions start at 0
        torch.nn.init.normal_(parameter)
    program = export(classifier, inputs(4)[:1], dynamic_shapes=({0: Dim("batch")},)).module()
    for size in (1, 40):
        torch.testing.assert_close(program(*inputs(size)[:1]), classifier(*inputs(size)[:1]))


def test_an_exported_reconstruction_takes_plans_of_any_batch():
    module = ProgressiveReconstruction(8, SCHEDULE.grid)
    batch = Dim("batch")
    arguments = torch.randn(4, 12, 8), plan_of(0, 1, 2, 3)
    program = export(module, arguments, dynamic_shapes=({0: batch}, [{0: batch}]), strict=True).module()
    features, plan = torch.randn(7, 12, 8), plan_of(*range(7))
    torch.testing.assert_close(program(features, plan), module(features, plan))


def test_one_compiled_program_serves_all_batches():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    method = create_method("mae", **OPTIONS["mae"])
    compiled = torch.compile(method, dynamic=True, fullgraph=True, backend=backend)
    for size in (5, 7, 40):
        torch.testing.assert_close(compiled(*inputs(size)).loss, method(*inputs(size)).loss)
    assert len(graphs) == 1


def test_a_plan_is_a_pytree():
    plan = plan_of(0, 1)
    moved = tree_map(lambda order: order.to("meta"), plan)
    assert isinstance(moved, Plan)
    assert moved.order.is_meta
    assert moved.schedule == SCHEDULE
    leaves, structure = tree_flatten(plan)
    assert len(leaves) == 1
    assert structure == tree_flatten(plan_of(2, 3, 4))[1]
    assert treespec_loads(treespec_dumps(structure)) == structure


def own(grid, counts, noise, is_visible):
    return random_decoded(counts.decoded, -noise, is_visible)


def test_a_method_with_a_function_is_exported_but_its_plan_is_not_saved():
    method = create_method("mae", **OPTIONS["mae"], throwing=own).eval()
    batch = Dim("batch")
    exported = export(method, inputs(4), dynamic_shapes=({0: batch}, {0: batch}))
    got, wanted = exported.module()(*inputs(3)), method(*inputs(3))
    assert got.plan.schedule == wanted.plan.schedule
    assert torch.equal(got.plan.order, wanted.plan.order)
    plan = default_collate([wanted.plan, wanted.plan])
    assert plan.schedule.throwing is own
    with pytest.raises(ValueError, match=r"^throwing: expected a named strategy in a plan that is saved, got the func"):
        torch.export.save(exported, io.BytesIO())


def test_plans_of_a_batch_are_collated():
    samples = [(plan_of(number), torch.tensor(number)) for number in range(3)]
    plan, numbers = default_collate(samples)
    assert torch.equal(plan.order, plan_of(0, 1, 2).order)
    assert plan.schedule == SCHEDULE
    assert numbers.tolist() == [0, 1, 2]


def test_plans_of_other_schedules_are_not_collated():
    other = Schedule(SCHEDULE.grid, TokenCounts(4, 4, 16))
    plans = [plan_of(0), make_plan(other, counter_noise(0, 0, torch.tensor([1]), 24))]
    message = r"^plans: expected equal schedules, got TokenCounts\(visible=4, decoded=8, .* and .*decoded=4, "
    with pytest.raises(ValueError, match=message):
        default_collate(plans)
