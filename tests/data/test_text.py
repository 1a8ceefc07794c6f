from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.trainers import WordLevelTrainer

from recipe_lib.data.text import PAD, UNK, SentenceEncoder, word_tokenizer

TEXTS = [
    "Boil 2 Eggs, then boil.",
    "crème fraîche (½ cup)",
    "Ｆｕｌｌ width ﬁg",
    "西红柿 2个。",
    "a¨b ¨ x",
    "it's <pad>",
]


def tokenizer(texts, min_count=1):
    return word_tokenizer(Counter(word for text in texts for word in text.split()), min_count)


def test_vocabulary_is_that_of_the_library_s_trainer():
    ours, theirs = tokenizer(TEXTS[:-1]), tokenizer(TEXTS[:-1])
    trainer = WordLevelTrainer(min_frequency=1, special_tokens=["<pad>", "<unk>"], show_progress=False)
    theirs.train_from_iterator(TEXTS[:-1], trainer)
    assert set(ours.get_vocab()) == set(theirs.get_vocab()) and ours.get_vocab()["<pad>"] == PAD
    assert ours.token_to_id("boil") == 2 and ours.get_vocab()["<unk>"] == UNK, "the most frequent word first"


def test_padding_cannot_be_written_in_a_recipe():
    assert PAD not in SentenceEncoder(tokenizer(TEXTS), 9)("a <pad> b")


def test_rare_words_are_unknown():
    rare = tokenizer(["egg egg Egg", "ham"], 3)
    assert rare.get_vocab_size() == 3 and SentenceEncoder(rare, 5)("ham EGG") == [UNK, 2]


@given(st.lists(st.sampled_from(TEXTS) | st.text(max_size=30), max_size=4).map(" ".join), st.integers(1, 12))
@pytest.mark.parametrize("known", [tokenizer(TEXTS)])
def test_ids_equal_those_of_the_library(known, text, most):
    whole = known.encode(" ".join(text.split()), add_special_tokens=False).ids
    assert SentenceEncoder(known, most)(text) == (whole[:most] or [UNK])


def test_long_sentences_cost_what_is_kept():
    encode = SentenceEncoder(tokenizer(TEXTS), 15)
    assert encode("boil " * 20_000) == [2] * 15 and encode("") == encode(" \n") == [UNK]
    assert np.asarray(encode("boil eggs")).ndim == 1
