"""Methods by name."""

import pytest
import torch

from prmim_core import TokenCounts, counter_noise
from prmim_torch import METHODS, create_method


def test_a_method_is_built_by_name(tiny):
    method = create_method("mae", **tiny, throw_ratio=0.25, stages=3)
    assert isinstance(method, METHODS["mae"])
    assert method.schedule.stage_sizes == (2, 1, 1)
    assert method.counts.thrown == 4


@pytest.mark.parametrize(
    ("name", "counts"), [("mae", TokenCounts(4, 4, 8)), ("simmim", TokenCounts(4, 8, 4))], ids=lambda value: str(value)
)
def test_ratios_are_the_methods_own_where_none_is_given(tiny, tiny_simmim, name, counts):
    assert create_method(name, **{"mae": tiny, "simmim": tiny_simmim}[name]).counts == counts


def test_named_models():
    method = create_method("mae", model="vit_small", image_size=(32, 32), depth=1)
    assert (method.embed_dim, method.depth, method.num_heads) == (384, 1, 6)


def test_unknown_names_are_answered_with_the_known_ones(tiny):
    with pytest.raises(ValueError, match=rf"^name: expected one of {', '.join(METHODS)}, got 'mea'$"):
        create_method("mea", **tiny)
    with pytest.raises(TypeError, match=r"^options: 'mae' has no option 'stage', only model, image_size, .*, stages, "):
        create_method("mae", **tiny, stage=3)


def losses_and_gradients(method, images, noise, forward=None):
    """Return the loss, all gradients, and the bytes that are kept between the two passes."""
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


def test_a_flag_is_a_flag(tiny):
    with pytest.raises(TypeError, match=r"^recompute_blocks: expected True or False, got 1$"):
        create_method("mae", **tiny, recompute_blocks=1)
