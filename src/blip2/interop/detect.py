"""Which format a checkpoint has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from blip2.backbones.pretrained import first_line
from blip2.data.assets import resolve
from blip2.errors import InputError
from blip2.interop import lavis, transformers
from blip2.interop.checkpoint import QFORMER_TOKENIZER, Checkpoint
from blip2.io import read_json

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", f"{QFORMER_TOKENIZER}/*"]


def open_foreign(name: str, changes: Mapping[str, object] | None = None) -> Checkpoint | None:
    """A checkpoint of BLIP-2 in another format; None where there is none of that name.

    Args:
        name: folder in transformers' layout, hub name, or ``.pth`` file.
        changes: keys of the recipe that say what the file does not; None where only the frozen parts that it holds
            are asked for. See :func:`lavis.read`.

    Raises:
        InputError: it is damaged, or lacks something.
    """
    path = Path(resolve(name))
    if is_pickle(name):
        return lavis.read(path.absolute(), changes)
    if is_blip2(path):
        return transformers.read(str(path.absolute()), path.absolute())
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        folder = _fetch(name)
        if folder is not None:
            return transformers.read(name, folder)
    return None


def is_pickle(name: str) -> bool:
    """Whether a name is that of a file of :func:`torch.save`."""
    return not name.startswith("timm:") and Path(name).suffix in PICKLES and not Path(name).expanduser().is_dir()


def is_blip2(folder: Path) -> bool:
    """Whether a folder holds a BLIP-2 of transformers' layout."""
    try:
        return read_json(folder / "config.json").get("model_type") == "blip-2"
    except (InputError, AttributeError):
        return False


def _fetch(name: str) -> Path | None:
    """The folder of a BLIP-2 of the hub; None where the hub has none of that name."""
    try:
        folder = Path(snapshot_download(name, allow_patterns="config.json"))
        return Path(snapshot_download(name, allow_patterns=HUB_FILES)) if is_blip2(folder) else None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, RepositoryNotFoundError):
        return None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{name!r} cannot be fetched from the hub ({first_line(error)}): check its name") from error
