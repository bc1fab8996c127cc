"""A masked autoencoder of PyTorch's own transformer layers, in raster order, with a boolean mask."""

import torch
from torch import nn


def transformer(dim, layers):
    layer = nn.TransformerEncoderLayer(dim, 2, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Autoencoder(nn.Module):
    def __init__(self, side=4, patch=4, dim=16, decoder_dim=8):
        super().__init__()
        self.patch, self.num_visible = patch, side**2 // 4
        self.embed, self.encoder = nn.Linear(patch**2 * 3, dim), transformer(dim, 2)
        self.narrow, self.decoder = nn.Linear(dim, decoder_dim), transformer(decoder_dim, 1)
        self.places = nn.Parameter(torch.randn(side**2, dim))
        self.decoder_places = nn.Parameter(torch.randn(side**2, decoder_dim))
        self.mask_token = nn.Parameter(torch.randn(decoder_dim))
        self.head = nn.Linear(decoder_dim, patch**2 * 3)

    def forward(self, images, noise):
        fold = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        patches = fold.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask = noise.argsort(1).argsort(1) >= self.num_visible  # True: hidden
        x = (self.embed(patches) + self.places)[~mask].unflatten(0, (len(images), -1))
        x = self.narrow(self.encoder(x))
        full = self.mask_token.expand(*patches.shape[:2], -1).masked_scatter(~mask[:, :, None], x)
        x = self.decoder(full + self.decoder_places)
        return (self.head(x) - patches)[mask].square().mean()


model = Autoencoder()
