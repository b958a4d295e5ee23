"""The code that goes with a saved model, so that `trust_remote_code=True` loads it where mosaics was never imported.

It is a file that imports the installed package, or what the model's arrangement needs of the package's own sources:
definitions that nothing there uses are left out, and so are the forms of ops that need more than PyTorch.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mosaics._version import __version__
from mosaics.memories.contract import memory_class
from mosaics.models.configuration_mosaic import MosaicConfig

ENTRY = "modeling_mosaic"  # the module that transformers is sent to
CODE_LICENSE = "LICENSE-CODE.txt"
# What asks for presets, counts what a model costs or looks into what it read is served by the package.
_LEFT_OUT = {"from_preset", "changed", "settings", "describe", "undecayed_parameters", "check"}
_LEFT_OUT |= {"inspect", "read_weights", "remove_memories"}
_LOOKED_INTO = "context.reads is not None"
_TRIED = "EXAMPLES"
_CLASSES = {"AutoConfig": "MosaicConfig", "AutoModel": "MosaicModel", "AutoModelForCausalLM": "MosaicForCausalLM"}
_HEADER = "# Copyright the mosaics authors. Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0\n"
_INSTALLED = f'''{_HEADER}"""Lets `trust_remote_code=True` load this model where the package mosaics is installed."""

import mosaics.models
from transformers import GenerationMixin


class MosaicConfig(mosaics.models.MosaicConfig):
    """As in the package; saved models take this file along."""


class MosaicModel(mosaics.models.MosaicModel):
    """As in the package."""

    config_class = MosaicConfig


class MosaicForCausalLM(mosaics.models.MosaicForCausalLM, GenerationMixin):
    """As in the package."""

    config_class = MosaicConfig
'''


def write_code(folder: Path, self_contained: bool = False) -> None:
    """Put code into the folder of a saved mosaic, and its name into the folder's config.

    Args:
        folder: what `save_pretrained` wrote.
        self_contained: whether to write all code that the model needs, with its licence; else a file that imports the
            installed package.

    Raises:
        ValueError: a memory of the model is that of another package, whose code can't be given away here.
    """
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    files = {f"{ENTRY}.py": _INSTALLED}
    if self_contained:
        files = sources(MosaicConfig.from_dict(values).memory_types())
        files[CODE_LICENSE] = _license()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    values["auto_map"] = {auto: f"{ENTRY}.{name}" for auto, name in _CLASSES.items()}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sources(memories: set[str]) -> dict[str, str]:
    """The text of every module, by the name of its file, that a mosaic of these types of memories needs: one flat
    folder, whose modules import each other by relative imports, as transformers loads them.

    Raises:
        ValueError: a memory is that of another package.
    """
    wanted = [("mosaics.models.modeling_mosaic", name) for name in _CLASSES.values()]
    registered = []
    for name in sorted(memories):
        kind = memory_class(name)
        if kind.__module__.partition(".")[0] != "mosaics":
            raise ValueError(
                f"the memory {name!r} is of another package ({kind.__module__}), whose code can't be written into an "
                "export; leave out --self-contained"
            )
        registered.append((kind.__module__, kind.__name__))
    needed, called = _needed([*wanted, *registered])
    flat = [_flat(module) for module in needed]
    assert len(set(flat)) == len(flat), "two modules have one name"
    texts = {f"{_flat(module)}.py": _written(_source(module), names, called) for module, names in needed.items()}
    # A config asks the registry for its memories.
    config = f"{_flat('mosaics.models.configuration_mosaic')}.py"
    imports = "".join(f"from .{_flat(module)} import {name}  # noqa: F401\n" for module, name in registered)
    texts[config] = re.sub(r"^(?=from \.)", imports, texts[config], count=1, flags=re.M)
    return texts


def _license() -> str:
    """That of the package: beside its modules in a wheel, above them in a checkout."""
    here = Path(__file__).parents[1]
    return next(p for p in (here / "LICENSE", here.parents[1] / "LICENSE") if p.is_file()).read_text(encoding="utf-8")


def _flat(module: str) -> str:
    """The name of a module of the package in the flat folder."""
    return module.removeprefix("mosaics.").removeprefix("models.").replace(".", "_")


class _Source:
    """A module of the package by its syntax tree."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.text = Path(find_spec(module).origin).read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.binding: dict[str, list[ast.stmt]] = defaultdict(list)  # the statements that bind a name
        self.imported: dict[str, tuple[str, str | None]] = {}  # names of other modules of the package; None: a module
        self.always: list[ast.stmt] = []  # what runs for its effect
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    self.binding[alias.asname or alias.name.partition(".")[0]].append(statement)
                self.imported |= dict(_from_package(statement))
            elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self.binding[statement.name].append(statement)
            elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for node in ast.walk(statement):
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                        self.binding[node.id].append(statement)
            elif statement is not self.tree.body[0]:  # the docstring
                self.always.append(statement)

    def idle(self, statement: ast.stmt, called: set[str]) -> list[ast.AST]:
        """What of a class nothing calls, neither what was found to be called nor a library; and what is left to the
        package."""
        if not isinstance(statement, ast.ClassDef):
            return []
        methods, from_transformers, idle = self._class(statement)
        if from_transformers:  # asks for more than it declares
            return [m for m in methods if m.name in _LEFT_OUT]
        return [m for m in idle if not isinstance(m, ast.FunctionDef) or m.name not in called]

    @functools.cache  # noqa: B019 - as long-lived as the module's source
    def _class(self, statement: ast.ClassDef) -> tuple[list[ast.FunctionDef], bool, list[ast.stmt]]:
        """Of a class of this module: its methods, whether transformers calls them, and what may be idle."""
        bases = getattr(importlib.import_module(self.module), statement.name).__mro__
        outside = [base for base in bases if base.__module__.partition(".")[0] != "mosaics"]
        methods = [node for node in statement.body if isinstance(node, ast.FunctionDef)]
        untried = [s for s in statement.body if isinstance(s, ast.Assign | ast.AnnAssign) and _TRIED in ast.unparse(s)]
        own = [m for m in methods if not any(hasattr(base, m.name) for base in outside)]
        return methods, any(base.__module__.startswith("transformers.") for base in outside), [*own, *untried]

    def left_out(self, statement: ast.stmt, called: set[str]) -> list[ast.AST]:
        """What of a statement is not written: what is idle, and what only an inspector asks for."""
        asked = (c for n in self.nodes(statement, called) for c in ast.iter_child_nodes(n) if _is_of_inspection(n, c))
        return [*self.idle(statement, called), *asked]

    def parts(self, statement: ast.stmt, called: set[str]) -> Iterator[ast.AST]:
        """The parts of a statement, those of a class without what is idle."""
        if not isinstance(statement, ast.ClassDef):
            yield statement
            return
        idle = self.idle(statement, called)
        yield from (part for part in ast.iter_child_nodes(statement) if part not in idle)

    @functools.cache  # noqa: B019
    def _nodes(self, part: ast.AST) -> list[ast.AST]:
        """As `ast.walk`, parents first, without what only an inspector asks for."""
        found, left = [], [part]
        while left:
            node = left.pop()
            found.append(node)
            left.extend(child for child in ast.iter_child_nodes(node) if not _is_of_inspection(node, child))
        return found

    @functools.cache  # noqa: B019
    def _uses(self, part: ast.AST) -> list[tuple[ast.AST, str, str]]:
        aliases, found = set(), []
        for node in self._nodes(part):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = self.imported.get(node.value.id, (None, ""))
                if module and name is None:
                    aliases.add(node.value)
                    found.append((node, *_defined(module, node.attr)))
            elif isinstance(node, ast.Name) and node not in aliases:
                if node.id in self.imported:
                    module, name = self.imported[node.id]
                    assert name is not None, f"{self.module} uses the module {node.id} as a value"
                    found.append((node, *_defined(module, name)))
                elif node.id in self.binding:
                    found.append((node, self.module, node.id))
        return found

    def nodes(self, statement: ast.stmt, called: set[str]) -> Iterator[ast.AST]:
        """As `ast.walk`, without what is left out."""
        if isinstance(statement, ast.ClassDef):
            yield statement
        for part in self.parts(statement, called):
            yield from self._nodes(part)

    def uses(self, statement: ast.stmt, called: set[str]) -> Iterator[tuple[ast.AST, str, str]]:
        """What of the package's modules a statement uses: where, the module that defines it, and its name there."""
        for part in self.parts(statement, called):
            yield from self._uses(part)

    @functools.cache  # noqa: B019
    def _asks(self, part: ast.AST) -> frozenset[str]:
        return frozenset(node.attr for node in self._nodes(part) if isinstance(node, ast.Attribute))

    def asks(self, statement: ast.stmt, called: set[str]) -> set[str]:
        """The names of the attributes that a statement asks any object for."""
        return set().union(*map(self._asks, self.parts(statement, called)))

    def kept(self, names: set[str]) -> list[ast.stmt]:
        """The statements, but for imports, that a module needs that has to offer these names."""
        wanted = {id(s) for name in names for s in self.binding[name]} | {id(s) for s in self.always}
        return [s for s in self.tree.body if id(s) in wanted and not isinstance(s, ast.Import | ast.ImportFrom)]


def _is_of_inspection(function: ast.AST, statement: ast.AST) -> bool:
    """Whether a statement of a function only tells an inspector what was read."""
    of_function = isinstance(function, ast.FunctionDef) and isinstance(statement, ast.If)
    return of_function and ast.unparse(statement.test) == _LOOKED_INTO


@functools.cache
def _source(module: str) -> _Source:
    return _Source(module)


def _from_package(statement: ast.stmt) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """The names that a statement imports from the package, and what they are."""
    if isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == "mosaics":
        for alias in statement.names:
            module = f"{statement.module}.{alias.name}"
            is_package = find_spec(statement.module).submodule_search_locations is not None
            whole = is_package and find_spec(module) is not None
            yield alias.asname or alias.name, (module, None) if whole else (statement.module, alias.name)


def _defined(module: str, name: str) -> tuple[str, str]:
    """The module that defines a name, which others may only pass on."""
    if name in _source(module).imported:
        module, name = _defined(*_source(module).imported[name])
    return module, name


def _needed(wanted: list[tuple[str, str]]) -> tuple[dict[str, set[str]], set[str]]:
    """What has to be defined so that the wanted names of modules can be: names by module, and what is called by them of
    any object."""
    called: set[str] = set()
    while True:
        needed: dict[str, set[str]] = {}
        left, before = [_defined(*pair) for pair in wanted], len(called)
        while left:
            module, name = left.pop()
            source, found = _source(module), needed.setdefault(module, set())
            if name in found:
                continue
            statements = [*source.binding[name], *([] if found else source.always)]
            found.add(name)
            for statement in statements:
                left += [(m, n) for _, m, n in source.uses(statement, called)]
                called |= source.asks(statement, called)
        if len(called) == before:
            return needed, called


def _written(source: _Source, names: set[str], called: set[str]) -> str:
    """The text of a module with these of its names alone, and relative imports."""
    data = source.text.encode()
    lines = source.text.splitlines(keepends=True)
    begins = [0]  # of each line, in bytes, as syntax trees count
    for line in lines:
        begins.append(begins[-1] + len(line.encode()))
    edits: list[tuple[int, int, str]] = []

    def place(node: ast.AST) -> tuple[int, int]:
        return begins[node.lineno - 1] + node.col_offset, begins[node.end_lineno - 1] + node.end_col_offset

    def whole(statement: ast.stmt) -> tuple[int, int]:
        """With its decorators, and what is said of it in the lines before."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        while lines[first - 2].strip().startswith("#"):
            first -= 1
        return begins[first - 1], begins[statement.end_lineno]

    kept = source.kept(names)
    used = {node.id for s in kept for node in source.nodes(s, called) if isinstance(node, ast.Name)}
    imports: dict[str, set[str]] = defaultdict(set)  # what is imported of each module of the folder
    for statement in kept:
        for node, module, name in source.uses(statement, called):
            if isinstance(node, ast.Attribute):
                alias, (begin, end) = f"{node.value.id}_{name}", place(node)
                assert data[begin:end].decode() == ast.unparse(node), f"{source.module}:{node.lineno} is not rewritten"
                edits.append((begin, end, alias))
                imports[module].add(f"{name} as {alias}")
            elif module != source.module:
                imports[module].add(name if name == node.id else f"{name} as {node.id}")
        edits += [(*whole(part), "") for part in source.left_out(statement, called)]
        for node in source.nodes(statement, called):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) and len(node.body) > 1:
                begin, end = place(node.body[0])  # the package has the whole
                first, rest, _ = data[begin:end].decode().partition("\n\n")
                if isinstance(node, ast.FunctionDef):
                    edits.append((*whole(node.body[0]), ""))
                elif rest:
                    edits.append((begin, end, f'{first}"""'))

    head = ""
    for statement in source.tree.body[1:]:
        if isinstance(statement, ast.ImportFrom | ast.Import) and not list(_from_package(statement)):
            own = [a for a in statement.names if (a.asname or a.name.partition(".")[0]) in used]
            if isinstance(statement, ast.Import):
                head += f"{ast.unparse(ast.Import(own))}\n" if own else ""
            elif own or statement.module == "__future__":
                head += f"{ast.unparse(ast.ImportFrom(statement.module, own or statement.names, 0))}\n"
        if statement not in kept:
            edits.append((*whole(statement), ""))
    relative = [f"from .{_flat(module)} import {', '.join(sorted(found))}" for module, found in sorted(imports.items())]
    opening = place(source.tree.body[0])[1]
    edits.append((opening, opening, "\n".join(["\n", head, *relative, "\n"])))
    for begin, end, text in sorted(edits, reverse=True):
        data = data[:begin] + text.encode() + data[end:]
    about = f"# From {source.module} of mosaics {__version__}, without what this model does not need.\n{_HEADER}"
    text = re.sub(r"\n{3,}(?= )", "\n\n", re.sub(r"\n{4,}", "\n\n\n", data.decode()))  # what was left out leaves gaps
    return about + text.rstrip() + "\n"
