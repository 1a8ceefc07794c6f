"""The code that a name reaches, read from the source: what a result was made from, as far as this package goes.

From some names, every reference to a top-level function, class or constant of the package is followed, definition by
definition, so an edit to one function concerns only what uses it. Comments, docstrings and formatting do not count.
Where a reference cannot be followed (a module handed on as a value, `import *`, `globals()`), all of the module counts.
Top-level statements that are no plain definition run at import: they count in every module that is imported.
`import_module(f"package.room.{name}")` reaches all modules of that room, or those that the caller says are chosen.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

# They draw, print and watch: no weight and no prepared photo follows from them.
SHOW = frozenset({"pandas", "matplotlib", "seaborn", "tqdm", "psutil"})
_DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_OPAQUE = frozenset({"globals", "vars", "locals", "eval", "exec"})


def digest(thing: object) -> str:
    """Short SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def without_docstrings(tree: ast.AST) -> ast.AST:
    """The tree, changed in place: texts that stand alone are gone."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list) and body:
                kept = [s for s in body if not (isinstance(s, ast.Expr) and _text(s.value) is not None)]
                setattr(node, name, kept or [ast.Pass()])
    return tree


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed version of each distribution that holds one of these top-level modules."""
    names = {name for package in packages for name in _distributions().get(package, ())}
    return {name: metadata.version(name) for name in sorted(names)}


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


class Module:
    """The top level of one file.

    Args:
        name: dotted; "" for code from outside the package.
        home: the package that relative imports start from.
        tree: its syntax, without docstrings.
        package: the package whose code is followed.

    Attributes:
        defined: name -> the statements that bind it.
        loose: statements that are no plain definition.
        imports: name -> the (module, attribute or "") that it stands for.
        stars: modules of which everything is imported.
        imported: every dotted name that the top level imports.
    """

    def __init__(self, name: str, home: str, tree: ast.Module, package: str):
        self.name, self.home, self.package = name, home, package
        self.defined: dict[str, list[ast.stmt]] = {}
        self.loose: list[ast.stmt] = []
        self.imports: dict[str, set[tuple[str, str]]] = {}
        self.stars: set[str] = set()
        self.imported: set[str] = set()
        for statement in tree.body:
            self._add(statement)

    def _add(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.If) and _names(statement.test) & {"TYPE_CHECKING", "__name__"}:
            for other in statement.orelse:
                self._add(other)
            return  # no import of the module runs it
        inner = list(_own_scope(statement))
        for node in inner:
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound, stars, named = imports(node, self.home)
                _merge(self.imports, bound)
                self.stars |= stars
                self.imported |= named
        if isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass):
            return
        bound = {node.name for node in inner if isinstance(node, _DEFINITION)}
        bound |= {node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for name in bound:
            self.defined.setdefault(name, []).append(statement)
        is_plain = isinstance(statement, (*_DEFINITION, ast.Assign, ast.AnnAssign))
        # A decorator of the package may put what it decorates into a register.
        if not bound or not is_plain or any(map(self._is_own, getattr(statement, "decorator_list", []))):
            self.loose.append(statement)

    def _is_own(self, decorator: ast.expr) -> bool:
        targets = {target for name in _names(decorator) for target, _ in self.imports.get(name, ())}
        own = any(target.partition(".")[0] == self.package for target in targets)
        return own or bool(_names(decorator) & self.defined.keys())


def imports(node: ast.Import | ast.ImportFrom, home: str) -> tuple[dict[str, set[tuple[str, str]]], set[str], set[str]]:
    """What an import binds, name -> (module, attribute or ""); the modules of its `*`; all dotted names in it."""
    if isinstance(node, ast.Import):
        bound: dict[str, set[tuple[str, str]]] = {}
        for alias in node.names:
            first = alias.name.partition(".")[0]
            _merge(bound, {alias.asname or first: {(alias.name if alias.asname else first, "")}})
        return bound, set(), {alias.name for alias in node.names}
    above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    names = [alias for alias in node.names if alias.name != "*"]
    stars = {base} if len(names) < len(node.names) else set()
    bound = {alias.asname or alias.name: {(base, alias.name)} for alias in names}
    return bound, stars, {base, *(f"{base}.{alias.name}" for alias in names)}


def _merge(into: dict[str, set], more: Mapping[str, set]) -> None:
    for name, targets in more.items():
        into[name] = into.get(name, set()) | targets


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _own_scope(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement without the bodies of functions and classes in it."""
    pending: list[ast.AST] = [statement]
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (*_DEFINITION, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


@cache
def _parsed(name: str, home: str, text: bytes, package: str) -> Module:
    return Module(name, home, without_docstrings(ast.parse(text)), package)


class Sources:
    """The modules of a package as they are on the disk now; later edits change nothing here.

    Args:
        folder: of the package.
    """

    def __init__(self, folder: Path):
        self.package = folder.name
        self._files: dict[str, tuple[Path, bytes]] = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self._files[name] = (path, path.read_bytes())

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Module:
        path, text = self._files[name]
        return _parsed(name, name if path.name == "__init__.py" else name.rpartition(".")[0], text, self.package)

    def beside(self, name: str) -> dict[str, Path]:
        """Data files in the folder of a module, by file name."""
        folder = self._files[name][0].parent
        return {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in (".csv", ".json", ".txt")}


class Reach:
    """What some code reaches in a package.

    Args:
        sources: of the package.
        chosen: room -> the last names of its modules that are imported by a name known only at run time; all modules
            of a room that is not in it.

    Attributes:
        definitions: "module:name" -> source of each definition, and what its names stand for; "module:" -> what runs
            when the module is imported.
        packages: top-level modules of other packages that this code uses.
        files: path -> SHA-256 of each data file that this code names beside itself.
    """

    def __init__(self, sources: Sources, chosen: Mapping[str, Collection[str]] | None = None):
        self.sources, self.chosen = sources, chosen or {}
        self.definitions: dict[str, list[str]] = {}
        self.packages: set[str] = set()
        self.files: dict[str, str] = {}
        self._seen: set[tuple[str, str]] = set()
        self._pending: list[tuple[Module, list[ast.stmt]]] = []

    def code(self, tree: ast.Module) -> Reach:
        """Follow code from outside the package; returns self."""
        outside = Module("", "", tree, self.sources.package)
        self._run_imports(outside)
        self._pending.append((outside, tree.body))
        return self._finish()

    def name(self, module: str, name: str) -> Reach:
        """Follow a top-level name of a module of the package; returns self."""
        self._reach(module, name)
        return self._finish()

    def state(self) -> dict:
        """All of it but the packages, for `digest`."""
        return {"definitions": self.definitions, "files": self.files}

    def _finish(self) -> Reach:
        while self._pending:
            module, statements = self._pending.pop()
            for statement in statements:
                _References(self, module, statement)
        return self

    def _first(self, module: str, name: str) -> bool:
        is_first = (module, name) not in self._seen
        self._seen.add((module, name))
        return is_first

    def _reach(self, module: str, name: str) -> None:
        """A top-level name of a module, or the module `module.name`."""
        if module not in self.sources:
            self._outside(module)
        elif self._first(module, name) and module != __name__:  # what is here decides no result
            self.touch(module)
            source = self.sources[module]
            if name in source.defined:
                self._define(f"{module}:{name}", source, source.defined[name])
            for target in source.imports.get(name, ()):
                self.target(*target)
            if name not in source.defined and name not in source.imports:
                # A module; else from `import *`, or made in a way that the source does not show.
                self.whole(f"{module}.{name}" if f"{module}.{name}" in self.sources else module)

    def _define(self, key: str, source: Module, statements: list[ast.stmt]) -> None:
        names = set().union(*map(_names, statements))
        stands_for = sorted(f"{n}={'.'.join(t)}" for n in names for t in source.imports.get(n, ()))
        self.definitions[key] = [*map(ast.unparse, statements), *stands_for]
        self._pending.append((source, statements))

    def _outside(self, module: str) -> None:
        top = module.partition(".")[0]
        if top not in (self.sources.package, *sys.stdlib_module_names):
            self.packages.add(top)

    def _run_imports(self, source: Module) -> None:
        for name in source.imported:
            self.touch(name)
        for name in source.stars:
            self.whole(name)

    # ---- what references do ----

    def target(self, module: str, attribute: str) -> None:
        """What an imported name stands for."""
        if attribute:
            self._reach(module, attribute)
        else:
            self.whole(module)

    def whole(self, module: str) -> None:
        """Everything in a module."""
        if module not in self.sources:
            self._outside(module)
        elif self._first(module, "*"):
            self.touch(module)
            for name in (*self.sources[module].defined, *self.sources[module].imports):
                self._reach(module, name)

    def touch(self, module: str) -> None:
        """A module is imported, with those above it and those that it imports."""
        if module in self.sources and module != __name__ and self._first(module, ""):
            self.touch(module.rpartition(".")[0])
            source = self.sources[module]
            if source.loose:
                self._define(f"{module}:", source, source.loose)
            self._run_imports(source)

    def room(self, name: str) -> None:
        """Modules of a package that are imported by name."""
        for module in self.sources:
            above, _, last = module.rpartition(".")
            if (not name or above == name) and last in self.chosen.get(name, [last]):
                self.whole(module)

    def data(self, module: str, texts: Collection[str], reads_own_folder: bool) -> None:
        """Data files beside a module that a statement of it names, or all where it looks for them in another way."""
        beside = self.sources.beside(module)
        named = beside.keys() & texts
        for name in named or (beside if reads_own_folder else ()):
            path = beside[name]
            self.files[f"{module.rpartition('.')[0]}/{name}"] = hashlib.sha256(path.read_bytes()).hexdigest()


class _References(ast.NodeVisitor):
    """Hands every reference of one top-level statement to a Reach."""

    def __init__(self, reach: Reach, module: Module, statement: ast.stmt):
        self._reach, self._module = reach, module
        self._aliases = dict(module.imports)
        texts, reads_own_folder = set(), False
        for node in ast.walk(statement):  # imports inside functions first
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound, stars, named = imports(node, module.home)
                _merge(self._aliases, bound)
                for name in named:
                    reach.touch(name)
                for name in stars:
                    reach.whole(name)
            texts.add(_text(node))
            reads_own_folder |= isinstance(node, ast.Name) and node.id == "__file__"
        if module.name:
            reach.data(module.name, texts - {None}, reads_own_folder)
        self.visit(statement)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path, inner = [], node
        while isinstance(inner, ast.Attribute):
            path.append(inner.attr)
            inner = inner.value
        targets = self._aliases.get(inner.id, ()) if isinstance(inner, ast.Name) else ()
        if not targets:
            self.visit(node.value)
        for module, attribute in targets:
            self._along(f"{module}.{attribute}" if attribute else module, path[::-1], (module, attribute))

    def _along(self, place: str, path: list[str], target: tuple[str, str]) -> None:
        """`alias.room.module.name`: that name alone."""
        if place not in self._reach.sources:
            self._reach.target(*target)
            return
        while path and f"{place}.{path[0]}" in self._reach.sources:
            place, *path = f"{place}.{path[0]}", *path[1:]
            self._reach.touch(place)
        self._reach.target(place, path[0] if path else "")

    def visit_Name(self, node: ast.Name) -> None:
        if self._module.name and node.id in self._module.defined:
            self._reach.target(self._module.name, node.id)
        for target in self._aliases.get(node.id, ()):
            self._reach.target(*target)
        if self._module.name and node.id in _OPAQUE:
            self._reach.whole(self._module.name)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and node.args:
            self._import_by_name(node.args[0])
        self.generic_visit(node)

    def _import_by_name(self, name: ast.expr) -> None:
        first = name.values[0] if isinstance(name, ast.JoinedStr) else name
        text = _text(first)
        if text is None:
            self._reach.room("")  # any module at all
        elif first is name:
            self._reach.whole(text)
        else:
            self._reach.room(text.rpartition(".")[0])


# As this process imported it: an edit counts in processes that start after it.
_HERE = Sources(Path(__file__).parent)


def code_digest(*things: Callable | type) -> str:
    """Digest of the code that functions and classes of this package reach, with the versions of the packages it uses.

    Packages that draw, print and watch do not count, nor does this module. An edit made while a notebook's kernel runs
    counts when the kernel is started again, as the code itself does.
    """
    return _code_digest(*sorted((thing.__module__, thing.__qualname__) for thing in things))


@cache
def _code_digest(*names: tuple[str, str]) -> str:
    reach = Reach(_HERE)
    for module, name in names:
        if module not in _HERE:
            raise ValueError(f"{module}.{name}: not a part of {_HERE.package}, whose code alone can be followed")
        reach.name(module, name)
    return digest([reach.state(), versions(reach.packages - SHOW)])
