"""What a notebook looks like: the parameters it declares, and whether it is fit to be committed; nothing runs here."""

from __future__ import annotations

import ast
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from pydantic import TypeAdapter, ValidationError

from prunelab.errors import PrunelabError, nearest

MOST_CELLS, MOST_LINES = 12, 60  # of a notebook that a reader can take in at one sitting; our own limits
KERNEL = "python3"


class NotebookFailed(PrunelabError):  # noqa: N818 - what is raised is an outcome, as in "2 of 7 notebooks failed"
    """The notebook cannot be run as asked, or did not run to its end; the message is one line."""


@dataclass(frozen=True)
class Parameter:
    """One line ``name: type = default  # help`` of a notebook's ``parameters`` cell."""

    name: str
    type: str  # as it is written: "int", "list[int]", "float | None"
    default: Any
    help: str = ""


def declared_parameters(path: str | Path) -> dict[str, Parameter]:
    """What a notebook can be asked for: the lines of its one cell tagged ``parameters``, in their order.

    Args:
        path: A notebook.

    Raises:
        NotebookFailed: The file is no notebook, has none or several such cells, or a line is not
            ``name: type = literal``.
    """
    tagged = [cell for cell in _read(path).cells if "parameters" in tags(cell)]
    if len(tagged) != 1:
        raise NotebookFailed(f"{path}: {len(tagged)} cells are tagged 'parameters'; tag exactly one")
    if tagged[0].cell_type != "code":
        raise NotebookFailed(f"{path}: the cell tagged 'parameters' is {tagged[0].cell_type}; tag a code cell")
    found: dict[str, Parameter] = {}
    lines = tagged[0].source.splitlines()
    try:
        body = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        raise NotebookFailed(f"{path}: parameters line {error.lineno} is not Python: {error.msg}") from None
    for node in body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value) if (
                name not in found
            ):
                parameter = Parameter(name, ast.unparse(annotation), _literal(value), _comment(lines, node))
            case _:
                parameter = None
        if parameter is None or parameter.default is _NOT_A_LITERAL:
            raise NotebookFailed(f"{path}: parameters line {node.lineno} is not a new 'name: type = literal  # help'")
        try:
            _checked(parameter, parameter.default)
        except NotebookFailed as error:
            raise NotebookFailed(f"{path}: parameters line {node.lineno}: {error}") from None
        found[name] = parameter
    return found


def check_parameters(path: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the notebook will see them, once each is known to be declared, of the right type, and safe in JSON.

    Args:
        path: A notebook.
        values: Parameter name -> value; what is left out keeps its default. A whole number is taken where a float is
            declared.

    Raises:
        NotebookFailed: A name is not declared, a value is of another type, or JSON would change it (tuple, integer key,
            NumPy scalar).
    """
    declared = declared_parameters(path)
    for name in values:
        if name not in declared:
            raise NotebookFailed(f"{path}: no parameter {name!r}; {nearest(name, declared)}")
    try:
        return {name: _checked(declared[name], value) for name, value in values.items()}
    except NotebookFailed as error:
        raise NotebookFailed(f"{path}: {error}") from None


def parse_assignment(text: str, declared: Mapping[str, Parameter]) -> tuple[str, Any]:
    """Read ``name=value`` from a command line; the declared type decides how, so nothing is guessed.

    Strings are taken as they stand, ``true`` and ``false`` are truth values, everything else is a Python literal.

    Args:
        text: For example ``seeds=[0, 1]``.
        declared: What ``declared_parameters`` gave.

    Raises:
        NotebookFailed: No ``=``, an unknown name, or a value of another type.
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise NotebookFailed(f"{text!r} is no parameter; write name=value")
    if name not in declared:
        raise NotebookFailed(f"no parameter {name!r}; {nearest(name, declared)}")
    parts = {part.strip() for part in declared[name].type.split("|")}
    if "bool" in parts and value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    if "None" in parts and value in ("None", "none"):
        return name, None
    try:
        parsed = value if parts <= {"str", "None"} else ast.literal_eval(value.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        parsed = value  # text, which the check takes where text is declared, and otherwise names
    return name, _checked(declared[name], parsed)


_NOT_A_LITERAL = object()
_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _NOT_A_LITERAL


def _comment(lines: list[str], node: ast.stmt) -> str:
    """What follows the statement on its last line, without the hash; ast counts columns in bytes."""
    rest = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset :].decode()
    return rest.strip().lstrip("#").strip()


def _annotation(node: ast.expr) -> Any:
    """The type that an annotation means; LookupError for one that has no meaning here."""
    match node:
        case ast.Name(id=name):
            return _TYPES[name]
        case ast.Constant(value=None):
            return type(None)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _annotation(left) | _annotation(right)
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return list[_annotation(inner)]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[ast.Name(id="str"), inner])):
            return dict[str, _annotation(inner)]
    raise LookupError(ast.unparse(node))


def _checked(parameter: Parameter, value: Any) -> Any:
    """``value`` as the declared type; only a whole number changes, into the float that was declared."""
    if not _survives_json(value):
        raise NotebookFailed(
            f"{parameter.name} = {value!r}: it would arrive changed; "
            "give finite numbers, text, lists and dicts with text as keys"
        )
    try:
        wanted = TypeAdapter(_annotation(ast.parse(parameter.type, mode="eval").body))
        return wanted.validate_python(value, strict=True)
    except LookupError:
        known = ", ".join([*_TYPES, "list[int]", "dict[str, float]", "int | None"])
        raise NotebookFailed(f"{parameter.name}: type {parameter.type!r} is not understood; use {known}") from None
    except ValidationError:
        example = "" if parameter.default is None else f", for example {parameter.default!r}"
        raise NotebookFailed(f"{parameter.name} = {value!r}: should be {parameter.type}{example}") from None


def _survives_json(value: Any) -> bool:
    """Whether JSON gives back the same value of the same type."""
    if type(value) is list:
        return all(map(_survives_json, value))
    if type(value) is dict:
        return all(type(key) is str and _survives_json(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


ELSEWHERE = re.compile(
    r"""(?:^|[\s"'`(=])(?:~/|/(?:home|root|Users|tmp|mnt|work|var|opt|usr|etc|data|content|srv|scratch|media|Volumes)/|[A-Z]:\\)""",
    re.MULTILINE,
)
SHELL = re.compile(
    r"^\s*(?:[\w, ]+=\s*)?!|^\s*%(?:pip|conda|sx|system)\b|^\s*%%(?:bash|sh|script|sx|system|!)", re.MULTILINE
)
MAGIC = re.compile(r"^\s*%.*$", re.MULTILINE)


def tidy(path: str | Path) -> list[str]:
    """What keeps a notebook from being committed, one line each; empty when it is stripped, short and movable.

    Notebooks in a folder ``explore`` may define functions and use magics; all others are reproductions, whose logic is
    in the package.

    Args:
        path: A notebook.
    """
    try:
        notebook, declared = _read(path), set(declared_parameters(path))
    except NotebookFailed as error:
        return [str(error)]
    complaints = []
    if (name := notebook.metadata.get("kernelspec", {}).get("name")) != KERNEL:
        complaints.append(f"kernel is {name!r}, not {KERNEL!r}")
    if extra := set(notebook.metadata) - {"kernelspec", "language_info"}:
        complaints.append(f"metadata not stripped: {', '.join(sorted(extra))}")
    if len(notebook.cells) > MOST_CELLS:
        complaints.append(f"{len(notebook.cells)} cells, at most {MOST_CELLS}")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = sum(bool(line.strip()) for cell in code for line in cell.source.splitlines())
    if lines > MOST_LINES:
        complaints.append(f"{lines} lines of code, at most {MOST_LINES}")
    explores = "explore" in Path(path).parts
    for number, cell in enumerate(notebook.cells, 1):
        complaints += [f"cell {number}: {what}" for what in _untidy(cell, declared, explores)]
    return complaints


def _untidy(cell: NotebookNode, declared: set[str], explores: bool) -> list[str]:
    found = []
    if extra := set(cell.metadata) - {"tags"}:
        found.append(f"metadata not stripped: {', '.join(sorted(extra))}")
    if quiet := {"raises-exception", "skip-execution"} & set(tags(cell)):
        found.append(f"tag {sorted(quiet)[0]!r} hides a failure")
    if match := ELSEWHERE.search(cell.source):
        found.append(f"absolute path {match[0].strip()!r}...")
    if cell.cell_type != "code":
        return found
    if cell.outputs or cell.get("execution_count") is not None:
        found.append("outputs or execution count not stripped")
    if SHELL.search(cell.source):
        found.append("a shell command, whose failure would not be seen")
    elif MAGIC.search(cell.source) and not explores:
        found.append("a magic; use plain Python")
    try:
        nodes = list(ast.walk(ast.parse(MAGIC.sub("", SHELL.sub("#", cell.source)))))
    except SyntaxError as error:
        return [*found, f"not Python: {error.msg}"]
    if not explores and any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in nodes):
        found.append("def or class; its place is the package")
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if "parameters" not in tags(cell) and (again := stored & declared):
        found.append(f"sets the parameter {sorted(again)[0]!r} anew, whatever was asked for")
    return found


def _read(path: str | Path) -> NotebookNode:
    try:
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
    except OSError as error:
        raise NotebookFailed(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise NotebookFailed(f"{path}: is not a notebook: {short(str(error))}") from None
    return notebook


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def short(text: str) -> str:
    """One line without colours, not a page."""
    return textwrap.shorten(re.sub(r"\x1b\[[0-9;]*m", "", text), 300, placeholder=" ...").rstrip(": ")
