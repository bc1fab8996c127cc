"""A masked autoencoder with the structure and the names of the authors' code of CrossMAE."""

import torch
from torch import nn


def block(dim):
    return nn.TransformerEncoderLayer(dim, 2, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)


class CrossAttentionBlock(nn.Module):
    def __init__(self, encoder_dim, decoder_dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(decoder_dim), nn.LayerNorm(decoder_dim)
        self.cross_attn = nn.MultiheadAttention(decoder_dim, 2, kdim=encoder_dim, vdim=encoder_dim, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(decoder_dim, 4 * decoder_dim), nn.GELU(), nn.Linear(4 * decoder_dim, decoder_dim)
        )

    def forward(self, x, y):
        x = x + self.cross_attn(self.norm1(x), y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class WeightedFeatureMaps(nn.Module):
    def __init__(self, k, embed_dim, decoder_depth):
        super().__init__()
        self.linear = nn.Linear(k, decoder_depth, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(decoder_depth))

    def forward(self, feature_maps):
        mixed = self.linear(torch.stack(feature_maps, dim=-1))
        return [norm(mixed[..., number]) for number, norm in enumerate(self.norms)]


class MaskedAutoencoderViT(nn.Module):
    def __init__(self, img_size=16, patch_size=4, embed_dim=16, decoder_embed_dim=8, depth=2, decoder_depth=2):
        super().__init__()
        num_patches = (img_size // patch_size) ** 2
        self.patch_size, self.kept_mask_ratio = patch_size, 0.75
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(block(embed_dim) for _ in range(depth))
        self.wfm = WeightedFeatureMaps(depth + 1, embed_dim, decoder_depth)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            CrossAttentionBlock(embed_dim, decoder_embed_dim) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * 3)

    def patchify(self, imgs):
        patches = imgs.unfold(2, self.patch_size, self.patch_size).unfold(3, self.patch_size, self.patch_size)
        return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def random_masking(self, x, noise, mask_ratio=0.75):
        len_keep, len_decoded = int(x.shape[1] * (1 - mask_ratio)), int(x.shape[1] * self.kept_mask_ratio)
        ids_shuffle = noise.argsort(dim=1)
        ids_visible, ids_decoded = ids_shuffle[:, :len_keep], ids_shuffle[:, x.shape[1] - len_decoded :]
        return x.gather(1, ids_visible[:, :, None].expand(-1, -1, x.shape[2])), ids_decoded

    def forward_encoder(self, imgs, noise):
        x = self.patch_embed(imgs).flatten(2).mT + self.pos_embed[:, 1:]
        x, ids_decoded = self.random_masking(x, noise)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        feature_maps = [torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)]
        for layer in self.blocks:
            feature_maps.append(layer(feature_maps[-1]))
        return feature_maps, ids_decoded

    def forward_decoder(self, feature_maps, ids_decoded):
        places = self.decoder_pos_embed[0, 1:][ids_decoded]
        x = self.mask_token + places
        for layer, y in zip(self.decoder_blocks, self.wfm(feature_maps), strict=True):
            x = layer(x, y)
        x = self.decoder_norm(x)
        return self.decoder_pred(x)

    def forward_loss(self, imgs, pred, ids_decoded):
        target = self.patchify(imgs)
        target = target.gather(1, ids_decoded[:, :, None].expand(-1, -1, target.shape[2]))
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
        return (pred - target).square().mean()

    def forward(self, imgs, noise):
        feature_maps, ids_decoded = self.forward_encoder(imgs, noise)
        pred = self.forward_decoder(feature_maps, ids_decoded)
        return self.forward_loss(imgs, pred, ids_decoded)


model = MaskedAutoencoderViT()
