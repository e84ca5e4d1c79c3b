"""all-MiniLM-L6-v2 and a linear probe on it: a transformer that others trained, of which only the probe learns here.

The encoder is BERT's (Devlin et al. 2019, arXiv:1810.04805) with six layers, distilled as MiniLM (Wang et al. 2020,
arXiv:2002.10957); its sentence embedding is the normalised mean over tokens (Reimers and Gurevych 2019,
arXiv:1908.10084).
"""

from __future__ import annotations

import json

import safetensors.torch
import torch
from minilm import file
from torch import Tensor, nn
from torch.nn import functional

PADDING = 0  # token
_EPSILON = 1e-12  # of layer norms

_NAMES = {
    "attention.self.": "",
    "attention.output.dense": "project",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "expand",
    "output.dense": "contract",
    "output.LayerNorm": "norm",
    "embeddings.LayerNorm": "norm",
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "encoder.layer": "layers",
}
"""The file's names -> those of this module, in the order in which they are replaced."""


class Layer(nn.Module):
    """Attention and a feed-forward net, each added to what came in and normalised after.

    Args:
        width: Channels that come in and go out.
        hidden: Channels within the feed-forward net.
        heads: Number of attention heads.
    """

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, _EPSILON)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, _EPSILON)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return features of the shape that came in; tokens where the mask is false are not attended to."""
        query, key, value = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.project(attended.transpose(1, 2).flatten(2)))
        return self.norm(x + self.contract(functional.gelu(self.expand(x))))


class Encoder(nn.Module):
    """Embeds sentences.

    Args:
        words: Number of tokens.
        positions: Most tokens of a sentence.
        width: Channels of a token, and of an embedding.
        hidden: Channels within the feed-forward nets.
        heads: Number of attention heads.
        layers: Number of layers.
    """

    def __init__(self, *, words: int, positions: int, width: int, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, _EPSILON)
        self.layers = nn.ModuleList(Layer(width, hidden, heads) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings of length 1, of shape (batch, width).

        Args:
            tokens: Shape (batch, length), padded with zeros at the end.
        """
        mask = tokens != PADDING
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(places))
        for layer in self.layers:
            x = layer(x, mask)
        counts = mask.unsqueeze(2).to(x.dtype)
        return functional.normalize((x * counts).sum(1) / counts.sum(1), dim=1)


class Probe(nn.Module):
    """A linear classifier on the embeddings of a frozen encoder.

    Args:
        encoder: The encoder; its weights no longer learn.
        classes: Number of classes.
    """

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.head = nn.Linear(encoder.norm.normalized_shape[0], classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for tokens of shape (batch, length), padded with zeros."""
        return self.head(self.encoder(tokens))


def pretrained() -> Encoder:
    """Return the encoder with its weights.

    Raises:
        ModelError: The package that carries them is missing.
    """
    sizes = json.loads(file("config.json").read_text())
    encoder = Encoder(
        words=sizes["vocab_size"],
        positions=sizes["max_position_embeddings"],
        width=sizes["hidden_size"],
        hidden=sizes["intermediate_size"],
        heads=sizes["num_attention_heads"],
        layers=sizes["num_hidden_layers"],
    )
    tensors = safetensors.torch.load_file(file("model.safetensors"))
    # Every sentence is of the first type: what that adds to each token goes into the positions.
    tensors["embeddings.position_embeddings.weight"] += tensors["embeddings.token_type_embeddings.weight"][0]
    unused = ("pooler.", "embeddings.token_type_embeddings", "embeddings.position_ids")
    encoder.load_state_dict({_renamed(name): each for name, each in tensors.items() if not name.startswith(unused)})
    return encoder


def build(classes: int = 6) -> nn.Module:
    """Build the model: the encoder, with 22.6 million weights, and a probe that knows nothing yet.

    Args:
        classes: As many as there are `data.categories`.

    Raises:
        ModelError: The package that carries the weights is missing.
    """
    return Probe(pretrained(), classes)


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name
