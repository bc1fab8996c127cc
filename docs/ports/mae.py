"""A masked autoencoder with the structure and the names of the authors' code of MAE."""

import torch
from torch import nn


def block(dim):
    return nn.TransformerEncoderLayer(dim, 2, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)


class MaskedAutoencoderViT(nn.Module):
    def __init__(self, img_size=16, patch_size=4, embed_dim=16, decoder_embed_dim=8, depth=2, norm_pix_loss=True):
        super().__init__()
        num_patches = (img_size // patch_size) ** 2
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, embed_dim), requires_grad=False)
        self.blocks = nn.Sequential(*(block(embed_dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.Sequential(block(decoder_embed_dim))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * 3)

    def patchify(self, imgs):
        patches = imgs.unfold(2, self.patch_size, self.patch_size).unfold(3, self.patch_size, self.patch_size)
        return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def random_masking(self, x, noise, mask_ratio=0.75):
        len_keep = int(x.shape[1] * (1 - mask_ratio))
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, :len_keep]
        mask = (ids_restore >= len_keep).float()
        return x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2])), mask, ids_restore

    def forward_encoder(self, imgs, noise):
        x = self.patch_embed(imgs).flatten(2).mT
        x = x + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, noise)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.blocks(x)), mask, ids_restore

    def forward_decoder(self, x, ids_restore):
        x = self.decoder_embed(x)
        mask_tokens = self.mask_token.expand(len(x), 1 + ids_restore.shape[1] - x.shape[1], -1)
        tokens = torch.cat([x[:, 1:], mask_tokens], dim=1)
        tokens = tokens.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], tokens], dim=1)
        x = x + self.decoder_pos_embed
        x = self.decoder_norm(self.decoder_blocks(x))
        return self.decoder_pred(x)[:, 1:]

    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = (pred - target).square().mean(-1)
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs, noise):
        latent, mask, ids_restore = self.forward_encoder(imgs, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask)


model = MaskedAutoencoderViT()
