"""Compared arms: dense, with thrown tokens, official layout, and peers."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prmim_core import counter_noise, normalize_patches, patchify, take_tokens
from prmim_methods import Accounting, CostReport, TrainingConfig, create_config, vit_size
from prmim_torch import MAE, create_method, make_plan
from prmim_torch.cross_decoder import CrossAttention
from prmim_torch.method import Method

ARMS: dict[str, dict[str, Any]] = {
    "dense": {"throw_ratio": 0.0},
    "partial 0.5": {"throwing": "random", "reconstruction": "none"},
    "PR-MIM 0.25": {"throw_ratio": 0.25},
    "PR-MIM 0.5": {"throw_ratio": 0.5},
    "PR-MIM 0.65": {"throw_ratio": 0.65},
}
"""Options of MAE's arms; omitted options have the method's defaults. Partial: thrown tokens are not supervised."""

METHODS = {
    "mae": ARMS,
    "simmim": {name: options for name, options in ARMS.items() if name in ("dense", "PR-MIM 0.25", "PR-MIM 0.5")},
    "crossmae": {
        name: {"decoder": "cross", "decoder_depth": 12, **ARMS[name]} for name in ("dense", "partial 0.5", "PR-MIM 0.5")
    },
}
"""Arms by method."""

RECORDS = {"crossmae": "mae"}
"""Method whose record an arm uses, if it has no record of its own."""

OFFICIAL = "official layout"
PEERS = {f"transformers {attention}": attention for attention in ("sdpa", "eager")}
"""Peer implementations: the MAE of transformers, with each of its attention kernels."""

NUM_TOKENS = 196


def build(arm: str, model: str = "vit_base", *, method: str = "mae", **options: Any) -> nn.Module:
    """Return the module of an arm, of the official layout or of a peer."""
    if arm in PEERS:
        return TransformersMAE(model, PEERS[arm])
    if arm == OFFICIAL:
        return OfficialLayout(create_method("mae", model=model, **ARMS["dense"], **options))
    return create_method(RECORDS.get(method, method), model=model, **{**METHODS[method][arm], **options})


def jax_engine(arm: str, model: str, *, method: str, precision: str, device: str = "auto", **options: Any) -> Any:
    """Return a JAX engine that trains an arm."""
    from prmim_jax import Engine

    training = TrainingConfig(total_steps=1000, learning_rate=1e-4, precision=precision, device=device)
    config = create_config(RECORDS.get(method, method), model=model, **METHODS[method][arm], **options)
    return Engine(config, training)


def compile_step(engine: Any, batch: int) -> Any:
    """Return a JAX engine's compiled training step for images of 224 x 224 pixels."""
    inputs = engine._inputs(np.zeros((batch, 224, 224, 3), np.uint8), np.arange(batch))
    return engine._train.lower(engine._state, engine._buffers, inputs, 0, 0.0).compile()


def inputs(batch: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return random images, uint8 (batch, 224, 224, 3), and noise (batch, 196)."""
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8).to(device)
    return images, counter_noise(0, 0, torch.arange(batch, device=device), NUM_TOKENS)


def loss(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Return the loss of a batch, for any arm or peer.

    The batch holds images, noise and, for some methods, weights.
    """
    output = module(*inputs)
    return output if isinstance(output, Tensor) else output.loss


def share_weights(modules: Iterable[nn.Module]) -> None:
    """Share parameters of equal name and shape between modules, to save memory."""
    pool: dict[tuple[str, torch.Size], nn.Parameter] = {}
    for module in modules:
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            shared = pool.setdefault((name.removeprefix("method."), parameter.shape), parameter)
            setattr(module.get_submodule(owner), leaf, shared)


def formula(module: nn.Module, *, attention: str = "fused", compute_bytes: int = 4) -> CostReport:
    """Return the cost of an arm by the formulas of :mod:`prmim_methods.cost`."""
    if isinstance(module, OfficialLayout):
        accounting = Accounting(compute_bytes=compute_bytes, attention="explicit", bookkeeping="official")
        return module.method.config.cost(accounting)
    method: Any = module
    return method.config.cost(Accounting(compute_bytes=compute_bytes, attention=attention))


class OfficialLayout(nn.Module):
    """Dense MAE that computes as the official code does.

    Weights and loss are the same as ours. The module embeds all patches, stores attention scores and softmax, restores
    raster order in the decoder, and predicts every decoder token, including visible tokens and the class token.
    """

    def __init__(self, method: MAE) -> None:
        super().__init__()
        self.method = explicit(method)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of a batch."""
        config, encoder, decoder = self.method.config, self.method.encoder, self.method.decoder
        plan = make_plan(config.schedule, noise)
        mean, std = (torch.tensor(values, device=images.device) for values in (config.pixel_mean, config.pixel_std))
        patches = patchify((images.float() / 255 - mean) / std, config.patch_size)

        tokens = encoder.patch_embed(patches) + encoder.pos_embed[:, 1:]
        cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([cls_token, take_tokens(tokens, plan.visible)], dim=1)
        for block in encoder.blocks:
            x = block(x)

        seen = decoder.embed(encoder.norm(x))
        hidden = decoder.mask_token.expand(len(images), config.counts.masked, -1)
        raster = take_tokens(torch.cat([seen[:, 1:], hidden], dim=1), plan.restore)
        x = torch.cat([seen[:, :1], raster], dim=1) + decoder.pos_embed
        for block in decoder.blocks:
            x = block(x)
        predicted = decoder.pred(decoder.norm(x))[:, 1:]

        per_token = (predicted - normalize_patches(patches)).square().mean(-1)
        return (per_token * plan.mask).sum() / plan.mask.sum()


class TransformersMAE(nn.Module):
    """Dense MAE of transformers at our sizes.

    Takes float images (batch, 3, 224, 224).
    """

    def __init__(self, model: str, attention: str) -> None:
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        size = vit_size(model)
        self.model = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=size.dim,
                num_hidden_layers=size.depth,
                num_attention_heads=size.heads,
                intermediate_size=size.mlp_ratio * size.dim,
                decoder_hidden_size=512,
                decoder_num_hidden_layers=8,
                decoder_num_attention_heads=16,
                decoder_intermediate_size=2048,
                mask_ratio=0.75,
                norm_pix_loss=True,
                attn_implementation=attention,
            )
        ).train()

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of a batch."""
        loss: Tensor = self.model(pixels, noise=noise).loss
        return loss


class ExplicitCrossAttention(nn.Module):
    """Attention to a context with explicit scores and the weights of ``attention``."""

    def __init__(self, attention: CrossAttention) -> None:
        super().__init__()
        self.num_heads, self.q, self.kv, self.proj = attention.num_heads, attention.q, attention.kv, attention.proj

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map (batch, length, dim) to the same shape.

        The context is (batch, context length, context_dim).
        """
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(_attend(q, k, v).transpose(1, 2).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    # Always float32: autocast does so on GPUs, but not on CPUs.
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return weights @ v


class ExplicitAttention(nn.Module):
    """Explicit attention with the weights of ``attention``, as in timm 0.3."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (batch, length, dim) to the same shape; ``bias`` is added to the scores."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(_attend(q, k, v, bias).transpose(1, 2).flatten(2))


def explicit(method: Method) -> Any:
    """Return a copy of a method with explicit attention."""
    method = copy.deepcopy(method)
    for name, part in list(method.named_modules()):
        if name.endswith(".attn"):
            explicit_part = ExplicitCrossAttention if isinstance(part, CrossAttention) else ExplicitAttention
            method.get_submodule(name.removesuffix(".attn")).attn = explicit_part(part)
    return method
