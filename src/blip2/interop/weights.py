"""Weights in files, read one at a time.

A file of weights may be larger than the memory. Nothing is read before it is asked for, and what was read is given back
when its tensor goes: a model that is loaded in another dtype or onto another device is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip2.backbones.pretrained import check_shards, read_pickle
from blip2.errors import InputError
from blip2.interop.key_map import Table, listing, rename

SINGLE = ("model.safetensors", "pytorch_model.bin")


class Weights(Mapping[str, Tensor]):
    """Tensors by name, each mapped from its file when it is asked for.

    Args:
        places: for each name the file that holds it and its name there, or the tensor itself.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str] | Tensor]) -> None:
        self.places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        if isinstance(place, Tensor):
            return place
        with _reading(place[0]), safe_open(place[0], framework="pt") as file:
            return file.get_tensor(place[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def renamed(self, table: Table, where: str, back: bool = False) -> Weights:
        """Under the names of another format; see :func:`rename`."""
        return Weights({new: self.places[old] for old, new in rename(self, table, where, back).items()})

    def where(self, keep: Callable[[str], bool]) -> Weights:
        """Those whose names `keep` is true of."""
        return Weights({name: place for name, place in self.places.items() if keep(name)})

    def part(self, *prefixes: str) -> Weights:
        """Those whose names begin with one of `prefixes`."""
        return self.where(lambda name: name.startswith(prefixes))

    def without(self, *prefixes: str) -> Weights:
        """Those whose names begin with none of `prefixes`."""
        return self.where(lambda name: not name.startswith(prefixes))

    def stripped(self, prefix: str) -> Weights:
        """Those whose names begin with `prefix`, without it."""
        return Weights({name.removeprefix(prefix): place for name, place in self.part(prefix).places.items()})

    def with_prefix(self, prefix: str) -> Weights:
        return Weights({prefix + name: place for name, place in self.places.items()})

    def __or__(self, other: Mapping[str, Tensor]) -> Weights:
        """Both; where both have a name, that of `other`."""
        return Weights({**self.places, **(other.places if isinstance(other, Weights) else other)})


def open_folder(folder: Path) -> Weights:
    """All weights of a folder in transformers' layout: one file or shards, safetensors before pickles.

    Raises:
        InputError: there are none, one is damaged, or a shard is missing.
    """
    for name in SINGLE:
        if (folder / name).is_file():
            return open_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(folder, index)
    raise InputError(f"{folder} has no {SINGLE[0]} and no {SINGLE[0]}.index.json: copy or download its weights too")


def _open_shards(folder: Path, index: Path) -> Weights:
    homes = check_shards(index)
    shards = sorted(set(homes.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of its {len(shards)} shards ({listing(missing)}): copy or download them too"
        )
    opened = {name: open_file(folder / name) for name in shards}
    absent = [name for name, home in homes.items() if name not in opened[home]]
    if absent:
        raise InputError(f"{folder}: {listing(absent)} are not in the shards that {index.name} says: download it again")
    return Weights({name: opened[home].places[name] for name, home in homes.items()})


def open_file(path: Path) -> Weights:
    """All weights of a safetensors file, or of a file of :func:`torch.save`, of which nothing is ever executed.

    Raises:
        InputError: the file is damaged, or holds more than tensors, numbers and texts.
    """
    if path.suffix != ".safetensors":
        return Weights(_tensors(read_pickle(path), path))
    with _reading(path), safe_open(path, framework="pt") as file:
        return Weights({name: (path, name) for name in file.keys()})  # noqa: SIM118


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): copy or download it again") from error


@contextmanager
def understood(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while the parts of a checkpoint are made out into an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{name} has no {error.args[0]}, which a BLIP-2 has: copy or download it again") from error
    except Exception as error:  # sizes and settings can be wrong in any way
        raise InputError(
            f"{name} is no whole BLIP-2 ({type(error).__name__}: {' '.join(str(error).split())[:200]}): copy or"
            " download it again"
        ) from error


def _tensors(found: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    good = isinstance(found, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    if not good or not found:
        raise InputError(f"{path} holds no state dict (names with tensors): give a file of weights")
    for name, tensor in found.items():  # a view of four bytes can be said to have any number of rows
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{path} is damaged ({name} is said to be {tuple(tensor.shape)}, which it does not hold): copy or"
                " download it again"
            )
    return dict(found)
