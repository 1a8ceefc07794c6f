import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recipe_lib.data.clip_text import clip_ids, clip_tokens
from recipe_lib.data.loading import RecipeBatch
from recipe_lib.encoders import clip as clip_module
from recipe_lib.encoders.captions import CLIPImageEncoder, ZeroShotEncoder
from recipe_lib.encoders.clip import ImageTower, TextTower, clip_towers, save_clip
from recipe_lib.encoders.clip_score import FoodRank
from recipe_lib.systems.dar import DARRecipeEncoder, DescriptionEncoder, SegmentEncoder

SMALL = "kitchen-clip-small"
IMAGES = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LINES = [
    "apple pie",
    "2 cups of flour",
    "wow!°, 3 onions!!?",
    "",
    "chop the onion, fry it in butter until golden, then add stock, salt, pepper and a good pinch of nutmeg, and serve",
]


@pytest.fixture(scope="module")
def towers():
    torch.manual_seed(0)
    return clip_towers(SMALL)


def tiny(**changes):
    config = json.loads((clip_module.LOCAL / f"{SMALL}.json").read_text())
    for part, values in changes.items():
        config[part] = config[part] | values
    return open_clip.CLIP(**config).eval()


def standard():
    return {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}


def normalised(images):
    mean, std = (torch.tensor(standard()[name])[:, None, None] for name in ("mean", "std"))
    return (images / 255 - mean) / std


def stir(*modules):
    """Adapters start near the identity; these do something."""
    generator = torch.Generator().manual_seed(1)
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision_cfg": {"pool_type": "avg", "no_ln_pre": True}},
        {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}},
        {"vision_cfg": {"final_ln_after_pool": True}},
        {"vision_cfg": {"ls_init_value": 0.1}, "text_cfg": {"ls_init_value": 0.1}},
        {"vision_cfg": {"qk_norm": True, "scale_attn": True}, "text_cfg": {"scale_fc": True}},
    ],
    ids=["standard", "mean pooling", "norm after it", "norm after the class token", "layer scale", "custom blocks"],
)
def test_towers_give_what_open_clip_gives(changes):
    clip = tiny(**changes)
    image, text = ImageTower(clip.visual, standard()), TextTower(clip)
    tokens = clip_tokens(LINES, 77)
    torch.testing.assert_close(image.pool(image(IMAGES)), clip.encode_image(normalised(IMAGES)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text(tokens), clip.encode_text(tokens), rtol=1e-4, atol=1e-5)
    clip.visual.output_tokens = True
    patches = clip.visual(normalised(IMAGES))[1].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(image.patches(image(IMAGES)), patches, rtol=1e-4, atol=1e-5)


def test_patches_are_dropped_in_training_alone():
    clip = tiny(vision_cfg={"patch_dropout": 0.5})
    image = ImageTower(clip.visual, standard(), frozen=False)
    assert image.eval()(IMAGES).shape[1] == 17 and image.train()(IMAGES).shape[1] == 9


def test_sequence_first_attention():
    clip = tiny()
    expected = ImageTower(clip.visual, standard())(IMAGES)
    for block in clip.visual.transformer.resblocks:
        block.attn.batch_first = False
    torch.testing.assert_close(ImageTower(clip.visual, standard())(IMAGES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"width": 0, "reduction": 4}])
def test_adapters_sit_after_attention_and_after_the_mlp(options):
    clip = tiny()
    image, text = ImageTower(clip.visual, standard()), TextTower(clip)
    tokens = clip_tokens(LINES, 40)
    plain = image(IMAGES), text(tokens)
    ours = image.adapters(**options), text.adapters(**options)
    assert ours[0].down[0].out_features == (32 if options else 64)
    for parameter in (p for adapters in ours for p in adapters.parameters()):
        assert not parameter.any() if parameter.ndim == 1 else 0.018 < parameter.std() < 0.022
    near = image.pool(image(IMAGES, ours[0])), text(tokens, ours[1])
    for adapted, bare in zip(near, (image.pool(plain[0]), plain[1]), strict=True):
        assert torch.cosine_similarity(adapted, bare).min() > 0.99, "near the identity"

    stir(*ours)

    def hook(adapters, place):  # attention gives a tuple
        def changed(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            x = x + adapters.up[place](adapters.down[place](x).relu())
            return (x, None) if isinstance(output, tuple) else x

        return changed

    adapted = image.pool(image(IMAGES, ours[0])), text(tokens, ours[1])
    for transformer, adapters in zip((clip.visual.transformer, clip.transformer), ours, strict=True):
        for i, block in enumerate(transformer.resblocks):
            block.attn.register_forward_hook(hook(adapters, 2 * i))
            block.mlp.register_forward_hook(hook(adapters, 2 * i + 1))
    expected = clip.encode_image(normalised(IMAGES)), clip.encode_text(clip_tokens(LINES, 77))
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (adapted[0] - image.pool(plain[0])).abs().max() > 0.1 and (adapted[1] - plain[1]).abs().max() > 0.1


def system(towers):
    image, text = towers
    return nn.ModuleDict(
        {
            "image": CLIPImageEncoder(image, width=64),
            "recipe": DARRecipeEncoder(text, feedforward=32, dropout=0.0),
            "description": DescriptionEncoder(text),
            "segment": SegmentEncoder(image, width=8),
        }
    )


def recipes():
    return RecipeBatch(
        clip_tokens(LINES, 20),
        torch.tensor([0, 1, 0]),
        torch.tensor([[1, 2], [2, -1], [0, 3]]),
        torch.tensor([[4, 1, 0], [4, -1, -1], [2, 2, 4]]),
    )


def loss(model):
    segments = IMAGES[None].expand(3, -1, -1, -1, -1)
    out = [
        model["image"](IMAGES),
        model["recipe"](recipes()).embedding,
        model["description"](clip_tokens(LINES[:3], 77)),
        model["segment"](segments, torch.tensor([[True, True, True], [True, False, True], [True, False, False]])),
    ]
    return out, sum((i + 1) * (x**2).sum() for i, x in enumerate(out))


def test_one_tower_serves_as_copies_of_it_would(towers):
    torch.manual_seed(0)
    shared = system(towers)
    stir(shared)
    separate = copy.deepcopy(shared)
    recipe = separate["recipe"]
    towers_of = {name: copy.deepcopy(towers[1]) for name in recipe.adapters}
    recipe.encode_sentences = lambda name, tokens: towers_of[name](tokens, recipe.adapters[name])
    for name, which in (("description", 1), ("segment", 0)):
        object.__setattr__(separate[name], "tower", copy.deepcopy(towers[which]))

    (of_shared, a), (of_separate, b) = loss(shared), loss(separate)
    torch.testing.assert_close(of_shared, of_separate, rtol=0, atol=0)
    a.backward(), b.backward()
    for (name, p), q in zip(shared.named_parameters(), separate.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (".tower." in name), name
        if p.grad is not None:
            assert p.grad.abs().max() > 0, name
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


def test_state_holds_each_tower_once(towers):
    model = system(towers)
    state = model.state_dict()
    assert len({x.data_ptr() for x in state.values()}) == len(state)
    assert sum("token_embedding" in name for name in state) == 1 and sum("conv1" in name for name in state) == 1
    copied = copy.deepcopy(model)
    assert copied["description"].tower is copied["recipe"].tower is not towers[1]
    stir(copied)
    copied.load_state_dict(state)
    torch.testing.assert_close(loss(copied)[0], loss(model)[0])


def test_frozen_towers_stay_as_they_are(towers):
    image, text = towers
    model = system(towers).train()
    assert not any(m.training for tower in towers for m in tower.modules()) and model["image"].training
    before = copy.deepcopy(image.state_dict() | text.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    start = [x.weight.clone() for x in model["image"].adapters.up]
    for _ in range(2):
        optimizer.zero_grad()
        loss(model)[1].backward()
        optimizer.step()
    after = image.state_dict() | text.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(torch.equal(x.weight, w) for x, w in zip(model["image"].adapters.up, start, strict=True))


def test_without_adapters_nothing_is_kept_for_a_backward_pass(towers):
    image, text = towers
    tokens = clip_tokens(LINES, 20)
    assert not image(IMAGES).requires_grad and not text(tokens).requires_grad
    assert image(IMAGES, image.adapters()).requires_grad and text(tokens, text.adapters()).requires_grad
    assert image.adapters(0, 0) is None
    with torch.no_grad():
        assert not text(tokens, text.adapters()).requires_grad
    encoder = DARRecipeEncoder(text, width=0, feedforward=32)
    encoder(recipes()).embedding.sum().backward()
    assert encoder.fc.weight.grad.abs().max() > 0
    assert not any("adapters" in name for name, _ in encoder.named_parameters())


def test_a_tower_that_is_not_frozen_trains():
    image, text = clip_towers(SMALL, frozen=False)
    (image.pool(image.train()(IMAGES)).sum() + text(clip_tokens(LINES, 20)).sum()).backward()
    assert image.visual.conv1.weight.grad.abs().max() > 0 and text.token_embedding.weight.grad.abs().max() > 0
    assert image.training
    with pytest.raises(ValueError, match="must be frozen"):
        SegmentEncoder(image)


def test_nothing_is_computed_for_padding(towers):
    text = towers[1]
    ids = [clip_ids(line, 77) for line in LINES]
    assert 0 in ids[2], "a '!' is token 0, as padding is"
    long, short = clip_tokens(LINES, 77), clip_tokens(LINES, 40)
    assert (long[:, :40] == short).all() and len(ids[4]) < 40
    torch.testing.assert_close(text(long), text(short))
    torch.testing.assert_close(text(long), torch.cat([text(row[None]) for row in long]), rtol=1e-4, atol=1e-5)
    seen = []
    blocks = text.transformer.resblocks
    hooks = [blocks[i].mlp.register_forward_hook(lambda m, i, o: seen.append(len(o))) for i in (0, -1)]
    text(long)
    for hook in hooks:
        hook.remove()
    assert seen == [sum(map(len, ids)), len(LINES)], "every real token once; of the last block's, each text's end"


def test_tokens_are_those_of_open_clip():
    lines = [
        *LINES,
        "Crème brûlée &amp; 1½ cups  “sugar”\n\tDON'T stir",
        "ABC abc",
        "🍕 12345 it's",
        "<b>&lt; x",
        "&Lt; &AMP;",
        "voilÃ\xa0 x",
        "cafÃ© au lait",
        "a\x1cb",
        "\x1b[0m x",
    ]
    for length in (2, 5, 20, 77):
        assert clip_tokens(lines, length).equal(open_clip.tokenize(lines, length))
    printable = "".join(map(chr, range(32, 127))).replace("&", "")
    generator = torch.Generator().manual_seed(0)
    noise = [
        "".join(printable[i] for i in torch.randint(len(printable), (30,), generator=generator)) for _ in range(200)
    ]
    assert clip_tokens(noise, 77).equal(open_clip.tokenize(noise, 77))
    tokens = clip_tokens(["x " * 100, ""], 20)
    assert tokens[0, -1] == tokens[1, 1] == 49407 and (tokens[1, 2:] == 0).all()


def test_photo_encoder_has_the_interface_of_the_others(towers):
    encoder = CLIPImageEncoder(towers[0], width=64)
    features = encoder.features(IMAGES)
    assert encoder.channels == 128 and encoder.feature_map(features).shape == (3, 128, 4, 4)
    embedding = encoder.embed(features)
    assert torch.equal(embedding, towers[0].pool(towers[0](IMAGES, encoder.adapters)))
    assert embedding.shape == (3, 128) and torch.equal(encoder(IMAGES), embedding)
    towers[0].visual.ln_post, kept = nn.Identity(), towers[0].visual.ln_post
    tokens = torch.arange(17.0)[None, :, None].expand(1, 17, 128)
    grid = encoder.feature_map(tokens)[0, 0]
    towers[0].visual.ln_post = kept
    assert grid[2, 3] == 1 + 4 * 2 + 3, "row by row, the class token left out"


def test_recipes_do_not_depend_on_their_company(towers):
    encoder = DARRecipeEncoder(towers[1], feedforward=32).eval()
    stir(encoder)
    together = encoder(recipes())
    assert together.embedding.shape == (3, 128) and [c.shape for c in together.components] == [(3, 128)] * 3
    torch.testing.assert_close(together.embedding, torch.tanh(encoder.fc(torch.cat(together.components, 1))))
    title = towers[1](clip_tokens([LINES[0]], 77), encoder.adapters["title"])
    torch.testing.assert_close(together.components[0][2:], title, rtol=1e-4, atol=1e-4)
    batch = recipes()
    alone = encoder(
        RecipeBatch(batch.tokens, batch.title[1:2], batch.ingredients[1:2, :1], batch.instructions[1:2, :1])
    )
    torch.testing.assert_close(together.embedding[1:2], alone.embedding, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("empty", [[[4, -1], [-1, -1], [0, 1]], [[-1], [-1], [-1]], [[], [], []]])
def test_a_recipe_without_instructions_has_none(towers, empty):
    encoder = DARRecipeEncoder(towers[1], feedforward=32)
    batch = recipes()
    batch.instructions = torch.tensor(empty, dtype=torch.int64)
    encoded = encoder(batch)
    assert torch.isfinite(encoded.embedding).all() and (encoded.components[2][1] == 0).all()
    sum(F.normalize(c, dim=1).sum() for c in encoded.components).backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_segments_are_averaged_over_those_that_are_there(towers):
    encoder = SegmentEncoder(towers[0])
    kept = encoder.features(IMAGES)
    torch.testing.assert_close(kept, towers[0].pool(towers[0](IMAGES)))
    assert not kept.requires_grad and not list(encoder.parameters()) and not list(encoder.children())
    mask = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    out = encoder(torch.stack([kept, kept, kept]), mask)
    torch.testing.assert_close(out, torch.stack([kept.mean(0), kept[1], torch.zeros(128)]))


def test_adapted_segments_learn_from_pixels(towers):
    encoder = SegmentEncoder(towers[0], width=8)
    stir(encoder)
    mask = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    out = encoder(IMAGES[None].expand(3, -1, -1, -1, -1), mask)
    each = towers[0].pool(towers[0](IMAGES, encoder.adapters))
    expected = torch.stack([each.mean(0), each[1], torch.zeros(128)])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(torch.stack([each] * 3), mask), expected, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in encoder.parameters())
    nobody = encoder(IMAGES[None], torch.zeros(1, 3, dtype=torch.bool))
    assert not nobody.any() and nobody.shape == (1, 128)


def test_statistics_follow_the_weights(towers):
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    assert towers[0].mean.flatten().tolist() == pytest.approx([255 * x for x in mean])
    assert towers[0].std.flatten().tolist() == pytest.approx([255 * x for x in std])
    assert {"tower.mean", "tower.std"} <= set(CLIPImageEncoder(towers[0], width=64).state_dict())


def supported(model):
    try:
        return clip_module._config(model)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("model", "tag"),
    [
        ("ViT-B-16", "openai"),
        ("ViT-B-16-quickgelu", "openai"),
        ("ViT-B-16", "laion2b_s34b_b88k"),
        ("ViT-L-14", "dfn2b"),
    ],
)
def test_activation_and_statistics_follow_published_weights(model, tag, monkeypatch):
    published = open_clip.get_pretrained_cfg(model, tag) | {"mean": (0.1, 0.2, 0.3)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda m, t: published if (m, t) == (model, tag) else {})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda p: "file")
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda *a: None)
    with torch.device("meta"):  # nothing is computed
        monkeypatch.setattr(torch, "tensor", lambda x, t=torch.tensor: t(x, device="cpu"))
        image, text = clip_towers(model, pretrained=tag)
    wanted = open_clip.transformer.QuickGELU if tag in ("openai", "dfn2b") else nn.GELU
    for transformer in (image.visual.transformer, text.transformer):
        assert all(isinstance(block.mlp.gelu, wanted) for block in transformer.resblocks)
    assert image.mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])


def test_no_quickgelu_name_is_offered_with_other_weights():
    pairs = [(m, t) for m, t in open_clip.list_pretrained() if supported(m) is not None]
    assert len(pairs) > 50 and {m for m, _ in pairs} >= {"ViT-B-16", "ViT-B-32-quickgelu", "ViT-L-14", "ViT-bigG-14"}
    for model, tag in pairs:
        if supported(model).get("quick_gelu"):
            assert open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"), (model, tag)


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("ViT-B-17", "", "no such model; near: ViT-B-16"),
        ("", "", "no such model"),
        ("RN50", "openai", "ResNet image tower"),
        ("ViT-B-16-SigLIP", "", "timm image tower"),
        ("roberta-ViT-B-32", "", "Hugging Face text tower"),
        ("coca_ViT-B-32", "", "CoCa"),
        ("ViT-H-14-CLIPA", "", "own tokenizer"),
        ("ViT-B-16", "opnai", "neither a file nor weights of ViT-B-16 .openai, "),
        (SMALL, "openai", "neither a file"),
    ],
)
def test_mistakes_are_named(model, pretrained, words):
    with pytest.raises(ValueError, match=words) as error:
        clip_towers(model, pretrained=pretrained)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named(towers):
    with pytest.raises(ValueError, match=r"\(48, 48\).*reads \(56, 56\)"):
        towers[0](IMAGES[..., :48, :48])
    with pytest.raises(ValueError, match="80 tokens.*77 at most"):
        towers[1](clip_tokens(LINES, 80))


def test_weights_that_cannot_be_fetched_give_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with torch.device("meta"), pytest.raises(ConnectionError, match="openai.*ViT-B-16 cannot be fetched") as error:
        clip_towers("ViT-B-16", pretrained="openai")
    assert "\n" not in str(error.value)


def test_saved_towers_are_read_again_by_us_and_by_open_clip(towers, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_clip(path, *towers)
    again = clip_towers(SMALL, pretrained=str(path))
    tokens = clip_tokens(LINES, 40)
    assert torch.equal(again[0](IMAGES), towers[0](IMAGES)) and torch.equal(again[1](tokens), towers[1](tokens))
    clip = tiny()
    open_clip.load_checkpoint(clip, str(path))
    torch.testing.assert_close(clip.encode_text(clip_tokens(LINES, 77)), towers[1](tokens), rtol=1e-4, atol=1e-5)


def test_autocast_stays_near(towers):
    model = system(towers)
    stir(model)
    expected, _ = loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, total = loss(model)
    total.backward()
    for f, e in zip(rounded, expected, strict=True):
        torch.testing.assert_close(f.float(), e, rtol=0, atol=0.03)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


# ---- DAR's zero-shot score ----


def test_zero_shot_is_the_mean_of_components_that_are_means_of_sentences(towers):
    encoder, text = ZeroShotEncoder(towers[1]), towers[1]
    one = [text(clip_tokens([line], 20))[0] for line in LINES]
    encoded = encoder(recipes())
    expected = [
        (one[0] + (one[1] + one[2]) / 2 + (one[4] + one[1] + one[0]) / 3) / 3,
        (one[1] + one[2] + one[4]) / 3,
        (one[0] + (one[0] + one[3]) / 2 + (2 * one[2] + one[4]) / 3) / 3,
    ]
    torch.testing.assert_close(encoded.embedding, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.components[0][0], one[0], rtol=1e-4, atol=1e-5)
    batch = recipes()
    batch.instructions = torch.full((3, 2), -1)
    without = encoder(batch).embedding[1]
    expected = one[1] + one[2]  # its title, and its only line
    assert torch.cosine_similarity(without, expected, dim=0) == pytest.approx(1, abs=1e-5)


# ---- a picture of food ----


def test_food_rank_is_the_cosine_to_a_picture_of_food(tmp_path):
    torch.manual_seed(3)
    image, text = clip_towers(SMALL)
    save_clip(tmp_path / "clip.safetensors", image, text)
    rank = FoodRank(SMALL, str(tmp_path / "clip.safetensors"))
    crops = IMAGES.permute(0, 2, 3, 1).numpy()
    food = text(clip_tokens(["a picture of food"], 77))
    expected = torch.cosine_similarity(image.pool(image(IMAGES)), food)
    torch.testing.assert_close(torch.tensor(rank(crops)), expected, rtol=1e-3, atol=1e-4)
    larger = crops.repeat(4, 1).repeat(4, 2)  # 224 pixels, as segments are cut for ranking
    torch.testing.assert_close(torch.tensor(rank(larger)), expected, rtol=0, atol=0.05)
    assert str(tmp_path) in str(rank)
    with pytest.raises(ValueError, match="neither a file nor weights"):
        FoodRank(SMALL, "no-such-weights")
