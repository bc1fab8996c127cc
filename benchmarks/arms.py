"""What is compared: a method dense and with part of its patches thrown, the official layout, and peers."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prmim_core import (
    CostReport,
    Transformer,
    cost,
    counter_noise,
    inverse_permutation,
    normalize_patches,
    patchify,
    simmim_cost,
    take_tokens,
    vit_size,
)
from prmim_core.cost import Attention
from prmim_torch import MAE, create_method, make_plan
from prmim_torch.method import Method

ARMS: dict[str, dict[str, Any]] = {
    "dense": {"throwing": "none"},
    "partial 0.5": {"throwing": "random", "variant": "none"},
    "PR-MIM 0.25": {"throw_ratio": 0.25},
    "PR-MIM 0.5": {"throw_ratio": 0.5},
    "PR-MIM 0.65": {"throw_ratio": 0.65},
}
"""Arms of MAE by name, as options; all others are the method's own. Partial: thrown tokens are not supervised."""

METHODS = {
    "mae": ARMS,
    "simmim": {name: options for name, options in ARMS.items() if name in ("dense", "PR-MIM 0.25", "PR-MIM 0.5")},
}
"""Arms by method."""

OFFICIAL = "official layout"
PEERS = {f"transformers {attention}": attention for attention in ("sdpa", "eager")}
"""MAEs of others, by name: that of transformers with each of its attentions."""

NUM_TOKENS = 196


def build(arm: str, model: str = "vit_base", *, method: str = "mae", **options: Any) -> nn.Module:
    """Return what an arm trains; "official layout" is :class:`OfficialLayout`, a peer is :class:`TransformersMAE`."""
    if arm in PEERS:
        return TransformersMAE(model, PEERS[arm])
    if arm == OFFICIAL:
        return OfficialLayout(create_method("mae", model=model, **ARMS["dense"], **options))
    return create_method(method, model=model, **{**METHODS[method][arm], **options})


def inputs(batch: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return random images (batch, 224, 224, 3) and the noise of their plans."""
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8).to(device)
    return images, counter_noise(0, 0, torch.arange(batch, device=device), NUM_TOKENS)


def loss(module: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    """Return the loss of a batch, whatever an arm is."""
    output = module(images, noise)
    return output if isinstance(output, Tensor) else output.loss


def share_weights(modules: Iterable[nn.Module]) -> None:
    """Let modules have one parameter where both name and shape are alike, which spares memory."""
    pool: dict[tuple[str, torch.Size], nn.Parameter] = {}
    for module in modules:
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            shared = pool.setdefault((name.removeprefix("method."), parameter.shape), parameter)
            setattr(module.get_submodule(owner), leaf, shared)


def formula(module: nn.Module, *, attention: Attention = "fused", compute_bytes: int = 4) -> CostReport:
    """Return what `prmim_core.cost` says of an arm, with either attention."""
    is_official = isinstance(module, OfficialLayout)
    method: Any = module.method if is_official else module
    shared: dict[str, Any] = {
        "patch_dim": method.patch_dim,
        "encoder": method.encoder_size,
        "variant": method.variant,
        "bookkeeping": "official" if is_official else "prmim",
        "attention": "explicit" if is_official else attention,
        "recompute_blocks": method.recompute_blocks,
        "compute_bytes": compute_bytes,
    }
    if isinstance(method, MAE):
        decoder = Transformer(method.decoder_dim, method.decoder_depth, method.decoder_heads)
        return cost(method.schedule, decoder=decoder, **shared)
    return simmim_cost(method.schedule, **shared)


class OfficialLayout(nn.Module):
    """A dense MAE that works as the official one does, to compare with: same weights, same loss, more work.

    All patches are embedded, attention is explicit (scores and softmax are stored), the decoder's sequence is put back
    in raster order, and every decoder token is predicted, the visible and the cls one too.
    """

    def __init__(self, method: MAE) -> None:
        super().__init__()
        self.method = explicit(method)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of a batch."""
        method, encoder, decoder = self.method, self.method.encoder, self.method.decoder
        plan = make_plan(method.schedule, noise)
        mean, std = (torch.tensor(values, device=images.device) for values in (method.mean, method.std))
        patches = patchify((images.float() / 255 - mean) / std, method.patch_size)

        tokens = encoder.patch_embed(patches) + encoder.pos_embed[:, 1:]
        cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([cls_token, take_tokens(tokens, plan.visible)], dim=1)
        for block in encoder.blocks:
            x = block(x)

        seen = decoder.embed(encoder.norm(x))
        hidden = decoder.mask_token.expand(len(images), method.counts.masked, -1)
        raster = take_tokens(torch.cat([seen[:, 1:], hidden], dim=1), inverse_permutation(plan.order))
        x = torch.cat([seen[:, :1], raster], dim=1) + decoder.pos_embed
        for block in decoder.blocks:
            x = block(x)
        predicted = decoder.pred(decoder.norm(x))[:, 1:]

        per_token = (predicted - normalize_patches(patches)).square().mean(-1)
        is_masked = inverse_permutation(plan.order) >= method.counts.visible
        return (per_token * is_masked).sum() / is_masked.sum()


class TransformersMAE(nn.Module):
    """Hugging Face's MAE, dense, at the sizes of ours. It takes pixels (batch, 3, 224, 224) where ours take bytes."""

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


class ExplicitAttention(nn.Module):
    """Attention written out, as timm did when MAE was released; the weights are those of ``attention``."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (batch, length, dim) to the same shape; ``bias`` is added to the scores."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        # In float32 whatever the precision, which is autocast's rule on GPUs; on CPUs it has none.
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def explicit(method: Method) -> Any:
    """Return a copy of a method whose attention is written out."""
    method = copy.deepcopy(method)
    for name, part in list(method.named_modules()):
        if name.endswith(".attn"):
            method.get_submodule(name.removesuffix(".attn")).attn = ExplicitAttention(part)
    return method
