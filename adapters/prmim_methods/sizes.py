"""Sizes of vision transformers."""

from dataclasses import dataclass, replace

LAYER_NORM_EPS = 1e-6
"""Epsilon of our layer norms."""


def norm_bytes(length: int, dim: int) -> int:
    """Return the bytes that a layer norm saves: its input and two statistics in float32."""
    return length * (4 * dim + 2 * 4)


def score_bytes(queries: int, keys: int, heads: int, *, compute_bytes: int, attention: str) -> int:
    """Return the bytes that attention scores save.

    Fused attention saves one float32 per head and query; explicit attention saves its softmax in float32 and, where
    that differs, in the compute type.
    """
    softmax_bytes = 4 if compute_bytes == 4 else 4 + compute_bytes
    return heads * queries * (4 if attention == "fused" else keys * softmax_bytes)


@dataclass(frozen=True)
class Transformer:
    """The size of a stack of transformer blocks.

    Parameters
    ----------
    dim
        Width.
    depth
        Number of blocks.
    heads
        Attention heads.
    mlp_ratio
        Width of the hidden layer over ``dim``.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: int = 4

    def macs(self, length: int) -> int:
        """Return the MACs of all blocks: depth * ((4 + 2 mlp_ratio) n d**2 + 2 n**2 d)."""
        linear = (4 + 2 * self.mlp_ratio) * length * self.dim**2
        attention = 2 * length**2 * self.dim
        return self.depth * (linear + attention)

    def parameters(self) -> int:
        """Return the number of parameters of all blocks, without LayerScale."""
        linear = (4 + 2 * self.mlp_ratio) * self.dim**2 + (5 + self.mlp_ratio) * self.dim
        return self.depth * (linear + 4 * self.dim)

    def activation_bytes(self, length: int, *, compute_bytes: int, attention: str) -> int:
        """Return the bytes that all blocks save, with a float32 residual stream.

        Per block: two norms, the scores, and per token the inputs of the four linear layers and of GELU, and q, k, v.
        """
        norms = 2 * norm_bytes(length, self.dim)
        linear = (1 + 3 + 1 + 1 + 2 * self.mlp_ratio) * length * self.dim * compute_bytes
        scores = score_bytes(length, length, self.heads, compute_bytes=compute_bytes, attention=attention)
        return self.depth * (norms + linear + scores)


@dataclass(frozen=True)
class CrossTransformer:
    """The size of a stack of cross-attention blocks, without self-attention.

    Parameters
    ----------
    dim
        Width.
    depth
        Number of blocks.
    heads
        Attention heads.
    context_dim
        Width of the context.
    mlp_ratio
        Width of the hidden layer over ``dim``.
    """

    dim: int
    depth: int
    heads: int
    context_dim: int
    mlp_ratio: int = 4

    def macs(self, queries: int, keys: int) -> int:
        """Return the MACs: depth * ((2 + 2 mlp_ratio) n d**2 + 2 m d (c + n)).

        Here n is the number of queries, m that of keys, and c the context's width.
        """
        linear = (2 + 2 * self.mlp_ratio) * queries * self.dim**2
        keys_and_values = 2 * keys * self.context_dim * self.dim
        attention = 2 * queries * keys * self.dim
        return self.depth * (linear + keys_and_values + attention)

    def parameters(self) -> int:
        """Return the number of parameters of all blocks, with three norms each.

        One norm is the context's.
        """
        linear = (2 + 2 * self.mlp_ratio) * self.dim**2 + (3 + self.mlp_ratio) * self.dim
        keys_and_values = 2 * (self.context_dim + 1) * self.dim
        return self.depth * (linear + keys_and_values + 4 * self.dim + 2 * self.context_dim)

    def activation_bytes(self, queries: int, keys: int, *, compute_bytes: int, attention: str) -> int:
        """Return the bytes saved by all blocks; see :meth:`Transformer.activation_bytes`."""
        norms = 2 * norm_bytes(queries, self.dim) + norm_bytes(keys, self.context_dim)
        of_queries = (1 + 1 + 1 + 1 + 2 * self.mlp_ratio) * queries * self.dim * compute_bytes
        of_keys = keys * (self.context_dim + 2 * self.dim) * compute_bytes
        scores = score_bytes(queries, keys, self.heads, compute_bytes=compute_bytes, attention=attention)
        return self.depth * (norms + of_queries + of_keys + scores)


VIT_SIZES = {
    "vit_tiny": Transformer(192, 12, 3),
    "vit_small": Transformer(384, 12, 6),
    "vit_base": Transformer(768, 12, 12),
    "vit_large": Transformer(1024, 24, 16),
    "vit_huge": Transformer(1280, 32, 16),
    "vit_1b": Transformer(1536, 48, 24),
    "vit_5b": Transformer(3072, 48, 32),
}
"""Vision transformers by name. The last two are Pixio's."""


def vit_size(
    model: str, embed_dim: int | None = None, depth: int | None = None, num_heads: int | None = None
) -> Transformer:
    """Return the size of a named vision transformer, with parts replaced.

    Parameters
    ----------
    model
        A key of :data:`VIT_SIZES`.
    embed_dim, depth, num_heads
        Width, number of blocks and heads, in place of the model's; None: the model's.

    Examples
    --------
    >>> vit_size("vit_base", depth=6)
    Transformer(dim=768, depth=6, heads=12, mlp_ratio=4)
    """
    changes = {"dim": embed_dim, "depth": depth, "heads": num_heads}
    return replace(VIT_SIZES[model], **{name: size for name, size in changes.items() if size is not None})
