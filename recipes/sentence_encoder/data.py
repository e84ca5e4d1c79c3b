"""Fortunes by category: short English texts, tokenised for the encoder.

Texts that are in more than one category are left out. Which split has a text follows from the text alone: a fifth is
val, four in ten are test, the others train.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import torch
from minilm import file
from torch import Tensor

from mil_cli.errors import DataError

FOLDER = Path("/usr/share/games/fortunes")
CATEGORIES = ("computers", "food", "law", "men-women", "politics", "songs-poems")
_SHARES = {"test": 40, "val": 60}  # of a hundred texts: test has those below 40, val the next twenty


def texts(root: Path, categories: tuple[str, ...]) -> dict[str, list[tuple[str, int]]]:
    """Read the categories' files: texts with a line with nothing but a percent sign between them.

    Args:
        root: The folder of the files, each named as its category.
        categories: Which to read.

    Returns:
        Split -> texts and the numbers of their categories, in a fixed order.

    Raises:
        DataError: A file is missing or cannot be read.
    """
    found: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for number, category in enumerate(categories):
        for text in _texts_of(root / category):
            found[text] = number
            seen[text] += 1
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    for text, number in found.items():
        if seen[text] == 1:
            splits[split_of(text)].append((text, number))
    return splits


def split_of(text: str) -> str:
    """Return the split that has a text."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    return next((split for split, below in _SHARES.items() if place < below), "train")


def tokenise(sentences: list[str], length: int) -> Tensor:
    """Return tokens as int64 of shape (sentences, length): cut to the length, or padded with zeros.

    Raises:
        DataError: The tokenizer is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as problem:
        raise DataError("texts need tokenizers", where="data", hint="pip install tokenizers") from problem
    tokenizer = Tokenizer.from_file(str(file("tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(sentences)])


def build(
    root: str | Path | None = None, categories: tuple[str, ...] = CATEGORIES, length: int = 64
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the three splits, each tokens and categories.

    Args:
        root: A folder with a file of texts for each category; by default that of the Debian package.
        categories: Which to tell apart; as many as `model.classes`.
        length: Tokens of a text; what is longer is cut.

    Raises:
        DataError: What is missing, or a number that is out of range.
    """
    if not 3 <= length <= 512:
        raise DataError("the encoder takes 3 to 512 tokens", where="data.length", value=length)
    splits = texts(FOLDER if root is None else Path(root), tuple(categories))
    return {
        name: (tokenise([text for text, _ in split], length), torch.tensor([number for _, number in split]))
        for name, split in splits.items()
    }


def _texts_of(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"the fortunes of a category cannot be read: {problem}",
            where="data.root",
            value=str(path),
            hint="apt-get install fortunes, or set data.root to a folder with a file for each of data.categories",
        ) from problem
    return [text for part in content.split("\n%\n") if (text := part.strip())]
