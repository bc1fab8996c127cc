"""Methods by name."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prmim_methods
from prmim_core import counter_noise, random_decoded
from prmim_methods import create_config
from prmim_torch import METHODS, create_method, load_weights, save_weights


def own(grid, counts, noise, is_visible):
    return random_decoded(counts.decoded, -noise, is_visible)


class Weighted(torch.nn.Module):
    """A learned mean of the known features."""

    def __init__(self, dim, grid):
        super().__init__()
        self.score = torch.nn.Linear(dim, 1)

    def forward(self, features, known, thrown):
        mean = self.score(features).softmax(1).mT @ features
        return mean.expand(*thrown.shape, -1)


@pytest.mark.parametrize("name", ["mae", "simmim", "localmim"])
def test_functions_of_ones_own(tiny, tiny_simmim, name, tmp_path):
    options = {
        "mae": tiny,
        "simmim": {**tiny_simmim, "throw_by": "unit"},
        "localmim": {**tiny_simmim, "decoder_dim": 8, "decoder_heads": 2},
    }[name]
    method = create_method(name, **options, throwing=own, reconstruction=Weighted)
    images, noise = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8), counter_noise(0, 0, torch.arange(2), 16)
    output = method(images, noise)
    output.plan.check()
    assert torch.equal(output.plan.order, create_method(name, **options, throwing=own)(images, noise).plan.order)
    assert not torch.equal(output.plan.decoded, create_method(name, **options)(images, noise).plan.decoded)
    output.loss.backward()
    weights = {key: p for key, p in method.named_parameters() if ".mix." in key}
    assert weights
    assert all(weight.grad is not None for weight in weights.values())
    # The weights are the method's: from its seed, and in its file, which fits no other reconstruction.
    again = create_method(name, **options, throwing=own, reconstruction=Weighted)
    other = create_method(name, **options, reconstruction=Weighted, init_seed=1)
    key = next(key for key in weights if key.endswith("score.weight"))
    assert torch.equal(again.state_dict()[key], weights[key])
    assert not torch.equal(other.state_dict()[key], weights[key])
    save_weights(method, tmp_path / "own.safetensors")
    load_weights(other, tmp_path / "own.safetensors")
    assert torch.equal(other.state_dict()[key], weights[key])
    with pytest.raises(ValueError, match=r"^weights: reconstruction: expected 'kernel', got 'custom'$"):
        load_weights(create_method(name, **options), tmp_path / "own.safetensors")


def test_a_compiled_method_calls_functions_of_ones_own(tiny):
    method = create_method("mae", **tiny, throwing=own, reconstruction=Weighted)
    images, noise = torch.zeros(2, 16, 16, 3, dtype=torch.uint8), counter_noise(0, 0, torch.arange(2), 16)
    compiled = torch.compile(method, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, noise).plan.order, method(images, noise).plan.order)


def test_a_factory_returns_a_mixing_module(tiny):
    with pytest.raises(TypeError, match=r"^reconstruction: expected <lambda> to return a mixing module, got NoneType$"):
        create_method("mae", **tiny, reconstruction=lambda dim, grid: None)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_a_method_is_built_from_its_record(tiny, tiny_simmim, name):
    options = {**{"mae": tiny, "simmim": tiny_simmim}[name], "throw_ratio": 0.25, "stages": 3, "mask_ratio": None}
    method = create_method(name, **options)
    assert type(method) is METHODS[name]
    assert method.config == create_config(name, **options)
    assert set(METHODS) == set(prmim_methods.METHODS)


def test_named_models():
    method = create_method("mae", model="vit_small", image_size=(32, 32), depth=1)
    assert len(method.encoder.blocks) == 1
    assert method.encoder.cls_token.shape == (1, 1, 384)
    assert method.encoder.blocks[0].attn.num_heads == 6


def test_unknown_names_are_refused(tiny):
    with pytest.raises(ValueError, match=r"^method: expected one of mae, "):
        create_method("mea", **tiny)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_the_other_initial_weights_do_not_depend_on_cells(tiny, tiny_simmim, name):
    sizes = {"mae": tiny, "simmim": tiny_simmim}[name]
    cells, patches = (create_method(name, **sizes, thrown_target=t).state_dict() for t in ("cells", "patch"))
    assert set(cells) - set(patches) == {"cell_head.weight", "cell_head.bias"}
    for key, weight in patches.items():
        assert torch.equal(cells[key], weight), key


def losses_and_gradients(method, images, noise, forward=None):
    """Return the loss, all gradients, and the bytes saved for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (method if forward is None else forward)(images, noise).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    method.zero_grad()
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_recomputed_blocks_change_nothing_but_what_is_kept(tiny, tiny_simmim, make_images, name):
    options = {**{"mae": tiny, "simmim": tiny_simmim}[name], "depth": 4}
    keeps, recomputes = (create_method(name, **options, recompute_blocks=flag) for flag in (False, True))
    assert recomputes.architecture() == keeps.architecture()
    batch = torch.from_numpy(make_images(8, 16, 16, 3)), counter_noise(0, 0, torch.arange(8), 16)
    loss, gradients, kept = losses_and_gradients(keeps, *batch)
    same_loss, same_gradients, less = losses_and_gradients(recomputes, *batch)
    assert same_loss == loss
    for parameter, gradient in gradients.items():
        assert torch.equal(same_gradients[parameter], gradient), parameter
    assert less < 0.5 * kept


def test_recomputed_blocks_compile_to_one_graph(tiny, make_images):
    method = create_method("mae", **tiny, recompute_blocks=True)
    batch = torch.from_numpy(make_images(2, 16, 16, 3)), counter_noise(0, 0, torch.arange(2), 16)
    loss, gradients, _ = losses_and_gradients(method, *batch)
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    same_loss, same_gradients, _ = losses_and_gradients(method, *batch, compiled)
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_gradients, gradients)


def test_attention_drives_a_step_that_compiles_to_one_graph(tiny_simmim, make_images):
    method = create_method("simmim", **tiny_simmim, throwing="weighted")
    images, noise = torch.from_numpy(make_images(2, 16, 16, 3)), counter_noise(0, 0, torch.arange(2), 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        weights = method.attention(images)
    assert counter.get_total_flops() == 2 * 2 * method.config.attention_cost().macs
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    output, expected = compiled(images, noise, weights), method(images, noise, weights)
    torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(output.plan.order, expected.plan.order)
    with pytest.raises(ValueError, match=r"^weights: expected a tensor with throwing 'weighted', got None$"):
        method(images, noise)
    with pytest.raises(ValueError, match=r"^weights: expected None without throwing 'weighted', got a tensor$"):
        create_method("simmim", **tiny_simmim)(images, noise, weights)
