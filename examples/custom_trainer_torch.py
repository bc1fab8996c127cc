"""A masked autoencoder with PR-MIM: python examples/custom_trainer_torch.py."""

from pathlib import Path

import numpy as np
import torch
from custom_trainer import GRID, SCHEDULE, draw, read_pixels
from torch import nn

from prmim_core import counter_noise, take_tokens
from prmim_torch import ProgressiveReconstruction, make_plan


def transformer(dim: int, depth: int) -> nn.Module:
    """Return a stack of PyTorch's own layers."""
    layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class Autoencoder(nn.Module):
    """Autoencoder that reconstructs half of all tokens from their neighbours.

    It encodes visible tokens and decodes a quarter of all tokens.
    """

    def __init__(self, dim: int = 48, decoder_dim: int = 32) -> None:
        super().__init__()
        self.embed, self.narrow, self.head = nn.Linear(1, dim), nn.Linear(dim, decoder_dim), nn.Linear(decoder_dim, 1)
        self.encoder, self.decoder = transformer(dim, 2), transformer(decoder_dim, 1)
        self.places = nn.Parameter(0.5 * torch.randn(1, 64, dim))
        self.decoder_places = nn.Parameter(0.5 * torch.randn(1, 64, decoder_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.reconstruct = ProgressiveReconstruction(decoder_dim, GRID)  # the only module that PR-MIM adds

    def forward(self, pixels, plan):
        """Predict the masked tokens (batch, masked, 1), in the order of the plan."""
        x = self.embed(take_tokens(pixels, plan.visible)) + take_tokens(self.places, plan.visible)
        x = self.narrow(self.encoder(x))
        x = torch.cat([x, self.mask_token.expand(*plan.decoded.shape, -1)], dim=1)
        x = self.decoder(x + take_tokens(self.decoder_places, plan.known(1)))  # visible and decoded tokens only
        x = self.reconstruct(x, plan)  # all tokens
        return self.head(x[:, SCHEDULE.counts.visible :])


def main(out: Path = Path("runs/examples"), steps: int = 800) -> list[float]:
    """Train, draw reconstructions, and return the losses."""
    torch.manual_seed(0)
    train, held_out = map(torch.from_numpy, read_pixels())
    model = Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        sample = torch.randint(len(train), (64,))
        plan = make_plan(SCHEDULE, counter_noise(seed=0, step=step, sample=sample, num_tokens=64))
        loss = (model(train[sample], plan) - take_tokens(train[sample], plan.masked)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}")

    plan = make_plan(SCHEDULE, counter_noise(seed=1, step=0, sample=torch.arange(len(held_out)), num_tokens=64))
    with torch.no_grad():
        predicted = model(held_out, plan)
    error = (predicted - take_tokens(held_out, plan.masked)).square().mean()
    print(f"held-out digits: error {error:.4f}, variance of the pixels {held_out.var():.4f}")
    draw(out / "custom_trainer_torch.png", held_out.numpy(), predicted.numpy(), plan.order.numpy())
    return losses


if __name__ == "__main__":
    main()
