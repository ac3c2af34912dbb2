"""Reading the pretrained parts: one error for everything that can be wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2VisionConfig,
    Blip2VisionModel,
)
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
    auto: Any,
    name: str,
    what: str,
    dtype: torch.dtype | str = torch.float32,
    optional: str = "(?!)",
    config: Any = None,
    how: Mapping[str, Any] | None = None,
) -> tuple[Any, set[str]]:
    """A pretrained model of transformers, and the names of weights that its files do not have.

    Args:
        auto: the class to load it with.
        optional: regular expression, found in the names of weights that may be missing.
        config: in place of its own.
        how: it is loaded besides, for transformers (``device_map``).

    Raises:
        InputError: there is no such model, its files are damaged, or they lack weights that are not optional.
    """
    with _quiet(), reading(name, what):
        model, info = auto.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **how or {})
    missing = set(info["missing_keys"])
    _check_missing(model, {key for key in missing if not re.search(optional, key)}, name, what)
    return model, missing


def read_part(config: Any, weights: Mapping[str, Tensor], name: str, what: str, optional: str = "(?!)") -> Any:
    """A model of transformers from weights that lie within a larger checkpoint, in their dtypes and without a copy.

    Args:
        config: of the model; says its class too.
        weights: under the names that the model itself has for them.
        name: of the checkpoint, for messages.

    Raises:
        InputError: weights are missing, left over or of other shapes than `config` says.
    """
    if not weights:
        raise InputError(f"{name} holds no weights of its {what}: copy or download it again")
    with _quiet(), reading(name, what):
        kind: Any = type(empty_model(config))
        dtype = next(iter(weights.values())).dtype
        model, info = kind.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    for where, found, expected in sorted(info["mismatched_keys"])[:1]:
        raise InputError(
            f"{name}: {where} of the {what} is {tuple(found)}, its config.json says {tuple(expected)}: one of the two"
            " belongs to another model"
        )
    left = sorted(set(info["unexpected_keys"]))
    if left:
        raise InputError(
            f"{name} has {len(left)} weights that its {what}, a {kind.__name__}, does not have, such as {left[0]}: its"
            " config.json belongs to another model"
        )
    _check_missing(model, {key for key in info["missing_keys"] if not re.search(optional, key)}, name, what)
    check_twins(weights, model.state_dict(), name)
    return model


def empty_model(config: Any) -> Any:
    """A model of transformers without any weights: an LLM with its head, or an image encoder."""
    auto: Any = AutoModel
    if isinstance(config, Blip2VisionConfig):
        with torch.device("meta"):
            return Blip2VisionModel(config)
    if getattr(config, "is_encoder_decoder", False):
        auto = AutoModelForSeq2SeqLM
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "patch_size"):
        auto = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def check_twins(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    """See that two weights of a file that are one parameter of a model, as tied matrices are, have the same values.

    Args:
        state: of the model, under the names of `weights`.
        name: of the file, for the message.

    Raises:
        InputError: they differ, and one of them would be lost.
    """
    first: dict[int, str] = {}
    for key in weights:
        if key not in state or state[key].is_meta or not state[key].numel():
            continue
        twin = first.setdefault(state[key].data_ptr(), key)
        dtype = state[key].dtype
        if twin != key and not torch.equal(weights[twin].to(dtype), weights[key].to(dtype)):
            raise InputError(
                f"{name} has different values for {twin} and {key}, which are one matrix in a model of its"
                " configuration: set tie_word_embeddings to false in the config.json of the LLM, or name the LLM"
                " that it was made with"
            )


def _check_missing(model: Any, missing: set[str], name: str, what: str) -> None:
    if missing:
        raise InputError(
            f"the weights in {name!r} are not those of a {type(model).__name__}: {len(missing)} are missing, such as"
            f" {min(missing)}; name the folder of a complete {what}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """What is missing or left over is handled here, not printed by transformers."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
