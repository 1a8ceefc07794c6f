import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel

from recipe_lib.data.loading import recipe_batch
from recipe_lib.data.prepare import StoreConfig, token_ids
from recipe_lib.encoders import sentence
from recipe_lib.encoders.sentence import SentenceRecipeEncoder, sentence_tokenizer
from recipe_lib.evaluation.scores import encode_recipes
from recipe_lib.systems.base import SystemConfig
from recipe_lib.systems.registry import build

WORDS = "[PAD] [UNK] [CLS] [SEP] apple pie salt water cake".split()


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A BERT that nobody trained, in a folder as transformers leaves one."""
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path / "outputs"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).eval().save_pretrained(tmp_path / "bert")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    return str(tmp_path / "bert")


def padded(*sentences):
    width = max(map(len, sentences))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sentences])


def test_a_vector_is_the_mean_of_the_last_states_whatever_it_is_padded_with(model):
    encoder = SentenceRecipeEncoder(model, 8, layers=1, heads=2, feedforward=8)
    reader = AutoModel.from_pretrained(model).eval()
    sentences = [2, 4, 5, 3], [2, 3], [2, 6, 7, 8, 4, 3]
    vectors = encoder.encode_sentences("title", padded(*sentences))
    for ids, vector in zip(sentences, vectors, strict=True):
        states = reader(input_ids=torch.tensor([ids])).last_hidden_state[0]
        expected = F.normalize(states.mean(0), dim=0) * 16**0.5
        torch.testing.assert_close(vector, expected.detach(), atol=0.05, rtol=0)  # bfloat16, where the CPU has it


def test_each_sentence_is_read_once_by_whatever_process(model, monkeypatch):
    encoder = SentenceRecipeEncoder(model, 8, layers=1, heads=2, feedforward=8)
    tokens = padded([2, 4, 3], [2, 5, 6, 3])
    first = encoder.encode_sentences("title", tokens)
    path = encoder._memory.path
    with open(path, "ab") as file:
        file.write(b"half a record")  # of a writer that was killed
    again = SentenceRecipeEncoder(model, 8, layers=1, heads=2, feedforward=8)
    with monkeypatch.context() as patched:
        patched.setattr(again, "_read", lambda _: pytest.fail("they are there"))
        assert torch.equal(again.encode_sentences("steps", F.pad(tokens, (0, 3))), first)
    more = again.encode_sentences("title", padded([2, 7, 3], [2, 4, 3]))
    assert torch.equal(more[1], first[0])
    third = SentenceRecipeEncoder(model, 8, layers=1, heads=2, feedforward=8)
    monkeypatch.setattr(third, "_read", lambda _: pytest.fail("what came after the broken record is whole"))
    assert torch.equal(third.encode_sentences("title", padded([2, 7, 3]))[0], more[0])
    assert path.stat().st_size == 3 * (16 + 2 * 16)
    third.reader.embeddings.word_embeddings.weight.data += 1
    third._memory = None
    with pytest.raises(pytest.fail.Exception):
        third.encode_sentences("title", tokens)


def test_of_two_processes_that_read_a_sentence_at_once_both_take_what_the_first_wrote(model, monkeypatch):
    first, second = (SentenceRecipeEncoder(model, 8, layers=1, heads=2, feedforward=8) for _ in range(2))
    one, other = padded([2, 4, 3]), padded([2, 4, 3], [2, 5, 3])
    second._memory = sentence.Memory(second.reader, second.dim)  # has looked before the first one wrote
    vector = first.encode_sentences("title", one)
    own = second._read
    monkeypatch.setattr(second, "_read", lambda tokens: own(tokens) * np.float16(0.5))  # other last digits
    both = second.encode_sentences("title", other)
    assert torch.equal(both[0], vector[0]) and not torch.equal(both[1], vector[0])
    assert first._memory.path.stat().st_size == 2 * (16 + 2 * 16), "and no sentence is there twice"
    third = SentenceRecipeEncoder(model, 8, layers=1, heads=2, feedforward=8)
    assert torch.equal(third.encode_sentences("title", other), both)


def test_batches_of_sentences_do_not_change_them(model, monkeypatch):
    tokens = torch.from_numpy(np.random.default_rng(0).integers(4, 9, (30, 7)))
    for row, length in zip(tokens, torch.arange(30) % 6 + 1, strict=True):
        row[length:] = 0
    monkeypatch.setattr(sentence, "BATCH", 4)
    encoder = SentenceRecipeEncoder(model, 8, layers=1, heads=2, feedforward=8)
    vectors = encoder.encode_sentences("title", tokens)
    for i in (0, 11, 29):
        encoder._memory._known.clear()
        torch.testing.assert_close(
            encoder.encode_sentences("title", tokens[i : i + 1])[0], vectors[i], atol=0.05, rtol=0
        )


def test_tokens_are_the_models_own(model):
    tokenizer = sentence_tokenizer(model)
    ids = token_ids(tokenizer.to_str(), StoreConfig(max_tokens=5, text_tokens="sentence"))
    assert ids("apple pie") == [2, 4, 5, 3] and ids("") == [2, 3]
    assert ids("salt water cake apple pie") == [2, 6, 7, 8, 3], "the mark at the end stays"


def test_what_is_no_model_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="must hold config.json, tokenizer.json, model.safetensors"):
        sentence_tokenizer(str(tmp_path))
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, "[UNK]"))
    tokenizer.save(f"{model}/tokenizer.json")
    with pytest.raises(ValueError, match="its padding is not id 0"):
        sentence_tokenizer(model)


def test_the_system_trains_heads_and_transformers_alone(model, tiny_store):
    config = SystemConfig(
        300, 20, method="ht_sentence", sentence_model=model, image_model="test_resnet", frozen=("all",), embed_dim=8,
        recipe_layers=1, recipe_heads=2, recipe_feedforward=8,
    )  # fmt: skip
    system = build(config).train()
    trained = {name.split(".")[1] for name, p in system.named_parameters() if p.requires_grad}
    assert not system.recipe_encoder.reader.training and {"fc", "sentences"} <= trained
    assert not trained & {"reader", "backbone"}
    rows = np.arange(5)
    split = tiny_store.split("val")
    features = system.eval().encode_recipes(recipe_batch(split, rows))
    torch.testing.assert_close(encode_recipes(system, split)[:5], features.embedding.detach(), atol=1e-4, rtol=1e-3)
    features.embedding.sum().backward()
    assert system.recipe_encoder.sentences["ingredients"].position.grad.abs().sum() > 0
