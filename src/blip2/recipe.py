"""Recipes as files: read, overridden, explained and written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from blip2.config import EvaluationConfig, LanguageConfig, LoraConfig, Recipe
from blip2.errors import InputError

USAGE = "blip2 train RECIPE [--resume] [--KEY VALUE ...]"


def recipe_parser() -> ArgumentParser:
    """What reads a recipe file and the command line that overrides it."""
    parser = ArgumentParser(prog="blip2 train", usage=USAGE, exit_on_error=False)
    parser.add_argument("--config", action="config", help="Path to a recipe, a YAML file.")
    parser.add_argument(
        "--base",
        type=str | None,
        help="In a recipe alone: another one beside it, all of whose keys hold that are not given here.",
    )
    parser.add_class_arguments(Recipe, as_group=False)
    return parser


def recipe_help() -> str:
    """Every field of a recipe, with its docstring."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # slow, and of no use but here
    try:
        pages = [recipe_parser().format_help()]
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


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        overrides: command-line arguments that override it (``["--data.batch_size", "32"]``).

    Raises:
        InputError: not YAML, an unknown key, a value of the wrong type or out of range, or a base that is not there.
    """
    parser = recipe_parser()
    if any(override.split("=")[0] == "--base" for override in overrides):
        raise InputError("--base stands in a recipe: give the recipe, and the keys that are to differ")
    files = [argument for file in _with_bases(path) for argument in ("--config", str(file))]
    try:
        values = vars(parser.instantiate(parser.parse_args([*files, *overrides])))
    except ArgumentError as error:
        raise InputError(f"recipe {path}: {_one_line(error)}; blip2 train --help lists all keys") from error
    except TypeError as error:
        raise InputError(f"recipe {path}: {_one_line(error)}") from error
    values.pop("config")
    values.pop("base")
    return Recipe(**values)


def _with_bases(path: Path) -> list[Path]:
    """A recipe file behind the one that it is based on, which may be based on another."""
    files = [path]
    while (base := _base(files[0])) is not None:
        file = files[0].parent / base
        if not file.is_file():
            raise InputError(f"recipe {files[0]}: its base {file} is not there: a base lies beside what names it")
        if file in files:
            raise InputError(f"recipe {files[0]}: its base {file} is based on it: leave out one of the two")
        files.insert(0, file)
    return files


def _base(path: Path) -> str | None:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None  # which whoever reads it all will say
    base = values.get("base") if isinstance(values, dict) else None
    return base if isinstance(base, str) else None


def override(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """A recipe with other values at some of its keys (``{"vision.name": "eva_vit_g.pth"}``).

    Raises:
        InputError: an unknown key, or a value of the wrong type or out of range.
    """
    if not changes:
        return recipe
    values = json.loads(json.dumps(asdict(recipe)))
    for key, value in changes.items():
        section, _, name = key.partition(".")
        place = values.get(section)
        if name:
            values[section] = {**(place or {}), name: value}
        else:
            values[section] = value
    parser = recipe_parser()
    try:
        changed = vars(parser.instantiate(parser.parse_object(values)))
    except (ArgumentError, TypeError) as error:
        given = ", ".join(f"{key} {value!r}" for key, value in changes.items())
        raise InputError(f"{given}: {_one_line(error)}; blip2 train --help lists all keys") from error
    changed.pop("config", None)
    changed.pop("base", None)
    return Recipe(**changed)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field spelled out."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(recipe))), sort_keys=False)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
