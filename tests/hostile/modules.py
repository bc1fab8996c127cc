"""Hostile use of PyTorch and JAX modules: foreign plans, meta devices, export."""

import copy
import importlib.util
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from cases import TINY, cases, prmim, refused, write_tiny

from prmim_core import Grid, Plan, Schedule, TokenCounts, counter_noise, make_plan

GRID = Grid((4, 5))
COUNTS = TokenCounts(5, 5, 10)
RECONSTRUCTIONS = ("kernel", "interpolate", "conv")
SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 1, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
METHODS = {
    "MAE": ("mae", DECODER),
    "MAE by distance": ("mae", {**DECODER, "reconstruction": "interpolate", "norm_pix": True}),
    "MAE by convolution": ("mae", {**DECODER, "reconstruction": "conv", "cell_norm": "window"}),
    "MAE, nothing thrown": ("mae", {**DECODER, "throw_ratio": 0.0}),
    "SimMIM": ("simmim", {}),
    "SimMIM, nothing thrown": ("simmim", {"throw_ratio": 0.0}),
    "MaskAlign": ("maskalign", {"teacher_layers": 1, "fusion": "sum"}),
}
FRAMEWORKS = ("torch", "jax")


def adapter(framework):
    """Return an adapter and the namespace of its arrays."""
    if framework == "torch":
        import torch

        import prmim_torch

        return prmim_torch, torch
    import jax.numpy as jnp

    import prmim_jax

    return prmim_jax, jnp


def product(framework, values):
    """Name values of both frameworks or one."""
    return {f"{name}, {framework}": (framework, value) for name, value in values.items()}


def both(values):
    return product("torch", values) | product("jax", values)


def plan_of(framework, schedule, batch=2):
    plan = make_plan(schedule, counter_noise(0, 0, np.arange(batch), schedule.grid.num_tokens))
    return Plan(adapter(framework)[1].asarray(plan.order), schedule)


def features_of(framework, *shape):
    _, xp = adapter(framework)
    return xp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def host(array):
    return array.detach().numpy() if hasattr(array, "detach") else np.asarray(array)


@cases(
    13,
    both(
        {
            "a transposed grid": Grid((5, 4)),
            "a flat grid of as many tokens": Grid((20,)),
            "a stretched grid": Grid((2, 10)),
            "another spacing": Grid((4, 5), spacing=(2, 1)),
            "a grid of one more axis": Grid((1, 4, 5)),
            "a larger grid": Grid((8, 8)),
            "a smaller grid": Grid((4, 4)),
        }
    ),
)
def plan_of_another_grid(folder, value):
    framework, grid = value
    module = adapter(framework)[0].ProgressiveReconstruction(8, GRID)
    plan = plan_of(framework, Schedule(grid, TokenCounts(5, 5, grid.num_tokens - 10)))
    refused(lambda: module(features_of(framework, 2, 10, 8), plan), ValueError, says="plan: expected one on Grid")


@cases(
    13,
    both(
        {
            "features of fewer tokens": (2, 9, 8),
            "features of more tokens": (2, 11, 8),
            "features of all tokens": (2, 20, 8),
            "features of no token": (2, 0, 8),
            "features of fewer images": (1, 10, 8),
            "features of no image": (0, 10, 8),
            "features of another width": (2, 10, 4),
            "features of one image, without a batch": (10, 8),
            "features of too many axes": (2, 2, 10, 8),
        }
    ),
)
def features_of_other_counts(folder, value):
    framework, shape = value
    module = adapter(framework)[0].ProgressiveReconstruction(8, GRID)
    plan = plan_of(framework, Schedule(GRID, COUNTS))
    refused(lambda: module(features_of(framework, *shape), plan), ValueError, says="features: expected")


@cases(
    13,
    {
        f"{visible} visible, {decoded} decoded, {stages} stages, {kind}": (kind, visible, decoded, stages)
        for kind in RECONSTRUCTIONS
        for visible, decoded, stages in ((5, 15, 2), (5, 14, 3), (1, 0, 1), (0, 1, 30))
    },
)
def counts_of_an_annealed_ratio(folder, value):
    kind, visible, decoded, stages = value
    package, torch = adapter("torch")
    module, fresh = (package.ProgressiveReconstruction(8, GRID, kind) for _ in range(2))
    module(features_of("torch", 2, 10, 8), plan_of("torch", Schedule(GRID, COUNTS)))
    schedule = Schedule(GRID, TokenCounts(visible, decoded, 20 - visible - decoded), stages=stages)
    features, plan = features_of("torch", 2, visible + decoded, 8), plan_of("torch", schedule)
    rebuilt = module(features, plan)
    assert rebuilt.shape == (2, 20, 8)
    assert rebuilt.isfinite().all()
    assert torch.equal(rebuilt, fresh(features, plan))


@cases(13, {f"no token is known, {framework}": framework for framework in FRAMEWORKS})
def nothing_known(folder, framework):
    module = adapter(framework)[0].ProgressiveReconstruction(8, GRID)
    plan = plan_of(framework, Schedule(GRID, TokenCounts(0, 0, 20)))
    refused(lambda: module(features_of(framework, 2, 0, 8), plan), ValueError, says="at least one")


@cases(13, product("torch", {f"no images, {kind}": kind for kind in RECONSTRUCTIONS}))
@cases(13, product("jax", {f"no images, {kind}": kind for kind in RECONSTRUCTIONS}), quick=False)
def empty_reconstruction(folder, value):
    framework, kind = value
    module = adapter(framework)[0].ProgressiveReconstruction(8, GRID, kind)
    plan = plan_of(framework, Schedule(GRID, COUNTS), batch=0)
    assert module(features_of(framework, 0, 10, 8), plan).shape == (0, 20, 8)


@cases(13, {"a NumPy plan": "numpy", "a JAX plan": "jax"})
def plan_of_another_library(folder, library):
    module = adapter("torch")[0].ProgressiveReconstruction(8, GRID)
    order = np.asarray(host(plan_of("jax" if library == "jax" else "torch", Schedule(GRID, COUNTS)).order))
    order = adapter("jax")[1].asarray(order) if library == "jax" else order
    plan = Plan(order, Schedule(GRID, COUNTS))
    refused(lambda: module(features_of("torch", 2, 10, 8), plan), TypeError)


def method_of(framework, name, folder=None, **changes):
    """Return a small method, with its name as in `METHODS`."""
    kind, options = METHODS[name]
    if kind == "maskalign":
        changes["teacher"] = str(_teachers().write_teacher(folder / "teacher"))
    return adapter(framework)[0].create_method(kind, **{**SIZES, **options, **changes})


def _teachers():
    spec = importlib.util.spec_from_file_location("teachers", Path(__file__).parents[1] / "teachers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch_of(framework, batch, size=16):
    _, xp = adapter(framework)
    images = xp.asarray(np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3), np.uint8))
    return images, counter_noise(0, 0, xp.arange(batch), (size // 4) ** 2)


@cases(13, {f"{name} of no images, {framework}": (framework, name) for name in METHODS for framework in FRAMEWORKS})
def empty_method(folder, value):
    method = method_of(*value, folder)
    images, noise = batch_of(value[0], 0)
    refused(lambda: method(images, noise), ValueError, says="images: expected at least one image")
    if value[0] == "torch":
        assert method.features(images).shape == (0, 16)


@cases(13, both({"other images": (8, 4), "other noise": (16, 8), "one more image": (16, 16)}))
def method_of_other_inputs(folder, value):
    framework, (image_size, noise_size) = value
    images, _ = batch_of(framework, 2, image_size)
    _, noise = batch_of(framework, 3 if image_size == noise_size else 2, noise_size)
    method = method_of(framework, "MAE")
    refused(lambda: method(images, noise), ValueError, says="images: " if image_size == 8 else "noise: ")


@cases(
    13,
    {
        "an output of other stages": {"stages": 1},
        "an output of another ratio": {"throw_ratio": 0.25},
        "an output of another mask ratio": {"mask_ratio": 0.9},
        "an output of another grid": {"image_size": (8, 32)},
        "an output of random throwing": {"throwing": "random"},
    },
)
def output_of_another_method(folder, changes):
    _, torch = adapter("torch")
    images, noise = batch_of("torch", 2)
    other = method_of("torch", "MAE", **changes)
    shape = (2, *changes.get("image_size", (16, 16)), 3)
    output = other(torch.zeros(shape, dtype=torch.uint8), noise)
    refused(lambda: method_of("torch", "MAE").rebuilt_pixels(images, output), ValueError, says="output: ")


def build(name, folder):
    """Return a PyTorch module by name: method, reconstruction or classifier."""
    package, _ = adapter("torch")
    if name in RECONSTRUCTIONS:
        return package.ProgressiveReconstruction(8, GRID, name)
    if name in ("finetune", "linear"):
        from prmim_methods import ClassifierConfig, MAEConfig

        return package.Classifier(MAEConfig(**SIZES, **DECODER), ClassifierConfig(protocol=name), 3)
    return method_of("torch", name, folder)


def result(module):
    """Return the output of a module of PyTorch for a fixed input."""
    package, _ = adapter("torch")
    if isinstance(module, package.ProgressiveReconstruction):
        return module(features_of("torch", 2, 10, 8), plan_of("torch", Schedule(GRID, COUNTS)))
    images, noise = batch_of("torch", 2)
    output = module.eval()(images, noise)
    return output if isinstance(module, package.Classifier) else output.loss


def assert_same(module, wanted):
    _, torch = adapter("torch")
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert torch.equal(result(module), result(wanted))


def on_meta(name, folder):
    _, torch = adapter("torch")
    with torch.device("meta"):
        return build(name, folder)


def spoil(module):
    """Give a module memory that is not initialised: NaN, as an example."""
    _, torch = adapter("torch")
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(torch.nan)
    return module


PARTS = (*RECONSTRUCTIONS, *METHODS, "finetune", "linear")


@cases(15, {f"weights assigned on the meta device: {name}": name for name in PARTS})
def assigned_weights(folder, name):
    wanted, module = build(name, folder), on_meta(name, folder)
    module.load_state_dict(wanted.state_dict(), assign=True)
    assert_same(module, wanted)


@cases(15, {f"to_empty, then weights are loaded: {name}": name for name in PARTS})
def loaded_weights(folder, name):
    wanted, module = build(name, folder), spoil(on_meta(name, folder))
    module.load_state_dict(wanted.state_dict())
    assert_same(module, wanted)


@cases(15, {f"to_empty, then reset_parameters of each part: {name}": name for name in PARTS})
def parts_reset(folder, name):
    module = spoil(on_meta(name, folder))
    module.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
    assert_same(module, build(name, folder))


@cases(15, {f"there and back: {name}": name for name in ("kernel", "MAE", "SimMIM", "MaskAlign")})
def copied_and_moved(folder, name):
    wanted = build(name, folder)
    module = copy.deepcopy(wanted).to("meta")
    module.to_empty(device="cpu").load_state_dict(wanted.state_dict())
    assert_same(module.double().float(), wanted)


@cases(15, {f"from_pretrained: {name}": name for name in PARTS}, quick=False)
def pretrained_model(folder, name):
    import transformers

    class HostConfig(transformers.PreTrainedConfig):
        model_type = "prmim_host"

    class Host(transformers.PreTrainedModel):
        config_class = HostConfig

        def __init__(self, config):
            super().__init__(config)
            _, torch = adapter("torch")
            self.part, self.other = build(name, folder), torch.nn.Linear(2, 2)
            self.post_init()

        def _init_weights(self, module):
            pass

    model = Host(HostConfig())
    for tensor in model.state_dict().values():
        tensor += 0.1
    model.save_pretrained(folder / "model")
    loaded, report = Host.from_pretrained(folder / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert_same(loaded.part, model.part)


@cases(15, {f"abstract, then weights are loaded: {name}": name for name in ("MAE", "SimMIM")}, quick=False)
def abstract_jax_method(folder, name):
    import jax
    from flax import nnx

    wanted = method_of("jax", name)
    graph, _ = nnx.split(nnx.eval_shape(lambda: method_of("jax", name)))
    images, noise = batch_of("jax", 2)
    run = jax.jit(lambda graph, state: nnx.merge(graph, state)(images, noise).loss, static_argnums=0)
    assert float(run(graph, nnx.split(wanted)[1])) == float(run(*nnx.split(wanted)))


def exported(module, *arguments, strict=False, dynamic=None):
    import torch

    if dynamic is None:
        batch = torch.export.Dim("batch")
        dynamic = tuple([{0: batch}] if isinstance(one, Plan) else {0: batch} for one in arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=strict).module()


@cases(16, {f"export of {name}": name for name in METHODS}, quick=False)
def exported_method(folder, name):
    import torch

    method = method_of("torch", name, folder).eval()
    program = exported(method, *batch_of("torch", 4))
    for size in (1, 2, 40):
        torch.testing.assert_close(program(*batch_of("torch", size)).loss, method(*batch_of("torch", size)).loss)


@cases(16, {f"strict export of {name}": name for name in ("MAE", "SimMIM")}, quick=False)
def strictly_exported_method(folder, name):
    import torch

    method = method_of("torch", name).eval()
    program = exported(method, *batch_of("torch", 4), strict=True)
    torch.testing.assert_close(program(*batch_of("torch", 7)).loss, method(*batch_of("torch", 7)).loss)


@cases(16, {"export of a batch of one": 1, "export of a batch of as many images as channels": 3}, quick=False)
def exported_from_odd_batches(folder, size):
    import torch

    method = method_of("torch", "MAE").eval()
    auto = torch.export.Dim.AUTO
    program = exported(method, *batch_of("torch", size), dynamic=({0: auto}, {0: auto}))
    torch.testing.assert_close(program(*batch_of("torch", size)).loss, method(*batch_of("torch", size)).loss)


@cases(16, {"export of features": "features", "export of a classifier": "classifier"}, quick=False)
def exported_encoder(folder, what):
    import torch

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.method = method_of("torch", "SimMIM").eval()

        def forward(self, images):
            return self.method.features(images)

    module = Features() if what == "features" else build("finetune", folder).eval()
    program = exported(module, batch_of("torch", 4)[0])
    for size in (1, 9):
        images, _ = batch_of("torch", size)
        torch.testing.assert_close(program(images), module(images))


@cases(16, {f"export with a plan as input: {kind}": kind for kind in RECONSTRUCTIONS}, quick=False)
def exported_reconstruction(folder, kind):
    import torch

    module, schedule = build(kind, folder), Schedule(GRID, COUNTS)
    program = exported(module, features_of("torch", 4, 10, 8), plan_of("torch", schedule, 4))
    features, plan = features_of("torch", 6, 10, 8), plan_of("torch", schedule, 6)
    torch.testing.assert_close(program(features, plan), module(features, plan))


@cases(16, {f"compile(dynamic=True) of {name}": name for name in ("MAE", "SimMIM", "MaskAlign")}, quick=False)
def compiled_for_any_batch(folder, name):
    import torch

    torch.compiler.reset()
    graphs = []
    method = method_of("torch", name, folder)

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(method, dynamic=True, fullgraph=True, backend=backend)
    for size in (5, 7, 40):
        torch.testing.assert_close(compiled(*batch_of("torch", size)).loss, method(*batch_of("torch", size)).loss)
    assert len(graphs) == 1


@cases(16, {f"JAX export of {name}": name for name in ("MAE", "SimMIM")}, quick=False)
def exported_jax_method(folder, name):
    import jax
    import jax.export
    from flax import nnx

    method = method_of("jax", name)
    graph, state = nnx.split(method)
    (batch,) = jax.export.symbolic_shape("batch")
    images, noise = batch_of("jax", 5)
    shapes = [jax.ShapeDtypeStruct((batch, *one.shape[1:]), one.dtype) for one in (images, noise)]
    run = jax.jit(lambda state, images, noise: nnx.merge(graph, state)(images, noise).loss)
    program = jax.export.export(run)(jax.eval_shape(lambda: state), *shapes)
    np.testing.assert_allclose(program.call(state, images, noise), run(state, images, noise), rtol=1e-6)


def _in_a_dictionary(plan):
    from torch.utils._pytree import tree_map

    moved = tree_map(lambda tensor: tensor.to("meta"), {"plans": [plan, plan]})
    assert moved["plans"][1].order.is_meta
    assert moved["plans"][1].schedule == plan.schedule


def _collated(plan):
    from torch.utils.data import default_collate

    collated = default_collate([{"plan": plan}, {"plan": plan}])["plan"]
    assert collated.order.shape == (4, 20)
    collated.check()


def _collated_with_another(plan):
    from torch.utils.data import default_collate

    other = plan_of("torch", Schedule(GRID, TokenCounts(4, 6, 10)))
    refused(lambda: default_collate([plan, other]), ValueError, says="plans: expected equal schedules")


def _loaded_by_workers(plan):
    from torch.utils.data import DataLoader

    (collated,) = DataLoader([plan, plan, plan], batch_size=3)
    assert collated.order.shape == (6, 20)


def _mapped(plan):
    import torch

    visible = torch.func.vmap(lambda one: one.order[:5])(plan)
    assert torch.equal(visible, plan.visible)


def _dumped(plan):
    from torch.utils._pytree import tree_structure, treespec_dumps, treespec_loads

    structure = tree_structure(plan)
    assert treespec_loads(treespec_dumps(structure)) == structure


PLANS = {
    "in a dictionary": _in_a_dictionary,
    "collated": _collated,
    "collated with another": _collated_with_another,
    "loaded in batches": _loaded_by_workers,
    "mapped over": _mapped,
    "its structure as JSON": _dumped,
}


@cases(16, {f"a plan {name}": check for name, check in PLANS.items()})
def plan_as_pytree(folder, check):
    adapter("torch")
    check(plan_of("torch", Schedule(GRID, COUNTS)))


@cases(16, {f"no float64 on the device: {name}": name for name in PARTS if name != "MaskAlign"})
def no_float64(folder, name):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    class NothingWide(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in tree_leaves((args, out)):
                wide = isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype.itemsize > 4
                assert not wide or not tensor.dtype.is_floating_point, function
                assert not wide or not tensor.dtype.is_complex, function
            return out

    inputs = batch_of("torch", 2)
    if name in RECONSTRUCTIONS:
        inputs = features_of("torch", 2, 10, 8), plan_of("torch", Schedule(GRID, COUNTS))
    with NothingWide():
        module = build(name, folder).to("meta")
        output = module(*tree_map(lambda tensor: tensor.to("meta"), inputs))
        loss = output.sum() if isinstance(output, torch.Tensor) else output.loss
        if loss.requires_grad:
            loss.backward()
            torch.optim.AdamW(module.parameters()).step()


MPS = {
    "--device mps without one": ("mps", "torch", "expected an available device, got 'mps'"),
    "--device mps with JAX": ("mps", "jax", "expected an available device, got 'mps'"),
    "--device mps:1": ("mps:1", "torch", "expected auto, cpu, cuda, cuda:N or mps"),
    "--device MPS": ("MPS", "torch", "expected auto, cpu, cuda, cuda:N or mps"),
}


@cases(16, MPS)
def device_mps(folder, value):
    device, backend, says = value
    import torch

    if not torch.backends.mps.is_available():
        write_tiny(folder)
        run = partial(prmim, folder, "pretrain", *TINY, "--backend", backend, "--device", device, "--out", "run")
        run(code=2, says=says)
