"""What a constructor takes, read from its source.

Importing torch and Lightning takes seconds; a misspelled option is refused without them.
"""

import ast
import builtins
import importlib.util
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hydra.utils import get_object

_TYPING = {
    *("Any", "Callable", "Dict", "Iterable", "Iterator", "List", "Mapping", "Optional", "Sequence"),
    *("Set", "Tuple", "Union"),
}
# classes that a value from YAML can be converted to, or that have no instances
_CONVERTIBLE = {
    *("Number", "Enum", "IntEnum", "StrEnum", "PurePath", "Path", "Protocol", "NamedTuple"),
}


class Unresolved(Exception):
    """Something that the source alone does not say."""


class Definition(NamedTuple):
    """A class, a function or an assigned expression, and the module it stands in."""

    node: ast.AST
    module: str


@cache
def _spec(module: str) -> ModuleSpec | None:
    """The spec of a module, without the import of its parents by ``importlib.util.find_spec``."""
    parent = module.rpartition(".")[0]
    above = _spec(parent) if parent else None
    path = above.submodule_search_locations if above else None
    if parent and path is None:
        return None
    found = (finder.find_spec(module, path) for finder in sys.meta_path)
    return next(filter(None, found), None)


@cache
def _source(module: str) -> str:
    spec = _spec(module)
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        raise Unresolved(module)
    return Path(str(spec.origin)).read_text(encoding="utf-8")


@cache
def _statements(module: str) -> list[ast.stmt]:
    """Statements of a module, those within ``if`` and ``try`` included."""

    def flat(outer: ast.AST) -> Iterator[ast.stmt]:
        for one in ast.iter_child_nodes(outer):
            if isinstance(one, ast.stmt):
                yield one
            if isinstance(one, ast.If | ast.Try | ast.ExceptHandler | ast.With | ast.For):
                yield from flat(one)

    return list(flat(ast.parse(_source(module))))


@cache
def _lookup(module: str, name: str) -> Definition:
    """Definition of a name of a module, through its imports.

    Raises:
        Unresolved: the source does not say.
        AttributeError: there is no such name.
    """
    unresolved = _spec(f"{module}.{name}") is not None
    for one in _statements(module):
        match one:
            case ast.ClassDef() | ast.FunctionDef() if one.name == name:
                return Definition(one, module)
            case ast.Assign(targets=[ast.Name(id=target)]) if target == name:
                return Definition(one.value, module)
            case ast.AnnAssign(target=ast.Name(id=target)) if target == name:
                return Definition(one.value or one.annotation, module)
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                try:
                    return _lookup(_imported_from(one, module), name)
                except Unresolved:
                    unresolved = True
                except AttributeError:
                    pass
            case ast.ImportFrom():
                for alias in one.names:
                    if name == (alias.asname or alias.name):
                        return _lookup(_imported_from(one, module), alias.name)
    # it may be defined in a way that is not followed here
    if unresolved or re.search(rf"\b{re.escape(name)}\b|__getattr__|globals\(\)", _source(module)):
        raise Unresolved(name)
    raise AttributeError(f"module {module} has no {name}")


def _imported_from(statement: ast.ImportFrom, module: str) -> str:
    relative = "." * statement.level + (statement.module or "")
    spec = _spec(module)
    return importlib.util.resolve_name(relative, spec and spec.parent)


def find(path: str) -> Definition:
    """Definition of what an import path such as ``torch.optim.SGD`` names.

    Raises:
        Unresolved: the source does not say; the import may be right.
        ImportError, AttributeError: there is no such module or name.
    """
    module, _, name = path.rpartition(".")
    package = module.partition(".")[0]
    if not package or not name:
        raise ImportError(f"{path!r} is no import path such as my_package.MyModule")
    if _spec(package) is None and package not in sys.modules:
        raise ModuleNotFoundError(f"there is no module {package}")
    if _spec(module) is None:
        raise Unresolved(path)  # a class within a class, or a module made at run time
    return _lookup(module, name)


def _resolve(dotted: str, module: str) -> Definition:
    """Definition of what a module calls ``Name`` or ``package.Name``."""
    first, _, rest = dotted.partition(".")
    try:
        if not rest:
            return _lookup(module, first)
        for one in _statements(module):
            for alias in one.names if isinstance(one, ast.Import) else ():
                if first in (alias.asname, alias.name.partition(".")[0]):
                    return find(f"{alias.name}.{rest}" if alias.asname else dotted)
    except (AttributeError, ImportError) as error:
        raise Unresolved(dotted) from error
    raise Unresolved(dotted)


def _bases(found: Definition) -> Iterator[Definition]:
    """A class and those it is derived from, depth first."""
    if not isinstance(found.node, ast.ClassDef):
        raise Unresolved(found.module)
    yield found
    for base in found.node.bases:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        if not hasattr(builtins, name):
            yield from _bases(_resolve(name, found.module))


def _resolution_order(found: Definition) -> Iterator[tuple[ast.ClassDef, str]]:
    """Node and module of a class and of those it is derived from, as Python looks them up.

    Raises:
        Unresolved: when all bases before one that is made at run time have been yielded.
    """
    bases: list[Any] = []
    unresolved: Unresolved | None = None
    try:
        bases += _bases(found)
    except Unresolved as error:
        unresolved = error
    # of a base that is met twice the last time counts
    yield from (one for i, one in enumerate(bases, start=1) if one not in bases[i:])
    if unresolved is not None:
        raise unresolved


def class_attribute(path: str, name: str) -> Any:
    """An attribute of a class, by import where the source does not say.

    Raises:
        ImportError: there is no such module.
        AttributeError: there is no such class, or it has no such attribute.
    """
    try:
        for node, _ in _resolution_order(find(path)):
            for one in node.body:
                match one:
                    case ast.Assign(targets=[target], value=value) if ast.unparse(target) == name:
                        return ast.literal_eval(value)
                    case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if (
                        target == name
                    ):
                        return ast.literal_eval(value)
                    case ast.FunctionDef() if one.name == name:
                        raise Unresolved(name)
    except (Unresolved, ValueError):  # such as a property, or an expression
        return getattr(get_object(path), name)
    raise AttributeError(f"{path} has no {name}")


def parameters(path: str) -> dict[str, Any] | None:
    """Names and annotations of what a class or a function is called with.

    Annotations that the source alone does not say are ``Any``; a class that is none of Python's
    own stands for itself by a class of the same name.

    Returns:
        None where it takes any keyword, or where the source does not say.

    Raises:
        ImportError, AttributeError: there is no such module or name.
    """
    try:
        found = find(path)
        if isinstance(found.node, ast.FunctionDef):
            return _arguments(found.node, found.module)
        return _of_constructor(found)
    except Unresolved:
        return None


def _of_constructor(found: Definition) -> dict[str, Any] | None:
    fields: dict[str, Any] = {}
    for node, module in _resolution_order(found):
        methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
        if "__init__" in methods and not fields:  # else of what a dataclass is derived from
            taken = _arguments(methods["__init__"], module)
            return taken and {name: taken[name] for name in list(taken)[1:]}
        if "__init__" in methods or "__new__" in methods:
            return fields or None
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields |= {
                one.target.id: _type(one.annotation, module)
                for one in node.body
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            }
    return fields or None


def _arguments(function: ast.FunctionDef, module: str) -> dict[str, Any] | None:
    of = function.args
    if of.kwarg is not None:
        return None
    every = [*of.posonlyargs, *of.args, *of.kwonlyargs]
    return {one.arg: _type(one.annotation, module) for one in every}


def _type(node: ast.AST | None, module: str) -> Any:
    """The type that an annotation means; ``Any`` where the source does not say."""
    try:
        return _annotation(node, module)
    except (Unresolved, SyntaxError, TypeError, ValueError, RecursionError):
        return Any


def _annotation(node: ast.AST | None, module: str) -> Any:
    match node:
        case ast.Constant(value=str(text)):
            return _annotation(ast.parse(text, mode="eval").body, module)
        case ast.Constant(value=value):  # None, ...
            return value
        case ast.BinOp(left=left, right=right):
            return typing.Union[_annotation(left, module), _annotation(right, module)]  # noqa: UP007
        case ast.Tuple(elts=members):
            return tuple(_annotation(one, module) for one in members)
        case ast.List(elts=members):  # of a Callable
            return [_annotation(one, module) for one in members]
        case ast.Subscript(value=outer, slice=inner):
            if ast.unparse(outer).endswith("Literal"):
                return Literal[ast.literal_eval(inner)]
            return _annotation(outer, module)[_annotation(inner, module)]
        case ast.Name() | ast.Attribute():
            return _named(ast.unparse(node), module)
    return Any


def _named(dotted: str, module: str) -> Any:
    name = dotted.rpartition(".")[2]
    if name in _TYPING:
        return getattr(typing, name)
    if isinstance(getattr(builtins, dotted, None), type):
        return getattr(builtins, dotted)
    found = _resolve(dotted, module)
    if not isinstance(found.node, ast.ClassDef):
        return _annotation(found.node, found.module)
    names = {name}
    with suppress(Unresolved):  # a base in C converts nothing
        for one, _ in _resolution_order(found):
            names |= {one.name, *(ast.unparse(base).rpartition(".")[2] for base in one.bases)}
    return Any if names & _CONVERTIBLE else type(name, (), {})
