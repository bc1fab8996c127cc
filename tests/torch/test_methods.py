"""Methods by name."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prmim_methods
from prmim_core import counter_noise
from prmim_methods import create_config
from prmim_torch import METHODS, create_method


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
    with pytest.raises(ValueError, match="weights: expected a tensor with throwing 'weighted' only, got none"):
        method(images, noise)
    with pytest.raises(ValueError, match="weights: expected a tensor with throwing 'weighted' only, got a tensor"):
        create_method("simmim", **tiny_simmim)(images, noise, weights)
