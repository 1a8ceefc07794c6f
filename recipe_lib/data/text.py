"""Words and token ids: one word-level tokenizer per study, made from the words of the paired training recipes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from recipe_lib.data.recipe import DataError

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


def name_token(name: str | None) -> str:
    """An ingredient's name as one token, "olive_oil"; of several the first; "" where there is none."""
    return re.sub(r"[\s!-/:-@\[-`{-~]+", "_", (name or "").split(";")[0].strip().lower())


def with_names(tokenizer: Tokenizer, counts: Mapping[str, int], min_count: int) -> Tokenizer:
    """The same with a token for every ingredient name that at least `min_count` recipes hold."""
    words = tokenizer.get_vocab()
    names = {name_token(name) for name, count in counts.items() if count >= min_count} - words.keys() - {""}
    tokenizer.model = WordLevel(
        words | {name: len(words) + i for i, name in enumerate(sorted(names))}, unk_token="<unk>"
    )
    return tokenizer


def tokenizer_from_vocabulary(words_by_id: Mapping[int, str]) -> Tokenizer:
    """Word-level tokenizer with the ids of a published vocabulary: H-T's vocab.pkl, as `read_plain_pickle` gives it.

    Words are those of the Treebank rules that made it: "1/2-inch" is one, "don't" two, a period at a word's end is one.

    Raises:
        DataError: ids that are not 0, 1, 2, ..., a word that is there twice, or marks that are not in their places.
    """
    marks = {0: "<pad>", 1: "<start>", 2: "<end>", len(words_by_id) - 1: "<unk>"}
    if set(words_by_id) != set(range(len(words_by_id))) or not all(type(word) is str for word in words_by_id.values()):
        raise DataError("vocab_file: must hold {0: word, 1: word, ...}; give the authors' vocab.pkl")
    if wrong := [f"{i} is {words_by_id.get(i)!a}" for i, mark in marks.items() if words_by_id.get(i) != mark]:
        raise DataError(f"vocab_file: {wrong[0]}; <pad>, <start>, <end> must come first and <unk> last")
    ids = {word: i for i, word in words_by_id.items()}
    if len(ids) != len(words_by_id):
        raise DataError("vocab_file: holds a word twice; give the authors' vocab.pkl")
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    opening = normalizers.Replace(Regex(r'(?<=^|[\s(\[{<])"'), "``")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), opening, normalizers.Replace('"', "''")])
    cuts = [
        r"``|''|\.{2,}|--|[\]\[(){}<>;@#$%&?!«“‘„»”’]",
        r"[:,](?!\d)",
        r"(?<=[^.])\.$",
        r"(?<=[^'])(?:'(?:s|m|d|ll|re|ve)?|n't)$",
        r"^(?:can(?=not$)|gim(?=me$)|gon(?=na$)|got(?=ta$)|lem(?=me$)|wan(?=na$))",
    ]
    isolated = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *isolated])
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

        def ids(word: str) -> tuple[int, ...]:
            known = tokenizer.token_to_id(word) if "_" in word else None  # as `with_names` has it
            return tuple(tokenizer.encode(word, add_special_tokens=False).ids) if known is None else (known,)

        self._ids = lru_cache(1 << 18)(ids)

    def __call__(self, sentence: str) -> list[int]:
        """1 to max_tokens ids; a text without a word is `<start>` and `<end>`: no mean is taken over nothing."""
        ids = [self._start]
        # A sentence of 20,000 words costs as much as one that fits.
        for word in sentence.split(maxsplit=self.max_tokens)[: self.max_tokens]:
            ids += self._ids(word)
        return [*ids, self._end][: self.max_tokens]


def marked_ids(tokenizer: Tokenizer, max_tokens: int, sentence: str) -> list[int]:
    """Ids of a tokenizer that sets marks of its own: `max_tokens` at most, the mark at the end kept."""
    ids = tokenizer.encode(sentence[: 40 * max_tokens]).ids
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]
