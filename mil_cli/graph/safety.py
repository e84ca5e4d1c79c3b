"""Checks a `.pt2` archive before torch reads it: nothing in it may run code.

torch 2.13 falls back to full unpickling of some members, resolves operator names to any function that can be reached
from the torch module, evaluates symbolic expressions as Python, and writes names into the Python code of the graph. An
archive made by someone else could use each of these; every such member is parsed here first, and the archive is refused
if it holds anything but data.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from mil_cli.errors import ArchiveError

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/"
_CONSTANTS = "data/constants/"
_RAW = re.compile(r"^(archive_format|archive_version|byteorder|version|\.data/\w+|extra/[\w./-]+)$")
_CONFIGS = {
    _WEIGHTS: f"{_WEIGHTS}model_weights_config.json",
    _CONSTANTS: f"{_CONSTANTS}model_constants_config.json",
}
_PAYLOAD = re.compile(r"^(weight|tensor)_\d+$")
NAMESPACES = frozenset({"aten", "mil", "prims", "quantized", "quantized_decomposed"})
"""Namespaces of the operators that an archive may hold."""
_OPERATOR = r"(?!(?:from_file|save|_save|_print|print|warn)\b)(?:[A-Za-z]|_(?!_)|__i?(?:and|or|xor|lshift|rshift)__)\w*"
_CONTROL_FLOW = (
    "cond|while_loop|scan|associative_scan|map_impl|wrap|wrap_with_set_grad_enabled|wrap_with_autocast|invoke_subgraph"
)
_ARITHMETIC = "add|sub|mul|floordiv|truediv|mod|neg|pos|pow|lt|le|gt|ge|eq|ne|and_|or_|not_|getitem|index"
_TARGET = re.compile(
    rf"^(?:torch\.ops\.(?:{'|'.join(sorted(NAMESPACES))})\.{_OPERATOR}\.(?!__)\w+"
    rf"|torch\.ops\.higher_order\.(?:{_CONTROL_FLOW})"
    r"|torch\.(?:_sym|sym)_[a-z_]+"
    rf"|_operator\.(?:{_ARITHMETIC})"
    r"|math\.(?:ceil|floor|trunc|sqrt))$"
)
_NAME = re.compile(r"[\w.]*")
"""Names of values and arguments, which torch writes into the code of the graph as they are."""
_WEIGHT_NAME = re.compile(r"[^\"\\\r\n]*")
"""Names of weights, which torch writes into that code between quotes."""
_TREE_TYPES = frozenset(
    {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "mil.Record", "mil.NamedFields"}
)
_EXPRESSION_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Constant,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)
_EXPRESSION_NAME = re.compile(r"^([suz]\d+|int_oo|oo|zoo|nan|true|false|True|False)$")
_EXPRESSION_TEXT = re.compile(r"^([a-z]+_?\d+|[-+0-9.e]+)$")
_EXPRESSION_FUNCTIONS = frozenset(
    {
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Piecewise"),
        *("Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan"),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Not", "And", "Or", "Where", "floor", "ceiling", "Identity"),
        *("FloorDiv", "ModularIndexing", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"),
        *("LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt"),
        *("RoundToInt", "RoundDecimal", "ToFloat", "IsNonOverlappingAndDenseIndicator"),
    }
)


def check_archive(content: bytes, *, where: str) -> None:
    """Refuse an archive that could run code when torch reads it, or that is damaged.

    Args:
        content: The whole file.
        where: Its path, for messages.

    Raises:
        ArchiveError: If it is not a `.pt2` archive of one model, or holds anything that is not plain data.
    """
    reader = _Reader(content, where)
    names = reader.names
    if _MODEL not in names or _SAMPLES not in names or not set(_CONFIGS.values()) <= names:
        raise ArchiveError(
            "this is not a .pt2 archive of one exported model",
            where=where,
            hint="write it with torch.export.save (torch 2.9 or newer)",
        )
    payloads = {folder: _payloads(reader, folder, config) for folder, config in _CONFIGS.items()}
    for name in sorted(names):
        folder = next((folder for folder in _CONFIGS if name.startswith(folder)), None)
        if name == _SAMPLES:
            _check_pickle(reader, name)
        elif folder is not None and name != _CONFIGS[folder]:
            _check_payload(reader, name, folder, payloads[folder])
        elif folder is None and name != _MODEL and not _RAW.match(name):
            raise ArchiveError("the archive holds a member that no plain model has", where=where, value=name)
    _check_graph(reader.json(_MODEL), where)


class _Reader:
    """The archive through the reader that torch itself uses, so that both see the same members."""

    def __init__(self, content: bytes, where: str) -> None:
        self.where = where
        try:
            self._file = torch._C.PyTorchFileReader(io.BytesIO(content))
            members: list[str] = self._file.get_all_records()
        except Exception:
            raise ArchiveError(
                "the file is damaged or is no .pt2 archive", where=where, hint="write or copy it again"
            ) from None
        self.names = frozenset(members)
        if len({name.casefold() for name in members}) != len(members):
            raise ArchiveError("the archive holds two members of one name", where=where)

    def read(self, name: str) -> bytes:
        try:
            content: bytes = self._file.get_record(name)
        except Exception:
            raise ArchiveError("a member of the archive is damaged", where=self.where, value=name) from None
        return content

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError):
            raise ArchiveError("a member of the archive is damaged", where=self.where, value=name) from None


def _payloads(reader: _Reader, folder: str, config: str) -> dict[str, bool]:
    """Return the tensor files that a config lists, and whether each is pickled."""
    listed: dict[str, bool] = {}
    try:
        entries = [(entry["path_name"], bool(entry["use_pickle"])) for entry in reader.json(config)["config"].values()]
    except (KeyError, TypeError, AttributeError):
        raise ArchiveError("a member of the archive is damaged", where=reader.where, value=config) from None
    for name, pickled in entries:
        if not isinstance(name, str) or not _PAYLOAD.match(name):
            raise ArchiveError(
                "the archive holds an object that only full unpickling can read",
                where=reader.where,
                value=f"{folder}{name}",
                hint="export the model without custom objects",
            )
        listed[f"{folder}{name}"] = listed.get(f"{folder}{name}", False) or pickled
    return listed


def _check_payload(reader: _Reader, name: str, folder: str, listed: dict[str, bool]) -> None:
    """A weight or constant is raw bytes, or a tensor that can be unpickled safely; nothing else may lie there."""
    if name in (f"{folder}model.pt",) or listed.get(name):
        _check_pickle(reader, name)
    elif name not in listed:
        raise ArchiveError("the archive holds a member that its lists do not name", where=reader.where, value=name)


def _check_pickle(reader: _Reader, name: str) -> None:
    content = reader.read(name)
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception:
        raise ArchiveError(
            "a member of the archive needs full unpickling, which can run any code",
            where=reader.where,
            value=name,
            hint="get the model from its maker again, written by torch.export.save without custom objects",
        ) from None


def _check_graph(program: Any, where: str) -> None:
    """Check every string of the graph that torch would resolve or evaluate."""
    for key, value in _walk(program):
        if key in ("target", "as_operator") and isinstance(value, str) and not _TARGET.match(value):
            if "." in value or value.startswith("#"):
                raise ArchiveError("the graph calls something that is not a tensor operator", where=where, value=value)
        elif key in ("name", "as_name", "forward_arg_names"):
            _check_names(value if isinstance(value, list) else [value], _NAME, where)
        elif key.endswith("_name"):
            _check_names([value], _WEIGHT_NAME, where)
        elif key == "expr_str" and not _is_arithmetic(value):
            raise ArchiveError("a size in the graph is not arithmetic", where=where, value=value)
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            check_tree(value, where=where)
            if key == "in_spec":
                _check_names(_keywords(value, where), _NAME, where)


def _check_names(names: Iterable[object], allowed: re.Pattern[str], where: str) -> None:
    """Refuse names that would be more than a name in the code that torch makes of the graph."""
    for name in names:
        if isinstance(name, str) and not allowed.fullmatch(name):
            raise ArchiveError("a name in the graph is not a plain name", where=where, value=name)


def _keywords(text: str, where: str) -> list[object]:
    """Return the names of the keyword arguments in a serialized tree of inputs, which are its second part."""
    try:
        parts = json.loads(text)[1]["children_spec"]
        names = json.loads(parts[1]["context"]) if len(parts) > 1 and parts[1]["type"] == "builtins.dict" else []
        return list(names)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise ArchiveError("the tree of inputs and outputs is damaged", where=where) from None


def check_tree(text: str, *, where: str) -> None:
    """Refuse a serialized tree of containers that names anything but plain containers and our records.

    Raises:
        ArchiveError: If it does, or cannot be read.
    """
    try:
        _, tree = json.loads(text)
        kinds = {value for key, value in _walk(tree) if key == "type"}
    except (ValueError, TypeError, RecursionError):
        raise ArchiveError("the tree of inputs and outputs is damaged", where=where) from None
    if unknown := {kind for kind in kinds if kind is not None and kind not in _TREE_TYPES}:
        raise ArchiveError(
            "the inputs or outputs use a class of someone's own",
            where=where,
            value=sorted(map(str, unknown)),
            hint="export the model so that it takes and returns tuples, lists and dicts",
        )
    if "__enum__" in text:
        raise ArchiveError("the tree of inputs and outputs names Python objects", where=where)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of a JSON value with what it holds, at any depth."""
    stack = [value]
    while stack:
        current = stack.pop()
        if isinstance(current, dict):
            yield from current.items()
            stack.extend(current.values())
        elif isinstance(current, list):
            stack.extend(current)


def _is_arithmetic(text: object) -> bool:
    """Whether a string is an expression over size symbols, numbers and the exporter's integer functions."""
    if not isinstance(text, str):
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    functions = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return all(isinstance(node, _EXPRESSION_NODES) and _is_harmless(node, functions) for node in nodes)


def _is_harmless(node: ast.AST, functions: set[int]) -> bool:
    """Whether one node of an expression is a number, a size symbol, or a call of a known function by its name."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return bool(_EXPRESSION_TEXT.match(node.value))
        return isinstance(node.value, bool | int | float)
    if isinstance(node, ast.Call):
        constant = all(isinstance(keyword.value, ast.Constant) for keyword in node.keywords)
        return isinstance(node.func, ast.Name) and constant
    if isinstance(node, ast.Name):
        return node.id in _EXPRESSION_FUNCTIONS if id(node) in functions else bool(_EXPRESSION_NAME.match(node.id))
    return True
