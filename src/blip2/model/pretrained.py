"""Reading the pretrained parts: one error for everything that can be wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging

from blip2.errors import InputError


@contextmanager
def reading(name: str, what: str, files: str = "config.json and model.safetensors") -> Iterator[None]:
    """Turn whatever transformers raises while it reads `name` into an :class:`InputError`.

    Args:
        what: is read, for the message.
        files: that it is read from, for the message.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"no {what} could be read from {name!r} ({first_line(error)}): name a folder that has a {files}, or a hub"
            " name when there is a network"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without its second line and its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def read_config(name: str, what: str) -> Any:
    """The configuration of a pretrained model of transformers."""
    with reading(name, what):
        return AutoConfig.from_pretrained(name)


def read_model(
    auto: Any, name: str, what: str, dtype: torch.dtype = torch.float32, optional: str = "(?!)"
) -> tuple[Any, set[str]]:
    """A pretrained model of transformers, and the names of weights that its files do not have.

    Args:
        auto: the class to load it with.
        optional: regular expression, found in the names of weights that may be missing.

    Raises:
        InputError: there is no such model, its files are damaged, or they lack weights that are not optional.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing or left over is handled here
    try:
        with reading(name, what):
            model, info = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    missing = set(info["missing_keys"])
    needed = sorted(key for key in missing if not re.search(optional, key))
    if needed:
        raise InputError(
            f"the weights in {name!r} are not those of a {type(model).__name__}: {len(needed)} are missing, such as"
            f" {needed[0]}; name the folder of a complete {what}"
        )
    return model, missing
