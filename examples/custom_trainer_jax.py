"""A masked autoencoder with PR-MIM in JAX: python examples/custom_trainer_jax.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from custom_trainer import GRID, SCHEDULE, draw, read_pixels
from flax import nnx

from prmim_core import counter_noise, take_tokens
from prmim_jax import ProgressiveReconstruction, make_plan


class Block(nnx.Module):
    """A block of a transformer."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(dim, rngs=rngs), nnx.LayerNorm(dim, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, dim, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(dim, 4 * dim, rngs=rngs), nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x):
        """Attend, then transform each token."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Autoencoder(nnx.Module):
    """Autoencoder that reconstructs half of all tokens from their neighbours.

    It encodes visible tokens and decodes a quarter of all tokens.
    """

    def __init__(self, dim: int = 48, decoder_dim: int = 32, *, rngs: nnx.Rngs) -> None:
        self.embed, self.narrow = nnx.Linear(1, dim, rngs=rngs), nnx.Linear(dim, decoder_dim, rngs=rngs)
        self.encoder = nnx.Sequential(Block(dim, rngs=rngs), Block(dim, rngs=rngs), nnx.LayerNorm(dim, rngs=rngs))
        self.decoder, self.head = Block(decoder_dim, rngs=rngs), nnx.Linear(decoder_dim, 1, rngs=rngs)
        self.places = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, 64, dim)))
        self.decoder_places = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, 64, decoder_dim)))
        self.mask_token = nnx.Param(jnp.zeros((1, 1, decoder_dim)))
        self.reconstruct = ProgressiveReconstruction(decoder_dim, GRID)  # the only module that PR-MIM adds

    def __call__(self, pixels, plan):
        """Predict the masked tokens (batch, masked, 1), in the order of the plan."""
        x = self.embed(take_tokens(pixels, plan.visible)) + take_tokens(self.places[...], plan.visible)
        x = self.narrow(self.encoder(x))
        mask_tokens = jnp.broadcast_to(self.mask_token[...], (*plan.decoded.shape, x.shape[-1]))
        x = jnp.concatenate([x, mask_tokens], axis=1)
        x = self.decoder(x + take_tokens(self.decoder_places[...], plan.known(1)))  # visible and decoded tokens only
        x = self.reconstruct(x, plan)  # all tokens
        return self.head(x[:, SCHEDULE.counts.visible :])


def loss_of(model, pixels, sample, step):
    """Return the mean squared error of the masked tokens.

    Step and sample determine the mask.
    """
    plan = make_plan(SCHEDULE, counter_noise(0, step, sample, 64))
    predicted = model(pixels, plan)
    return jnp.square(predicted - take_tokens(pixels, plan.masked)).mean(), (predicted, plan)


@nnx.jit
def train_step(model, optimizer, pixels, sample, step):
    """Take one step. Plan, loss and update are compiled together."""
    (loss, _), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model, pixels, sample, step)
    optimizer.update(model, gradients)
    return loss


def main(out: Path = Path("runs/examples"), steps: int = 800) -> list[float]:
    """Train, draw reconstructions, and return the losses."""
    train, held_out = read_pixels()
    model = Autoencoder(rngs=nnx.Rngs(0))
    rate = optax.cosine_onecycle_schedule(steps, 4e-3)
    optimizer = nnx.Optimizer(model, optax.adamw(rate, weight_decay=0.05), wrt=nnx.Param)
    generator = np.random.default_rng(0)
    losses = []
    for step in range(steps):
        sample = generator.integers(len(train), size=64)
        loss = train_step(model, optimizer, train[sample], jnp.asarray(sample), jnp.asarray(step))
        losses.append(loss)  # float(loss) would wait for the step
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}")

    everything = jnp.asarray(held_out), jnp.arange(len(held_out)), jnp.asarray(steps)
    error, (predicted, plan) = nnx.jit(loss_of)(model, *everything)
    print(f"held-out digits: error {error:.4f}, variance of the pixels {held_out.var():.4f}")
    draw(out / "custom_trainer_jax.png", held_out, np.asarray(predicted), np.asarray(plan.order))
    return [float(loss) for loss in losses]


if __name__ == "__main__":
    main()
