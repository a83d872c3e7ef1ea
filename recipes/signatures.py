"""What a constructor takes, read from its source.

Importing torch and Lightning takes seconds; a misspelled option is refused without them.
"""

import ast
import builtins
import collections.abc
import importlib.util
import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal, NamedTuple

_GENERIC: dict[str, Any] = {
    name: getattr(collections.abc, name)
    for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")
} | {"Dict": dict, "List": list, "Set": set, "Tuple": tuple}
# bases of classes that a value from YAML can be converted to, or that have no instances
_CONVERTIBLE = {
    "Number",
    "Enum",
    "IntEnum",
    "StrEnum",
    "PurePath",
    "Path",
    "Protocol",
    "NamedTuple",
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
    parent, _, _ = module.rpartition(".")
    if not parent:
        try:
            return importlib.util.find_spec(module)
        except ValueError:  # __main__ may have none
            return None
    above = _spec(parent)
    if above is None or above.submodule_search_locations is None:
        return None
    for finder in sys.meta_path:
        found = finder.find_spec(module, above.submodule_search_locations)
        if found is not None:
            return found
    return None


@cache
def _statements(module: str) -> list[ast.stmt]:
    """Statements of a module, those within ``if`` and ``try`` included."""
    spec = _spec(module)
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        raise Unresolved(module)

    def flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for one in body:
            yield one
            if isinstance(one, ast.If | ast.Try | ast.With | ast.For):
                handlers = [each for kept in getattr(one, "handlers", ()) for each in kept.body]
                yield from flat([*one.body, *getattr(one, "orelse", ()), *handlers])

    return list(flat(ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8")).body))


def _absolute(module: str, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    spec = _spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    parts = module.split(".")
    parts = parts[: len(parts) - statement.level + is_package]
    return ".".join([*parts, *([statement.module] if statement.module else [])])


@cache
def _lookup(module: str, name: str) -> Definition:
    """Definition of a name of a module, through its imports.

    Raises:
        Unresolved: the source does not say.
        AttributeError: there is no such name.
    """
    dynamic = False
    for one in _statements(module):
        if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == name:
            return Definition(one, module)
        if isinstance(one, ast.FunctionDef) and one.name == "__getattr__":
            dynamic = True
        elif isinstance(one, ast.Assign) and name in [getattr(t, "id", "") for t in one.targets]:
            return Definition(one.value, module)
        elif isinstance(one, ast.Assign | ast.Expr) and "globals()" in ast.unparse(one):
            dynamic = True
        elif isinstance(one, ast.Assign):  # several names at once
            dynamic |= any(getattr(each, "id", "") == name for each in ast.walk(one))
        elif isinstance(one, ast.AnnAssign) and getattr(one.target, "id", "") == name:
            return Definition(one.value or one.annotation, module)
        elif isinstance(one, ast.Import):
            dynamic |= any((alias.asname or alias.name) == name for alias in one.names)
        elif isinstance(one, ast.ImportFrom):
            for alias in one.names:
                if alias.name == "*":
                    try:
                        return _lookup(_absolute(module, one), name)
                    except Unresolved:
                        dynamic = True
                    except AttributeError:
                        pass
                elif (alias.asname or alias.name) == name:
                    return _lookup(_absolute(module, one), alias.name)
    if dynamic or _spec(f"{module}.{name}") is not None:
        raise Unresolved(name)
    raise AttributeError(f"module {module} has no {name}")


def find(path: str) -> Definition:
    """Definition of what an import path such as ``torch.optim.SGD`` names.

    Raises:
        Unresolved: the source does not say; the import may be right.
        ImportError, AttributeError: there is no such module or name.
    """
    module, _, name = path.rpartition(".")
    if not module or not name:
        raise ImportError(f"{path!r} is no import path such as my_package.MyModule")
    if _spec(module) is None:
        parts = module.split(".")
        above = next((n for n in range(len(parts), 0, -1) if _spec(".".join(parts[:n]))), 0)
        if above == 0:
            raise ModuleNotFoundError(f"there is no module {parts[0]}")
        raise Unresolved(path)  # a class within a class, or a module made at run time
    return _lookup(module, name)


def _bases(found: Definition) -> Iterator[Definition]:
    """A class and those it is derived from, as far as the source says.

    Raises:
        Unresolved: a base is made at run time.
    """
    if not isinstance(found.node, ast.ClassDef):
        raise Unresolved(found.module)
    yield found
    for base in found.node.bases:
        inner = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(inner, ast.Name) and hasattr(builtins, inner.id):
            continue
        yield from _bases(_expression(inner, found.module))


def _expression(node: ast.AST, module: str) -> Definition:
    """Definition of a name or of ``package.Name``."""
    try:
        if isinstance(node, ast.Name):
            return _lookup(module, node.id)
        if isinstance(node, ast.Attribute):
            return _attribute_of(ast.unparse(node), module)
    except (AttributeError, ImportError) as error:
        raise Unresolved(ast.unparse(node)) from error
    raise Unresolved(ast.unparse(node))


def _attribute_of(dotted: str, module: str) -> Definition:
    first, _, rest = dotted.partition(".")
    for one in _statements(module):
        if isinstance(one, ast.Import):
            for alias in one.names:
                if (alias.asname or alias.name.partition(".")[0]) == first:
                    root = alias.name if alias.asname else first
                    return find(f"{root}.{rest}")
    raise Unresolved(dotted)


def class_attribute(path: str, name: str) -> Any:
    """A literal in the body of a class or of one it is derived from.

    Raises:
        Unresolved: the source does not say.
        ImportError: there is no such module.
        AttributeError: there is no such class, or it has no such attribute.
    """
    for found in _bases(find(path)):
        for one in typing.cast(ast.ClassDef, found.node).body:
            targets = one.targets if isinstance(one, ast.Assign) else [getattr(one, "target", None)]
            named = name in [getattr(target, "id", "") for target in targets]
            value = getattr(one, "value", None)
            if named and isinstance(value, ast.Constant):
                return value.value
            if (named and value is not None) or getattr(one, "name", "") == name:
                raise Unresolved(name)
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
        return _parameters(find(path))
    except Unresolved:
        return None


def _parameters(found: Definition) -> dict[str, Any] | None:
    if isinstance(found.node, ast.FunctionDef):
        return _arguments(found.node, found.module)
    fields: dict[str, Any] = {}
    bases: list[Definition] = []
    unresolved: Unresolved | None = None
    try:
        bases += _bases(found)
    except Unresolved as error:
        unresolved = error
    # of a base that is met twice the last time counts, as in the method resolution order
    order = {id(one.node): one for one in reversed(bases)}
    for one in reversed(list(order.values())):
        node = typing.cast(ast.ClassDef, one.node)
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                if fields:  # of a dataclass derived from this class
                    return fields
                taken = _arguments(inner, one.module)
                return taken and {name: taken[name] for name in list(taken)[1:]}
            if isinstance(inner, ast.FunctionDef) and inner.name == "__new__":
                return None
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields |= {
                inner.target.id: _annotation(inner.annotation, one.module)
                for inner in node.body
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
            }
    if unresolved is not None:
        raise unresolved
    return fields or None


def _arguments(function: ast.FunctionDef, module: str) -> dict[str, Any] | None:
    of = function.args
    if of.kwarg is not None:
        return None
    every = [*of.posonlyargs, *of.args, *of.kwonlyargs]
    return {one.arg: _annotation(one.annotation, module) for one in every}


def _annotation(node: ast.AST | None, module: str) -> Any:
    """The type that an annotation means; ``Any`` where the source does not say."""
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str(text)):
            with suppress(SyntaxError):
                return _annotation(ast.parse(text, mode="eval").body, module)
        case ast.BinOp(left=left, right=right):
            return typing.Union[_annotation(left, module), _annotation(right, module)]  # noqa: UP007
        case ast.Subscript(value=value, slice=inner):
            return _subscript(ast.unparse(value).rpartition(".")[2], inner, module)
        case ast.Name(id=name) if isinstance(getattr(builtins, name, None), type):
            return getattr(builtins, name)
        case ast.Name(id=name) if name in _GENERIC:
            return _GENERIC[name]
        case ast.Name() | ast.Attribute():
            return _named(node, module)
    return Any


def _named(node: ast.AST, module: str) -> Any:
    try:
        found = _expression(node, module)
    except (Unresolved, RecursionError):
        return Any
    if not isinstance(found.node, ast.ClassDef):
        return _annotation(found.node, found.module)
    names = set()
    with suppress(Unresolved):  # a base in C converts nothing
        for one in _bases(found):
            node = typing.cast(ast.ClassDef, one.node)
            names |= {node.name, *(ast.unparse(base).rpartition(".")[2] for base in node.bases)}
    return Any if names & _CONVERTIBLE else type(found.node.name, (), {})


def _subscript(outer: str, inner: ast.expr, module: str) -> Any:
    members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if outer == "Literal":
        try:
            return Literal[tuple(ast.literal_eval(one) for one in members)]
        except ValueError:  # members of an Enum
            return Any
    if outer == "Union":
        return typing.Union[tuple(_annotation(one, module) for one in members)]  # noqa: UP007
    if outer == "Optional":
        return typing.Optional[_annotation(inner, module)]  # noqa: UP045
    if outer in ("Annotated", "Final"):
        return _annotation(members[0], module)
    if outer.lower() == "tuple":
        return tuple[tuple(
            ... if getattr(one, "value", 0) is ... else _annotation(one, module) for one in members
        )]  # fmt: skip
    return _GENERIC.get(outer) or getattr(builtins, outer, Any)
