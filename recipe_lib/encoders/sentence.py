"""Recipes by a frozen sentence encoder, such as MiniLM (arXiv:2002.10957): its vectors, then our second level.

What it makes of a sentence is computed once: in outputs/frozen a file for each model grows by the sentences that were
not there. Whoever needs the space may delete it.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from recipe_lib import devices
from recipe_lib.data.text import PAD
from recipe_lib.encoders.packed import MaskedTransformer
from recipe_lib.encoders.recipe import COMPONENTS, HierarchicalEncoder
from recipe_lib.encoders.weights import local, weights_digest
from recipe_lib.paths import frozen_dir
from recipe_lib.reachable import code_digest, digest

BATCH = 64  # sentences read together
_KEY = 16  # bytes of a sentence's digest


def model_folder(name: str) -> Path:
    """The folder of a sentence encoder: a user's, or one in an installed package; see `weights.local`.

    Raises:
        ValueError: it is not there, or there is no such model in it.
    """
    root = local(name)
    files = ("config.json", "tokenizer.json", "model.safetensors")
    for folder in (root, root / "model"):
        if all((folder / file).is_file() for file in files):
            return folder
    raise ValueError(
        f"sentence_model {name}: must hold {', '.join(files)}, as transformers' save_pretrained leaves them"
    )


def sentence_tokenizer(name: str) -> Tokenizer:
    """Its tokenizer, which neither cuts nor pads. ValueError as `model_folder`, or where padding is not id 0."""
    tokenizer = Tokenizer.from_file(str(model_folder(name) / "tokenizer.json"))
    if tokenizer.token_to_id("[PAD]") != PAD:
        raise ValueError(f"sentence_model {name}: its padding is not id {PAD}; models of BERT's kind are read")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class SentenceRecipeEncoder(HierarchicalEncoder):
    """Mean of the words' last states, of length 1 as such encoders are compared, then transformers over sentences.

    Args:
        model: see `model_folder`; its weights do not train.
        embed_dim: D, width of the joint space.
        transformer: layers, heads, ... of each `MaskedTransformer` over sentences.

    Shape:
        RecipeBatch of B recipes -> embedding (B, D), three components (B, E); E is the model's width.
    """

    def __init__(self, model: str, embed_dim: int, **transformer: float):
        super().__init__()
        from transformers import AutoModel

        self.reader = AutoModel.from_pretrained(model_folder(model), local_files_only=True, use_safetensors=True)
        self.reader.requires_grad_(False)
        self.dim = self.reader.config.hidden_size
        self.sentences = nn.ModuleDict({name: MaskedTransformer(self.dim, **transformer) for name in COMPONENTS[1:]})
        self.fc = nn.Linear(3 * self.dim, embed_dim)
        self._memory: Memory | None = None
        self.train()

    def train(self, mode: bool = True) -> SentenceRecipeEncoder:
        """As of any module, but the reader drops nothing."""
        super().train(mode)
        self.reader.eval()
        return self

    @torch.no_grad()
    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        if self._memory is None:
            self._memory = Memory(self.reader, self.dim)
        vectors = self._memory.recall(tokens.cpu().numpy(), self._read)
        return torch.from_numpy(vectors).to(tokens.device).float() * self.dim**0.5  # entries of variance 1

    def _read(self, tokens: np.ndarray) -> np.ndarray:
        """Token ids (U, L) -> unit vectors (U, E) float16."""
        ids = torch.from_numpy(tokens).to(self.fc.weight.device)
        mask = ids != PAD
        # Whatever the precision around it, for the vectors are shared. bfloat16 where a CPU has units for it: three
        # times as fast, and far more exact than vectors need.
        where = ids.device.type
        with torch.autocast(where, torch.bfloat16, enabled=where == "cpu" and devices.fast_bfloat16("cpu")):
            hidden = self.reader(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean.float(), dim=1).half().cpu().numpy()


class Memory:
    """Vectors of sentences that a reader has read, in memory and on the disk.

    Of two processes that read a sentence at once, both take what the first one wrote: vectors of other batches differ
    in their last digits.

    Args:
        reader: its weights, its configuration and the code name the file.
        dim: E.
    """

    def __init__(self, reader: nn.Module, dim: int):
        config = {key: value for key, value in reader.config.to_dict().items() if not key.startswith("_")}
        made_by = digest([weights_digest(reader.state_dict()), config, code_digest(SentenceRecipeEncoder)])
        self.path = frozen_dir() / f"sentences-{made_by[:16]}.bin"
        self._record = np.dtype([("key", f"V{_KEY}"), ("vector", np.float16, dim)])
        self._known: dict[bytes, np.ndarray] = {}
        self._read_to = 0  # bytes of the file that are known
        self._append(np.empty(0, self._record))

    def recall(self, tokens: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """(U, L) token ids -> (U, E) float16; `read` is asked for those that are new."""
        keys = [hashlib.blake2b(row[row != PAD].tobytes(), digest_size=_KEY).digest() for row in tokens]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        new.sort(key=lambda i: int((tokens[i] != PAD).sum()))
        for start in range(0, len(new), BATCH):
            rows = new[start : start + BATCH]
            vectors = read(tokens[rows, : int((tokens[rows] != PAD).sum(1).max())])
            records = np.empty(len(rows), self._record)
            records["key"], records["vector"] = np.array([keys[i] for i in rows], f"V{_KEY}"), vectors
            self._append(records)
        return np.stack([self._known[key] for key in keys])

    def _append(self, records: np.ndarray) -> None:
        """Learn what others have written meanwhile, then write and learn what is still new."""
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # studies run beside each other
            # A killed writer may leave part of a record.
            whole = file.truncate(file.seek(0, 2) // self._record.itemsize * self._record.itemsize)
            file.seek(self._read_to)
            self._learn(np.frombuffer(file.read(), self._record))
            records = records[[key.tobytes() not in self._known for key in records["key"]]]
            file.write(records.tobytes())
            self._read_to = whole + records.nbytes
        self._learn(records)

    def _learn(self, records: np.ndarray) -> None:
        for record in records:
            self._known.setdefault(record["key"].tobytes(), record["vector"])
