"""A recognizer of speech: convolutions that halve time twice, then a transformer that needs no positions.

Mohamed, Okhonko and Zettlemoyer 2019, "Transformers with convolutional context for ASR" (arXiv:1904.11660): what the
convolutions see of a frame's neighbours takes the place of positional encodings, and recordings may have any length.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention over all frames and a feed-forward net, each normalised before and added to what came in.

    Args:
        width: Channels that come in and go out; a multiple of `heads`.
        heads: Number of attention heads.
        hidden: Channels within the feed-forward net.
        dropout: Share of what is added that is left out while training.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape that came in: (batch, frames, width)."""
        parts = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        heard = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.project(heard))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class Recognizer(nn.Module):
    """Scores the tokens of every fourth frame.

    Args:
        bins: Mel bands of a frame.
        tokens: Number of classes, the blank included.
        channels: Of the convolutions.
        width: Of the transformer.
        heads: Number of attention heads.
        blocks: Number of transformer blocks.
        dropout: Within the blocks.
    """

    def __init__(
        self, bins: int, tokens: int, channels: int, width: int, heads: int, blocks: int, dropout: float
    ) -> None:
        super().__init__()
        self.context = nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.embed = nn.Linear(channels * -(-bins // 4), width)
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width, dropout) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens)

    def forward(self, features: Tensor) -> Tensor:
        """Score tokens.

        Args:
            features: Log-mel spectrum, shape (batch, frames, bins); any number of frames.

        Returns:
            Scores before softmax, shape (batch, ceil(frames / 4), tokens).
        """
        seen = self.context(features.unsqueeze(1))
        x = self.embed(seen.transpose(1, 2).flatten(2))
        return self.head(self.norm(self.blocks(x)))


def build(
    bins: int = 40,
    tokens: int = 11,
    channels: int = 32,
    width: int = 144,
    heads: int = 4,
    blocks: int = 4,
    dropout: float = 0.1,
) -> nn.Module:
    """Build the model: 1.1 million parameters by default.

    Raises:
        ValueError: The width is no multiple of the heads.
    """
    if width % heads:
        raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
    return Recognizer(bins, tokens, channels, width, heads, blocks, dropout)
