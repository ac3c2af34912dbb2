"""Digests of images, which are stored so that no file is read twice, and digests of weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2.data.images import ImageError, read_bytes, unreadable_image
from blip2.data.records import Records
from blip2.distributed import all_gather_objects, rank, world_size
from blip2.feature_cache.store import DIGEST, StoreIndex, StoreWriter, digest, file_key, lookup


def digest_images(records: Records, index: StoreIndex, writer: StoreWriter) -> tuple[np.ndarray, dict[int, str]]:
    """Compute the digest of the image of each record. All processes must call it, and share the work.

    Args:
        records: the data set.
        index: the index of the store. A file in the index is not read if its size and modification time are unchanged.
        writer: adds the digests of other files to the store.

    Returns:
        The digest of each record's image, as an array of type :data:`DIGEST`, and messages about images that cannot be
        read, by the index of the record. The digest of such an image is empty.
    """
    own = np.arange(rank(), len(records), world_size())
    images, files = np.zeros(len(own), DIGEST), np.zeros(len(own), DIGEST)
    errors: dict[int, str] = {}
    for at, i in enumerate(own.tolist()):
        record = records[i]
        image = record.image
        if isinstance(image, bytes):
            images[at] = digest(image)
        elif image is None:
            errors[i] = record.skip_reason[1] if record.skip_reason else "it has no image"
        else:
            try:
                stat = Path(image).stat()
                files[at] = file_key(image, stat.st_size, stat.st_mtime_ns)
            except (OSError, ValueError) as error:
                errors[i] = str(unreadable_image(image, error))
    known = lookup(index.files, files)
    images[known >= 0] = index.file_images[known[known >= 0]]

    new = np.flatnonzero((known < 0) & (files != b""))
    _, firsts, which = np.unique(files[new], return_index=True, return_inverse=True)  # many records may name one file
    digests, failed = _digest_files(records, own[new[firsts]], writer)
    images[new] = digests[which]
    errors |= {int(own[at]): failed[n] for at, n in zip(new, which.tolist(), strict=True) if n in failed}

    all_images = np.zeros(len(records), DIGEST)
    for process, (part, part_errors) in enumerate(all_gather_objects((images, errors))):
        all_images[process :: world_size()] = part
        errors |= part_errors
    return all_images, errors


def _digest_files(records: Records, indices: np.ndarray, writer: StoreWriter) -> tuple[np.ndarray, dict[int, str]]:
    """Compute the digests of the image files of some records, and add the digests to the store.

    Returns:
        The digests, and error messages by position in `indices`.
    """
    images = np.zeros(len(indices), DIGEST)
    failed: dict[int, str] = {}
    with ThreadPoolExecutor(8) as pool:  # hides the latency of disks and networks
        for start in range(0, len(indices), 256):
            paths = [str(records[i].image) for i in indices[start : start + 256].tolist()]
            for n, (path, result) in enumerate(zip(paths, pool.map(_digest_file, paths), strict=True), start):
                if isinstance(result, ImageError):
                    failed[n] = str(result)
                else:
                    images[n], stat = result
                    writer.add_file(result[0], path, stat)
    return images, failed


def _digest_file(path: str) -> tuple[str, os.stat_result] | ImageError:
    try:
        stat = (
            Path(path).stat()
        )  # before the file is read: if the file changes in between, the stored time is too old, and it is read again
        return digest(read_bytes(path)), stat
    except OSError as error:
        return unreadable_image(path, error)
    except ImageError as error:
        return error


def hash_weights(hasher: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Update a hashlib object with the names and bytes of weights, given as (name, tensor)."""
    for name, tensor in weights:
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
