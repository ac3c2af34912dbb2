"""Read arrays of features [P, E] safely, and give an encoder what it reads: pixels or arrays.

An array is named by the path of a file, ``clip.npy``, ``clips.npz#KEY`` or ``clips.safetensors#KEY``, or it is the
bytes of such a file, as in a WebDataset sample. Nothing in a file is executed: object arrays, which NumPy stores as
pickles, are refused. The shape in the header is checked before the values are read, so that a small file cannot claim
gigabytes.

Legend: H and W height and width of an image in pixels, P tokens, E width of the features.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import torch
from jaxtyping import Float
from numpy.lib import format as npy
from safetensors.torch import load as load_safetensors
from torch import Tensor

from blip2.backbones.features import FeatureFormat, pad_tokens
from blip2.backbones.vision import Preprocessing
from blip2.data.images import MAX_FILE_BYTES, ImageError, describe_invalid_path, preprocess, read_image
from blip2.errors import InputError
from blip2.io import check_regular_file

FEATURE_SUFFIXES = (".npy", ".npz", ".safetensors")
"""Suffixes of files that hold arrays."""
KEYED_SUFFIXES = (".npz", ".safetensors")
"""Suffixes of files that hold several arrays, each with a key."""
ADVICE = "correct the array, or vision.hidden_size and vision.max_tokens"


def split_key(name: str) -> tuple[str, str | None]:
    """Return the path and the key of ``clips.npz#KEY``; the key is None if there is none."""
    path, mark, key = name.rpartition("#")
    return (path, key) if mark and path.lower().endswith(KEYED_SUFFIXES) else (name, None)


def read_input(source: Any, form: Preprocessing | FeatureFormat) -> Float[Tensor, "..."]:
    """Return what an encoder reads of one record.

    Args:
        source: an image, or an array of features, as :func:`read_features` takes it.
        form: the encoder's :attr:`~blip2.backbones.vision.ImageEncoder.input_format`.

    Returns:
        Pixels [3, H, W], without augmentation, or an array [1, P, E].

    Raises:
        ImageError: the image or the array cannot be used.
    """
    return (
        read_features(source, form)[None] if isinstance(form, FeatureFormat) else preprocess(read_image(source), form)
    )


def stack_inputs(inputs: Sequence[Tensor]) -> Tensor:
    """Stack pixels, or arrays [1, P, E], which are padded with NaN to the longest."""
    longest = max(each.shape[-2] for each in inputs)
    return torch.stack([pad_tokens(each, longest) for each in inputs])


def blank_input(form: Preprocessing | FeatureFormat) -> Float[Tensor, "1 ..."]:
    """Return an input that shows nothing: pixels of the mean color, which are 0 when normalized, or one zero token."""
    if isinstance(form, FeatureFormat):
        return torch.zeros(1, 1, 1, form.hidden_size)
    return torch.zeros(1, 3, form.image_size, form.image_size)


def read_features(source: Any, form: FeatureFormat) -> Float[Tensor, "P E"]:
    """Read an array of features.

    Args:
        source: a path with or without a key, the bytes of an .npy, .npz or .safetensors file, or an array or tensor.
        form: the shape that the array must have.

    Returns:
        The array in float32.

    Raises:
        ImageError: the file cannot be read or is damaged, it holds Python objects or texts, its width is not
            ``form.hidden_size``, it has no tokens or more than ``form.max_tokens``, or a value is NaN or infinite.
    """
    if isinstance(source, np.ndarray | Tensor):
        array, name = source, "the array of features"
        _check_header(tuple(array.shape), array.dtype, form, name)
    elif isinstance(source, bytes | bytearray | memoryview):
        name = f"array of {len(source)} bytes"
        array = _guard(lambda: _read_file(io.BytesIO(bytes(source)), None, form, name), name)
    elif isinstance(source, str | os.PathLike):
        if problem := describe_invalid_path(os.fspath(source)):
            raise ImageError(f"an array of features is {problem}")
        path, key = split_key(os.fspath(source))
        name = f"array {os.fspath(source)}"
        array = _guard(lambda: _open(path, key, form, name), name)
    else:
        raise ImageError(
            f"features are a {type(source).__name__}, expected an array [P, E], or the path or the bytes of a file"
            f" ({', '.join(FEATURE_SUFFIXES)}): give one of these"
        )
    with np.errstate(over="ignore"):  # a number that float32 cannot hold becomes infinite
        array = torch.from_numpy(array.astype(np.float32)) if isinstance(array, np.ndarray) else array
    tensor = array.detach().cpu().float()
    finite = tensor.isfinite()
    if not finite.all():
        token, channel = (~finite).nonzero()[0].tolist()
        raise ImageError(
            f"{name} holds {float(tensor[token, channel])} at token {token}, channel {channel}, expected numbers that"
            " are finite in float32: compute it again, or remove the record"
        )
    return tensor


def _guard(read: Any, name: str) -> Any:
    """Call a function that reads a file, and convert every exception of a damaged file to :class:`ImageError`."""
    try:
        return read()
    except ImageError:
        raise
    except InputError as error:
        raise ImageError(f"array {error}") from error
    except OSError as error:
        raise ImageError(
            f"{name} cannot be read ({error.strerror or error}): check its path and permissions"
        ) from error
    except Exception as error:  # the readers raise nearly anything on damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{name} is damaged ({reason}): copy or compute it again") from error


def _open(path: str, key: str | None, form: FeatureFormat, name: str) -> np.ndarray | Tensor:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(handle, "rb") as file:
        # A file with keys may hold the arrays of many records, of which only one is read.
        check_regular_file(path, os.fstat(handle), None if key is not None else MAX_FILE_BYTES)
        if not path.lower().endswith(".safetensors"):
            return _read_file(file, key, form, name)
        with safetensors.safe_open(path, framework="pt") as tensors:
            key = _choose_key(key, list(tensors.keys()), name)
            part = tensors.get_slice(key)
            _check_header(tuple(part.get_shape()), part.get_dtype(), form, name)
            return tensors.get_tensor(key)


def _read_file(file: Any, key: str | None, form: FeatureFormat, name: str) -> np.ndarray | Tensor:
    """Read one array of an open file. Its first bytes determine the format."""
    start = file.read(8)
    file.seek(0)
    if start[:6] == npy.MAGIC_PREFIX:
        if key is not None:
            raise ImageError(f"{name} has a key, but the file is an .npy file of one array: remove the key")
        return _read_npy(file, form, name)
    if start[:2] == b"PK":
        with zipfile.ZipFile(file) as archive:
            names = [each for each in archive.namelist() if each.endswith(".npy")]
            chosen = _choose_key(key, [each.removesuffix(".npy") for each in names], name)
            with archive.open(f"{chosen}.npy") as member:
                return _read_npy(member, form, name)
    if start[:1] == b"<" or len(start) < 8 or int.from_bytes(start, "little") > MAX_FILE_BYTES:
        found = "it is empty" if not start else "its first bytes are those of another format"
        raise ImageError(f"{name} is not an array ({found}): give an .npy, .npz or .safetensors file")
    tensors = load_safetensors(file.read())
    tensor = tensors[_choose_key(key, list(tensors), name)]
    _check_header(tuple(tensor.shape), tensor.dtype, form, name)
    return tensor


def _read_npy(file: Any, form: FeatureFormat, name: str) -> np.ndarray:
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    _check_header(shape, dtype, form, name)
    size = shape[0] * shape[1] * dtype.itemsize
    content = file.read(size)
    if len(content) < size:
        raise ImageError(f"{name} ends after {len(content)} of {size} bytes of values: copy or compute it again")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")


def _choose_key(key: str | None, keys: list[str], name: str) -> str:
    if key is None and len(keys) == 1:
        return keys[0]
    listed = ", ".join(sorted(keys)[:8]) + (", ..." if len(keys) > 8 else "") or "none"
    if key is None:
        raise ImageError(f"{name} holds {len(keys)} arrays ({listed}), expected one: name it with #KEY after the path")
    if key not in keys:
        raise ImageError(f"{name} has no array {key!r}; its arrays are {listed}: correct the key after the #")
    return key


def _check_header(shape: tuple[int, ...], dtype: Any, form: FeatureFormat, name: str) -> None:
    """Check the shape and the data type of an array before its values are read.

    Args:
        shape: the shape.
        dtype: a data type of NumPy or PyTorch, or its name in a .safetensors file.
        form: the shape that the array must have.
        name: name of the array in error messages.
    """
    if isinstance(dtype, np.dtype):
        is_number, found = dtype.kind in "fiu", str(dtype)
    else:
        found = str(dtype).removeprefix("torch.")
        is_number = re.fullmatch(r"(bfloat|float|u?int|BF|F|I|U)\d+(_\w+)?", found) is not None
    if not is_number:
        found = "Python objects, which are never unpickled" if found == "object" else f"values of type {found}"
        raise ImageError(f"{name} holds {found}, expected numbers: store the array as float32")
    wanted = f"[P, {form.hidden_size}] with P from 1 to {form.max_tokens}"
    if len(shape) != 2 or shape[1] != form.hidden_size or not 0 < shape[0] <= form.max_tokens:
        raise ImageError(f"{name} has the shape {list(shape)}, expected {wanted}: {ADVICE}")
