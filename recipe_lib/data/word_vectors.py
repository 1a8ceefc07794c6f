"""Word vectors of the training recipes: word2vec as im2recipe trained it (skip-gram, hierarchical softmax).

Its sentences are the steps of the paired training recipes, in which the names of a recipe's own ingredients are one
token each. Ten passes with a window of 10, as the released code has it; what is no word of the store is left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from recipe_lib.data.derived import note
from recipe_lib.data.shards import digest
from recipe_lib.data.text import MARKS, PAD, name_token

FILE = "word_vectors.safetensors"


def add_word_vectors(folder: Path, dim: int, seed: int) -> dict:
    """Train vectors of `dim` numbers for a store's words; those in no step are random, at the others' scale."""
    from gensim.models import Word2Vec  # seconds, for those alone who ask for it

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sentences = list(_steps(folder, tokenizer))
    model = Word2Vec(
        sentences, vector_size=dim, sg=1, hs=1, negative=0, window=10, epochs=10, min_count=1, seed=seed, workers=1,
        hashfxn=lambda text: zlib.crc32(str(text).encode()),
    )  # fmt: skip
    vectors = np.random.default_rng(seed).normal(0, model.wv.vectors.std(), (tokenizer.get_vocab_size(), dim))
    vectors[[int(word) for word in model.wv.index_to_key]] = model.wv.vectors
    vectors[PAD] = 0
    save_file({"vectors": torch.from_numpy(vectors).float()}, folder / FILE)
    made_of = digest(FILE, str(dim), str(seed), *(" ".join(sentence) for sentence in sentences))
    return note(folder, "word_vectors", [{"files": {FILE: made_of}}], {"dim": dim, "steps": len(sentences)})


def word_vectors(folder: Path) -> torch.Tensor:
    """(V, dim), what `add_word_vectors` left."""
    return load_file(folder / FILE)["vectors"]


def _steps(folder: Path, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """Token ids of each step, as texts."""
    for path in sorted(folder.glob("train/*.recipes.parquet")):
        table = pq.read_table(path, columns=["instructions", "names"])
        for steps, names in zip(table["instructions"].to_pylist(), table["names"].to_pylist(), strict=True):
            tokens = {token for name in names if (token := name_token(name)) and "_" in token}
            own = {tuple(token.split("_")): tokenizer.token_to_id(token) for token in tokens}
            for step in steps:
                words = tokenizer.encode(step, add_special_tokens=False)
                yield [str(i) for i in _joined(words.tokens, words.ids, own) if i >= len(MARKS)]


def _joined(words: list[str], ids: list[int], names: dict[tuple[str, ...], int | None]) -> Iterator[int]:
    """Ids with each longest run of words that is one of the names as the id of that name."""
    lengths = sorted({len(name) for name, i in names.items() if i is not None}, reverse=True)
    at = 0
    while at < len(words):
        length = next((n for n in lengths if names.get(tuple(words[at : at + n])) is not None), 1)
        yield names[tuple(words[at : at + length])] if length > 1 else ids[at]
        at += length
