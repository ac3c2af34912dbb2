"""Reading, overriding, documenting and writing the files of recipes and of models' configs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from blip2.config import EvaluationConfig, LanguageConfig, LoraConfig, ModelConfig, Recipe
from blip2.errors import InputError
from blip2.io import parse_yaml, read_yaml, to_plain

KEYS_HINT = "blip2 train --help lists all keys"
KINDS = {
    Recipe: ("recipe", KEYS_HINT),
    ModelConfig: ("model config", f"its keys are {', '.join(ModelConfig.__dataclass_fields__)}; {KEYS_HINT}"),
}
"""For each class: what its files are called in messages, and a hint on where to find its keys."""
SUFFIXES = (".yaml", ".yml")
"""Suffixes of file names that ``base`` accepts."""
Config = TypeVar("Config", Recipe, ModelConfig)


def recipe_help() -> str:
    """Return the help of all fields of a recipe."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # slow, so only here
    try:
        parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
        parser.add_argument(
            "--base",
            type=str | None,
            help="Only in a recipe file, not on the command line: the name of another recipe in the same folder, which"
            " provides the values of all keys that this recipe does not set.",
        )
        parser.add_class_arguments(Recipe, as_group=False)
        pages = [parser.format_help().strip()]
        # jsonargparse does not list the fields of optional sections.
        sections = (
            (LoraConfig, "qformer.lora"),
            (LanguageConfig, "language"),
            (LoraConfig, "language.lora"),
            (EvaluationConfig, "evaluation"),
        )
        for section, name in sections:
            parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
            parser.add_class_arguments(section, name)
            pages.append(parser.format_help().strip())
        return "\n\n".join(pages)
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=False)


def find_recipe(name: str) -> Path:
    """Return the path of a recipe file.

    Args:
        name: a path, or the name of a recipe that comes with blip2 (``demo-stage1``).

    Raises:
        InputError: there is no such recipe.
    """
    package = Path(__file__).parent
    shipped = [folder for folder in (package / "recipes", package.parents[1] / "recipes") if folder.is_dir()]
    stem = Path(name).name.removesuffix(".yaml")  # the name can contain a dot
    for path in (Path(name), *(folder / f"{stem}.yaml" for folder in shipped)):
        if path.is_file():
            return path
    names = sorted({path.stem for folder in shipped for path in folder.glob("*.yaml")})
    raise InputError(
        f"there is no recipe {name!r}: give a YAML file, or the name of a recipe that comes with blip2:"
        f" {', '.join(names)}"
    )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file of the user, with the files that it names as ``base``.

    Args:
        path: the file.
        overrides: command-line arguments with values that replace those in the file (``["--data.batch_size", "32"]``).

    Raises:
        InputError: a file is not YAML, its base is missing, a key is unknown, or a value has the wrong type or is out
            of range.
    """
    changes = _overrides(overrides)
    error = _errors(Recipe, path)
    values: dict[str, Any] = {}
    for file in _with_bases(path):
        above = _read(Recipe, file)
        above.pop("base", None)
        _merge(Recipe, values, above)
    for key, text in changes.items():
        hint = _hint(Recipe, key)
        if hint is None:
            raise error(f"there is no key --{key}")
        _put(values, key, _parsed(hint, text))
    return _section(Recipe, values, "", error)


def load_stored(kind: type[Config], path: Path) -> Config:
    """Read the recipe or the model's config of a checkpoint. The checkpoint may come from an untrusted source.

    ``trust_remote_code`` is ignored, and ``base`` is refused, because it names another file to read.

    Args:
        kind: ``Recipe`` or ``ModelConfig``.
        path: the file.

    Raises:
        InputError: the file is not YAML, has a base or an unknown key, or a value has the wrong type or is out of
            range.
    """
    values, error = _read(kind, path), _errors(kind, path)
    if "base" in values:
        raise error(
            f"it has a base, {_show(values['base'])}, expected a {KINDS[kind][0]} without base: copy the keys of the"
            " base into the file"
        )
    for section in values.values():  # an untrusted file must not allow the code of a model to run
        if isinstance(section, dict):
            section.pop("trust_remote_code", None)
    return _section(kind, values, "", error)


def _errors(kind: type[Config], source: Path | str) -> Callable[[str], InputError]:
    """Return a function that makes an error from a message. The error begins with the source: a file, or a text."""
    name, hint = KINDS[kind]
    what = source if isinstance(source, str) else f"{name} {source}"
    return lambda message: InputError(f"{what}: {message}; {hint}")


def _read(kind: type[Config], path: Path) -> dict[str, Any]:
    error = _errors(kind, path)
    try:
        values = read_yaml(path)
    except InputError as cause:
        raise error(f"{cause}; expected keys with values") from cause
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        kinds = {type(None): "is empty", dict: "has a key that is not text"}  # such as 1, or on, which is True in YAML
        found = kinds.get(type(values), f"contains a value of type {type(values).__name__}")
        raise error(f"it {found}, expected keys with values")
    return values


def _with_bases(path: Path) -> list[Path]:
    """Return the path of a recipe file, preceded by the path of its base, and so on if the base has a base."""
    files = [path]
    seen = {os.path.realpath(path)}  # a file can have several names
    while (base := _read(Recipe, files[0]).get("base")) is not None:
        # Another file is not read: an error message could show its content.
        if not isinstance(base, str) or not base.endswith(SUFFIXES):
            raise InputError(
                f"recipe {files[0]}: its base is {_show(base)}, expected the name of a recipe in the same folder, which"
                f" ends in {' or '.join(SUFFIXES)}"
            )
        file = files[0].parent / base
        if not file.is_file():
            raise InputError(
                f"recipe {files[0]}: its base {file} does not exist: copy that file into the folder, or correct base"
            )
        if os.path.realpath(file) in seen:
            raise InputError(
                f"recipe {files[0]}: its base {file} is in turn based on this recipe: remove base from one of the two"
            )
        seen.add(os.path.realpath(file))
        files.insert(0, file)
    return files


def override(config: Config, changes: Mapping[str, object]) -> Config:
    """Return a copy of a recipe, or of the config of a model, with new values for some keys.

    Args:
        config: the recipe or config.
        changes: new values by key (``{"vision.image_size": 364}``). A string is parsed as on the command line
            (``"364"``).

    Raises:
        InputError: a key is unknown, or a value has the wrong type or is out of range.
    """
    if not changes:
        return config
    kind, values = type(config), to_plain(asdict(config))
    error = _errors(kind, ", ".join(f"{key} {_show(value)}" for key, value in changes.items()))
    for key, value in changes.items():
        hint = _hint(kind, key)
        if hint is None:
            raise error(f"there is no key {key}")
        _put(values, key, _parsed(hint, value) if isinstance(value, str) else value)
    return _section(kind, values, "", error)


def dump_config(config: Recipe | ModelConfig) -> str:
    """Return a recipe, or the config of a model, as YAML with all fields."""
    return yaml.safe_dump(to_plain(asdict(config)), sort_keys=False)


# -- from plain values to dataclasses ------------------------------------------------------------------------------


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parse command-line arguments (``--KEY VALUE`` or ``--KEY=VALUE``) into keys and values."""
    overrides: dict[str, str] = {}
    remaining = iter(arguments)
    for argument in remaining:
        key, equals, value = argument.partition("=")
        if not key.startswith("--") or key == "--":
            raise InputError(f"unexpected argument {argument}: expected --KEY VALUE; {KEYS_HINT}")
        if key == "--base":
            raise InputError(
                "--base was given, but base can only be set inside a recipe file: give the base as RECIPE, and"
                " override keys with --KEY VALUE"
            )
        if not equals and (value := next(remaining, None)) is None:
            raise InputError(f"{key} has no value: expected --KEY VALUE; {KEYS_HINT}")
        overrides[key[2:]] = value
    return overrides


def _section_of(hint: Any) -> Any:
    """Return the dataclass in a type: the type itself or a member of a union. None: the type contains no dataclass."""
    return next((each for each in (hint, *_members(hint)) if is_dataclass(each)), None)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _hint(kind: type[Config], key: str) -> Any:
    """Return the type of the value of a key (``data.batch_size``); None if there is no such key."""
    hint: Any = kind
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
    """Merge the values `above` into `below`, section by section. A value that is not a section is replaced."""
    hints = get_type_hints(kind)
    for name, value in above.items():
        section = _section_of(hints.get(name))
        if section is not None and isinstance(value, dict) and isinstance(below.get(name), dict):
            _merge(section, below[name], value)
        else:
            below[name] = value


def _section(kind: Any, values: Any, key: str, error: Callable[[str], InputError]) -> Any:
    """Make a dataclass from plain values, which must have exactly the types of its fields.

    Nothing in `values` can name a class or a function: unknown fields and values of another type are refused.

    Args:
        kind: the dataclass.
        values: the values by name of the field.
        key: name of the section in error messages; empty for a whole file.
        error: makes an error from a message.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise error(f"{key} is {_show(values)}, expected a section with keys, such as {next(iter(hints))}")
    for name in values:
        if name not in hints:
            raise error(f"there is no key {_show(f'{key}.{name}' if key else name)}")
    arguments: dict[str, Any] = {}
    for field in fields(kind):
        full_key = f"{key}.{field.name}" if key else field.name
        section = _section_of(hints[field.name])
        required = field.default is MISSING and field.default_factory is MISSING
        if field.name in values and not (section is not None and values[field.name] is None and required):
            value = values[field.name]
            if section is not None and not (value is None and NoneType in _members(hints[field.name])):
                arguments[field.name] = _section(section, value, full_key, error)
            else:
                arguments[field.name] = _value(hints[field.name], value, full_key, error)
        elif required and section is not None:
            arguments[field.name] = _section(section, {}, full_key, error)  # raises an error that names the missing key
        elif required:
            raise error(f"{full_key} is missing")
    return kind(**arguments)


def _value(hint: Any, value: Any, key: str, error: Callable[[str], InputError]) -> Any:
    """Return a value of the type `hint`: the value itself, or an int as a float, or a list as a tuple."""
    for member in _members(hint):
        try:
            return _member(member, value)
        except TypeError:
            continue
    expected = " or ".join(_name(member) for member in _members(hint))
    raise error(f"{key} is {_show(value)}, expected {expected}")


def _member(hint: Any, value: Any) -> Any:
    """Return a value of the type `hint` as :func:`_value` does, but raise TypeError if the value has another type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin in (Union, UnionType):
        for member in args:
            try:
                return _member(member, value)
            except TypeError:
                continue
    elif hint is NoneType and value is None:
        return None
    elif hint is float and type(value) in (int, float):
        if abs(value) <= sys.float_info.max:
            return float(value)
    elif hint in (int, bool) and type(value) is hint:
        return value
    elif hint is str and type(value) is str:
        with contextlib.suppress(UnicodeEncodeError):  # a path may have surrogates, but only those of os.fsdecode
            if b"\0" not in os.fsencode(value):
                return value
    elif origin is list and isinstance(value, list | tuple):
        return [_member(args[0], each) for each in value]
    elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(args):
        return tuple(_member(each, one) for each, one in zip(args, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {_member(args[0], name): _member(args[1], one) for name, one in value.items()}
    raise TypeError


def _parsed(hint: Any, text: str) -> Any:
    """Parse a command-line value as YAML, for a key with the type `hint`.

    The text is returned unchanged if the type is str, if the text is not valid YAML, or if the type allows str and the
    parsed value is a string or fits no other of its types.
    """
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
    """Return whether a value has one of the types `members` other than str."""
    try:
        _member(Union[tuple(member for member in members if member is not str)], value)  # noqa: UP007
    except TypeError:
        return False
    return True


TYPE_NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "a valid text",
    bool: "true or false",
    NoneType: "null",
}


def _name(hint: Any) -> str:
    """Describe a type in an error message."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(str(choice) for choice in args)
    if origin in (Union, UnionType):
        return " or ".join(_name(each) for each in args)
    if origin is dict:
        return f"names, each with {_name(args[1])}"
    if origin in (list, tuple):
        return f"a list of {_name(args[0])}" if origin is list else f"a list of {len(args)} values"
    return TYPE_NAMES[hint]


_shown = Repr()
_shown.maxstring = _shown.maxother = 80


def _show(value: object) -> str:
    """Return the repr of a value, abbreviated if it is long."""
    return _shown.repr(value)
