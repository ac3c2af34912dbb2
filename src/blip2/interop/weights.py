"""Read weights from files one tensor at a time.

A file may be larger than the memory. A tensor is read when it is requested, and its memory is released when the caller
no longer uses the tensor. A model that is loaded in another data type or onto another device is therefore never in
memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip2.backbones.pretrained import load_pickle, read_shard_index
from blip2.errors import InputError
from blip2.interop.key_map import KeyMap, format_names, rename_keys

SINGLE = ("model.safetensors", "pytorch_model.bin")


class Weights(Mapping[str, Tensor]):
    """A mapping from names to tensors, each of which is mapped from its file when it is requested.

    Args:
        sources: for each name, a pair of a file and the tensor's name in that file, or the tensor itself.
    """

    def __init__(self, sources: Mapping[str, tuple[Path, str] | Tensor]) -> None:
        self.sources = dict(sources)

    def __getitem__(self, name: str) -> Tensor:
        source = self.sources[name]
        if isinstance(source, Tensor):
            return source
        with _wrap_read_errors(source[0]), safe_open(source[0], framework="pt") as file:
            return file.get_tensor(source[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def rename_keys(self, key_map: KeyMap, source: str, inverse: bool = False) -> Weights:
        """Return the weights under the names of another format; see :func:`.key_map.rename_keys`."""
        renamed = rename_keys(self, key_map, source, inverse)
        return Weights({new: self.sources[old] for old, new in renamed.items()})

    def filter(self, keep: Callable[[str], bool]) -> Weights:
        """Return the weights for whose names `keep` returns True."""
        return Weights({name: source for name, source in self.sources.items() if keep(name)})

    def select(self, *prefixes: str) -> Weights:
        """Return the weights whose names begin with one of `prefixes`."""
        return self.filter(lambda name: name.startswith(prefixes))

    def drop(self, *prefixes: str) -> Weights:
        """Return the weights whose names do not begin with any of `prefixes`."""
        return self.filter(lambda name: not name.startswith(prefixes))

    def strip_prefix(self, prefix: str) -> Weights:
        """Return the weights whose names begin with `prefix`, with the prefix removed."""
        return Weights({name.removeprefix(prefix): source for name, source in self.select(prefix).sources.items()})

    def add_prefix(self, prefix: str) -> Weights:
        return Weights({prefix + name: source for name, source in self.sources.items()})

    def __or__(self, other: Mapping[str, Tensor]) -> Weights:
        """Return the weights of both mappings. If both have the same name, the weight of `other` is taken."""
        return Weights({**self.sources, **(other.sources if isinstance(other, Weights) else other)})


def open_folder(folder: Path) -> Weights:
    """Open all weights of a folder in transformers' layout: one file or shards, preferably in safetensors format.

    Raises:
        InputError: there are no weights, a file is damaged, or a shard is missing.
    """
    for name in SINGLE:
        if (folder / name).is_file():
            return open_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(folder, index)
    raise InputError(
        f"{folder} contains no weights ({' or '.join(SINGLE)}, or shards with an index): copy or download them too"
    )


def _open_shards(folder: Path, index: Path) -> Weights:
    homes = read_shard_index(index)
    shards = sorted(set(homes.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of its {len(shards)} shards ({format_names(missing)}): copy or download"
            " them too"
        )
    opened = {name: open_file(folder / name) for name in shards}
    absent = [name for name, home in homes.items() if name not in opened[home]]
    if absent:
        raise InputError(
            f"the shards in {folder} do not contain {format_names(absent)}, which {index.name} lists: copy or download"
            " the shards and their index again"
        )
    return Weights({name: opened[home].sources[name] for name, home in homes.items()})


def open_file(path: Path) -> Weights:
    """Open all weights of a safetensors file, or of a file that :func:`torch.save` wrote.

    Code that the file contains is not executed.

    Raises:
        InputError: the file is damaged, or contains anything but tensors, numbers and strings.
    """
    if path.suffix != ".safetensors":
        return Weights(_state_dict(load_pickle(path), path))
    with _wrap_read_errors(path), safe_open(path, framework="pt") as file:
        return Weights({name: (path, name) for name in file.keys()})  # noqa: SIM118


@contextmanager
def _wrap_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): check its permissions, or copy or download it again"
        ) from error


@contextmanager
def wrap_parse_errors(name: str) -> Iterator[None]:
    """Convert any error that is raised within this context, while a checkpoint is read, to an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(
            f"{name} has no {error.args[0]}, which every BLIP-2 checkpoint has: copy or download it again"
        ) from error
    except Exception as error:  # sizes and settings can be wrong in any way
        raise InputError(
            f"{name} is not a complete BLIP-2 checkpoint ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:200]}): copy or download it again"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    state = content["model"] if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) else content
    valid = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not valid or not state:
        raise InputError(
            f"{path} contains no state dict (a mapping from names to tensors): give a file with the weights of a model"
        )
    for name, tensor in state.items():  # the strides of a pickled view can claim any number of rows
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{path} is damaged ({name} claims the shape {tuple(tensor.shape)}, for which the file has too few"
                " bytes): copy or download it again"
            )
    return dict(state)
