"""Released checkpoints: small modules that bear their names, built anew from the papers, must give our outputs."""

import pickle
from collections import OrderedDict, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.data.clip_text import clip_tokens
from recipe_lib.data.loading import RecipeBatch
from recipe_lib.data.recipe import DataError
from recipe_lib.losses import triplet_loss
from recipe_lib.systems.base import SystemConfig
from recipe_lib.systems.published import load_published, read_dictionary
from recipe_lib.systems.registry import build

E, D, WORDS, K = 16, 24, 30, 5
NAMES = ("title", "ingredients", "instructions")
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))
OPENAI = (torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711]))


class Named(nn.Module):
    """A module of the given parts, whose names are what matters."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def transformer(dim=E) -> Named:
    layer = nn.TransformerEncoderLayer(dim, 2, 32, 0.0, batch_first=True)
    return Named(
        pos_encoder=Named(weight=nn.Parameter(torch.randn(50, dim))),
        tf=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    )


def pooled(part: Named, x: torch.Tensor) -> torch.Tensor:
    """One sequence (L, E) without padding -> its mean (E,)."""
    return part.tf((x + part.pos_encoder.weight[: len(x)])[None])[0].mean(0)


def recipe_parts(dim=E, out=D) -> dict:
    pairs = {a: nn.ModuleDict({b: nn.Linear(dim, dim) for b in NAMES if b != a}) for a in NAMES}
    return {"merger_recipe": nn.Linear(3 * dim, out), "projector_recipes": nn.ModuleDict(pairs)}


def words() -> Named:
    return Named(
        word_embedding=nn.Embedding(WORDS, E),
        tfs=nn.ModuleDict({name: transformer() for name in NAMES}),
        merger=nn.ModuleDict({name: transformer() for name in NAMES[1:]}),
    )


def perturbed(model: nn.Module) -> nn.Module:
    """Every weight and statistic somewhere of its own: none equals what a fresh system starts with."""
    generator = torch.Generator().manual_seed(7)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.02 * (torch.rand(value.shape, generator=generator) - 0.5)
    return model.eval()


def ht(backbone: nn.Module, channels: int) -> Named:
    image = Named(backbone=backbone, fc=nn.Linear(channels, D))
    return perturbed(Named(text_encoder=words(), image_encoder=image, **recipe_parts()))


# Two recipes: a title, ingredient lines and steps of word ids.
RECIPES = [([1, 5, 2], [[1, 7, 8, 2], [1, 9, 2]], [[1, 4, 2]]), ([1, 6, 6, 2], [[1, 11, 2]], [[1, 12, 13, 2], [1, 2]])]


def batch(recipes) -> RecipeBatch:
    rows = [row for title, lines, steps in recipes for row in (title, *lines, *steps)]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    columns, first = ([], [], []), 0
    for title, lines, steps in recipes:
        columns[0].append(first)
        columns[1].append([first + 1 + i if i < len(lines) else -1 for i in range(2)])
        columns[2].append([first + 1 + len(lines) + i if i < len(steps) else -1 for i in range(2)])
        first += 1 + len(lines) + len(steps)
        assert title
    return RecipeBatch(tokens, *map(torch.tensor, columns))


def recipe_components(theirs, sentence) -> list[torch.Tensor]:
    """The three components, (2, E) each; `sentence` reads one sentence's ids by the encoder of a name."""
    merger = theirs.text_encoder.merger
    columns = [[sentence("title", title) for title, _, _ in RECIPES]]
    for name, which in (("ingredients", 1), ("instructions", 2)):
        columns.append(
            [pooled(merger[name], torch.stack([sentence(name, ids) for ids in recipe[which]])) for recipe in RECIPES]
        )
    return [torch.stack(column) for column in columns]


def compare_recipes(system, theirs, sentence):
    components = recipe_components(theirs, sentence)
    recipes = system.eval().encode_recipes(batch(RECIPES))
    for ours, expected in zip(recipes.components, components, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    expected = torch.tanh(theirs.merger_recipe(torch.cat(components, 1)))
    torch.testing.assert_close(recipes.embedding, expected, rtol=1e-4, atol=1e-5)
    raw, losses = dict(zip(NAMES, components, strict=True)), []
    for a in NAMES:
        for b in NAMES:
            if a != b:
                losses.append(triplet_loss(raw[a], theirs.projector_recipes[b][a](raw[b]), margin=0.3))
    ours = system.self_supervised_loss(recipes.components, lambda a, b: triplet_loss(a, b, margin=0.3))
    torch.testing.assert_close(ours, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def one_word_sentence(theirs):
    encoder = theirs.text_encoder
    return lambda name, ids: pooled(encoder.tfs[name], encoder.word_embedding(torch.tensor(ids)))


def config(model="resnet18", **changes) -> SystemConfig:
    return SystemConfig(
        WORDS, K, image_model=model, embed_dim=D, recipe_dim=E, recipe_layers=2, recipe_heads=2,
        recipe_feedforward=32, dropout=0.0, **changes,
    )  # fmt: skip


def save(theirs, path, prefix=""):
    torch.save(OrderedDict((prefix + name, value) for name, value in theirs.state_dict().items()), path)
    return path


PHOTOS = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(photos, statistics):
    mean, std = (value[:, None, None] for value in statistics)
    return (photos / 255 - mean) / std


@torch.inference_mode()
def test_ht_with_a_resnet(tmp_path):
    theirs = ht(nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2]), 512)
    system = build(config())
    said = load_published(system, save(theirs, tmp_path / "model-best.ckpt", "module."))
    assert said.kind == "H-T" and not said.left_over and not said.absent
    assert "image_encoder (" in str(said) and len(str(said).splitlines()) == 3
    compare_recipes(system, theirs, one_word_sentence(theirs))
    maps = theirs.image_encoder.backbone(normalised(PHOTOS, IMAGENET))
    expected = torch.tanh(theirs.image_encoder.fc(maps.mean((2, 3))))
    torch.testing.assert_close(
        system.encode_images(SimpleNamespace(images=PHOTOS, labels=None)).embedding, expected, rtol=1e-4, atol=1e-5
    )


@torch.inference_mode()
def test_ht_with_a_vit_has_its_own_normalisation(tmp_path):
    """The head is left over; photos are normalised as H-T's code does, not as timm says of the model."""
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7)
    theirs = ht(backbone, 192)
    system = build(config("vit_tiny_patch16_224", image_model_args=("img_size: 64",)))
    said = load_published(system, save(theirs, tmp_path / "vit.ckpt"))
    assert said.left_over == [f"image_encoder.backbone.head.{name}" for name in ("bias", "weight")]
    system, theirs = system.double(), theirs.double()
    tokens = backbone.forward_features(normalised(PHOTOS.double(), IMAGENET))
    expected = torch.tanh(theirs.image_encoder.fc(tokens[:, 0]))
    torch.testing.assert_close(
        system.encode_images(SimpleNamespace(images=PHOTOS, labels=None)).embedding, expected, rtol=1e-4, atol=1e-5
    )


def attention_layer(decoder: bool) -> Named:
    attention = "multihead_attn" if decoder else "self_attn"
    norms = ("norm2", "norm3") if decoder else ("norm1", "norm2")
    return Named(
        **{attention: nn.MultiheadAttention(512, 2)}, linear1=nn.Linear(512, 32), linear2=nn.Linear(32, 512),
        **{name: nn.LayerNorm(512) for name in norms},
    )  # fmt: skip


def debiasing() -> Named:
    body = torchvision.models.resnet18(weights=None)
    del body.fc
    return perturbed(
        Named(
            backbone=nn.Sequential(Named(body=body)),
            transformer=Named(
                encoder=Named(layers=nn.ModuleList([attention_layer(False)])),
                decoder=Named(
                    layers=nn.ModuleList([attention_layer(True), attention_layer(True)]), norm=nn.LayerNorm(512)
                ),
            ),
            text_encoder=words(), query_embed=nn.Embedding(K, 512), img_fc=nn.Linear(512, D),
            fc=Named(W=nn.Parameter(torch.randn(1, K, 512)), b=nn.Parameter(torch.zeros(1, K))),
            Wv=nn.Linear(E, D), **recipe_parts(),
        )
    )  # fmt: skip


def feature_map(body, x):
    x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
    return body.layer4(body.layer3(body.layer2(body.layer1(x))))


def logits_of(theirs, maps: torch.Tensor) -> torch.Tensor:
    """Query2Label on (B, C, h, w); the position of channel 2i is a sine, that of 2i + 1 a cosine."""
    height, width = maps.shape[2:]
    position = torch.zeros(height * width, 512)
    for cell in range(height * width):
        for half, (at, length) in enumerate([(cell // width, height), (cell % width, width)]):
            for i in range(128):
                angle = 2 * np.pi * (at + 1) / length / 10000 ** (2 * i / 256)
                position[cell, 256 * half + 2 * i : 256 * half + 2 * i + 2] = torch.tensor(
                    [np.sin(angle), np.cos(angle)]
                )

    def layer(part, attention, norms, x, where, memory, memory_where):
        x = norms[0](x + attention(x + where, memory + memory_where, memory, need_weights=False)[0])
        return norms[1](x + part.linear2(F.relu(part.linear1(x))))

    x = maps.flatten(2).permute(2, 0, 1)  # (h w, B, C)
    (first,), where = theirs.transformer.encoder.layers, position[:, None]
    memory = layer(first, first.self_attn, (first.norm1, first.norm2), x, where, x, where)
    queries = theirs.query_embed.weight[:, None].expand(-1, len(maps), -1)
    out = torch.zeros_like(queries)
    for part in theirs.transformer.decoder.layers:
        out = layer(part, part.multihead_attn, (part.norm2, part.norm3), out, queries, memory, where)
    out = theirs.transformer.decoder.norm(out).transpose(0, 1)
    return (theirs.fc.W * out).sum(2) + theirs.fc.b


@torch.inference_mode()
def test_the_debiasing_papers_system_with_its_term(tmp_path):
    theirs, dictionary = debiasing(), torch.randn(K, E)
    attached = replace(VARIANTS["debiased"], classifier_dim=512, classifier_heads=2, classifier_feedforward=32)
    system = build(config(debiasing=attached), dictionary)
    state = {"epoch": 3, "best_recall1": np.float64(0.6), "optimizer": {"state": {}}}
    state["state_dict"] = OrderedDict((f"module.{k}", v) for k, v in theirs.state_dict().items())
    torch.save(state, tmp_path / "model_best.pth.tar")
    said = load_published(system, tmp_path / "model_best.pth.tar")
    assert said.kind == "the debiasing paper" and not said.left_over and said.absent == ["adjustment.dictionary"]
    compare_recipes(system, theirs, one_word_sentence(theirs))
    maps = feature_map(theirs.backbone[0].body, normalised(PHOTOS, IMAGENET))
    logits = logits_of(theirs, maps)
    images = system.encode_images(SimpleNamespace(images=PHOTOS, labels=None))
    torch.testing.assert_close(images.embedding, torch.tanh(theirs.img_fc(maps.mean((2, 3)))), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images.logits, logits, rtol=1e-3, atol=1e-3)
    p = torch.sigmoid(logits)
    p = torch.where(p < 0.5, 0, p)
    z = (p / p.sum(1, keepdim=True)).nan_to_num() @ theirs.Wv(dictionary)
    torch.testing.assert_close(images.z, z, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_without_a_classifier_its_weights_are_left_over(tmp_path):
    theirs = debiasing()
    said = load_published(system := build(config()), save(theirs, tmp_path / "x.pth"))
    assert {name.split(".")[0] for name in said.left_over} == {"classifier", "adjustment"} and not said.absent
    compare_recipes(system, theirs, one_word_sentence(theirs))


def test_an_undebiased_baseline_fills_no_classifier(tmp_path):
    theirs = ht(nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2]), 512)
    system = build(config(debiasing=replace(VARIANTS["classifier_only"], classifier_dim=8)))
    said = load_published(system, save(theirs, tmp_path / "x.ckpt"))
    assert said.absent and {name.split(".")[0] for name in said.absent} == {"classifier"}


# ---- DAR ----


class Adapter(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(dim, 8), nn.ReLU())
        self.adapter_up = nn.Linear(8, dim)

    def forward(self, x):
        return x + self.adapter_up(self.adapter_down(x))


def with_adapters(model: nn.Module, layers, dim: int) -> nn.Module:
    """Hugging Face's own CLIP, an adapter after each attention and each MLP, before the residual sum."""
    for layer in layers:
        for place, part in (("attention_adapters", layer.self_attn), ("output_adapters", layer.mlp)):
            adapter = Adapter(dim)
            setattr(layer, place, Named(adapters=nn.ModuleDict({"bottleneck_adapter": adapter})))

            def adapt(_, __, out, adapter=adapter):
                return (adapter(out[0]), *out[1:]) if isinstance(out, tuple) else adapter(out)

            part.register_forward_hook(adapt)
    return model


def hf_text(adapted=True) -> nn.Module:
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3, projection_dim=128,
            hidden_act="gelu", eos_token_id=49407, bos_token_id=49406,
        )
    )  # fmt: skip
    return with_adapters(model, model.text_model.encoder.layers, 96) if adapted else model


def hf_vision(adapted=True) -> nn.Module:
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, projection_dim=128,
            hidden_act="gelu", image_size=56, patch_size=14,
        )
    )  # fmt: skip
    return with_adapters(model, model.vision_model.encoder.layers, 128) if adapted else model


def dar() -> Named:
    text, vision = hf_text(False), hf_vision(False)
    perturbed(text), perturbed(vision)
    tfs = nn.ModuleDict({name: hf_text() for name in NAMES})
    theirs = Named(
        text_encoder=Named(tfs=tfs, merger=nn.ModuleDict({name: transformer(128) for name in NAMES[1:]})),
        image_encoder=hf_vision(), sam_img_encoder=hf_vision(False), llama_text_encoder=hf_text(),
        **recipe_parts(128, 128),
    )  # fmt: skip
    perturbed(theirs)
    for copy in (*tfs.values(), theirs.llama_text_encoder):
        copy.load_state_dict(text.state_dict(), strict=False)
    for copy in (theirs.image_encoder, theirs.sam_img_encoder):
        copy.load_state_dict(vision.state_dict(), strict=False)
    return theirs


def dar_config(**changes) -> SystemConfig:
    return SystemConfig(
        49408, K, method="dar", clip_model="kitchen-clip-small", adapter_width=8, descriptions="adapted", segments=2,
        recipe_layers=2, recipe_heads=2, recipe_feedforward=32, dropout=0.0, **changes,
    )  # fmt: skip


@torch.inference_mode()
def test_dar(tmp_path, monkeypatch):
    theirs, system = dar(), build(dar_config())
    said = load_published(system, save(theirs, tmp_path / "dar.ckpt"))
    assert said.kind == "DAR" and not said.absent and not [n for n in said.left_over if "position_ids" not in n]
    system.eval()
    monkeypatch.setattr("tests.systems.test_published.RECIPES", [
        ([49406, 5, 49407], [[49406, 7, 8, 49407], [49406, 9, 49407]], [[49406, 4, 49407]]),
        ([49406, 6, 6, 49407], [[49406, 11, 49407]], [[49406, 12, 13, 49407], [49406, 49407]]),
    ])  # fmt: skip
    compare_recipes(system, theirs, lambda name, ids: theirs.text_encoder.tfs[name](torch.tensor([ids])).text_embeds[0])
    photos = PHOTOS[..., :56, :56]
    expected = theirs.image_encoder(normalised(photos, OPENAI)).image_embeds
    torch.testing.assert_close(
        system.encode_images(SimpleNamespace(images=photos, labels=None)).embedding, expected, rtol=1e-4, atol=1e-4
    )
    tokens = clip_tokens(["A grey soup.", "A pie, brown as a nut"], 12)
    expected = torch.stack(
        [theirs.llama_text_encoder(row[: int(row.argmax()) + 1][None]).text_embeds[0] for row in tokens]
    )
    torch.testing.assert_close(system.encode_descriptions(tokens), expected, rtol=1e-4, atol=1e-4)
    expected = theirs.sam_img_encoder(normalised(photos, OPENAI)).image_embeds
    torch.testing.assert_close(system.segment_encoder.features(photos), expected, rtol=1e-4, atol=1e-4)


def test_dars_copies_of_a_frozen_tower_must_be_one(tmp_path):
    theirs = dar()
    theirs.llama_text_encoder.text_projection.weight.data += 1
    with pytest.raises(ValueError, match=r"llama_text_encoder.text_projection.weight and text_encoder.tfs.*differ"):
        load_published(build(dar_config()), save(theirs, tmp_path / "dar.ckpt"))


# ---- what does not fit ----


@pytest.fixture(scope="module")
def small():
    return ht(nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2]), 512)


def test_a_weight_that_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, small):
    path = save(small, tmp_path / "x.ckpt")
    system = build(replace(config(), vocabulary=WORDS + 1))
    before = {k: v.clone() for k, v in system.state_dict().items()}
    with pytest.raises(ValueError, match=rf"x.ckpt: recipe_encoder.word.weight is \[{WORDS}, {E}\] in the checkpoint"):
        load_published(system, path)
    assert all(torch.equal(before[k], v) for k, v in system.state_dict().items())
    state = small.state_dict()
    del state["text_encoder.merger.ingredients.pos_encoder.weight"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="sentences.ingredients.position is not in this checkpoint of H-T"):
        load_published(build(config()), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="a checkpoint of H-T; set method to ht"):
        load_published(build(dar_config()), path)


class Harm:
    def __reduce__(self):
        return exec, ("open('pwned.txt', 'w').close()",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "not a checkpoint of tensors alone"),
        ({"a": Harm()}, "not a checkpoint of tensors alone"),
        ({"a": 1}, "holds no weights by name"),
        ([torch.zeros(1)], "holds no weights by name"),
        ({"a": torch.zeros(1)}, "not those of H-T, the debiasing paper or DAR"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"x.ckpt: .*{reason}") as error:
        load_published(build(config()), path)
    assert "\n" not in str(error.value) and not (tmp_path / "pwned.txt").exists()


# ---- the dictionary ----


def write_dictionary(folder, table, classes=None):
    (folder / "d.pkl").write_bytes(pickle.dumps(table))
    classes = {"sea_salt": 1, "salt": 1, "leek": 0} if classes is None else classes
    (folder / "ing2label_topk2.pkl").write_bytes(pickle.dumps(classes))
    return folder / "d.pkl"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_papers_dictionary(tmp_path, dtype):
    rng, table = np.random.default_rng(0), defaultdict(list)
    for label in (1, 0, 1, 1):
        table[label].append(rng.random(6).astype(dtype))
    dictionary = read_dictionary(write_dictionary(tmp_path, table), ["sea salt", "leek"])
    expected = np.stack([np.mean(np.stack(table[label]).astype(float), 0) for label in (1, 0)])
    assert dictionary.dtype == torch.float32
    np.testing.assert_allclose(dictionary.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({0: [np.ones(3)]}, "no vectors of the class 'salt'"),
        ({0: [np.ones(3)], 1: []}, "no vectors of the class 'salt'"),
        ({0: [np.ones(3)], 1: [np.ones(2)]}, "'salt' has not a list of vectors of numbers, all of one length"),
        ({0: [np.ones(3), np.ones(2)], 1: [np.ones(3)]}, "'leek' has not"),
        ({0: [np.full(3, np.nan)], 1: [np.ones(3)]}, "'leek' has not"),
        ({0: ["x"], 1: [np.ones(3)]}, "'leek' has not"),
    ],
)
def test_a_dictionary_of_wrong_form(tmp_path, table, reason):
    with pytest.raises(DataError, match=f"d.pkl: .*{reason}"):
        read_dictionary(write_dictionary(tmp_path, table), ["leek", "salt"])
    (tmp_path / "ing2label_topk2.pkl").unlink()
    with pytest.raises(DataError, match="0 files ing2label_topk"):
        read_dictionary(tmp_path / "d.pkl", ["leek", "salt"])
