"""Parameters of a run: flat YAML, checked against the notebooks' `parameters` cells before anything starts.

A cell line `epochs: int = 8  # passes over the training pairs [1..]` declares name, type, default, help and constraint.
Types are int, float, str, bool, list and list[item]; a plain list holds items of its default's type. The constraint is
the bracket that ends the comment: an interval `[1..]`, `[0..1]`, `(0..5]` (a round bracket leaves its end out), choices
`[a|b|c]`, or a table of the library whose keys are the choices, `[module.TABLE]`; it holds for every item of a list.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from ast import literal_eval as literal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from inspect import signature
from pathlib import Path

import nbformat
import papermill
import yaml

from recipe_lib.paths import resolve, study_dir
from recipe_lib.systems import methods

KINDS = {"int": int, "float": float, "str": str, "bool": bool}
_ARTICLE = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "list": "a list"}


class ParamsError(Exception):
    """A parameter or its file is wrong. One line: file, line, key, what is wrong, what to do."""


@dataclass(frozen=True)
class Parameter:
    """One line of a `parameters` cell.

    Args:
        kind: "int", "float", "str", "bool" or "list".
        item: kind of a list's items; "" where any scalar will do.
        constraint: interval or choices as written, "" = free.
        notebooks: stems of the notebooks that declare it.
    """

    name: str
    kind: str
    item: str
    default: object
    constraint: str
    help: str = field(compare=False)
    notebooks: tuple[str, ...] = field(compare=False)

    def check(self, value: object) -> str:
        """What is wrong with a value of the right type, or ""."""
        for item in value if isinstance(value, list) else [value]:
            if not _allowed(item, self.constraint):
                return f"{item!r} is not in {self.constraint}"
        if self.name in ("study", "distances_from", "compare_with"):
            for study in value if isinstance(value, list) else [value]:
                try:
                    if study or self.name != "distances_from":  # that one may be left empty
                        study_dir(study)
                except ValueError as error:
                    return str(error)
        return ""


def _allowed(value: object, constraint: str) -> bool:
    if not constraint:
        return True
    inner = constraint[1:-1]
    if not any(sign in inner for sign in ("..", "|")):
        return value in _named(inner)
    if "|" in inner:
        return str(value) in inner.split("|")
    low, high = (float(end) if end else None for end in inner.split(".."))
    above = low is None or value > low or (value == low and constraint[0] == "[")
    below = high is None or value < high or (value == high and constraint[-1] == "]")
    return above and below


def _named(path: str) -> Mapping:
    """The table of the library that a constraint names as `module.NAME`: its keys are the choices."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"recipe_lib.{module}"), name)


# ---- the schema: the notebooks' parameters cells ----


def declared(notebooks: Sequence[Path]) -> dict[str, Parameter]:
    """Every parameter that the notebooks declare, by name.

    Raises:
        ParamsError: a cell cannot be read, or two notebooks declare one name differently.
    """
    parameters: dict[str, Parameter] = {}
    for path in notebooks:
        for parameter in _declared_by(path):
            earlier = parameters.get(parameter.name)
            if earlier and earlier != parameter:
                raise ParamsError(
                    f"{path}: {parameter.name}: type, default or constraint is not the one in "
                    f"{earlier.notebooks[0]}; make the two lines alike"
                )
            names = (*(earlier.notebooks if earlier else ()), path.stem)
            parameters[parameter.name] = replace(earlier or parameter, notebooks=names)
    return parameters


def _declared_by(path: Path) -> list[Parameter]:
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds for a broken file
        raise ParamsError(f"{path}: not a readable notebook ({type(error).__name__})") from None
    sources = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if not sources:
        return []
    try:
        lines = papermill.inspect_notebook(str(path).replace("{", "{{").replace("}", "}}"))  # it fills in braces
        cell = ast.parse(sources[0])  # papermill takes the first one
    except (ValueError, SyntaxError) as error:  # no kernel named in the metadata; not Python
        raise ParamsError(f"{path}: its parameters cell cannot be read: {error}") from None
    # papermill leaves out, with a mere log line, what it cannot parse: a second "=" in the help is enough.
    for name in (node.id for node in ast.walk(cell) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
        if name not in lines:
            raise ParamsError(f"{path}: {name}: papermill cannot read this line; leave one '=' and one '#' in it")
    return [_parameter(path, line) for line in lines.values()]


def _parameter(path: Path, line: dict) -> Parameter:
    """One of papermill's inspected lines, its default checked like any value."""
    where = f"{path}: {line['name']}"
    try:
        default = literal(line["default"])
    except (ValueError, SyntaxError):
        raise ParamsError(f"{where}: the default {line['default']} is not a literal") from None
    kind, _, item = line["inferred_type_name"].strip().removesuffix("]").partition("[")
    if kind == "None":
        kind = type(default).__name__
    if isinstance(default, list) and not item:
        item = type(default[0]).__name__ if len({type(value) for value in default}) == 1 else ""
    if kind not in (*KINDS, "list") or item not in ("", *KINDS):
        raise ParamsError(f"{where}: the type must be int, float, str, bool, list or list[one of these]")
    if kind == "float" and type(default) is int:
        default = float(default)
    values = default if kind == "list" and isinstance(default, list) else [default]
    expected = item if kind == "list" else kind
    if (kind == "list") != isinstance(default, list) or any(
        expected and type(v) is not KINDS[expected] for v in values
    ):
        raise ParamsError(f"{where}: the default {line['default']} is not {_ARTICLE[kind]} as declared")
    parameter = Parameter(line["name"], kind, item, default, _constraint(where, line["help"]), line["help"], ())
    if wrong := parameter.check(default):
        raise ParamsError(f"{where}: the default {wrong}")
    return parameter


def _constraint(where: str, text: str) -> str:
    """The bracket that ends a help text, checked; "" where there is none."""
    number = r"(-?[0-9.]*[0-9](?:e-?[0-9]+)?)?"
    if match := re.search(rf"[\[(]{number}\.\.{number}[\])]\s*$|\[[^\[\]]*\|[^\[\]]*\]\s*$", text):
        return match[0].strip()
    if match := re.search(r"\[([a-z_.]+\.[A-Z_]+)\]\s*$", text):
        try:
            _named(match[1])
        except (ImportError, AttributeError):
            raise ParamsError(f"{where}: recipe_lib has no {match[1]}") from None
        return match[0].strip()
    if re.search(r"\[[^\[\]]*\]\s*$", text):
        raise ParamsError(
            f"{where}: the bracket that ends the comment must be [low..high], [a|b|c] or [module.TABLE] of recipe_lib"
        )
    return ""


def of_notebook(schema: Mapping[str, Parameter], values: Mapping, notebook: str) -> dict:
    """Those values that a notebook declares."""
    return {name: values[name] for name, parameter in schema.items() if notebook in parameter.notebooks}


# ---- the values: files and the command line ----


def _is_read(clip_model: str, crop_size: int, method: str) -> bool:
    if method not in CLIP:
        return True
    from recipe_lib.encoders.clip import clip_image_size  # seconds, for those alone who use it

    return crop_size == clip_image_size(clip_model)


def _can_freeze(frozen: list[str], image_model: str, image_model_args: list[str], method: str) -> bool:
    if not frozen or method in CLIP:
        return not frozen
    from recipe_lib.encoders.image import check_frozen  # as above

    check_frozen(image_model, image_model_args, frozen)
    return True


def _reads_sentences(method: str, sentence_model: str) -> bool:
    if method != "ht_sentence":
        return True
    from recipe_lib.encoders.sentence import sentence_tokenizer  # as above

    return bool(sentence_model and sentence_tokenizer(sentence_model))


def _has_weights(image_weights: str, pretrained: bool, method: str) -> bool:
    if image_weights:
        from recipe_lib.encoders.weights import weight_file  # as above

        weight_file(image_weights)
    return not image_weights or not (pretrained or method in CLIP)


def _is_installed(description_model: str, segment_model: str) -> bool:
    for name in (description_model, segment_model):
        if name.startswith("package:"):
            from recipe_lib.encoders.weights import local  # as above

            local(name)
    return True


def _is_known(method: str, system_file: str) -> bool:
    if system_file and not resolve(system_file).is_file():
        raise ValueError(f"system_file {system_file}: no such file; name a Python file with a subclass of System")
    if not system_file and method not in methods():
        raise ValueError(f"method {method!r}: no such system; there are {', '.join(methods())}, or name a system_file")
    return True


def _swaps(variants: list[str]) -> bool:
    from recipe_lib.causal.debiasing import VARIANTS  # as above

    return any(VARIANTS[name].context_swap for name in variants)


def _augments(augment: str) -> bool:
    if augment:
        from recipe_lib.data.images import RandAugment  # as above

        RandAugment(augment)
    return True


def _logs(logger: str) -> bool:
    from recipe_lib.training.loggers import check_logger  # as above

    try:
        check_logger(logger)
    except ModuleNotFoundError as error:
        raise ValueError(error) from None
    return True


CLIP = ("dar", "captions", "zero_shot")  # methods whose towers and tokens are CLIP's
TRANSFORMERS = ("ht", "tnlbt")  # methods that read words by H-T's transformers
LSTM = ("je", "adamine", "acme", "r2gan")  # methods that read ingredients by name, and categories
GAMES = ("tnlbt", "acme", "r2gan")  # methods that paint photos, so must see them
READS = dict.fromkeys(TRANSFORMERS, ("words",)) | {"ht_sentence": ("sentence",)}  # token ids, by method
READS |= dict.fromkeys(CLIP, ("clip",)) | dict.fromkeys(LSTM, ("words", "names"))
# What single ranges cannot say: these combinations would stop a run in the middle. A rule's arguments are parameters.
TOGETHER = {
    "crop_size must be at most image_size": lambda crop_size, image_size: crop_size <= image_size,
    "recipe_dim must be a multiple of the heads": lambda recipe_dim, recipe_heads: recipe_dim % recipe_heads == 0,
    "classifier_dim must be a multiple of 4 and of the heads": (
        lambda classifier_dim, classifier_heads: classifier_dim % classifier_heads == classifier_dim % 4 == 0
    ),
    "shares must leave all splits": (
        lambda val_share, test_share: min(val_share, test_share) > 0 and val_share + test_share < 1
    ),
    "epochs may be 0 only where weights_from names a checkpoint": (
        lambda epochs, weights_from: epochs > 0 or weights_from
    ),
    "a vocab_file is for text_tokens words": lambda vocab_file, text_tokens: not vocab_file or text_tokens == "words",
    "method must name a system": _is_known,
    "hub_columns must hold entries field: column": (
        lambda hub_columns: all(all(map(str.strip, entry.partition(":")[::2])) for entry in hub_columns)
    ),
    "source_dir must name the folder": lambda source, source_dir: source == "kitchen" or source_dir,
    "variants must hold equal_compute and debiased, which the verdict compares, or nothing": (
        lambda variants: not variants or {"equal_compute", "debiased"} <= set(variants)
    ),
    "batch_size counts the pairs of all devices together and must be a multiple of devices x num_nodes": (
        lambda batch_size, devices, num_nodes: batch_size % (devices * num_nodes) == 0
    ),
    "debias_batch_size counts the pairs of all devices together and must be a multiple of devices x num_nodes": (
        lambda debias_batch_size, devices, num_nodes: debias_batch_size % (devices * num_nodes) == 0
    ),
    "at most 50 positions are learnt": lambda max_sentences, max_tokens: max(max_sentences, max_tokens) <= 50,
    "CLIP's towers read text_tokens clip, ht_sentence sentence, LSTMs words or names, the others words": (
        lambda method, text_tokens: method not in READS or text_tokens in READS[method]
    ),
    "method ht_sentence needs a sentence_model": _reads_sentences,
    "image_weights are for backbones of timm, in place of pretrained": _has_weights,
    "frozen_views are of a backbone that is frozen [all], and of no method that paints photos": (
        lambda frozen_views, frozen, method: not frozen_views or ("all" in frozen and method not in (*CLIP, *GAMES))
    ),
    "categories are what methods je and r2gan classify, unless category_weight is 0": (
        lambda method, categories, category_weight: method not in ("je", "r2gan") or categories or not category_weight
    ),
    "categories are what method adamine has triplets of, unless semantic_weight is 0": (
        lambda method, categories, semantic_weight: method != "adamine" or categories or not semantic_weight
    ),
    "word_vectors are for methods with LSTMs, which take recipe_dim numbers": (
        lambda word_vectors, recipe_dim, method: (
            not word_vectors or (word_vectors == recipe_dim and method not in (*TRANSFORMERS, *CLIP))
        )
    ),
    "frozen_epochs are for backbones of timm": lambda frozen_epochs, method: not frozen_epochs or method not in CLIP,
    "alternate is for methods without texts alone, games and CLIP's towers, and a backbone that trains": (
        lambda alternate, method, frozen: (
            not alternate or (method not in (*TRANSFORMERS, "ht_sentence", *GAMES, *CLIP) and "all" not in frozen)
        )
    ),
    "only the kitchen knows what shows in a photo, as oracle_visible is told": (
        lambda source, variants: source == "kitchen" or "oracle_visible" not in variants
    ),
    "descriptions are read by method dar, segments by variants that swap context too (distances_from brings them)": (
        lambda method, descriptions, segments, variants: (
            method not in (*TRANSFORMERS, "captions", *LSTM)
            or not (descriptions or (segments and not _swaps(variants)))
        )
    ),
    "CLIP's towers have weights where both pretrained and clip_pretrained say so": (
        lambda method, pretrained, clip_pretrained: method not in CLIP or pretrained == bool(clip_pretrained)
    ),
    "segment_encoder adapted needs adapters on the image side": (
        lambda segment_encoder, adapters: segment_encoder == "frozen" or adapters in ("both", "image")
    ),
    "crop_size must be the side of the photos that the CLIP reads": _is_read,
    "frozen names parts of a backbone of timm; CLIP's towers are frozen as they are": _can_freeze,
    "augment must name a policy": _augments,
    "logger must be installed": _logs,
    "two tokens are CLIP's own marks": lambda text_tokens, max_tokens: text_tokens != "clip" or max_tokens >= 3,
    "description_backend given is for the files of DAR's authors, source recipe1m": (
        lambda descriptions, description_backend, source: (
            not descriptions or description_backend != "given" or source == "recipe1m"
        )
    ),
    "segment_backend given is for the files of DAR's authors, source recipe1m": (
        lambda segments, segment_backend, source: not segments or segment_backend != "given" or source == "recipe1m"
    ),
    "description_model must name the model": (
        lambda description_backend, description_model: description_backend in ("cues", "given") or description_model
    ),
    "a package that holds a model must be installed": _is_installed,
    "segment_model must name the model": (
        lambda segment_backend, segment_model: segment_backend in ("superpixels", "given") or segment_model
    ),
}


def load(
    files: Iterable[Path], overrides: Iterable[tuple[str, str]], schema: dict[str, Parameter]
) -> dict[str, object]:
    """Every declared parameter's value: its default, then the files (later wins), then the command line's.

    An empty file leaves all defaults. A float may be written 1e-4, which YAML itself reads as text, and an int is
    taken for a float; nothing else is converted. `{study}` in a file's `study` is the name it had before: so a method
    that is put on a study has its own folder.

    Args:
        files: flat YAML files.
        overrides: (key, text) pairs; the text of a str parameter is taken as it is, any other is YAML.
        schema: what `declared` returned.

    Raises:
        ParamsError: with file, line and key.
    """
    values = {name: parameter.default for name, parameter in schema.items()}
    places = {}
    for path in files:
        for key, node, where in _entries(path):
            if key == "study" and isinstance(node, yaml.ScalarNode):
                node.value = node.value.replace("{study}", str(values.get("study")))
            values[key] = _checked(where, key, node, schema)
            places[key] = where
    for key, text in overrides:
        where = f"-p {key}"
        if key in schema and schema[key].kind == "str":
            node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
        else:
            node = _compose(where, text)
        values[key] = _checked(where, key, node, schema)
        places[key] = where
    for message, holds in TOGETHER.items():
        keys = list(signature(holds).parameters)
        if set(keys) <= set(values):
            where = next((places[key] for key in keys if key in places), keys[0])
            try:
                good = holds(*(values[key] for key in keys))
            except ValueError as error:  # no such model, part of it, policy
                raise ParamsError(f"{where}: {error}") from None
            if not good:
                raise ParamsError(f"{where}: {message}, got " + ", ".join(f"{key} {values[key]!r}" for key in keys))
    return values


def _compose(where: str, text: str) -> yaml.Node | None:
    """YAML text as nodes, which know their lines; nothing is constructed, so no tag can do anything."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ParamsError(f"{where}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ParamsError(f"{where}: not flat YAML: nested too deep") from None


def _entries(path: Path) -> list[tuple[str, yaml.Node, str]]:
    """The (key, value node, "file:line: key") triples of a flat YAML file."""
    try:
        root = _compose(str(path), path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror or error}; name a YAML file of parameters") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if root is None or root.tag.endswith(":null"):
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ParamsError(f"{path}:{root.start_mark.line + 1}: not `key: value` lines")
    entries, lines = [], {}
    for key_node, node in root.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in lines:
            raise ParamsError(f"{path}:{line}: {key}: already set in line {lines[key]}; keep one of the two")
        lines[key] = line
        entries.append((key, node, f"{path}:{line}: {key}"))
    return entries


def _checked(where: str, key: str, node: yaml.Node | None, schema: dict[str, Parameter]) -> object:
    for part in [node, *(node.value if isinstance(node, yaml.SequenceNode) else [])]:
        if part and not re.fullmatch(r"tag:yaml\.org,2002:(str|int|float|bool|null|timestamp|value|seq|map)", part.tag):
            tag = part.tag.replace("tag:yaml.org,2002:", "!!")
            raise ParamsError(f"{where}: the tag {tag} is refused; write a plain value")
    if isinstance(node, yaml.MappingNode):
        raise ParamsError(f"{where}: holds nested keys; parameters are flat, write each as `key: value` without indent")
    if key not in schema:
        nearest = difflib.get_close_matches(key, schema, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "--list shows all parameters"
        raise ParamsError(f"{where}: no notebook declares this key; {hint}")
    parameter = schema[key]
    if parameter.kind == "list" and isinstance(node, yaml.SequenceNode):
        value = [_scalar(where, item, parameter.item) for item in node.value]
    elif parameter.kind == "list":
        raise ParamsError(f"{where}: must be a list like [1, 2]{_given(node)}")
    else:
        value = _scalar(where, node, parameter.kind)
    if wrong := parameter.check(value):
        raise ParamsError(f"{where}: {wrong}")
    return value


def _given(node: yaml.Node | None) -> str:
    if node is None or node.tag.endswith(":null"):
        return ', not nothing (an empty text is "")'
    if not isinstance(node, yaml.ScalarNode):
        return ", not a list"
    shown = node.value if len(node.value) <= 60 else f"{node.value[:60]}..."
    return f", not {shown!r}" if node.style else f", not {shown}"


def _scalar(where: str, node: yaml.Node | None, kind: str) -> object:
    """A scalar node as the kind; kind "" takes the type that YAML gives it."""
    tag = node.tag.rpartition(":")[2] if isinstance(node, yaml.ScalarNode) else ""
    plain = bool(tag) and node.style is None
    kind = kind or (tag if tag in KINDS else "str")
    if kind == "str" and tag == "str":
        return node.value
    if kind == "bool" and tag == "bool":
        return yaml.SafeLoader.bool_values[node.value.lower()]
    if kind == "int" and plain and re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,18})", node.value):
        return int(node.value)
    if kind == "float" and plain and re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", node.value):
        value = float(node.value)
        if math.isfinite(value):
            return value
    quote = "; put it in quotes" if kind == "str" and plain and tag != "null" else ""
    raise ParamsError(f"{where}: must be {_ARTICLE[kind]}{_given(node)}{quote}")
