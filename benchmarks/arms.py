"""What is compared: ViT-B/16 at 224 px, dense and with half of the patches thrown, and the official layout."""

import platform

import torch
from torch import Tensor, nn

from prmim_core import counter_noise, inverse_permutation, normalize_patches, patchify, take_tokens
from prmim_torch import MAE, create_method, make_plan

ARMS = {
    "dense": {"throwing": "none"},
    "partial, random": {"throwing": "random", "variant": "none"},
    "PR-MIM 0.5": {},
}


def build(arm: str, model: str = "vit_base") -> nn.Module:
    """Return the method of an arm; "official layout" is :class:`OfficialLayout`."""
    if arm == "official layout":
        return OfficialLayout(create_method("mae", model=model, throwing="none"))
    return create_method("mae", model=model, **ARMS[arm])


def inputs(batch: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return random images (batch, 224, 224, 3) and the noise of their plans."""
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8).to(device)
    return images, counter_noise(0, 0, torch.arange(batch, device=device), 196)


def machine() -> str:
    """Name what the numbers were measured on."""
    name = f"{platform.machine()}, {torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"torch {torch.__version__}, {name}"


class OfficialLayout(nn.Module):
    """A dense MAE that works as the official one does, to compare with: same weights, same loss, more work.

    All patches are embedded, attention is explicit (scores and softmax are stored), the decoder's sequence is put back
    in raster order, and every decoder token is predicted, the visible and the cls one too.
    """

    def __init__(self, method: MAE) -> None:
        super().__init__()
        self.method = method
        for block in (*method.encoder.blocks, *method.decoder.blocks):
            block.attn = ExplicitAttention(block.attn)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of a batch."""
        method, encoder, decoder = self.method, self.method.encoder, self.method.decoder
        plan = make_plan(method.schedule, noise)
        pixels = (images.float() / 255 - torch.tensor(method.mean)) / torch.tensor(method.std)
        patches = patchify(pixels, method.patch_size)

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
