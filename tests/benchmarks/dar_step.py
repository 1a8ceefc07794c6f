"""A training step of DAR: shared towers and kept segment features against a tower per encoder and nothing kept.

    python -m tests.benchmarks.dar_step [--model ViT-B-16] [--batch 8] [--steps 3] [--device cpu]

Both have the same weights and the same batch, so the same loss: the last column shows that nothing else differs. The
straightforward version is the released code's: six towers, every recipe padded to 15 sentences of 20 tokens per
ingredient list and per instruction list, four segments per photo encoded at every step. Each runs in a process of
its own.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn

from recipe_lib.data.clip_text import clip_tokens
from recipe_lib.data.loading import RecipeBatch
from recipe_lib.encoders.captions import CLIPImageEncoder
from recipe_lib.encoders.clip import Adapters, TextTower, _run, clip_towers
from recipe_lib.encoders.dar import DARRecipeEncoder, DescriptionEncoder, SegmentEncoder
from recipe_lib.losses import circle_loss

WORDS = (
    "butter flour sugar onion oven bake mix stir until golden brown pan cup of and the a in for minutes salt".split()
)
SENTENCES, TOKENS, SEGMENTS = 15, 20, 4


def recipe_batch(batch: int, rng: np.random.Generator) -> RecipeBatch:
    """About 9 ingredient lines of 5 words and 9 steps of 13 words per recipe, as in Recipe1M."""

    def texts(count: int, words: int) -> list[str]:
        return [" ".join(rng.choice(WORDS, n)) for n in rng.integers(words // 2, 2 * words, count)]

    def rows(start: int, lengths: np.ndarray) -> Tensor:
        out = torch.full((batch, int(lengths.max())), -1)
        for row, length in zip(out, lengths, strict=True):
            row[:length] = torch.arange(start, start + length)
            start += length
        return out

    lines, steps = rng.integers(4, SENTENCES, (2, batch))
    tokens = clip_tokens(texts(batch, 4) + texts(lines.sum(), 5) + texts(steps.sum(), 13), TOKENS)
    return RecipeBatch(tokens, torch.arange(batch), rows(batch, lines), rows(batch + lines.sum(), steps))


class PaddedRecipeEncoder(DARRecipeEncoder):
    """A tower per component; every place of the padded recipe is encoded, at the full length."""

    def separate(self) -> None:
        self.towers = nn.ModuleDict({name: copy.deepcopy(self.tower) for name in self.adapters})
        del self.tower

    def _component(self, name: str, rows: Tensor, tokens: Tensor) -> Tensor:
        grid = rows if rows.ndim == 1 else nn.functional.pad(rows, (0, SENTENCES - rows.shape[1]), value=-1)
        padded = tokens[grid.clamp(min=0).flatten()]
        encoded = plain_text(self.towers[name], padded, self.adapters[name]).unflatten(0, grid.shape)
        return encoded if rows.ndim == 1 else self.sentences[name](encoded, grid >= 0)


def plain_text(tower: TextTower, tokens: Tensor, adapters: Adapters) -> Tensor:
    length = tokens.shape[1]
    x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
    mask = tower.mask[:length, :length]

    def attend(block: nn.Module, x: Tensor, _: None) -> Tensor:
        return block.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    x = tower.ln_final(_run(tower.transformer, x, adapters, attend))
    return x[torch.arange(len(x)), tokens.argmax(1)] @ tower.text_projection


def measure(version: str, model: str, batch: int, steps: int, device: str) -> tuple[float, float, float]:
    """Median seconds per step (of the CPU, on a CPU), peak GB, loss of the first step."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image, text = clip_towers(model)
    size = image.size
    photos = torch.from_numpy(rng.integers(0, 256, (batch, 3, *size), np.uint8)).to(device)
    segments = torch.from_numpy(rng.integers(0, 256, (batch * SEGMENTS, 3, *size), np.uint8)).to(device)
    mask = torch.ones(batch, SEGMENTS, dtype=torch.bool, device=device)
    recipes = recipe_batch(batch, rng).to(device)
    descriptions = clip_tokens([" ".join(rng.choice(WORDS, 30)) for _ in range(batch)], 77).to(device)

    kind = DARRecipeEncoder if version == "shared" else PaddedRecipeEncoder
    encoders = nn.ModuleDict(
        {
            "image": CLIPImageEncoder(image, width=64),
            "recipe": kind(text, dropout=0.0),
            "description": DescriptionEncoder(text),
            "segment": SegmentEncoder(image),
        }
    )
    if version == "separate":
        # As modules of their own, which is what a tower per encoder means.
        for name in ("description", "segment"):
            encoders[name].add_module("own", copy.deepcopy(encoders[name].tower))
            object.__setattr__(encoders[name], "tower", encoders[name].own)
        encoders["recipe"].separate()
        del text
    encoders.to(device)
    optimizer = torch.optim.Adam([p for p in encoders.parameters() if p.requires_grad], 1e-4)
    if version == "shared":  # in batches, once, as at preparation
        kept = torch.cat([encoders["segment"].features(part) for part in segments.split(batch)])
        kept = kept.unflatten(0, (batch, SEGMENTS))

    # On a CPU its own seconds: other processes on the machine do not count.
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds, losses = [], []
    for _ in range(steps + 1):
        start = clock()
        optimizer.zero_grad()
        photo, recipe = encoders["image"](photos), encoders["recipe"](recipes).embedding
        if version == "shared":
            description, features = encoders["description"](descriptions), kept
        else:
            described = encoders["description"]
            description = plain_text(described.tower, descriptions, described.adapters)
            features = encoders["segment"].features(segments).unflatten(0, (batch, SEGMENTS))
        segment = encoders["segment"](features, mask)
        loss = circle_loss(photo, recipe) + circle_loss(segment, recipe) + circle_loss(photo, description)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(clock() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    return float(np.median(seconds[1:])), peak / 1e9, losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--version", choices=["empty", "shared", "separate"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.version == "empty":
        print(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 0)
        return
    if args.version:
        print(*measure(args.version, args.model, args.batch, args.steps, args.device))
        return
    results = {}
    for version in ("empty", "shared", "separate"):
        command = [sys.executable, "-m", "tests.benchmarks.dar_step", *sys.argv[1:], "--version", version]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[version] = [float(x) for x in output.split()]
    libraries = results.pop("empty")[1] if args.device == "cpu" else 0.0
    print(f"{args.model}, batch {args.batch}, {args.device}; memory without the {libraries:.2f} GB of the libraries")
    for version, (seconds, peak, loss) in results.items():
        print(f"{version:9} {seconds:7.3f} s/step {peak - libraries:6.2f} GB  loss {loss:.4f}")
    (fast, small, a), (slow, large, b) = results.values()
    print(f"ratio     {slow / fast:7.2f} x {(large - libraries) / (small - libraries):12.2f} x")
    if abs(a - b) > 1e-3 * abs(b):
        raise SystemExit("the two versions do not compute the same")


if __name__ == "__main__":
    main()
