"""What the finished dish looks like, in about 30 words imagined from the recipe (DAR, arXiv:2312.04763).

`describe_cues` puts visible ingredients, cuts and cooking into one sentence by rules: offline, deterministic.
`LLMDescriber` asks a chat model with the prompt in description_prompt.txt and keeps every answer in a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path

from tqdm.auto import tqdm

from recipe_lib.data.ingredients import _singular, ingredient_name
from recipe_lib.data.recipe import DataError

TextRecipe = tuple[str, str, Sequence[str], Sequence[str]]  # id, title, ingredient lines, steps
MAX_WORDS, MAX_TOKENS = 32, 68  # of a cues description; CLIP reads 77 tokens, two of them its own marks


PREFACE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|absolutely|great)\b[^:\n]{0,120}|here(?:'s| is| are)[^:\n]{0,120}|"
    r"(?:description|photo|answer|output)[^:\n]{0,30})[:!\n]\s*",
    re.I,
)
REFUSAL = re.compile(r"^(?:i'm sorry|i am sorry|sorry|i can(?:'|no)t|i am unable|as an ai)\b", re.I)

# ---- cues ----


@lru_cache(1)
def _cues() -> dict[str, dict[str, str]]:
    """The tables of cues.json as word -> row. Words that belong together are joined by "_"; the first row counts."""
    tables = json.loads(Path(__file__).with_name("cues.json").read_text(encoding="utf-8"))
    for name, table in tables.items():
        rows = table.items() if isinstance(table, dict) else [(name, table)]
        pairs = [(word, row) for row, words in rows for word in words.split()]
        tables[name] = dict(pairs) | dict(reversed(pairs))
    return tables


def describe_cues(title: str, ingredients: Sequence[str], instructions: Sequence[str]) -> str:
    """One sentence about the finished dish, of at most 32 words.

    Only what the recipe says: its title, ingredients that can be seen (cues.json) with the colour they have and the cut
    on their line, the cooking of the last step that names them, and the shape or vessel that the kind of dish has. What
    the tables do not hold is not mentioned: of a recipe in another language the title remains. Without a title it is
    "a dish of food".
    """
    cues, dish = _cues(), _clean_title(title)
    named = {_singular(word) for word in re.findall(r"\w+", dish.lower())}
    head = re.split(r" (?:with|in|on|over) |,", dish.lower())[0].split()
    kinds = [(w, cues[t][w]) for t in ("dishes", "vessels") for w, _ in _terms(head) if w in cues[t]]
    kind, place = kinds[0] if kinds else ("", "")
    implied = {_singular(word) for word in place.split()}
    said = re.findall(r"\w+", " ".join(ingredients[:60]).lower())
    sauce = next((row for word, row in cues["sauces"].items() if word in said), "")
    place = re.sub(r"\[.*?\]", lambda m: m[0][1:-1].format(sauce) if sauce else "", place)
    if kind in cues["dough"] and "chocolate chip" not in dish.lower() and not named.isdisjoint({"chocolate", "cocoa"}):
        place = re.sub("golden(?: brown)?", "dark brown", place)

    steps = [_cooking(s) for step in instructions[:60] for s in re.split(r"[.;!]", step[:2000].lower())]
    baked = kind in cues["dough"] or (
        not kind and "flour" in said and any(heat == "golden baked" for heat, *_ in steps)
    )
    mains, tops, seen = [], [], set()
    for line in ingredients[:60]:
        term, shown = _visible(line)
        if not term or term in seen or (baked and term in cues["lost_in_dough"]):
            continue
        seen.add(term)
        last = term.split("_")[-1]
        if last in implied:  # "layered with bread" says so
            continue
        heat = next((heat for heat, _, words in reversed(steps) if heat and last in words), "") * (not baked)
        if term in cues["on_top"] and (not steps or any(top and last in words for _, top, words in steps)):
            tops.append((last not in named, "", shown))
        elif term not in cues["lost_unless_on_top"] or last in named:
            mains.append((last not in named, heat, shown))
    # What the title names comes first, then the recipe's own order.
    mains, tops = sorted(mains, key=lambda item: item[0])[:5], sorted(tops, key=lambda item: item[0])[:3]
    if not (mains or tops or place):
        place = next((heat for heat, *_ in reversed(steps) if heat not in ("", "tender", "fresh")), "")
    while True:
        text = _sentence(dish, mains, place, tops)
        if not (mains or tops) or (len(text.split()) <= MAX_WORDS and _tokens(text) <= MAX_TOKENS):
            return text
        (tops if len(tops) > 1 or not mains else mains).pop()


def _clean_title(title: str) -> str:
    """Without brackets, praise and subtitle; cut at 12 words and about 50 tokens."""
    text = re.sub(r"\([^)]*\)|\[[^]]*\]|[\"*#_]", " ", title[:400])
    text = next((part for part in re.split(r"[:|–—]| - ", text) if part.strip()), "")
    words = [word for word in text.split() if word.lower().strip(",.!?") not in _cues()["noise"]] or text.split()
    del words[12:]
    while len(words) > 1 and (_tokens(" ".join(words)) > 50 or words[-1].lower() in _cues()["link"]):
        words.pop()
    text = " ".join(words).strip(" ,.!?&-")
    while _tokens(text) > 50:  # a language written without spaces
        text = text[:-1]
    return (text.capitalize() if text.isupper() else text) or "a dish of food"


def _tokens(text: str) -> int:
    """About as many tokens as CLIP's byte-pair vocabulary needs, rather more."""
    return sum(-(-len(run) // 5) if run.isascii() else len(run.encode()) for run in re.findall(r"[a-zA-Z]+|\S", text))


def _terms(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(singular word or pair "first_second", place of its first word), from the last word on, pairs first."""
    for i in reversed(range(len(words))):
        if i:
            yield f"{words[i - 1]}_{_singular(words[i])}", i - 1
        yield _singular(words[i]), i


def _visible(line: str) -> tuple[str, str]:
    """(term of the table, "sliced red tomatoes") of an ingredient line; "" for what is not seen or not known."""
    cues, words = _cues(), (ingredient_name(line) or "").split()
    term, at = next((t for t in _terms(words) if t[0] in cues["unseen"] or t[0] in cues["colours"]), ("", 0))
    said = re.findall(r"\w+", line.lower())
    if not term or term in cues["unseen"] or not {"juice", "juiced"}.isdisjoint(said):
        return "", ""
    *name, last = words[at : at + term.count("_") + 1]
    colour = words[at - 1] if at and words[at - 1] in cues["colour_words"] else cues["colours"][term]
    colour = "" if words[at] in cues["colour_words"] else colour
    cut = next((word for word in reversed(said) if word in cues["cuts"]), "")
    if cut in ("wedges", "sticks", "rings", "florets"):
        return term, " ".join([*colour.split(), *name, last, cut])
    noun = next((plural for plural in (last + "es", last + "s", last[:-1] + "ies") if plural in said), last)
    return term, " ".join([*cut.split(), *colour.split(), *name, noun])


def _cooking(sentence: str) -> tuple[str, bool, set[str]]:
    """What a sentence of the steps does: the look of its cooking or "", whether it tops the dish, words in singular."""
    words = re.findall(r"[\w-]+", sentence)
    heat = next((look for word in reversed(words) if (look := _cues()["heat"].get(word))), "")
    return heat, any(word in _cues()["topping"] for word in words), {_singular(word) for word in words}


def _sentence(dish: str, mains: list, place: str, tops: list) -> str:
    groups: dict[str, list[str]] = {}
    for _, heat, shown in mains:
        groups.setdefault(heat, []).append(shown)
    parts = [f"{heat} {_listed(shown)}".strip() for heat, shown in groups.items()] + [place] * bool(place)
    if tops:
        parts.append("topped with " * bool(parts) + _listed([shown for *_, shown in tops]))
    return f"A photo of {dish}{': ' * bool(parts)}{', '.join(parts)}."


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# ---- a language model ----


class LLMDescriber:
    """Descriptions by a chat model of transformers, loaded when the first one is missing in the cache.

    Args:
        model: name on the Hugging Face hub or a local folder; safetensors only, no code of the model is run. The cache
            knows it by this name: other weights need another one.
        batch_size: recipes at a time.
        device: such as "cuda" or "cpu".
        dtype: of the weights; "auto": as they are stored.
        max_recipe_tokens: a longer recipe is cut: its title to 64 tokens, its ingredient lines to the first half of the
            rest, its steps to their last tokens that still fit, since the end of a recipe tells how it is served.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token always; above, answers are drawn, the same ones for the same seed.

    Raises:
        ValueError, ConnectionError: on the first description that is missing; see `one_line_errors`.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 8,
        device: str = "cpu",
        dtype: str = "auto",
        max_recipe_tokens: int = 1024,
        max_new_tokens: int = 60,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        self.model, self.batch_size, self.device, self.dtype = model, batch_size, device, dtype
        self.max_recipe_tokens, self.max_new_tokens = max_recipe_tokens, max_new_tokens
        self.temperature, self.seed = temperature, seed
        self.prompt = Path(__file__).with_name("description_prompt.txt").read_text(encoding="utf-8")
        self._loaded = None

    def describe(self, recipes: Iterable[TextRecipe], cache: Path) -> Iterator[tuple[str, str, str]]:
        """Yield (id, text, source) in order; source "cues": the model gave nothing usable, the rules described it.

        `cache` holds a line {"id", "made_from", "text", "source"} for each; made_from stands for model, prompt,
        settings and recipe, so one file serves several. A batch is written at once: what is killed loses one at most.
        """
        known = _read_cache(cache)
        settings = [self.model, self.prompt, self.max_recipe_tokens, self.max_new_tokens, self.temperature, self.seed]
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("a", encoding="utf-8") as file:
            waiting: list[tuple] = []
            missing: dict[tuple, TextRecipe] = {}
            shown = tqdm(recipes, desc="descriptions", unit="", mininterval=5, maxinterval=30, disable=None)
            for recipe in chain(shown, [None]):
                if recipe:
                    stated = json.dumps([*settings, *recipe[1:]], default=list).encode()
                    key = recipe[0], hashlib.sha256(stated).hexdigest()[:16]
                    waiting.append(key)
                    if key not in known:
                        missing[key] = recipe
                if missing and (not recipe or len(missing) == self.batch_size):
                    known |= zip(missing, self._batch(list(missing.values())), strict=True)
                    rows = [
                        dict(zip(("id", "made_from", "text", "source"), (*k, *known[k]), strict=True)) for k in missing
                    ]
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                    file.flush()
                    missing = {}
                if not missing:
                    yield from ((key[0], *known[key]) for key in waiting)
                    waiting = []

    def _batch(self, recipes: list[TextRecipe]) -> list[tuple[str, str]]:
        import torch
        from transformers import GenerationConfig

        tokenizer, model = self._loaded = self._loaded or self._load()
        prompts = [self._prompt(tokenizer, model, *recipe[1:]) for recipe in recipes]
        # A chat template has written the marks of beginning and end already.
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template)
        inputs = {name: inputs[name].to(self.device) for name in ("input_ids", "attention_mask")}
        draw = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **draw
        )
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(int(hashlib.sha256(f"{self.seed} {recipes[0][0]}".encode()).hexdigest()[:15], 16))
            tokens = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        texts = map(clean_answer, tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return [
            (text, "llm") if text else (describe_cues(*r[1:]), "cues") for text, r in zip(texts, recipes, strict=True)
        ]

    def _load(self) -> tuple:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with one_line_errors(self.model):
            tokenizer = AutoTokenizer.from_pretrained(self.model, padding_side="left", trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                self.model, dtype=self.dtype, use_safetensors=True, trust_remote_code=False
            )
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
        return tokenizer, model.to(self.device).eval()

    def _prompt(self, tokenizer, model, title: str, ingredients: Sequence[str], instructions: Sequence[str]) -> str:
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]

        def part(text: str, limit: int, end: bool = False) -> tuple[str, int]:
            for mark in special:  # "<|im_end|>" in a recipe would end the user's turn
                text = text.replace(mark, " ")
            ids = tokenizer(text[-40_000:] if end else text[:40_000], add_special_tokens=False).input_ids
            if len(ids) > limit:
                ids = ids[-limit:] if end else ids[:limit]
                text = tokenizer.decode(ids)
            return text, len(ids)

        limit = self.max_recipe_tokens
        if window := getattr(model.config, "max_position_embeddings", None):
            limit = min(limit, window - self.max_new_tokens - len(tokenizer(self.prompt).input_ids) - 48)
        if limit < 64:
            raise ValueError(f"{self.model}: reads {window} tokens only, too few for a recipe; choose another model")
        name, used = part(title, 64 if limit > 256 else limit // 4)
        lines, more = part("\n".join(ingredients), (limit - used) // 2)
        steps, _ = part("\n".join(instructions), limit - used - more, end=True)
        # As JSON, a recipe cannot close its quotation. str.format would read braces in it.
        recipe = json.dumps({"title": name, "ingredients": lines, "instructions": steps}, ensure_ascii=False)
        text = self.prompt.replace("{recipe}", recipe)
        if not tokenizer.chat_template:
            return text
        turn = [{"role": "user", "content": text}]  # no system turn: some templates refuse one
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def clean_answer(text: str, max_words: int = 45, min_words: int = 5) -> str:
    """A model's answer as one line of whole sentences, without quotes and preface; "" for one that cannot be used."""
    text = re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.S).replace("’", "'").strip()
    text = PREFACE.sub("", PREFACE.sub("", text)).strip().split("\n\n")[0]
    text = " ".join(re.sub(r"[*#`\u0000-\u001f\ufffd]", " ", text).split()).strip(" \"'“”")
    words = text.split()
    if len(words) < min_words or REFUSAL.match(text):
        return ""
    text = " ".join(words[:max_words])
    whole = [end.end() for end in re.finditer(r"[.!?](?=\s|$)", text) if len(text[: end.end()].split()) >= min_words]
    return text[: whole[-1]] if whole else text.rstrip(" ,;:-") + "."


def _read_cache(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(id, made_from) -> (text, source). A last line that was torn is taken off the file."""
    known = {}
    if path.is_file():
        with path.open("rb+") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    os.truncate(path, path.stat().st_size - len(line))
                    break
                try:
                    row = json.loads(line)
                    known[row["id"], row["made_from"]] = row["text"], row["source"]
                except (ValueError, KeyError, TypeError):
                    raise DataError(f"{path}:{number}: not a line of a description cache; delete the line") from None
    return known


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """What transformers raises when it cannot load a model, in one line that names it.

    Raises:
        ConnectionError: the hub does not answer and the model is not on this machine.
        ValueError: there is no such model, it has no safetensors, needs its own code, or is of another kind.
    """
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ValueError(f"{model}: no such folder; give a model's folder or its name on the Hugging Face hub")
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "connect" in reason or "offline" in reason or isinstance(error, ConnectionError):
            raise ConnectionError(
                f"{model}: the Hugging Face hub does not answer; download the model elsewhere and give its folder"
            ) from None
        raise ValueError(f"{model}: cannot be loaded ({reason[:200]}); give another model or a folder") from None
