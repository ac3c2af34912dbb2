"""Options of a command line, made from typed functions and dataclasses.

A keyword-only parameter of a function becomes an option, any other parameter a positional argument. A parameter whose
type is a dataclass becomes one option per field. Names, types, choices, defaults and ranges are those of the parameters
and fields; the help is the docstring of a field, or the text about a parameter in the section Args. If a docstring
contains "The arguments are those of :func:`f`", help and defaults that the function lacks are taken from f. The
metadata ``option`` of a field is the name of its option if that differs from the field's name, or None to make no
option. (docs/tried.md says why this is not jsonargparse.)
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from blip2.config import check_not_blank, out_of_range
from blip2.errors import InputError
from blip2.io import expand_home

REQUIRED = inspect.Parameter.empty
"""The default of an option that has none."""
NO_OPTIONS = ("overrides", "keys")
"""Parameters that are not options: keys of recipes, which the caller of :func:`call` must have parsed."""


class Option(NamedTuple):
    """A parameter of a function, or a field of a dataclass."""

    name: str
    hint: Any  # its type, without None
    default: Any
    flag: str | None  # such as --batch-size. None: a positional argument
    help: str
    range: tuple[float, float] | None  # minimum and maximum


def add_options(parser: argparse.ArgumentParser, target: Callable[..., Any], defaults: object = None) -> None:
    """Add the options of a function or dataclass to a parser.

    Args:
        defaults: an instance of the dataclass, whose values are the defaults. None: the defaults of `target`.
    """
    for option in _options(target):
        default = option.default if defaults is None else getattr(defaults, option.name)
        if _is_group(option.hint):
            add_options(parser, option.hint, None if default is REQUIRED else default)
        elif option.name not in NO_OPTIONS:
            _add(parser, option, default)


def call(target: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call a function, or make a dataclass, with the values that were parsed from the command line.

    Args:
        values: the values by name of the option, as ``vars(parser.parse_args())`` returns them for a parser with the
            options of :func:`add_options`, and the values of :data:`NO_OPTIONS` that `target` takes.

    Returns:
        The result of `target`.

    Raises:
        InputError: a number is outside its range, or a path is blank.
    """
    arguments = {}
    for option in _options(target):
        key = (option.flag or option.name).removeprefix("--").replace("-", "_")
        value = call(option.hint, values) if _is_group(option.hint) else values[key]
        expected = None if option.range is None or value is None else out_of_range(value, *option.range)
        if expected is not None:
            raise InputError(f"{option.flag} is {value}, expected {expected}")
        if option.hint is Path and isinstance(value, str):
            check_not_blank(option.flag or option.name.upper(), value)
        arguments[option.name] = expand_home(value) if option.hint is Path and value is not None else value
    return target(**arguments)


def takes(target: Callable[..., Any], name: str) -> bool:
    """Return whether a function has a parameter named `name`, or a dataclass among its parameters has such a field."""
    return any(each.name == name or (_is_group(each.hint) and takes(each.hint, name)) for each in _options(target))


def _options(target: Callable[..., Any]) -> Iterator[Option]:
    hints, texts, fields = get_type_hints(target), _texts(target), getattr(target, "__dataclass_fields__", {})
    defaults = _library_defaults(target)
    for name, parameter in inspect.signature(target).parameters.items():
        metadata = fields[name].metadata if fields else {}
        other = metadata.get("option", name)
        if other is not None:
            is_argument = not fields and parameter.kind is not parameter.KEYWORD_ONLY
            flag = None if is_argument else f"--{other.replace('_', '-')}"
            members = [each for each in get_args(hints[name]) if each is not NoneType]
            hint = members[0] if NoneType in get_args(hints[name]) else hints[name]
            default = defaults.get(name, REQUIRED) if parameter.default is REQUIRED else parameter.default
            yield Option(name, hint, default, flag, texts.get(name, ""), metadata.get("range"))


def _add(parser: argparse.ArgumentParser, option: Option, default: Any) -> None:
    is_list, is_required = get_origin(option.hint) in (list, Sequence), default is REQUIRED
    kind = get_args(option.hint)[0] if is_list else option.hint
    settings: dict[str, Any] = {"help": _with_default(option.help, default)}
    if not is_required:
        settings["default"] = list(default) if is_list and default is not None else default
    if kind is bool:
        settings["action"] = "store_true"
    elif get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    elif kind in (int, float):
        settings |= {"type": kind, "metavar": "N" if kind is int else "X"}
    if option.flag is None:
        settings["metavar"] = (option.name.removesuffix("s") if is_list else option.name).upper()
        settings["nargs"] = ("+" if is_required else "*") if is_list else None if is_required else "?"
        parser.add_argument(option.name, **settings)
        return
    if is_list:  # several values after the option, or an option that can be repeated
        settings |= {"nargs": "+"} if default is None else {"action": "append"}
    parser.add_argument(option.flag, required=is_required, **settings)


# -- help ------------------------------------------------------------------------------------------------------------


def _with_default(text: str, default: Any) -> str:
    """Return a help text with the default at its end; for None, these are the words after ``null:`` in the text."""
    text, *meaning = re.split(r"\.? (?:null|None): ", text.removesuffix("."), maxsplit=1)
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    if default is None or default is REQUIRED or isinstance(default, bool | tuple):
        shown = meaning[0] if meaning else ""
    ending = f" (default: {shown})" if shown else ""
    return re.sub(r":\w+:`([^`]*)`|``", r"\1", f"{text}{ending}.").replace("%", "%%")


def _texts(target: Callable[..., Any]) -> dict[str, str]:
    """Return the help of each parameter of a function, or of each field of a dataclass."""
    texts = {}
    if isinstance(target, type):
        for parent in filter(_is_group, reversed(target.__mro__)):
            for field, doc in pairwise(_definition(parent.__module__, parent.__name__).body):
                if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                    texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(doc.value).split())
        return texts
    library = _library_function(target)
    for doc in ((library and ast.get_docstring(library)) or "", inspect.getdoc(target) or ""):
        section = doc.partition("Args:\n")[2].partition("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
            texts[name] = text[0].upper() + " ".join(text.split())[1:]
    return texts


def _library_defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the plain defaults of the function whose arguments a command has."""
    library = _library_function(target)
    if library is None:
        return {}
    arguments = library.args
    positional = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    pairs = zip((*positional, *arguments.kwonlyargs), (*arguments.defaults, *arguments.kw_defaults), strict=True)
    return {argument.arg: default.value for argument, default in pairs if isinstance(default, ast.Constant)}


def _library_function(target: Callable[..., Any]) -> Any:
    """Return the syntax tree of the library function that a command's docstring names after "The arguments are those
    of"; None if the command's docstring names no function."""
    found = re.search(r"arguments are those of\s+:func:`([\w.]+)\.(\w+)`", inspect.getdoc(target) or "")
    return None if found is None else _definition(*found.groups())


def _is_group(kind: Any) -> bool:
    return is_dataclass(kind)


@cache
def _definition(module: str, name: str) -> Any:
    """Return the syntax tree of a function or class without importing its module, which could import PyTorch."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return next(node for node in tree.body if getattr(node, "name", None) == name)
