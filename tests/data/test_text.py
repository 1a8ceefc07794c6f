from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.trainers import WordLevelTrainer

from recipe_lib.data.plain_pickle import read_plain_pickle
from recipe_lib.data.recipe import DataError
from recipe_lib.data.text import (
    END,
    MARKS,
    PAD,
    START,
    UNK,
    SentenceEncoder,
    name_token,
    tokenizer_from_vocabulary,
    with_names,
    word_tokenizer,
)

SHARED = Path(__file__).parents[3] / "shared" / "data" / "authors_layout"

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


def vocabulary(*words: str) -> dict[int, str]:
    return dict(enumerate(["<pad>", "<start>", "<end>", *words, "<unk>"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mix 1/2-inch (2 cm) cubes, 350.5 F.", "mix 1/2-inch ( 2 cm ) cubes , 350.5 f ."),
        ('"Well"; say ("so")', "`` well '' ; say ( `` so '' )"),
        ("don't it's cooks' you'll cannot gimme", "do n't it 's cooks ' you 'll can not gim me"),
        ("1,000 a:b 3:4 8-oz. f... a--b 50% & 7.", "1,000 a : b 3:4 8-oz . f ... a -- b 50 % & 7 ."),
        ("<start> half-and-half, and/or", "< start > half-and-half , and/or"),
    ],
)
def test_words_of_a_published_vocabulary(text, words):
    """By hand from the Treebank rules, which made it; the ids are its own, start and end around them."""
    words = words.split()
    kept = sorted(set(words) - {"cm"})
    ids = {word: i for i, word in vocabulary(*kept).items()}
    encode = SentenceEncoder(tokenizer_from_vocabulary(vocabulary(*kept)), 40)
    assert encode(text) == [1, *(ids.get(word, ids["<unk>"]) for word in words), 2]
    assert encode("") == [1, 2] and encode("gold") == [1, len(kept) + 3, 2]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({}, "must come first"),
        ({0: "<pad>", 1: "<start>", 2: "<end>", 4: "<unk>"}, "must hold"),
        (vocabulary("egg") | {3: ["egg"]}, "must hold"),
        (vocabulary("egg", "egg"), "a word twice"),
        (vocabulary("egg", "<pad>"), "a word twice"),
        (vocabulary("egg") | {4: "ham"}, "4 is 'ham'; <pad>, <start>, <end> must come first and <unk> last"),
        (dict(enumerate(MARKS)) | {3: "<end>", 2: "<unk>"}, "2 is '<unk>'"),
    ],
)
def test_what_is_no_vocabulary(table, reason):
    with pytest.raises(DataError, match=f"vocab_file: .*{reason}"):
        tokenizer_from_vocabulary(table)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data is not here")
def test_the_shared_vocabulary_is_that_of_these_words():
    """NLTK made it of the words seen three times in train.pkl; ours, counted there, are the same but for a few."""
    published = read_plain_pickle(SHARED / "vocab.pkl")
    tokenizer = tokenizer_from_vocabulary(published)
    counts: Counter[str] = Counter()
    for recipe in read_plain_pickle(SHARED / "train.pkl").values():
        for text in (recipe["title"], *recipe["ingredients"], *recipe["instructions"]):
            text = tokenizer.normalizer.normalize_str(text)
            counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    ours = {word for word, n in counts.items() if n >= 3}
    theirs = set(published.values()) - set(MARKS)
    assert len(ours & theirs) > 0.995 * len(ours | theirs)
    assert tokenizer.get_vocab_size() == len(published) and tokenizer.token_to_id("<unk>") == len(published) - 1


def test_an_ingredient_is_one_token_where_enough_recipes_hold_it():
    assert [name_token(name) for name in ("Olive Oil", "half-and-half", "salt;?pepper", "", None)] == [
        "olive_oil", "half_and_half", "salt", "", ""]  # fmt: skip
    plain = tokenizer(["olive oil and salt _"])
    words = plain.get_vocab()
    counts = {"olive oil": 3, "olives": 1, "half-and-half": 2, "salt": 5}
    named = with_names(tokenizer(["olive oil and salt _"]), counts, 2)
    assert named.get_vocab() == words | {"half_and_half": len(words), "olive_oil": len(words) + 1}
    encode, before = SentenceEncoder(named, 15), SentenceEncoder(plain, 15)
    assert encode("olive_oil") == [START, len(words) + 1, END]
    assert encode("salt") == before("salt") == [START, words["salt"], END]
    for text in ("olive oil_and salt", "_", "olive_oil"):  # without names nothing is new
        assert before(text) == [START, *plain.encode(text, add_special_tokens=False).ids, END]
