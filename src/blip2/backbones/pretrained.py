"""Reading the pretrained parts: one error for everything that can be wrong with them.

This is the one place that loads anything of transformers and anything that was pickled. No code that lies beside
weights ever runs, unless a caller says so for this one name, and nothing is asked on the terminal.
"""

from __future__ import annotations

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
    Blip2VisionConfig,
    Blip2VisionModel,
)
from transformers.utils import logging

from blip2.errors import InputError
from blip2.io import MAX_JSON, check_regular, read_json

CODE_KEYS = {"image encoder": "vision.trust_remote_code", "language model": "language.trust_remote_code"}
"""The key of a recipe that allows code, by what it is the code of."""
MAX_LAYERS = 2000
"""Of a network. Its modules are made one by one before its weights are looked at."""


@contextmanager
def reading(name: str, what: str, files: str = "config.json and model.safetensors") -> Iterator[None]:
    """Turn whatever transformers raises while it reads `name` into an :class:`InputError`.

    Args:
        what: is read, for the message.
        files: that it is read from, for the message.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # files that are damaged, or were made to be, bring up nearly anything
        if "custom code" in str(error) and "trust_remote_code" in str(error):
            key = CODE_KEYS.get(what.removesuffix(" tokenizer"))
            allow = f", or set {key} to {name} if you trust whoever wrote it" if key else ""
            raise InputError(
                f"the {what} {name!r} needs Python code that lies beside it (auto_map), which is not run: name another"
                f" one that transformers knows by itself{allow}"
            ) from error
        if _is_path(name) and not Path(name).expanduser().exists():
            raise InputError(
                f"there is no folder {name!r} to read the {what} from: check the path, or copy it there"
            ) from error
        raise InputError(
            f"no {what} could be read from {name!r} ({first_line(error)}): name a folder that has a {files}, or a hub"
            " name when there is a network"
        ) from error


def check_finite(name: str, tensor: Tensor, source: str) -> None:
    """Refuse weights that would make everything NaN.

    Args:
        source: where they were read from, for the message.

    Raises:
        InputError: a number is NaN or infinite.
    """
    if not tensor.is_floating_point() or tensor.is_meta or tensor.element_size() < 2 or not tensor.numel():
        return  # a quantized or an empty one
    extremes = torch.stack(torch.aminmax(tensor.detach())).float()  # both are NaN where one number is
    if not extremes.isfinite().all():
        found = "NaN" if extremes.isnan().any() else "infinite numbers"
        raise InputError(f"{name} in {source!r} holds {found}: use another checkpoint, or copy or download it again")


def _is_path(name: str) -> bool:
    """Whether a name means a folder: a name on the hub has at most an owner and one slash."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def first_line(error: BaseException) -> str:
    """What an error says, without its second line and its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def load_pretrained(auto: Any, name: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """``auto.from_pretrained(name)`` of transformers, which never asks whether it may run code.

    Raises:
        InputError: a file of the folder is a pipe, a device or too large, or it names files outside the folder.
        Exception: whatever transformers raises; see :func:`reading`.
    """
    _check_folder(Path(name))
    return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def _check_folder(folder: Path) -> None:
    """Look at the files of a folder before transformers does: it reads them whole, and as they say."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in (".json", ".jsonl", ".txt", ".model", ".jinja", ".bin", ".safetensors") and path.exists():
            small = None if path.suffix in (".bin", ".safetensors") else MAX_JSON
            if not path.is_dir():
                check_regular(path, path.stat(), small)
        if path.name.endswith(".index.json") and path.is_file():
            check_shards(path)


def check_shards(index: Path) -> dict[str, str]:
    """The file of each weight, as an index says, all of them beside it.

    Raises:
        InputError: it is damaged, or names files elsewhere.
    """
    found = read_json(index)
    homes = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(homes, dict) or not all(isinstance(home, str) for home in homes.values()):
        raise InputError(f"{index} is damaged (it has no weight_map): copy or download it again")
    away = next((home for home in homes.values() if home != Path(home).name or "\\" in home), None)
    if away is not None:
        raise InputError(f"{index} names the file {away!r}, expected files beside it: copy or download it again")
    return homes


def read_config(name: str, what: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a pretrained model of transformers.

    Raises:
        InputError: there is none, it needs code that may not run, or no model could be made by it.
    """
    with reading(name, what):
        config = load_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
        _check_config(config, name, what)
        return config


def _check_config(config: Any, name: str, what: str) -> None:
    kernel = config._attn_implementation
    if isinstance(kernel, str) and "/" in kernel:  # compiled code of the hub, which transformers would fetch and run
        raise InputError(
            f"the config.json of the {what} {name!r} wants the attention of {kernel!r}, which would be fetched and run:"
            " take attn_implementation out of it"
        )
    for key, value in vars(config).items():
        if hasattr(value, "_attn_implementation"):
            _check_config(value, name, what)
        elif isinstance(value, int) and re.search("layers?$|depth$", key) and value > MAX_LAYERS:
            raise InputError(
                f"the config.json of the {what} {name!r} says {key} {value}, more than the {MAX_LAYERS} allowed: copy"
                " or download it again"
            )


def read_model(
    auto: Any,
    name: str,
    what: str,
    dtype: torch.dtype | str = torch.float32,
    optional: str = "(?!)",
    config: Any = None,
    how: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, set[str]]:
    """A pretrained model of transformers, and the names of weights that its files do not have.

    Args:
        auto: the class to load it with.
        optional: regular expression, found in the names of weights that may be missing.
        config: in place of its own.
        how: it is loaded besides, for transformers (``device_map``).
        trust_remote_code: whether code that lies beside its weights may run.

    Raises:
        InputError: there is no such model, its files are damaged, or they lack weights that are not optional.
    """
    with _quiet(), reading(name, what):
        model, info = load_pretrained(
            auto, name, trust_remote_code=trust_remote_code, config=config, dtype=dtype, output_loading_info=True,
            **how or {},
        )  # fmt: skip
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
        return auto.from_config(config, trust_remote_code=False)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with reading(str(path), "weights", path.name):
        check_regular(path, path.stat())
        return load_file(path)


def read_pickle(path: Path, mmap: bool = True) -> Any:
    """What :func:`torch.save` wrote; nothing is executed.

    Args:
        mmap: map its tensors from the file, which then has to stay as it is.

    Raises:
        InputError: there is no such file, it is damaged, or it holds objects, which would have to be executed.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: check its path")
    try:
        _check_stored(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written before PyTorch 1.6
    except InputError:
        raise
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise InputError(
                f"{path} is refused: it wants to run {wanted[1]} while it is read, and files of weights need no code;"
                " save its state dict alone, with tensors, numbers and texts"
            ) from error
        raise InputError(f"{path} is damaged ({first_line(error)}): copy or download it again") from error


def _check_stored(path: Path) -> None:
    """Refuse an archive that is packed, which torch.save never does: a small one can unpack to terabytes."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = next((member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise InputError(f"{path} is compressed, which torch.save never does: save it again with torch.save")


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
