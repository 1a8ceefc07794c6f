"""What the finished dish looks like, in about 30 words that a chat model imagines (DAR, arXiv:2312.04763)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from recipe_lib.data.cues import describe_cues
from recipe_lib.data.recipe import DataError
from recipe_lib.progress import progress

TextRecipe = tuple[str, str, Sequence[str], Sequence[str]]  # id, title, ingredient lines, steps

PREFACE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|absolutely|great)\b[^:\n]{0,120}|here(?:'s| is| are)[^:\n]{0,120}|"
    r"(?:description|photo|answer|output)[^:\n]{0,30})[:!\n]\s*",
    re.I,
)
REFUSAL = re.compile(r"^(?:i'm sorry|i am sorry|sorry|i can(?:'|no)t|i am unable|as an ai)\b", re.I)


class LLMDescriber:
    """Descriptions by a chat model of transformers, loaded when the first one is missing in the cache.

    Args:
        model: name on the Hugging Face hub or a local folder, with safetensors; or a GGUF file, or a folder with one,
            which the packages gguf and accelerate read. No code of the model is run. The cache knows it by this name:
            other weights need another one.
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
        While another process writes to the file this one waits, and reads then what that one found.

        Raises:
            DataError: the cache is broken.
        """
        settings = [self.model, self.prompt, self.max_recipe_tokens, self.max_new_tokens, self.temperature, self.seed]
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting: another process is writing descriptions to {cache}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            known = _read_cache(cache)
            waiting: list[tuple] = []
            missing: dict[tuple, TextRecipe] = {}
            for recipe in chain(progress(recipes, "descriptions"), [None]):
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
            name, file = _model_file(self.model)
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False, **file)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=self.dtype, use_safetensors=True, trust_remote_code=False, **file
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


def _model_file(model: str) -> tuple[str, dict[str, str]]:
    """What transformers calls a model: its name or folder, and the file in it where that is GGUF.

    Raises:
        ValueError: a folder of several GGUF files, which are one model at several precisions.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    files = [] if any(path.glob("*.safetensors")) else sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"it holds {', '.join(files[:3])}: name one of these files")
    return model, {"gguf_file": files[0]} if files else {}


def clean_answer(text: str, max_words: int = 45, min_words: int = 5) -> str:
    """A model's answer as one line of whole sentences, without quotes and preface; "" for one that cannot be used.

    Such is one too short, a refusal, and one that goes in a circle: small models may say a phrase to the last token.
    """
    text = re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.S).replace("’", "'").strip()
    text = PREFACE.sub("", PREFACE.sub("", text)).strip().split("\n\n")[0]
    text = " ".join(re.sub(r"[*#`\u0000-\u001f\ufffd]", " ", text).split()).strip(" \"'“”")
    words = text.split()
    kinds = len({word.strip(".,;:!?").lower() for word in words[:max_words]})
    if len(words) < min_words or 2 * kinds < len(words[:max_words]) or REFUSAL.match(text):
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
