"""Load pretrained models and weights, and turn every error in their files into an :class:`InputError`.

This is the only module that calls ``from_pretrained`` of transformers or ``torch.load``. Python code in a model's
folder runs only if the caller allows it for that model, and nothing is asked on the terminal.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    Blip2VisionConfig,
    Blip2VisionModel,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from blip2.errors import InputError
from blip2.io import MAX_JSON, check_regular_file, expand_home, read_json

CODE_KEYS = {"image encoder": "vision.trust_remote_code", "language model": "language.trust_remote_code"}
"""The recipe key that allows custom code, for each kind of model."""
MAX_LAYERS = 2000
"""Maximum number of layers of a model. transformers creates all layers that a config.json asks for before it reads the
weights, which could exhaust the memory."""


@contextmanager
def wrap_load_errors(name: str, what: str, files: str = "config.json and model.safetensors") -> Iterator[None]:
    """Convert every exception that is raised within this context, while a model is loaded, to an :class:`InputError`.

    Args:
        name: folder or hub name of the model.
        what: kind of object that is loaded, for the message.
        files: names of the files from which the object is loaded, for the message.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged or malicious files can raise nearly anything
        if "custom code" in str(error) and "trust_remote_code" in str(error):
            key = CODE_KEYS.get(what.removesuffix(" tokenizer"))
            allow = f", or set {key} to {name} if you trust its author" if key else ""
            raise InputError(
                f"the {what} {name!r} needs Python code from its folder (auto_map), which is not run: choose a model"
                f" that transformers supports without such code{allow}"
            ) from error
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(
                f"the {what} {name!r} has a config.json with other sizes than its weights: copy or download config.json"
                " and weights of the same model"
            ) from error
        if _is_path(name) and not expand_home(name).exists():
            raise InputError(
                f"there is no folder {name!r} to load the {what} from: check the path, or copy the {what} there"
            ) from error
        raise InputError(
            f"no {what} could be loaded from {name!r} ({short_message(error)}): give a folder that contains {files}, or"
            " a name on the Hugging Face hub if there is a network connection"
        ) from error


def check_finite(name: str, tensor: Tensor, source: str) -> None:
    """Check that a weight has no NaN and no infinite numbers.

    Args:
        name: name of the weight, for the message.
        tensor: the weight.
        source: file or folder from which the weight was loaded, for the message.

    Raises:
        InputError: the weight has NaN or infinite numbers.
    """
    if not tensor.is_floating_point() or tensor.is_meta or tensor.element_size() < 2 or not tensor.numel():
        return  # quantized or empty
    extremes = torch.stack(torch.aminmax(tensor.detach())).float()  # both are NaN if any value is
    if not extremes.isfinite().all():
        found = "NaN" if extremes.isnan().any() else "infinite numbers"
        raise InputError(
            f"the weight {name} in {source!r} contains {found}: use another model, or copy or download this one again"
        )


def check_floating_point(name: str, tensor: Tensor, parameter: Tensor, source: str) -> None:
    """Check that a weight holds floating-point numbers if its parameter does.

    Integers would be converted without the scale that they need.

    Args:
        name, tensor, source: see :func:`check_finite`.
        parameter: the parameter or buffer that gets the values.

    Raises:
        InputError: the weight holds other values.
    """
    if parameter.is_floating_point() and not tensor.is_floating_point():
        raise InputError(
            f"the weight {name} in {source!r} holds values of type {str(tensor.dtype).removeprefix('torch.')}, expected"
            " floating-point numbers: give a checkpoint that is not quantized"
        )


def _is_path(name: str) -> bool:
    """Return whether a name is a path: a hub name has at most one slash."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def short_message(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the error's type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def load_pretrained(auto_class: Any, name: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call ``from_pretrained`` of transformers. The user is not asked on the terminal whether custom code may run.

    Args:
        auto_class: the class, such as ``AutoTokenizer``.
        name: folder or hub name of the model.
        trust_remote_code: whether Python code from the model's folder may run.
        options: further arguments of ``from_pretrained``.

    Raises:
        InputError: a file of the folder is a pipe, a device or too large, or names files outside the folder.
        Exception: any error of transformers; see :func:`wrap_load_errors`.
    """
    _check_folder(Path(name))
    if auto_class in (AutoTokenizer, AutoProcessor):
        _check_tokenizer_config(name)
    return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def _check_folder(folder: Path) -> None:
    """Check the files of a folder before transformers reads them, because transformers has no limits of size."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in (".json", ".jsonl", ".txt", ".model", ".jinja", ".bin", ".safetensors") and path.exists():
            max_bytes = None if path.suffix in (".bin", ".safetensors") else MAX_JSON
            if not path.is_dir():
                check_regular_file(path, path.stat(), max_bytes)
        if path.name.endswith(".index.json") and path.is_file():
            read_shard_index(path)


def _check_tokenizer_config(name: str | Path) -> None:
    """Refuse a tokenizer_config.json that names a file of this machine, which transformers would read."""
    for key, value in get_tokenizer_config(name).items():
        is_file = key in ("vocab", "merges") or (key.endswith("_file") and key != "special_tokens_map_file")
        if is_file and isinstance(value, str) and os.path.exists(value):  # noqa: PTH110  (Path.exists raises for odd names)
            raise InputError(
                f"the tokenizer_config.json of {str(name)!r} names the file {value!r} as {key}, expected files of its"
                f" own folder under their usual names: remove the entry {key}"
            )


def read_shard_index(index: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint.

    Args:
        index: the index file, such as model.safetensors.index.json.

    Returns:
        A mapping from the names of weights to names of files. All files are in the folder of the index.

    Raises:
        InputError: the index is damaged, or names files in other folders.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(
            f"{index} is damaged (it has no weight_map from weights to file names): copy or download it again"
        )
    outside = next((file for file in weight_map.values() if file != Path(file).name or "\\" in file), None)
    if outside is not None:
        raise InputError(
            f"{index} names the file {outside!r}, expected files in the same folder: copy or download it again"
        )
    return weight_map


def load_config(name: str, what: str, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a pretrained transformers model.

    Args:
        name: folder or hub name.
        what: kind of model, for messages.
        trust_remote_code: whether Python code from the model's folder may run.

    Raises:
        InputError: there is no configuration, or custom code or a value in it is not allowed.
    """
    with wrap_load_errors(name, what):
        config = load_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
        _check_config(config, name, what)
        return config


def _check_config(config: Any, name: str, what: str) -> None:
    attention = config._attn_implementation
    if isinstance(attention, str) and "/" in attention:  # transformers would download compiled code from the hub
        raise InputError(
            f"the config.json of the {what} {name!r} has attn_implementation {attention!r}, which would download code"
            " and run it: remove that entry"
        )
    for key, value in vars(config).items():
        if hasattr(value, "_attn_implementation"):
            _check_config(value, name, what)
        elif isinstance(value, int) and re.search("layers?$|depth$", key) and value > MAX_LAYERS:
            raise InputError(
                f"the config.json of the {what} {name!r} has {key} {value}, more than the {MAX_LAYERS} allowed: copy"
                " or download it again"
            )


def load_model(
    auto_class: Any,
    name: str,
    what: str,
    dtype: torch.dtype | str = torch.float32,
    optional: str = "(?!)",
    config: Any = None,
    load_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, set[str]]:
    """Load a pretrained transformers model.

    Args:
        auto_class: class whose ``from_pretrained`` loads the model.
        name: folder or hub name.
        what: kind of model, for messages.
        dtype: data type of the weights, or ``auto`` for the data type in the files.
        optional: regular expression for the names of weights that may be missing.
        config: configuration to use instead of the model's own.
        load_kwargs: further arguments of ``from_pretrained``, such as ``device_map``.
        trust_remote_code: whether Python code from the model's folder may run.

    Returns:
        The model, and the names of the weights that its files lack.

    Raises:
        InputError: there is no such model, its files are damaged, or they lack weights that are not optional.
    """
    with _quiet(), wrap_load_errors(name, what):
        model, info = load_pretrained(
            auto_class, name, trust_remote_code=trust_remote_code, config=config, dtype=dtype, output_loading_info=True,
            **load_kwargs or {},
        )  # fmt: skip
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"the {what} {name!r} has an adapter_config.json, with which transformers loads the model that the adapters"
            " were trained with, and not the weights beside it: merge the adapters (merge_and_unload of PEFT) and save"
            " the result, or remove that file"
        )
    _check_missing(model, info, optional, name, what)
    return model, set(info["missing_keys"])


def load_submodule(
    config: Any,
    weights: Mapping[str, Tensor],
    name: str,
    what: str,
    optional: str = "(?!)",
    load_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Create a transformers model from the weights of a larger checkpoint, without copying the weights.

    Args:
        config: configuration of the model, which also determines the class of the model.
        weights: the weights of the model in one data type, under the names that they have in this class.
        name: name of the checkpoint, for messages.
        what: kind of model, for messages.
        optional: regular expression for the names of weights that may be missing.
        load_kwargs: further arguments of ``from_pretrained``, such as ``device_map``.

    Raises:
        InputError: weights are missing, unexpected, or of other shapes than `config` has.
    """
    if not weights:
        raise InputError(f"{name} holds no weights of its {what}: copy or download it again")
    with _quiet(), wrap_load_errors(name, what):
        model_class: Any = type(init_empty_model(config))
        dtype = next(iter(weights.values())).dtype
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, **load_kwargs or {},
        )  # fmt: skip
    for key, found, expected in sorted(info["mismatched_keys"])[:1]:
        raise InputError(
            f"{name}: the weight {key} of the {what} has the shape {tuple(found)}, but its config.json says"
            f" {tuple(expected)}: copy or download config.json and weights of the same model"
        )
    unexpected = sorted(set(info["unexpected_keys"]))
    if unexpected:
        raise InputError(
            f"{name} has {len(unexpected)} weights that its {what}, a {model_class.__name__}, does not have, such as"
            f" {unexpected[0]}: its config.json is that of another model; copy the config.json that belongs to the"
            " weights"
        )
    _check_missing(model, info, optional, name, what)
    for key, parameter in model.named_parameters():
        if key in weights:
            check_floating_point(key, weights[key], parameter, name)
    check_tied_weights(weights, model.state_dict(), name)
    return model


def init_empty_model(config: Any) -> Any:
    """Create a transformers model on the meta device, without weights: an LLM with its head, or an image encoder."""
    auto_class: Any = AutoModel
    if isinstance(config, Blip2VisionConfig):
        with torch.device("meta"):
            return Blip2VisionModel(config)
    if getattr(config, "is_encoder_decoder", False):
        auto_class = AutoModelForSeq2SeqLM
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "patch_size"):
        auto_class = AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=False)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Load all tensors of a safetensors file.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    with wrap_load_errors(str(path), "weights", path.name):
        check_regular_file(path, path.stat())
        return load_file(path)


def load_pickle(path: Path, mmap: bool = True) -> Any:
    """Load a file that :func:`torch.save` wrote, without executing code that the file contains.

    Args:
        path: the file.
        mmap: whether to map the tensors from the file, which then must not change afterwards.

    Raises:
        InputError: there is no such file, it is damaged, or it contains objects whose loading would execute code.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: check its path")
    try:
        _check_uncompressed(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written before PyTorch 1.6
    except InputError:
        raise
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        function = re.search(r"GLOBAL ([\w.]+)", str(error))
        if function:
            raise InputError(
                f"{path} is not loaded, because loading it would run {function[1]}: save only the state dict of the"
                " model, with tensors, numbers and strings"
            ) from error
        raise InputError(
            f"{path} cannot be read ({short_message(error)}): check its permissions, or copy or download it again"
        ) from error


def _check_uncompressed(path: Path) -> None:
    """Refuse a compressed archive, which torch.save never writes: a small one can expand to terabytes."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        is_compressed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    if is_compressed:
        raise InputError(f"{path} is compressed, which torch.save never does: save its content again with torch.save")


def check_tied_weights(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    """Check that weights of a checkpoint that share one parameter of the model (tied weights) have the same values.

    Args:
        weights: weights of the checkpoint.
        state: state dict of the model, under the same names.
        name: name of the checkpoint, for the message.

    Raises:
        InputError: tied weights differ, so that the values of one of them would be lost.
    """
    first_key: dict[int, str] = {}
    for key in weights:
        if key not in state or state[key].is_meta or not state[key].numel():
            continue
        tied = first_key.setdefault(state[key].data_ptr(), key)
        dtype = state[key].dtype
        if tied != key and not torch.equal(weights[tied].to(dtype), weights[key].to(dtype)):
            raise InputError(
                f"{name} has different values for {tied} and {key}, which are one matrix according to the configuration"
                " of the LLM: set tie_word_embeddings to false in the config.json of the LLM, or set language.name to"
                " the LLM that the weights were trained with"
            )


def _check_missing(model: Any, info: Mapping[str, Any], optional: str, name: str, what: str) -> None:
    missing = {key for key in info["missing_keys"] if not re.search(optional, key)}
    if missing:
        raise InputError(
            f"the weights in {name!r} are not those of a {type(model).__name__} ({len(missing)} are missing, such as"
            f" {min(missing)}): copy or download the complete {what}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of missing and unexpected weights, which this module checks instead."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
