"""CLIP's token ids: byte pairs between a start and an end token, the same for every model of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 49408
CONTEXT = 77  # tokens at most, start and end among them


@cache
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer  # it takes seconds, which words do not need

    return SimpleTokenizer()


@lru_cache(1 << 18)
def _piece(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(text))


def clip_ids(text: str, length: int) -> list[int]:
    """Start, text, end: 2 to `length` ids. A longer text is cut, its end token kept.

    The ids of open_clip's tokenizer at a fraction of its time: pieces between white space repeat, their ids are kept.
    """
    # Printable ASCII without entities is what the tokenizer's cleaning leaves as it is.
    plain = text.isascii() and text.isprintable() and "&" not in text
    ids = [_tokenizer().sot_token_id]
    for piece in (text if plain else _tokenizer().clean_fn(text)).lower().split():
        ids += _piece(piece)
        if len(ids) >= length:
            break
    return [*ids[: length - 1], _tokenizer().eot_token_id]


def clip_tokens(texts: Sequence[str], length: int) -> Tensor:
    """Texts -> (N, length) int64, padded with 0."""
    import torch  # as above: a preparation's processes need ids alone

    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        ids = clip_ids(text, length)
        row[: len(ids)] = torch.tensor(ids)
    return tokens
