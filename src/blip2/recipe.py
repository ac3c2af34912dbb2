"""Recipes as files: read, overridden, explained and written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from blip2.config import EvaluationConfig, LanguageConfig, LoraConfig, Recipe
from blip2.errors import InputError
from blip2.io import parse_yaml, plain, read_yaml

USAGE = "blip2 train RECIPE [--resume] [--KEY VALUE ...]"
SEE = "blip2 train --help lists all keys"
SUFFIXES = (".yaml", ".yml")
"""Of the files that a base may be."""


def recipe_help() -> str:
    """Every field of a recipe, with its docstring."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # slow, and of no use but here
    try:
        parser = ArgumentParser(prog="blip2 train", usage=USAGE)
        parser.add_argument(
            "--base",
            type=str | None,
            help="In a recipe alone: another one beside it, all of whose keys hold that are not given here.",
        )
        parser.add_class_arguments(Recipe, as_group=False)
        pages = [parser.format_help()]
        # An optional section is not spelled out by itself.
        sections = ((LanguageConfig, "language"), (LoraConfig, "language.lora"), (EvaluationConfig, "evaluation"))
        for section, name in sections:
            parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
            parser.add_class_arguments(section, name)
            pages.append(parser.format_help().strip())
        return "\n".join(pages)
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=False)


def find_recipe(name: str) -> Path:
    """A recipe file: a path, or the name of one that comes with this project (``demo-stage1``)."""
    here = Path(__file__).parent
    shipped = [folder for folder in (here / "recipes", here.parents[1] / "recipes") if folder.is_dir()]
    stem = Path(name).name.removesuffix(".yaml")  # which may have a dot
    for path in (Path(name), *(folder / f"{stem}.yaml" for folder in shipped)):
        if path.is_file():
            return path
    names = sorted({path.stem for folder in shipped for path in folder.glob("*.yaml")})
    raise InputError(f"no recipe {name!r}: give a YAML file, or one of those that come with blip2: {', '.join(names)}")


def load_recipe(path: Path, overrides: Sequence[str] = (), is_own: bool = True) -> Recipe:
    """Read a recipe file.

    Args:
        overrides: command-line arguments that override it (``["--data.batch_size", "32"]``).
        is_own: whether the user wrote it. One that came with a checkpoint may have no base, which would be read too,
            and its trust_remote_code is left out.

    Raises:
        InputError: not YAML, an unknown key, a value of the wrong type or out of range, or a base that is not there.
    """
    changes = _overrides(overrides)
    what = f"recipe {path}"
    values: dict[str, Any] = {}
    for file in _with_bases(path) if is_own else [path]:
        above = _read(file)
        if "base" in above and not is_own:
            raise InputError(
                f"{what}: it has a base, {_show(above['base'])}, expected all keys in it: write them there"
            )
        above.pop("base", None)
        if not is_own:  # nor may it allow the code of a model that it names itself
            for section in above.values():
                if isinstance(section, dict):
                    section.pop("trust_remote_code", None)
        _merge(Recipe, values, above)
    for key, text in changes.items():
        hint = _hint(key)
        if hint is None:
            raise InputError(f"{what}: there is no key --{key}; {SEE}")
        _put(values, key, _parsed(hint, text))
    return _section(Recipe, values, "", what)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except InputError as error:
        raise InputError(f"recipe {path}: {error}; expected the keys of a recipe, {SEE}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        found = "is empty" if values is None else f"holds one {type(values).__name__}"
        raise InputError(f"recipe {path}: it {found}, expected the keys of a recipe; {SEE}")
    return values


def _with_bases(path: Path) -> list[Path]:
    """A recipe file behind the one that it is based on, which may be based on another."""
    files = [path]
    seen = {os.path.realpath(path)}  # a file has many names
    while (base := _read(files[0]).get("base")) is not None:
        if not isinstance(base, str) or not base.endswith(SUFFIXES):  # any other file would be read and shown
            raise InputError(
                f"recipe {files[0]}: its base is {_show(base)}, expected the name of a recipe beside it, which ends in"
                f" {' or '.join(SUFFIXES)}"
            )
        file = files[0].parent / base
        if not file.is_file():
            raise InputError(f"recipe {files[0]}: its base {file} is not there: a base lies beside what names it")
        if os.path.realpath(file) in seen:
            raise InputError(f"recipe {files[0]}: its base {file} is based on it: leave out one of the two")
        seen.add(os.path.realpath(file))
        files.insert(0, file)
    return files


def override(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """A recipe with other values at some of its keys (``{"vision.name": "eva_vit_g.pth"}``).

    Args:
        changes: values by key; a text is read as on the command line, where it is none (``"364"``).

    Raises:
        InputError: an unknown key, or a value of the wrong type or out of range.
    """
    if not changes:
        return recipe
    values = plain(asdict(recipe))
    given = ", ".join(f"{key} {_show(value)}" for key, value in changes.items())
    for key, value in changes.items():
        hint = _hint(key)
        if hint is None:
            raise InputError(f"{given}: there is no key {key}; {SEE}")
        _put(values, key, _parsed(hint, value) if isinstance(value, str) else value)
    return _section(Recipe, values, "", given)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field spelled out."""
    return yaml.safe_dump(plain(asdict(recipe)), sort_keys=False)


# -- from plain values to a recipe ---------------------------------------------------------------------------------


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Keys and values of the command line: ``--KEY VALUE`` or ``--KEY=VALUE``."""
    found: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        key, equals, value = argument.partition("=")
        if not key.startswith("--") or key == "--":
            raise InputError(f"unexpected argument {argument}: expected --KEY VALUE; {SEE}")
        if key == "--base":
            raise InputError("--base stands in a recipe: give the recipe, and the keys that are to differ")
        if not equals and (value := next(left, None)) is None:
            raise InputError(f"{key} has no value: expected --KEY VALUE; {SEE}")
        found[key[2:]] = value
    return found


def _section_of(hint: Any) -> Any:
    """The class of a section of a recipe that a type stands for, which may be left out; None for any other type."""
    return next((each for each in (hint, *_members(hint)) if is_dataclass(each)), None)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _hint(key: str) -> Any:
    """The type of a key (``data.batch_size``); None where there is no such key."""
    hint: Any = Recipe
    for name in key.split("."):
        section = _section_of(hint)
        hint = get_type_hints(section).get(name) if section is not None else None
        if hint is None:
            return None
    return hint


def _put(values: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values[section] = {**values[section]} if isinstance(values.get(section), dict) else {}
        values = values[section]
    values[name] = value


def _merge(kind: Any, below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Lay values over others, section by section; a value is replaced as a whole."""
    hints = get_type_hints(kind)
    for name, value in above.items():
        section = _section_of(hints.get(name))
        if section is not None and isinstance(value, dict) and isinstance(below.get(name), dict):
            _merge(section, below[name], value)
        else:
            below[name] = value


def _section(kind: Any, values: Any, key: str, what: str) -> Any:
    """A section of a recipe, made of plain values of exactly the types that its fields have.

    Nothing in `values` can name a class or a function: whatever is not a field, or not of a field's type, is refused.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise InputError(f"{what}: {key} is {_show(values)}, expected its keys, such as {next(iter(hints))}; {SEE}")
    for name in values:
        if name not in hints:
            raise InputError(f"{what}: there is no key {_show(f'{key}.{name}' if key else name)}; {SEE}")
    made: dict[str, Any] = {}
    for field in fields(kind):
        place = f"{key}.{field.name}" if key else field.name
        section = _section_of(hints[field.name])
        required = field.default is MISSING and field.default_factory is MISSING
        if field.name in values and not (section is not None and values[field.name] is None and required):
            value = values[field.name]
            if section is not None and not (value is None and NoneType in _members(hints[field.name])):
                made[field.name] = _section(section, value, place, what)
            else:
                made[field.name] = _value(hints[field.name], value, place, what)
        elif required and section is not None:
            made[field.name] = _section(section, {}, place, what)  # which says what is missing
        elif required:
            raise InputError(f"{what}: {place} is missing; {SEE}")
    return kind(**made)


def _value(hint: Any, value: Any, key: str, what: str) -> Any:
    """A value of a type: the value itself, but whole numbers as floats and lists as tuples where those are due."""
    for member in _members(hint):
        try:
            return _member(member, value)
        except TypeError:
            continue
    expected = " or ".join(_name(member) for member in _members(hint))
    raise InputError(f"{what}: {key} is {_show(value)}, expected {expected}; {SEE}")


def _member(hint: Any, value: Any) -> Any:
    """As :func:`_value`, of a type that is no union; TypeError where the value has another."""
    origin, of = get_origin(hint), get_args(hint)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in of):
            return value
    elif origin in (Union, UnionType):
        for member in of:
            try:
                return _member(member, value)
            except TypeError:
                continue
    elif hint is NoneType and value is None:
        return None
    elif hint is float and type(value) in (int, float):
        if abs(value) <= sys.float_info.max:
            return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    elif origin is list and isinstance(value, list | tuple):
        return [_member(of[0], each) for each in value]
    elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(of):
        return tuple(_member(each, one) for each, one in zip(of, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {_member(of[0], name): _member(of[1], one) for name, one in value.items()}
    raise TypeError


def _parsed(hint: Any, text: str) -> Any:
    """What a text of the command line says for a key of a type: the text itself where that is due."""
    members = _members(hint)
    if members == (str,):
        return text
    try:
        value = parse_yaml(text)
    except InputError:
        return text
    if str in members and (not text or isinstance(value, str) or not _is_one(members, value)):
        return text
    return value


def _is_one(members: tuple[Any, ...], value: Any) -> bool:
    """Whether a value is of one of some types, text apart."""
    try:
        _member(Union[tuple(member for member in members if member is not str)], value)  # noqa: UP007
    except TypeError:
        return False
    return True


NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", NoneType: "null"}


def _name(hint: Any) -> str:
    origin, of = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(str(choice) for choice in of)
    if origin in (Union, UnionType):
        return " or ".join(_name(each) for each in of)
    if origin is dict:
        return f"names, each with {_name(of[1])}"
    if origin in (list, tuple):
        return f"a list of {_name(of[0])}" if origin is list else f"a list of {len(of)} values"
    return NAMES[hint]


_shown = Repr()
_shown.maxstring = _shown.maxother = 80


def _show(value: object) -> str:
    """A value, cut where it is long."""
    return _shown.repr(value)
