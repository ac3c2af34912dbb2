"""Open the data sources of a recipe as records.

A source becomes a memory-mapped table (random access) or a stream (sequential access; the default for tar shards and
URLs). Both are datasets of the ``datasets`` library.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE

from blip2.config import DataConfig
from blip2.data.arrays import FEATURE_SUFFIXES
from blip2.data.benchmarks import find_shards, is_benchmark, read_benchmark
from blip2.data.cells import (
    ANSWER_COLUMNS,
    CAPTION_COLUMNS,
    CHOICE_COLUMNS,
    FEATURE_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_ID_COLUMNS,
    METADATA_COLUMNS,
    QUESTION_COLUMNS,
    class_names,
    decode_text,
    first_column,
)
from blip2.data.folders import list_pairs
from blip2.data.images import IMAGE_SUFFIXES
from blip2.data.records import ColumnMapping, Records, RecordStream, next_row
from blip2.data.shards import (
    ERROR_COLUMN,
    KEY_COLUMN,
    RESERVED_COLUMNS,
    check_parquet,
    expand_files,
    is_url,
    read_rows,
    read_shard,
    stream_shards,
    unreadable_source,
)
from blip2.data.tables import (
    COMPRESSED_SUFFIXES,
    Table,
    build_cached_table,
    describe_compression,
    table_from_rows,
)
from blip2.errors import InputError
from blip2.io import read_json

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")
"""Suffixes of the files that a data source may consist of."""
LIBRARY_CACHES = (HF_DATASETS_CACHE, HF_HUB_CACHE)
"""The folders in which the libraries of Hugging Face store datasets of the Hub."""
BENCHMARK_BATCH_ROWS = 50_000
"""Number of rows of a benchmark that are converted to a table at a time. As Python objects, rows take ten times as much
memory as in a table."""
SCHEMA_PROBE_ROWS = 20
"""Number of rows of a stream that are read to find its columns: several, because a single row may lack a column. A
table is refused if none of its first :data:`SCHEMA_PROBE_ROWS` rows can be used."""
MAX_BROKEN_PROBE_SHARDS = 10
"""Number of shards after which the search for the columns of a stream ends if no row could be read from them."""


def open_records(
    source: str,
    config: DataConfig,
    rank: int = 0,
    world_size: int = 1,
    *,
    all_columns: bool = False,
    reads_features: bool = False,
) -> Records | RecordStream:
    """Open a source of image-text pairs.

    Args:
        source: the data source, in one of the forms of ``data.train``.
        config: the section ``data`` of the recipe. Its columns, split and ``streaming`` are used; ``train`` is not.
        rank: rank of this process. It determines which records of a stream are read; a table has all records on every
            rank.
        world_size: number of processes.
        all_columns: also read the columns that are neither the image nor the captions, as
            :attr:`~blip2.data.records.Record.other_columns`, among them question and answers; and accept a source that
            has no captions.
        reads_features: the records have arrays of features in place of images (``vision.name: features``).

    Returns:
        :class:`~blip2.data.records.Records` for a table, :class:`~blip2.data.records.RecordStream` for a stream.

    Raises:
        InputError: the source does not exist, cannot be read, is empty, or lacks a column; or none of the first rows of
            a table can be used.
    """
    streaming = config.streaming
    if is_benchmark(source):
        shards = find_shards(source)
        if shards is None:
            table = _benchmark_table(source)
            return _make_records(table, source, config, Path(), rank, world_size, None, all_columns, reads_features)
        source = shards
    if source.startswith("hub:"):
        name = source.removeprefix("hub:")
        dataset = _load(source, datasets.load_dataset, name, split=config.split, streaming=bool(streaming))
        folders = (*(str(folder) for folder in LIBRARY_CACHES), *([name] if Path(name).is_dir() else []))
        return _make_records(dataset, source, config, Path(), rank, world_size, folders, all_columns, reads_features)
    path, remote = Path(source), is_url(source)
    if not remote and path.is_dir():
        return _open_folder(path, config, rank, world_size, all_columns, reads_features)
    suffix = path.suffix.lower()
    if suffix in COMPRESSED_SUFFIXES:
        file = expand_files(source)[0]
        raise InputError(f"data source {source!r}: {file} {describe_compression(file, b'')}")
    if suffix not in FILE_SUFFIXES:
        raise InputError(
            f"data source {source!r} is neither a folder nor a file ending in {', '.join(FILE_SUFFIXES)}: check the"
            " path, or write hub:NAME for a dataset on the Hugging Face Hub"
        )
    files = expand_files(source)
    streaming = suffix == ".tar" or remote if streaming is None else streaming
    if streaming:
        dataset = stream_shards(files)
    elif suffix == ".parquet":
        files = _load(source, check_parquet, files, _text_columns(config))
        if not files:
            raise _empty(source)
        literal = [file if remote else glob.escape(file) for file in files]  # load_dataset expands globs again
        dataset = _load(source, datasets.load_dataset, "parquet", data_files={"train": literal}, split="train")
    elif suffix == ".tar":
        columns = FEATURE_COLUMNS if reads_features else ("image",)
        columns = columns if config.image_column is None else (config.image_column,)
        texts = tuple(filter(None, (config.caption_column, config.question_column)))
        read = partial(_read_whole_shard, images=columns, texts=texts)
        dataset = _load(source, build_cached_table, files, read=read, kind=" ".join(columns + texts))
    else:
        dataset = _load(source, build_cached_table, files, read=read_rows)
    # A Parquet file may contain paths of image files in its own folder; a sample of a tar may not contain any path.
    allowed_folders = {".tar": (), ".parquet": (str(path.parent),)}.get(suffix)
    return _make_records(
        dataset, source, config, path.parent, rank, world_size, allowed_folders, all_columns, reads_features,
        files if streaming else (),
    )  # fmt: skip


def _text_columns(config: DataConfig) -> tuple[str | None, ...]:
    """Return the names of the columns that may have texts or paths."""
    named = (config.image_column, config.caption_column, config.question_column)
    return (*named, *IMAGE_COLUMNS, *CAPTION_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS, *METADATA_COLUMNS)


def _read_whole_shard(shard: str, images: tuple[str, ...], texts: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shard, without the cells that are bytes, except those of the columns `images`, and those of
    the columns `texts`, which are decoded.

    Raises:
        InputError: the shard is damaged.
    """
    for row in read_shard(shard):
        if ERROR_COLUMN in row:
            raise InputError(f"{shard}: {row[ERROR_COLUMN]}")
        row |= {name: decode_text(row[name]) for name in texts if isinstance(row.get(name), bytes)}
        kept = {name: cell for name, cell in row.items() if name in images or not isinstance(cell, bytes)}
        yield {**kept, KEY_COLUMN: f"{shard} {row[KEY_COLUMN]}"}


def _benchmark_table(source: str) -> datasets.Dataset:
    """Read a benchmark into memory as a table. Only the columns that records use are kept."""
    columns = ("image", *CAPTION_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS, *METADATA_COLUMNS, *IMAGE_ID_COLUMNS)
    rows = ({name: value for name, value in row.items() if name in columns} for row in read_benchmark(source))
    parts = []
    while part := list(islice(rows, BENCHMARK_BATCH_ROWS)):
        parts.append(_load(source, datasets.Dataset.from_list, part))
    return datasets.concatenate_datasets(parts)


def _open_folder(
    folder: Path, config: DataConfig, rank: int, world_size: int, all_columns: bool, reads_features: bool
) -> Records | RecordStream:
    for saved in (folder, folder / config.split):
        if (saved / "dataset_info.json").is_file():
            _check_saved(saved)
            dataset = _load(str(saved), datasets.load_from_disk, str(saved))
            name = str(saved)
            return _make_records(dataset, name, config, folder, rank, world_size, None, all_columns, reads_features)
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        content = read_json(splits)
        names = ", ".join(map(str, content.get("splits", ()))) if isinstance(content, dict) else "unknown"
        raise InputError(f"data source {folder} has the splits {names}, not {config.split}: name one with data.split")
    for pattern in ("metadata.[jJ][sS][oO][nN][lL]", "metadata.[cC][sS][vV]"):
        tables = sorted(folder.glob(pattern))
        if len(tables) > 1:
            names = " and ".join(path.name for path in tables)
            raise InputError(f"folder {folder} holds {names}, expected one of them: remove the other")
        if tables and tables[0].is_file():
            options = {"all_columns": all_columns, "reads_features": reads_features}
            return open_records(str(tables[0]), config, rank, world_size, **options)
    suffixes = FEATURE_SUFFIXES if reads_features else IMAGE_SUFFIXES
    pairs = list_pairs(folder, verbose=rank == 0, captions_required=not all_columns, suffixes=suffixes)
    columns = ColumnMapping(str(folder), "image", "captions", None, (), folder, reads_features=reads_features)
    return Records(table_from_rows(pairs), columns)


def _check_saved(folder: Path) -> None:
    """Check the files of a folder that ``save_to_disk`` wrote: the library would read files of other folders, too, and
    wait for a pipe."""
    state = read_json(folder / "state.json")
    files = state.get("_data_files") if isinstance(state, dict) else None
    names = [file.get("filename") if isinstance(file, dict) else None for file in files or ()]
    if not isinstance(files, list) or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise InputError(
            f"{folder / 'state.json'} is damaged (its _data_files do not list files of the same folder): copy or save"
            " the dataset again"
        )
    if missing := [name for name in names if not (folder / str(name)).is_file()]:
        raise InputError(f"data source {folder} has no file {missing[0]}: copy or save the dataset again")
    if not files:
        raise _empty(str(folder))


def _load(source: str, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that reads `source`, and convert the exceptions that it raises to :class:`InputError`."""
    try:
        return load(*args, **kwargs)
    except StopIteration as error:
        raise _empty(source) from error
    except Exception as error:  # the datasets library passes on the exceptions of all its parsers
        empty = not isinstance(error, InputError) and "corresponds to no data" in str(error)
        raise (_empty(source) if empty else unreadable_source(source, error)) from error


def _empty(source: str) -> InputError:
    return InputError(f"data source {source!r} is empty: it has no rows; add rows, or set another data source")


def _make_records(
    dataset: Any,
    source: str,
    config: DataConfig,
    root: Path,
    rank: int,
    world_size: int,
    allowed_folders: tuple[str, ...] | None = None,
    all_columns: bool = False,
    reads_features: bool = False,
    shards: Sequence[str] = (),
) -> Records | RecordStream:
    """Find the columns of a dataset, and return its rows as records.

    Args:
        dataset: a :class:`~blip2.data.tables.Table`, or a dataset or stream of the ``datasets`` library.
        source, root, allowed_folders: see :class:`~blip2.data.records.ColumnMapping`.
        config, rank, world_size, all_columns, reads_features: see :func:`open_records`.
        shards: see :class:`~blip2.data.records.RecordStream`.
    """
    dataset = _remove_reserved(dataset)
    table = _as_table(dataset)
    features = (dataset.features or _probe_columns(dataset, source)) if table is None else table.features
    features = {name: feature for name, feature in features.items() if name not in RESERVED_COLUMNS}
    if not features:
        raise _empty(source)
    image_columns = FEATURE_COLUMNS if reads_features else IMAGE_COLUMNS
    image = _find_column(
        features, config.image_column, image_columns, "image", source, "features" if reads_features else "image"
    )
    question = None
    if all_columns:
        pass
    elif config.question_column or first_column(features, QUESTION_COLUMNS):
        question = _find_column(features, config.question_column, QUESTION_COLUMNS, "question", source)
    caption = None
    if all_columns and config.caption_column is None and not first_column(features, CAPTION_COLUMNS):
        pass
    elif question is None:
        caption = _find_column(features, config.caption_column, CAPTION_COLUMNS, "caption", source)
    elif config.caption_column or first_column(features, ANSWER_COLUMNS):
        caption = _find_column(features, config.caption_column, ANSWER_COLUMNS, "caption", source)
    for name, feature in features.items():  # the library must not open files whose paths are in a column
        encoded = _without_decoding(feature)
        if encoded is not None:
            dataset = dataset.cast_column(name, encoded)
            table = _as_table(dataset)
    metadata = tuple(name for name in METADATA_COLUMNS if name in features and not all_columns)
    classes = {name: names for name, feature in features.items() if (names := class_names(feature))}
    # Questions are never grouped, so that their answers are mixed.
    group = config.group_column if config.group_column in features and question is None else None
    others = tuple(name for name in features if all_columns and name not in (image, caption))
    if question is not None:  # evaluation reads the choices, and says what is wrong with them
        others = tuple(name for name in CHOICE_COLUMNS if name in features)[:1]
    columns = ColumnMapping(
        source,
        image,
        caption,
        question,
        metadata,
        root,
        classes,
        allowed_folders,
        group,
        config.group_share,
        others,
        reads_features,
        (config.caption_column,) if config.caption_column else (),
        () if all_columns else QUESTION_COLUMNS,
    )
    if table is None:
        if group is not None:
            raise InputError(
                f"data.group_column is {group}, but {source!r} is read as a stream, whose records cannot be grouped:"
                " set data.streaming to false, or leave out data.group_column and store similar images next to each"
                " other"
            )
        return RecordStream(dataset, columns, rank, world_size, shards)
    if len(table) == 0:
        raise _empty(source)
    records = Records(table, columns)
    reasons = [records[i].skip_reason for i in range(min(len(records), SCHEMA_PROBE_ROWS))]
    if reasons[0] is not None and all(reasons):
        raise InputError(
            f"none of the first {len(reasons)} rows of {source!r} can be used; the first, {records[0].key}:"
            f" {reasons[0][1]}: correct the data, or name its columns with data.image_column, data.caption_column and"
            " data.question_column"
        )
    return records


def _remove_reserved(dataset: Any) -> Any:
    """Remove :data:`RESERVED_COLUMNS` from a dataset of the library. A table has those that :func:`read_shard` made."""
    if isinstance(dataset, Table) or not dataset.features:
        return dataset
    return dataset.remove_columns([name for name in dataset.features if name in RESERVED_COLUMNS])


def _as_table(dataset: Any) -> Table | None:
    """Return a dataset with random access as a table, and None for a stream."""
    if isinstance(dataset, Table):
        return dataset
    return Table(dataset) if isinstance(dataset, datasets.Dataset) else None


def _without_decoding(feature: Any) -> Any:
    """Return the type of a column with decoding turned off, or None if the library does not decode the column."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _without_decoding(feature.feature)
        return inner and type(feature)(inner)
    return replace(feature, decode=False) if getattr(feature, "decode", False) else None


def _probe_columns(dataset: datasets.IterableDataset, source: str) -> dict[str, Any]:
    """Return the names of the columns in the first :data:`SCHEMA_PROBE_ROWS` rows of a stream, as keys of a dict whose
    values are None, because the types are unknown."""
    names: dict[str, Any] = {}
    rows, broken, num_rows = iter(dataset), [], 0
    while num_rows < SCHEMA_PROBE_ROWS and (row := next_row(rows, source)) is not None:
        if ERROR_COLUMN in row:
            broken.append(row)
            if not names and len(broken) == MAX_BROKEN_PROBE_SHARDS:
                break
        else:
            names |= row
            num_rows += 1
    if not names and broken:
        raise InputError(f"data source {source!r} cannot be read: {broken[0][KEY_COLUMN]}: {broken[0][ERROR_COLUMN]}")
    return dict.fromkeys(names)


def _find_column(
    columns: Any, configured: str | None, candidates: tuple[str, ...], kind: str, source: str, content: str = ""
) -> str:
    found = first_column(columns, [configured] if configured else candidates)
    if found is None:
        raise InputError(
            f"data source {source!r} has no {content or kind} column{f' {configured!r}' if configured else ''}:"
            f" its columns are {', '.join(columns)}; name one of them with data.{kind}_column"
        )
    return found
