"""Which image each record shows, by a digest of its bytes, without reading a file twice; and digests of weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2.data.images import ImageError, read_bytes, unreadable
from blip2.data.records import Records
from blip2.distributed import gather_objects, process_count, process_index
from blip2.feature_cache.store import DIGEST, Index, Part, digest, file_key, find


def identify(records: Records, index: Index, part: Part) -> tuple[np.ndarray, dict[int, str]]:
    """The digest of each record's image, and why some have none. Processes share the work.

    A file that was read before and still has its size and its time of change is not read again.
    """
    processes = process_count()
    own = np.arange(process_index(), len(records), processes)
    images, files = np.zeros(len(own), DIGEST), np.zeros(len(own), DIGEST)
    unusable: dict[int, str] = {}
    for at, i in enumerate(own.tolist()):
        record = records[i]
        image = record.image
        if isinstance(image, bytes):
            images[at] = digest(image)
        elif image is None:
            unusable[i] = record.unusable[1] if record.unusable else "it has no image"
        else:
            try:
                found = Path(image).stat()
                files[at] = file_key(image, found.st_size, found.st_mtime_ns)
            except (OSError, ValueError) as error:
                unusable[i] = str(unreadable(image, error))
    known = find(index.files, files)
    images[known >= 0] = index.held[known[known >= 0]]

    new = np.flatnonzero((known < 0) & (files != b""))
    _, firsts, which = np.unique(files[new], return_index=True, return_inverse=True)  # many records may name one file
    read, failed = _read_files(records, own[new[firsts]], part)
    images[new] = read[which]
    unusable |= {int(own[at]): failed[n] for at, n in zip(new, which.tolist(), strict=True) if n in failed}

    everything = np.zeros(len(records), DIGEST)
    for process, (theirs, why) in enumerate(gather_objects((images, unusable))):
        everything[process::processes] = theirs
        unusable |= why
    return everything, unusable


def _read_files(records: Records, indices: np.ndarray, part: Part) -> tuple[np.ndarray, dict[int, str]]:
    """The digests of some records' files, which are noted, and why some could not be read."""
    images = np.zeros(len(indices), DIGEST)
    failed: dict[int, str] = {}
    with ThreadPoolExecutor(8) as pool:  # disks and networks are slow to answer, not slow to deliver
        for start in range(0, len(indices), 256):
            paths = [str(records[i].image) for i in indices[start : start + 256].tolist()]
            for n, (path, read) in enumerate(zip(paths, pool.map(_read_file, paths), strict=True), start):
                if isinstance(read, ImageError):
                    failed[n] = str(read)
                else:
                    images[n], found = read
                    part.add_file(read[0], path, found)
    return images, failed


def _read_file(path: str) -> tuple[str, os.stat_result] | ImageError:
    try:
        found = Path(path).stat()  # before it is read: who changes it meanwhile makes this time wrong, not the digest
        return digest(read_bytes(path)), found
    except OSError as error:
        return unreadable(path, error)
    except ImageError as error:
        return error


def add_weights(to: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Let the digest `to`, one of hashlib's, go on with the names and the bytes of weights."""
    for name, tensor in weights:
        to.update(name.encode())
        to.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
