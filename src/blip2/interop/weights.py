"""Read weights from files one tensor at a time.

A file may be larger than the memory. A tensor is read when it is requested and its memory is released with it, so that
a model that is loaded in another data type or onto another device is never in memory twice.
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
        sources: for each name, the file and the name in that file, or the tensor itself.
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
        """Return the weights for whose names `keep` is true."""
        return Weights({name: source for name, source in self.sources.items() if keep(name)})

    def select(self, *prefixes: str) -> Weights:
        """Return the weights whose names begin with one of `prefixes`."""
        return self.filter(lambda name: name.startswith(prefixes))

    def drop(self, *prefixes: str) -> Weights:
        """Return the weights whose names begin with none of `prefixes`."""
        return self.filter(lambda name: not name.startswith(prefixes))

    def strip_prefix(self, prefix: str) -> Weights:
        """Return the weights whose names begin with `prefix`, with the prefix removed."""
        return Weights({name.removeprefix(prefix): source for name, source in self.select(prefix).sources.items()})

    def add_prefix(self, prefix: str) -> Weights:
        return Weights({prefix + name: source for name, source in self.sources.items()})

    def __or__(self, other: Mapping[str, Tensor]) -> Weights:
        """Return the union of both; `other` wins where both have a name."""
        return Weights({**self.sources, **(other.sources if isinstance(other, Weights) else other)})


def open_folder(folder: Path) -> Weights:
    """Open all weights of a folder in transformers' layout: a file or shards, safetensors in preference to pickles.

    Raises:
        InputError: there are no weights, a file is damaged, or a shard is missing.
    """
    for name in SINGLE:
        if (folder / name).is_file():
            return open_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(folder, index)
    raise InputError(f"{folder} has no {SINGLE[0]} and no {SINGLE[0]}.index.json: copy or download its weights too")


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
            f"{folder}: {format_names(absent)} are not in the shards that {index.name} says: download it again"
        )
    return Weights({name: opened[home].sources[name] for name, home in homes.items()})


def open_file(path: Path) -> Weights:
    """Open all weights of a safetensors file or of a file of :func:`torch.save`, without executing anything in it.

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
        raise InputError(f"{path} is damaged ({error}): copy or download it again") from error


@contextmanager
def wrap_parse_errors(name: str) -> Iterator[None]:
    """Convert any error while the parts of a checkpoint are identified into an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{name} has no {error.args[0]}, which a BLIP-2 has: copy or download it again") from error
    except Exception as error:  # sizes and settings can be wrong in any way
        raise InputError(
            f"{name} is not a complete BLIP-2 ({type(error).__name__}: {' '.join(str(error).split())[:200]}): copy or"
            " download it again"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    state = content["model"] if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) else content
    valid = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not valid or not state:
        raise InputError(f"{path} contains no state dict (names with tensors): give a file of weights")
    for name, tensor in state.items():  # the strides of a pickled view can claim any number of rows
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{path} is damaged ({name} claims the shape {tuple(tensor.shape)}, for which the file has too few"
                " bytes): copy or download it again"
            )
    return dict(state)
