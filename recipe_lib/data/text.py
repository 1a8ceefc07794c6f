"""Words and token ids: one word-level tokenizer a study, trained on the paired training recipes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer

PAD, UNK = 0, 1


def train_tokenizer(texts: Iterable[str], min_count: int) -> Tokenizer:
    """Word-level tokenizer over the words seen at least `min_count` times (H-T takes 10, arXiv:2103.13061).

    Lower case, compatibility characters folded, punctuation split off; every other word becomes `<unk>`.
    """
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordLevelTrainer(
        vocab_size=2**31 - 1, min_frequency=min_count, special_tokens=["<pad>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_sentences(tokenizer: Tokenizer, sentences: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Token ids of each sentence, (<= max_tokens,) int32.

    Sentences without a single word are dropped; if none is left, one `<unk>` stands for the empty field, so that
    every field has a vector and no mean is taken over nothing.
    """
    # A sentence of 20,000 words costs as much as one that fits: the tail is cut before it is split into words.
    heads = [" ".join(sentence.split(maxsplit=max_tokens)[:max_tokens]) for sentence in sentences]
    encodings = tokenizer.encode_batch(heads, add_special_tokens=False)
    ids = [np.asarray(encoding.ids[:max_tokens], np.int32) for encoding in encodings if encoding.ids]
    return ids or [np.asarray([UNK], np.int32)]
