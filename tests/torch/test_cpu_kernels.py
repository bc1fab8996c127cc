"""CPU kernels: equal to PyTorch's functions, and used only where faster."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from prmim_torch import cpu_kernels
from prmim_torch.cpu_kernels import attend, linear


@pytest.mark.parametrize("rows", [slice(None), slice(1, 4)], ids=["all", "some"])
def test_a_product_as_a_convolution_is_the_same(monkeypatch, rows):
    monkeypatch.setattr(cpu_kernels, "ONEDNN", True)
    monkeypatch.setattr(cpu_kernels, "SMALL_PRODUCT", 0)
    inputs = torch.randn(16, 5, 8), torch.randn(6, 8), torch.randn(6)
    ours, theirs = ([part.clone().requires_grad_() for part in inputs] for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        out = linear(ours[0][:, rows], *ours[1:])
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.aten.convolution]
    expected = F.linear(theirs[0][:, rows], *theirs[1:])
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    gradient = torch.randn_like(expected)
    out.backward(gradient)
    expected.backward(gradient)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("case", ["small", "float64", "autocast", "two axes"])
def test_other_products_are_products(monkeypatch, case):
    monkeypatch.setattr(cpu_kernels, "ONEDNN", True)
    monkeypatch.setattr(cpu_kernels, "SMALL_PRODUCT", 16 * 5 * 8 * 6 + (case == "small"))
    dtype = torch.float64 if case == "float64" else torch.float32
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((16, 5, 8), (6, 8), (6,)))
    x = x.flatten(0, 1) if case == "two axes" else x
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.aten.addmm]


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any"])
def test_a_compiled_product_is_a_convolution_if_its_size_is_known(monkeypatch, dynamic):
    monkeypatch.setattr(cpu_kernels, "ONEDNN", True)
    monkeypatch.setattr(cpu_kernels, "SMALL_PRODUCT", 0)
    called = set()

    def backend(graph, example_inputs):
        called.update(node.target for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(linear, dynamic=dynamic, fullgraph=True, backend=backend)
    for batch in (20, 3):
        inputs = torch.randn(batch, 5, 8), torch.randn(6, 8), torch.randn(6)
        torch.testing.assert_close(compiled(*inputs), F.linear(*inputs))
        if batch == 20:
            assert (torch.conv2d in called, F.linear in called) == (not dynamic, dynamic)


def test_an_exported_product_is_a_product(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "ONEDNN", True)
    monkeypatch.setattr(cpu_kernels, "SMALL_PRODUCT", 0)

    class Product(torch.nn.Module):
        def forward(self, *inputs):
            return linear(*inputs)

    program = torch.export.export(Product(), (torch.randn(20, 5, 8), torch.randn(6, 8), torch.randn(6)))
    assert torch.ops.aten.linear.default in {node.target for node in program.graph.nodes}


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("length", [9, 300], ids=["short", "long"])
def test_attention_in_bfloat16_is_that_of_float32_and_keeps_no_scores(length, has_bias):
    values = torch.randn(3, 2, 4, length, 8).bfloat16()
    bias = torch.randn(4, length, length).bfloat16() if has_bias else None
    ours, theirs = (list(values.clone().to(dtype).requires_grad_()) for dtype in (torch.bfloat16, torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = attend(*ours, bias)
    if length <= cpu_kernels.SHORT_SEQUENCE:
        assert all(tensor.numel() <= values[0].numel() or tensor is bias for tensor in kept)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=None if bias is None else bias.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
    both = ((out, ours), (expected, theirs))
    gradients, wanted = (torch.autograd.grad(x.float().square().sum(), of) for x, of in both)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, atol=0.1, rtol=0.1)
