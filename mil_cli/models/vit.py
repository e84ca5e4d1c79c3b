"""A small vision transformer: patches, learned positions, pre-norm blocks, mean over the tokens."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mil_cli.errors import ModelError
from mil_cli.models.checks import check_dropout, check_positive


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: Channels of the tokens.
        heads: Number of heads; divides `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, dim) to the same shape."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        y = functional.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and beside a shortcut.

    Args:
        dim: Channels of the tokens.
        heads: Number of heads.
        mlp_dim: Channels inside the perceptron.
        dropout: After attention and after the perceptron.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, dim) to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """A vision transformer; see `vit` for the settings."""

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        in_channels: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dim, heads, round(dim * mlp_ratio), dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, in_channels, image_size, image_size) to class scores (batch, num_classes)."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        tokens = self.blocks(self.dropout(tokens))
        return self.head(self.norm(tokens).mean(1))  # type: ignore[no-any-return]


def vit(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    patch: int = 4,
    dim: int = 96,
    depth: int = 4,
    heads: int = 4,
    mlp_ratio: float = 4.0,
    dropout: float = 0.0,
) -> VisionTransformer:
    """Build a vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) that averages its tokens.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Side of the images in pixels.
        patch: Side of a patch in pixels; divides `image_size`.
        dim: Channels of the tokens.
        depth: Number of blocks.
        heads: Number of attention heads; divides `dim`.
        mlp_ratio: How many times wider the perceptron's inside is.
        dropout: After the embedding and in every block.

    Raises:
        ModelError: A setting is out of range.
    """
    check_positive(
        {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "patch": patch,
            "dim": dim,
            "depth": depth,
            "heads": heads,
        }
    )
    check_dropout(dropout)
    if image_size % patch:
        raise ModelError(f"must divide the image's side, {image_size}", where="model.patch", value=patch)
    if dim % heads:
        raise ModelError(f"must divide the tokens' channels, {dim}", where="model.heads", value=heads)
    if mlp_ratio <= 0:
        raise ModelError("must be above 0", where="model.mlp_ratio", value=mlp_ratio)
    return VisionTransformer(
        image_size=image_size,
        patch=patch,
        in_channels=in_channels,
        num_classes=num_classes,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        dropout=dropout,
    )
