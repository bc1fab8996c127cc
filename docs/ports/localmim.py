"""LocalMIM with the structure and the names of the authors' code: four decoders, each with a head at its scale."""

import torch
from torch import nn


def block(dim):
    return nn.TransformerEncoderLayer(dim, 2, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)


HEADS = {
    4.0: lambda dim: nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.GELU(), nn.ConvTranspose2d(dim, 3, 2, 2)),
    2.0: lambda dim: nn.ConvTranspose2d(dim, 3, 2, 2),
    1.0: lambda dim: nn.Conv2d(dim, 3, 1),
    0.5: lambda dim: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(dim, 3, 1)),
}


class Decoder(nn.Module):
    def __init__(self, scale, num_patches, embed_dim, decoder_embed_dim):
        super().__init__()
        self.scale, self.side = scale, int(num_patches**0.5)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, decoder_embed_dim), requires_grad=False)
        self.block, self.norm = block(decoder_embed_dim), nn.LayerNorm(decoder_embed_dim)
        self.head = HEADS[scale](decoder_embed_dim)

    def forward(self, x, ids_restore):
        x = self.decoder_embed(x)
        mask_tokens = self.mask_token.expand(len(x), 1 + ids_restore.shape[1] - x.shape[1], -1)
        tokens = torch.cat([x[:, 1:], mask_tokens], dim=1)
        tokens = tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.pos_embed
        x = self.norm(self.block(x))[:, 1:]
        return self.head(x.mT.unflatten(2, (self.side, self.side)))


class MaskedAutoencoderViT(nn.Module):
    def __init__(self, img_size=16, patch_size=4, embed_dim=16, decoder_embed_dim=8, depth=4):
        super().__init__()
        self.patch_size, num_patches = patch_size, (img_size // patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(block(embed_dim) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in HEADS)
        self.decoders = nn.ModuleList(Decoder(scale, num_patches, embed_dim, decoder_embed_dim) for scale in HEADS)

    def target(self, imgs, scale):  # in place of its histograms of gradients, which the port does not touch
        return nn.functional.avg_pool2d(imgs, int(self.patch_size / scale))

    def random_masking(self, x, noise, mask_ratio=0.75):
        len_keep = int(x.shape[1] * (1 - mask_ratio))
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= len_keep).float()
        return x.gather(1, ids_shuffle[:, :len_keep, None].expand(-1, -1, x.shape[2])), mask, ids_restore

    def forward(self, imgs, noise):
        x = self.patch_embed(imgs).flatten(2).mT + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, noise)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        loss, shape = 0, (-1, 1, int(mask.shape[1] ** 0.5), int(mask.shape[1] ** 0.5))
        for layer, norm, decoder in zip(self.blocks, self.norms, self.decoders, strict=True):
            x = layer(x)
            pred = decoder(norm(x), ids_restore)
            error = (pred - self.target(imgs, decoder.scale)).square().mean(1, keepdim=True)
            weight = nn.functional.interpolate(mask.reshape(shape), size=error.shape[2:], mode="area")
            loss = loss + (error * weight).sum() / weight.sum()
        return loss


model = MaskedAutoencoderViT()
