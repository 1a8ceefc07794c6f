"""A retrieval system of one's own, in one file: colours of the photo against a bag of words, aligned by a critic.

./run_all.sh params/smoke.yaml -p method mine -p system_file tests/systems/my_system.py -p study mine
"""

import torch
import torch.nn.functional as F
from torch import nn

from recipe_lib.encoders.recipe import RecipeFeatures
from recipe_lib.systems.base import System


class Colours(nn.Module):
    """Photo -> a map of mean colours, sharpened -> one vector."""

    def __init__(self, dim, channels=24):
        super().__init__()
        self.channels = channels
        self.mix, self.norm, self.fc = nn.Conv2d(3, channels, 1), nn.BatchNorm1d(channels), nn.Linear(channels, dim)

    def features(self, images):
        return torch.relu(self.mix(F.adaptive_avg_pool2d(images.float() / 255, 4)))  # (B, C, 4, 4)

    def embed(self, features):
        return torch.tanh(self.fc(self.norm(features.mean((2, 3)))))  # (B, D)

    def feature_map(self, features):
        return features


class Words(nn.Module):
    """Recipe -> mean of its sentences, each the mean of its word vectors."""

    def __init__(self, vocabulary, dim):
        super().__init__()
        self.dim, self.word = dim, nn.Embedding(vocabulary, dim, padding_idx=0)

    def encode_sentences(self, component, tokens):
        real = (tokens != 0).unsqueeze(2)
        return (self.word(tokens) * real).sum(1) / real.sum(1).clamp(min=1)  # (U, E)

    def forward(self, recipes):
        sentences = self.encode_sentences("", recipes.tokens)
        rows = torch.cat([recipes.title[:, None], recipes.ingredients, recipes.instructions], 1)
        there = (rows >= 0).unsqueeze(2)
        embedding = (F.embedding(rows.clamp(min=0), sentences) * there).sum(1) / there.sum(1)
        return RecipeFeatures(embedding, ())


class Mine(System):
    """The critic learns to tell photos from recipes; the encoders learn to fool it."""

    defaults = {"alignment": 0.1, "hidden": 16}  # noqa: RUF012  set by system_args, such as ["alignment: 0.3"]

    def build(self):
        dim = self.config.embed_dim
        self.image_encoder, self.recipe_encoder = Colours(dim), Words(self.config.vocabulary, dim)
        hidden = self.args["hidden"]
        self.objectives["critic"] = nn.Sequential(nn.Linear(dim, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))

    def players(self):
        critic = list(self.objectives["critic"].parameters())
        others = [p for name, p in self.named_parameters() if not name.startswith("objectives.") and p.requires_grad]
        return {"critic": critic, "main": others}

    def losses(self, step):
        critic = self.objectives["critic"]
        image = self.encode_images(step.batch).embedding
        recipe = self.encode_recipes(step.batch.recipes).embedding
        if step.player == "critic":
            told = critic(recipe.detach()).mean() - critic(image.detach()).mean()
            bound = critic(torch.cat([image, recipe]).detach()).square().mean()
            return {"critic": told + 0.1 * bound}
        losses = super().losses(step)  # retrieval, and whatever is attached
        return losses | {"alignment": self.args["alignment"] * -critic(recipe).mean()}
