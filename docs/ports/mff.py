"""MFF with the structure and the names of MMPretrain: a backbone that fuses layers, a neck that decodes, a head."""

import torch
from torch import nn


def block(dim):
    return nn.TransformerEncoderLayer(dim, 2, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)


class MFFViT(nn.Module):
    def __init__(self, img_size=16, patch_size=4, embed_dims=16, num_layers=3, out_indices=(0, 1, 2), mask_ratio=0.75):
        super().__init__()
        self.num_patches, self.mask_ratio, self.out_indices = (img_size // patch_size) ** 2, mask_ratio, out_indices
        self.patch_embed = nn.Conv2d(3, embed_dims, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.num_patches, embed_dims), requires_grad=False)
        self.layers = nn.ModuleList(block(embed_dims) for _ in range(num_layers))
        self.proj_layers = nn.ModuleList(nn.Linear(embed_dims, embed_dims) for _ in out_indices[:-1])
        self.proj_weights = nn.Parameter(torch.ones(len(out_indices)))
        self.ln1 = nn.LayerNorm(embed_dims)

    def random_masking(self, x, noise):
        len_keep = int(x.shape[1] * (1 - self.mask_ratio))
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= len_keep).float()
        return x.gather(1, ids_shuffle[:, :len_keep, None].expand(-1, -1, x.shape[2])), mask, ids_restore

    def forward(self, x, noise):
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, noise)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        res = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.out_indices:
                res.append(self.proj_layers[len(res)](x) if number != self.out_indices[-1] else x)
        x = (torch.stack(res, dim=-1) * self.proj_weights.softmax(0)).sum(-1)
        return self.ln1(x), mask, ids_restore


class MAEPretrainDecoder(nn.Module):
    def __init__(self, num_patches=16, patch_size=4, embed_dim=16, decoder_embed_dim=8):
        super().__init__()
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.Sequential(block(decoder_embed_dim))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * 3)

    def forward(self, x, ids_restore):
        x = self.decoder_embed(x)
        mask_tokens = self.mask_token.expand(len(x), 1 + ids_restore.shape[1] - x.shape[1], -1)
        tokens = torch.cat([x[:, 1:], mask_tokens], dim=1)
        tokens = tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], tokens], dim=1)
        x = x + self.decoder_pos_embed
        x = self.decoder_norm(self.decoder_blocks(x))
        return self.decoder_pred(x)[:, 1:]


class MAEPretrainHead(nn.Module):
    def __init__(self, patch_size=4, norm_pix=True):
        super().__init__()
        self.patch_size, self.norm_pix = patch_size, norm_pix

    def patchify(self, imgs):
        patches = imgs.unfold(2, self.patch_size, self.patch_size).unfold(3, self.patch_size, self.patch_size)
        return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def loss(self, pred, imgs, mask):
        target = self.patchify(imgs)
        if self.norm_pix:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = (pred - target).square().mean(-1)
        return (loss * mask).sum() / mask.sum()


class MFF(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.neck, self.head = MFFViT(), MAEPretrainDecoder(), MAEPretrainHead()

    def forward(self, inputs, noise):
        latent, mask, ids_restore = self.backbone(inputs, noise)
        pred = self.neck(latent, ids_restore)
        return self.head.loss(pred, inputs, mask)


model = MFF()
