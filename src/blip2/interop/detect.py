"""Detect the format of a checkpoint."""

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
    RevisionNotFoundError,
)

from blip2.backbones.pretrained import short_message
from blip2.data.assets import resolve
from blip2.errors import InputError
from blip2.interop import lavis, transformers
from blip2.interop.checkpoint import QFORMER_TOKENIZER, Checkpoint
from blip2.io import expand_home, read_json

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", f"{QFORMER_TOKENIZER}/*"]


def open_foreign(name: str, overrides: Mapping[str, object] | None = None) -> Checkpoint | None:
    """Open a BLIP-2 or InstructBLIP checkpoint of transformers or LAVIS.

    Args:
        name: folder in transformers' layout, hub name, or ``.pth`` file.
        overrides: values for config keys that a ``.pth`` file does not contain, by key. None: only the frozen parts in
            the file are needed. See :func:`lavis.read`.

    Returns:
        The checkpoint. None: `name` is not a BLIP-2 checkpoint of transformers or LAVIS.

    Raises:
        InputError: the checkpoint is damaged or incomplete.
    """
    path = Path(resolve(name))
    if is_pickle(name):
        return lavis.read(path.absolute(), overrides)
    if is_blip2(path):
        return transformers.read(str(path.absolute()), path.absolute())
    if not path.exists() and HUB_NAME.fullmatch(name):
        folder = _fetch(name)
        if folder is not None:
            return transformers.read(name, folder)
    return None


def is_pickle(name: str) -> bool:
    """Return whether a name has the suffix of a file that was written by :func:`torch.save`."""
    return not name.startswith("timm:") and Path(name).suffix in PICKLE_SUFFIXES and not expand_home(name).is_dir()


def is_blip2(folder: Path) -> bool:
    """Return whether a folder contains a BLIP-2 or InstructBLIP checkpoint in transformers' layout."""
    try:
        return read_json(folder / "config.json").get("model_type") in transformers.LAYOUTS
    except (InputError, AttributeError, TypeError):
        return False


def fetch_revision(name: str, revision: str) -> Path:
    """Download a BLIP-2 or InstructBLIP checkpoint from the hub as it was at a revision.

    Args:
        name: hub name.
        revision: branch, tag or commit.

    Returns:
        The local folder of the checkpoint, which belongs to this revision alone.

    Raises:
        InputError: `name` is not a hub name, there is no such revision, it is neither in the cache nor can be
            downloaded, or it is no BLIP-2.
    """
    if Path(resolve(name)).exists() or is_pickle(name) or not HUB_NAME.fullmatch(name):
        raise InputError(
            f"revision is {revision!r}, but {name!r} is not the name of a model on the hub, which alone has revisions:"
            " leave out revision"
        )
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns="config.json"))
        if is_blip2(folder):
            return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name!r} has no revision {revision!r}: give a branch, a tag or a commit that its page on the hub lists"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            f"revision {revision!r} of {name!r} is not in the cache and cannot be downloaded ({short_message(error)}):"
            " check the revision, the network connection and your access to the model (hf auth login)"
        ) from error
    raise InputError(f"revision {revision!r} of {name!r} is not a BLIP-2 of transformers: give a BLIP-2 checkpoint")


def _fetch(name: str) -> Path | None:
    """Download a BLIP-2 checkpoint from the hub.

    Returns:
        The local folder of the checkpoint. None: the hub has no BLIP-2 checkpoint of this name, or cannot be reached.
    """
    try:
        folder = Path(snapshot_download(name, allow_patterns="config.json"))
        return Path(snapshot_download(name, allow_patterns=HUB_FILES)) if is_blip2(folder) else None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, RepositoryNotFoundError):
        return None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{name!r} cannot be downloaded from the hub ({short_message(error)}): check the name, your access to the"
            " model (hf auth login) and the free disk space"
        ) from error
