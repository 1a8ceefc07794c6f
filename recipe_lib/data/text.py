"""Words and token ids: one word-level tokenizer a study, made from the words of the paired training recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

PAD, START, END, UNK = range(4)
MARKS = ("<pad>", "<start>", "<end>", "<unk>")


def word_tokenizer(counts: Mapping[str, int], min_count: int) -> Tokenizer:
    """Word-level tokenizer over the words seen at least `min_count` times (H-T takes 10, arXiv:2103.13061).

    Lower case, compatibility characters folded, punctuation split off; every other word becomes `<unk>`. The most
    frequent words come first.

    Args:
        counts: how often each piece of text between white space was seen.
    """
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The library's trainer would take every sentence through its normalizer; here each distinct word goes once.
    words: Counter[str] = Counter()
    for text, count in counts.items():
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            words[word] += count
    known = sorted((word for word, count in words.items() if count >= min_count), key=lambda w: (-words[w], w))
    order = dict.fromkeys([*MARKS, *known])
    tokenizer.model = WordLevel({word: i for i, word in enumerate(order)}, unk_token="<unk>")
    # They are not declared as special: "<pad>" in a recipe's text is three words, not padding.
    return tokenizer


class SentenceEncoder:
    """`<start>`, the words, `<end>`: the ids of `tokenizer.encode` at a tenth of its time, for words repeat.

    A sentence that is too long is cut at `max_tokens` and loses its `<end>`, as in H-T's released code.

    Args:
        tokenizer: as `word_tokenizer` makes it: no word reaches over white space.
        max_tokens: ids kept, `<start>` and `<end>` among them.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self.max_tokens = max_tokens
        self._start, self._end = (tokenizer.token_to_id(mark) for mark in ("<start>", "<end>"))
        self._ids = lru_cache(1 << 18)(lambda word: tuple(tokenizer.encode(word, add_special_tokens=False).ids))

    def __call__(self, sentence: str) -> list[int]:
        """1 to max_tokens ids; a text without a word is `<start>` and `<end>`: no mean is taken over nothing."""
        ids = [self._start]
        # A sentence of 20,000 words costs as much as one that fits.
        for word in sentence.split(maxsplit=self.max_tokens)[: self.max_tokens]:
            ids += self._ids(word)
        return [*ids, self._end][: self.max_tokens]
