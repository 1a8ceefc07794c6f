from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.trainers import WordLevelTrainer

from recipe_lib.data.text import END, MARKS, PAD, START, UNK, SentenceEncoder, word_tokenizer

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
    trainer = WordLevelTrainer(min_frequency=1, special_tokens=list(MARKS), show_progress=False)
    theirs.train_from_iterator(TEXTS[:-1], trainer)
    assert set(ours.get_vocab()) == set(theirs.get_vocab()) and ours.get_vocab()["<pad>"] == PAD
    assert ours.token_to_id("boil") == len(MARKS) and ours.get_vocab()["<unk>"] == UNK, "the most frequent word first"


def test_marks_cannot_be_written_in_a_recipe():
    ids = SentenceEncoder(tokenizer(TEXTS), 19)("a <pad> <end> <start> b")
    assert PAD not in ids and END not in ids[:-1] and START not in ids[1:]


def test_rare_words_are_unknown():
    rare = tokenizer(["egg egg Egg", "ham"], 3)
    assert rare.get_vocab_size() == len(MARKS) + 1
    assert SentenceEncoder(rare, 5)("ham EGG") == [START, UNK, len(MARKS), END]


@given(st.lists(st.sampled_from(TEXTS) | st.text(max_size=30), max_size=4).map(" ".join), st.integers(1, 12))
@pytest.mark.parametrize("known", [tokenizer(TEXTS)])
def test_ids_equal_those_of_the_library(known, text, most):
    whole = known.encode(" ".join(text.split()), add_special_tokens=False).ids
    assert SentenceEncoder(known, most)(text) == [START, *whole, END][:most]


def test_long_sentences_cost_what_is_kept():
    encode = SentenceEncoder(tokenizer(TEXTS), 15)
    assert encode("boil " * 20_000) == [START] + 14 * [len(MARKS)], "14 words, and no end"
    assert encode("") == encode(" \n") == [START, END]
    assert np.asarray(encode("boil eggs")).ndim == 1
