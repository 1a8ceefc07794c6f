"""H-T's training against a plain re-implementation of its description (arXiv:2103.13061): padded, with loops.

Forward pass in train mode without dropout, gradients, some steps of Adam, paired and text-only batches in turn.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from recipe_lib.data.loading import PairedBatches, StudyDataset
from recipe_lib.data.store import TEXT_ONLY
from recipe_lib.systems.registry import build
from recipe_lib.training.fit import TrainingConfig, train

CONFIG = TrainingConfig(epochs=1, batch_size=16, crop_size=48, learning_rate=1e-3, margin=0.3, seed=5)
NAMES = ("title", "ingredients", "instructions")


class Reader(nn.Module):
    """Vectors with a padding mask -> one: positions, torch's transformer, mean over what is real."""

    def __init__(self, dim, layers, heads, feedforward):
        super().__init__()
        self.position = nn.Parameter(torch.empty(50, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, feedforward, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x, real):
        x = self.encoder(x + self.position[: x.shape[1]], src_key_padding_mask=~real)
        return (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)


class PlainHT(nn.Module):
    def __init__(self, config, backbone):
        super().__init__()
        size = (config.recipe_dim, config.recipe_layers, config.recipe_heads, config.recipe_feedforward)
        self.backbone, self.image_fc = backbone, nn.Linear(backbone.num_features, config.embed_dim)
        self.word = nn.Embedding(config.vocabulary, config.recipe_dim)
        self.words = nn.ModuleDict({name: Reader(*size) for name in NAMES})
        self.sentences = nn.ModuleDict({name: Reader(*size) for name in NAMES[1:]})
        self.recipe_fc = nn.Linear(3 * config.recipe_dim, config.embed_dim)
        self.across = nn.ModuleDict({f"{a} {b}": nn.Linear(*2 * [size[0]]) for a in NAMES for b in NAMES if a != b})

    def images(self, pixels):
        config = self.backbone.pretrained_cfg
        mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
        return torch.tanh(self.image_fc(self.backbone.forward_features((pixels / 255 - mean) / std).mean((2, 3))))

    def component(self, name, recipes):
        rows = getattr(recipes, name)
        if name == "title":
            tokens = recipes.tokens[rows]
            return self.words[name](self.word(tokens), tokens != 0)
        parts = []
        for row in rows:  # a recipe at a time, no sentence shared
            tokens = recipes.tokens[row[row >= 0]]
            vectors = self.words[name](self.word(tokens), tokens != 0)
            parts.append(self.sentences[name](vectors[None], torch.ones(1, len(vectors), dtype=torch.bool)))
        return torch.cat(parts)

    def losses(self, batch):
        parts = {name: self.component(name, batch.recipes) for name in NAMES}
        loss = {
            "self_supervised": sum(
                hinge(parts[a], self.across[f"{a} {b}"](parts[b])) for a in NAMES for b in NAMES if a != b
            )
            / 6
        }
        if batch.images is not None:
            recipe = torch.tanh(self.recipe_fc(torch.cat([parts[name] for name in NAMES], 1)))
            loss["retrieval"] = hinge(self.images(batch.images), recipe)
        return loss


def hinge(a, b):
    """Both hinges, summed over i != j, divided by B x B."""
    total = 0
    for i in range(len(a)):
        others = torch.arange(len(a)) != i
        own = torch.cosine_similarity(a[i], b[i], dim=0)
        total = total + (0.3 + torch.cosine_similarity(a[i], b[others]) - own).clamp(min=0).sum()
        total = total + (0.3 + torch.cosine_similarity(a[others], b[i]) - own).clamp(min=0).sum()
    return total / len(a) ** 2


def plain_copy(system):
    plain = PlainHT(system.config, deepcopy(system.image_encoder.backbone))
    pairs = {
        plain.image_fc: system.image_encoder.fc,
        plain.word: system.recipe_encoder.word,
        plain.words: system.recipe_encoder.words,
        plain.sentences: system.recipe_encoder.sentences,
        plain.recipe_fc: system.recipe_encoder.fc,
    } | {plain.across[f"{a} {b}"]: system.projections[f"{a}_{b}"] for a in NAMES for b in NAMES if a != b}
    for mine, theirs in pairs.items():
        mine.load_state_dict(theirs.state_dict())
    return plain, pairs | {plain.backbone: system.image_encoder.backbone}


def flat(modules):
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


def test_an_epoch_equals_the_plain_one(tiny_store, tiny_config, tmp_path):
    torch.manual_seed(0)
    system = build(replace(tiny_config, dropout=0.0))
    plain, pairs = plain_copy(system)
    start = flat(pairs)
    text = tiny_store.split(TEXT_ONLY)
    data = StudyDataset(tiny_store.split("train"), 48, text_only=text, augment=True, seed=5)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    logged = {"retrieval": [], "self_supervised": []}
    for draw in PairedBatches(96, 16, text_only=len(text), seed=5):
        losses = plain.losses(data[draw])
        adam.zero_grad()
        sum(losses.values()).backward()
        adam.step()
        if draw.paired:
            for name, value in losses.items():
                logged[name].append(float(value.detach()))
    history = train(system, tiny_store, CONFIG, tmp_path)
    for name, values in logged.items():
        assert history[name].iloc[0] == pytest.approx(sum(values) / 6, rel=1e-3), name
    assert len(start) == sum(p.numel() for p in plain.parameters()), "every parameter is compared"
    moved = flat(pairs) - start
    assert (flat(pairs.values()) - start - moved).norm() < 0.02 * moved.norm()
