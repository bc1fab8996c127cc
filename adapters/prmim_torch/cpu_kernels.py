"""Selection of CPU kernels for matrix products and attention.

On other devices, PyTorch's own kernels are used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint

from prmim_methods.hardware import cpu_vendor

# On AMD's CPUs with AVX-512, oneDNN multiplies float32 matrices faster than MKL; on Intel's, MKL is faster.
ONEDNN: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and cpu_vendor() == "AuthenticAMD"
)
SMALL_PRODUCT = 2**22
"""Multiply-accumulates below which the setup of a convolution costs more than it saves."""
SHORT_SEQUENCE = 256
"""Most tokens for which bfloat16 matrix products on a CPU beat the fused attention kernel; at 577, the kernel wins."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``; drop-in for ``torch.nn.functional.linear``.

    Notes
    -----
    On AMD's CPUs with AVX-512, large float32 products run as convolutions of kernel size 1. PyTorch multiplies matrices
    with MKL, which uses AVX-512 on Intel's CPUs only. It convolves with oneDNN, which always uses AVX-512, and supports
    channels last without a copy.

    The choice depends on the batch size. Programs with a dynamic batch size, or for other machines (exported), always
    multiply matrices.
    """
    if ONEDNN and x.device.type == "cpu" and x.ndim == 3 and _is_faster_as_convolution(x, weight):
        return F.conv2d(x.mT.unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).mT
    return F.linear(x, weight, bias)


def _is_faster_as_convolution(x: Tensor, weight: Tensor) -> bool:
    is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not is_float32 or torch.compiler.is_exporting():
        return False
    # False, without a guard, if the answer depends on a dynamic batch size.
    is_known = statically_known_true if torch.compiler.is_compiling() else bool
    is_large = is_known(x.numel() * weight.shape[0] >= SMALL_PRODUCT)
    # PyTorch's condition for a convolution of kernel size 1 in oneDNN.
    return is_large and (is_known(x.shape[0] >= 16) or _num_threads() > 1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _num_threads() -> int:
    return torch.get_num_threads()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return scaled dot-product attention; all inputs are (..., length, head_dim).

    Notes
    -----
    Short bfloat16 sequences on a CPU use plain matrix products, because the backward pass of PyTorch's fused kernel is
    up to ten times as slow. They are recomputed in the backward pass to save memory.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-2] > SHORT_SEQUENCE:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if not torch.is_grad_enabled():
        return _attend_plainly(q, k, v, bias)
    return checkpoint(_attend_plainly, q, k, v, bias, use_reentrant=False, preserve_rng_state=False)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    return (scores if bias is None else scores + bias).softmax(-1) @ v
