import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.config import HF_DATASETS_CACHE
from PIL import Image

from blip2.config import DataConfig
from blip2.data.cells import read_texts
from blip2.data.records import Record, Records, RecordStream
from blip2.data.shards import expand_files
from blip2.data.sources import open_records
from blip2.errors import InputError

Row = dict[str, Any]


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {f"{name}.png": png(shade) for shade, name in enumerate("abc")}
CAPTIONS = [["one a", "another a"], ["one b"], ["one c", "another c", "a third c"]]


def open_(source: Path | str, rank: int = 0, world_size: int = 1, **settings: Any) -> Records | RecordStream:
    return open_records(str(source), DataConfig(train=str(source), **settings), rank, world_size)


def read_all(records: Records | RecordStream) -> list[Record]:
    return list(records.read()) if isinstance(records, RecordStream) else [records[i] for i in range(len(records))]


def content(record: Record) -> bytes:
    assert record.image is not None
    return record.image if isinstance(record.image, bytes) else Path(record.image).read_bytes()


# -- supported formats -------------------------------------------------------------------------------------


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in IMAGES.items():
        (folder / name).write_bytes(data)
    return folder


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_shard(path: Path, rows: Sequence[tuple[str, bytes, str]]) -> Path:
    with tarfile.open(path, "w") as shard:
        for key, image, caption in rows:
            for name, data in ((f"{key}.png", image), (f"{key}.txt", caption.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    return path


def rows_with_lists() -> list[Row]:
    return [{"image": f"images/{name}", "captions": c} for name, c in zip(IMAGES, CAPTIONS, strict=True)]


def jsonl(folder: Path) -> Path:
    write_images(folder / "images")
    return write_jsonl(folder / "pairs.jsonl", rows_with_lists())


def json_list(folder: Path) -> Path:
    write_images(folder / "images")
    (folder / "pairs.json").write_text(json.dumps(rows_with_lists()))
    return folder / "pairs.json"


def table(suffix: str, delimiter: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_images(folder / "images")
        path = folder / f"pairs.{suffix}"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["image_path", "caption"])
            writer.writerows((f"images/{n}", c[0]) for n, c in zip(IMAGES, CAPTIONS, strict=True))
        return path

    return write


def parquet_of_paths(folder: Path) -> Path:
    write_images(folder / "images")
    datasets.Dataset.from_list(rows_with_lists()).to_parquet(str(folder / "pairs.parquet"))
    return folder / "pairs.parquet"


def with_images() -> datasets.Dataset:
    """Return a dataset with a column of the type datasets.Image."""
    rows = {"image": [{"bytes": data} for data in IMAGES.values()], "captions": CAPTIONS}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def parquet_of_images(folder: Path) -> Path:
    with_images().to_parquet(str(folder / "pairs.parquet"))
    return folder / "pairs.parquet"


def saved(folder: Path) -> Path:
    with_images().save_to_disk(str(folder / "saved"))
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    splits = {"train": with_images(), "test": with_images().select([0])}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def folder_with_texts(folder: Path) -> Path:
    write_images(folder / "deep" / "images")
    for name, captions in zip(IMAGES, CAPTIONS, strict=True):
        (folder / "deep" / "images" / name).with_suffix(".txt").write_text("\n".join(captions) + "\n")
    return folder / "deep"


def folder_with_metadata(folder: Path) -> Path:
    write_images(folder / "images")
    rows = [{"file_name": name, "text": c} for name, c in zip(IMAGES, CAPTIONS, strict=True)]
    write_jsonl(folder / "images" / "metadata.jsonl", rows)
    return folder / "images"


def two_shards(pattern: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rows = [(n, data, c[0]) for (n, data), c in zip(IMAGES.items(), CAPTIONS, strict=True)]
        write_shard(folder / "shard-000.tar", [(n.removesuffix(".png"), data, c) for n, data, c in rows[:2]])
        write_shard(folder / "shard-001.tar", [(n.removesuffix(".png"), data, c) for n, data, c in rows[2:]])
        return folder / pattern

    return write


SEVERAL = [
    jsonl,
    json_list,
    parquet_of_paths,
    parquet_of_images,
    saved,
    saved_splits,
    folder_with_texts,
    folder_with_metadata,
]
SINGLE = {
    "csv": table("csv", ","),
    "tsv": table("tsv", "\t"),
    "shards by numbers": two_shards("shard-{000..001}.tar"),
    "shards by glob": two_shards("*.tar"),
}


@pytest.mark.parametrize(
    ("write", "captions"),
    [
        *(pytest.param(write, [tuple(c) for c in CAPTIONS], id=write.__name__) for write in SEVERAL),
        *(pytest.param(write, [(c[0],) for c in CAPTIONS], id=name) for name, write in SINGLE.items()),
    ],
)
def test_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path], captions: list[tuple[str, ...]]
) -> None:
    source = write(tmp_path)
    monkeypatch.chdir("/")  # relative image paths start from the folder of the table
    records = open_(source)
    assert isinstance(records, RecordStream) == (source.suffix == ".tar")
    read = read_all(records)
    assert [content(record) for record in read] == list(IMAGES.values())
    assert [record.captions for record in read] == captions
    assert len({record.key for record in read}) == 3


@pytest.mark.parametrize("write", [jsonl, parquet_of_images, two_shards("*.tar")])
@pytest.mark.parametrize("streaming", [False, True])
def test_streaming_can_be_chosen(tmp_path: Path, write: Callable[[Path], Path], streaming: bool) -> None:
    records = open_(write(tmp_path), streaming=streaming)
    assert isinstance(records, RecordStream if streaming else Records)
    assert [content(record) for record in read_all(records)] == list(IMAGES.values())


def test_named_split(tmp_path: Path) -> None:
    (only,) = read_all(open_(saved_splits(tmp_path), split="test"))
    assert content(only) == IMAGES["a.png"]


def test_named_columns(tmp_path: Path) -> None:
    rows = [{"image": "no.png", "photo": "yes.png", "caption": "no", "alt": "yes"}]
    (record,) = read_all(open_(write_jsonl(tmp_path / "rows.jsonl", rows), image_column="photo", caption_column="alt"))
    assert record.image == str(tmp_path / "yes.png")
    assert record.captions == ("yes",)


def test_absolute_paths_are_kept(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "tables").mkdir()
    source = write_jsonl(tmp_path / "tables" / "rows.jsonl", [{"image": elsewhere, "caption": "a"}])
    assert read_all(open_(source))[0].image == elsewhere


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("a cat", ("a cat",)),
        ("  a \n\tcat ", ("a cat",)),
        (["a cat", None, " ", "a dog"], ("a cat", "a dog")),
        (("a cat",), ("a cat",)),
        (["nothing was cut", "x" * 10_000], ("nothing was cut", "x" * 10_000)),
        (7, ("7",)),
        (None, ()),
        ("", ()),
        (" \n", ()),
        ([], ()),
    ],
)
def test_captions_in_a_cell(cell: object, captions: tuple[str, ...]) -> None:
    assert read_texts(cell)[0] == captions


def test_rows_with_missing_cells_are_records(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "caption": "fine"},
        {"image": None, "caption": "no image"},
        {"image": "", "caption": "no image"},
        {"caption": "no image"},
        {"image": "b.png", "caption": None},
        {"image": "c.png", "caption": "  "},
        {"image": "d.png"},
    ]
    read = read_all(open_(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert [record.image is None for record in read] == [False, True, True, True, False, False, False]
    assert [len(record.captions) for record in read] == [1, 1, 1, 1, 0, 0, 0]
    assert [re.search(r"row (\d)", record.key)[1] for record in read] == list("0123456")


def test_streamed_file_without_the_image_column(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "0.jsonl", [{"image": "a.png", "caption": "a"}])
    write_jsonl(tmp_path / "1.jsonl", [{"caption": "b"}])
    read = read_all(open_(tmp_path / "*.jsonl", streaming=True))
    assert [(record.image is None, record.captions) for record in read] == [(False, ("a",)), (True, ("b",))]


def test_integer_images_are_file_names(tmp_path: Path) -> None:
    """Such a column is a mistake, which is reported as a missing file."""
    source = write_jsonl(tmp_path / "rows.jsonl", [{"image": 5, "caption": "a"}])
    assert read_all(open_(source))[0].image == str(tmp_path / "5")


def test_captions_equal_those_of_the_records(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "captions": c} for c in [*CAPTIONS, None, [], [" a  b "]]]
    records = open_(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert isinstance(records, Records)
    order = [5, 0, 3, 4, 2, 1, 0]
    assert records.captions(order) == [records[i].captions for i in order]


def test_image_id_by_path(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "a.png", "./a.png"]
    source = write_jsonl(tmp_path / "rows.jsonl", [{"image": name, "caption": "x"} for name in names])
    ids = [record.image_id for record in read_all(open_(source))]
    assert ids[0] == ids[2] == ids[3] != ids[1]


def test_image_id_fits_a_tensor() -> None:
    assert all(0 <= Record("", f"{i}.png", ()).image_id < 2**63 for i in range(50))


def test_image_id_by_content(tmp_path: Path) -> None:
    """Shards often number their images from 0 each."""
    write_shard(tmp_path / "0.tar", [("0000", png(1), "one"), ("0001", png(2), "two")])
    write_shard(tmp_path / "1.tar", [("0000", png(3), "three"), ("0001", png(1), "one again")])
    one, two, three, again = (record.image_id for record in read_all(open_(tmp_path / "*.tar")))
    assert one == again
    assert len({one, two, three}) == 3


def test_expand_files(tmp_path: Path) -> None:
    for name in ("09", "10", "11"):
        (tmp_path / f"{name}.tar").touch()
    assert [Path(file).stem for file in expand_files(str(tmp_path / "{09..11}.tar"))] == ["09", "10", "11"]
    assert [Path(file).stem for file in expand_files(str(tmp_path / "1*.tar"))] == ["10", "11"]
    with pytest.raises(InputError, match=r"08\.tar"):
        expand_files(str(tmp_path / "{08..11}.tar"))


# -- streams ---------------------------------------------------------------------------------------------------------


def shards(folder: Path, count: int, size: int = 4) -> Path:
    for shard in range(count):
        rows = [(str(i), png(10 * shard + i), f"{shard} {i}") for i in range(size)]
        write_shard(folder / f"{shard:03}.tar", rows)
    return folder / f"{{000..{count - 1:03}}}.tar"


def streamed_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "rows.jsonl", [{"image": f"{i}.png", "caption": f"words {i}"} for i in range(12)])


def open_stream(source: Path, rank: int = 0, world_size: int = 1) -> RecordStream:
    stream = open_(source, rank, world_size, streaming=True)
    assert isinstance(stream, RecordStream)
    return stream


@pytest.mark.parametrize("write", [lambda folder: shards(folder, 3), streamed_jsonl], ids=["shards", "jsonl"])
@pytest.mark.parametrize("done", range(13))
def test_resume_from_a_position(tmp_path: Path, write: Callable[[Path], Path], done: int) -> None:
    source = write(tmp_path)
    stream = open_stream(source)
    all_records = list(stream.read())
    reader = stream.read()
    for _ in range(done):
        next(reader)
    position = json.loads(json.dumps(stream.position()))
    rest = all_records[done:]
    assert list(stream.read(position)) == rest
    assert list(open_stream(source).read(position)) == rest
    # The position is restored and saved again before a record is read, as at the start of a window.
    stream.read(position)
    assert list(open_stream(source).read(stream.position())) == rest


def test_reading_a_stream_again_starts_from_its_beginning(tmp_path: Path) -> None:
    stream = open_stream(shards(tmp_path, 2))
    all_records = list(stream.read())
    list(stream.read({"num_read": 8, "state_dict": stream.position()["state_dict"]}))
    assert list(stream.read()) == all_records
    assert stream.position()["num_read"] == 8


@pytest.mark.parametrize(("count", "world_size"), [(2, 2), (3, 2), (1, 2), (4, 3)])
def test_ranks_share_a_stream(tmp_path: Path, count: int, world_size: int) -> None:
    source = shards(tmp_path, count)
    all_records = {record.captions for record in open_stream(source).read()}
    shares = [[r.captions for r in open_stream(source, rank, world_size).read()] for rank in range(world_size)]
    together = [captions for share in shares for captions in share]
    assert len(together) == len(all_records) == 4 * count
    assert set(together) == all_records
    assert all(shares)


# -- errors -------------------------------------------------------------------------------------------------


def no_captions(folder: Path) -> Path:
    return write_images(folder / "images")


def text(name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return write


def nothing(name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / name


def empty_folder(folder: Path) -> Path:
    (folder / "inside").mkdir()
    (folder / "inside" / "notes.txt").write_text("no image")
    return folder / "inside"


def broken_shard(folder: Path) -> Path:
    source = two_shards("*.tar")(folder)
    second = folder / "shard-001.tar"
    second.write_bytes(second.read_bytes()[:600])
    return source


def unlike_tables(folder: Path) -> Path:
    (folder / "0.csv").write_text("image,caption\na.png,a\n")
    (folder / "1.csv").write_text("photo,words\nb.png,b\n")
    return folder / "*.csv"


def parquet(**files: dict[str, list[Any]]) -> Callable[[Path], Path]:
    """Writes a Parquet file for each keyword, of columns, and returns their pattern."""

    def write(folder: Path) -> Path:
        for name, columns in files.items():
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet")
        return folder / "*.parquet"

    return write


def repeated_column(folder: Path) -> Path:
    columns = [pyarrow.array([text]) for text in ("a.png", "b.png", "a")]
    table = pyarrow.Table.from_arrays(columns, names=["image", "image", "caption"])
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def saved_elsewhere(folder: Path) -> Path:
    """A saved dataset whose state.json names a file of another folder."""
    pairs = datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["a"]})
    for name in ("secret", "saved"):
        pairs.save_to_disk(str(folder / name))
    state = json.loads((folder / "saved" / "state.json").read_text())
    (file,) = state["_data_files"]
    file["filename"] = f"../secret/{file['filename']}"
    (folder / "saved" / "state.json").write_text(json.dumps(state))
    return folder / "saved"


def saved_empty(folder: Path) -> Path:
    datasets.Dataset.from_dict({"image": [], "caption": []}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


INTEGERS: dict[str, list[Any]] = {"image": ["a.png"], "caption": [7]}
TEXTS: dict[str, list[Any]] = {"image": ["b.png"], "caption": ["007"]}
NO_ROWS = {"image": pyarrow.array([], pyarrow.string()), "caption": pyarrow.array([], pyarrow.string())}
ONE_ROW = '{"image": "a.png", "words": "x", "caption": "y"}\n'


@pytest.mark.parametrize(
    ("write", "settings", "found"),
    [
        (nothing("no.jsonl"), {}, r"no file '.*no\.jsonl': check the path"),
        (nothing("no-{0..1}.tar"), {}, r"no file '.*no-0\.tar': check the path"),
        (nothing("no/*.tar"), {}, r"no file '.*\*\.tar': check the path"),
        (nothing("no"), {}, r"'.*no' is neither a folder nor a file ending in \.jsonl, .*: check the path"),
        (text("rows.xlsx", "x"), {}, r"rows\.xlsx' is neither a folder nor a file ending in \.jsonl, "),
        (text("rows.jsonl", '{"image": "a.png", "words": "x"}\n'), {},
         r"has no caption column: its columns are image, words; name one of them with data\.caption_column"),
        (text("rows.csv", "url,caption\na,b\n"), {},
         r"has no image column: its columns are url, caption; name one of them with data\.image_column"),
        (text("rows.jsonl", ONE_ROW), {"caption_column": "alt"}, r"no caption column 'alt': .* image, words, caption"),
        (text("rows.jsonl", ONE_ROW), {"image_column": "photo"}, r"no image column 'photo': .* image, words, caption"),
        (text("rows.jsonl", ""), {}, r"rows\.jsonl' is empty: it has no rows"),
        (text("rows.jsonl", "\n"), {}, r"rows\.jsonl' is empty: it has no rows"),
        (text("rows.jsonl", ""), {"streaming": True}, r"rows\.jsonl' is empty: it has no rows"),
        (text("rows.jsonl", "\n"), {"streaming": True}, r"rows\.jsonl' is empty: it has no rows"),
        (text("rows.csv", "image,caption\n"), {"streaming": True}, r"rows\.csv' is empty: it has no rows"),
        (text("rows.json", "[]"), {}, r"rows\.json' is empty: it has no rows"),
        (text("rows.csv", "image,caption\n"), {}, r"rows\.csv' is empty: it has no rows"),
        (empty_folder, {}, r"inside holds no images \(\.jpg, .*\) and no metadata\.jsonl"),
        (no_captions, {}, r"images holds 3 images but no captions: put a \.txt file next to each image"),
        (text("rows.jsonl", ONE_ROW + '{"image": oops'), {}, r"read: rows\.jsonl line 2 is not JSON \(Exp"),
        (text("rows.jsonl", ONE_ROW + '{"image": oops'), {"streaming": True}, r"read: rows\.jsonl line 2 is not JSON"),
        (text("rows.parquet", "no"), {}, r"rows\.parquet' cannot be read: .*[Pp]arquet"),
        (text("rows.tar", "no"), {}, r"rows\.tar' cannot be read: .*rows\.tar: truncated header"),
        (text("rows.parquet", "no"), {"streaming": True}, r"rows\.parquet' cannot be read: .*[Pp]arquet"),
        (unlike_tables, {}, r"\*\.csv' cannot be read: .*1\.csv has the columns photo, words, expected image, cap"),
        (broken_shard, {"streaming": False}, r"\*\.tar' cannot be read: .*shard-001\.tar: unexpected end of data; "),
        (nothing("{9..1}.tar"), {}, r"\{9\.\.1\} in '.*' ends before it begins: write the smaller number first"),
        (nothing("{0..999}/{0..1000}.tar"), {}, r"\{0\.\.1000\} in '.*' is more than 1,000,000 files: use a shorter"),
        (text("rows.jsonl", '{"image": "a.png", "caption": "a", "caption": "b"}'), {}, r"line 1 .*the key cap"),
        (parquet(a=NO_ROWS), {}, r"\*\.parquet' is empty: it has no rows"),
        (parquet(a=INTEGERS, b=TEXTS), {}, r"b\.parquet holds texts in the column caption, expected integers as in"),
        (repeated_column, {}, r"the column image occurs more than once: give each column its own name"),
        (repeated_column, {"streaming": True}, r"the column image occurs more than once: give each column its own"),
        (saved_elsewhere, {}, r"state\.json is damaged \(its _data_files do not list files of the same folder\)"),
        (saved_empty, {}, r"saved' is empty: it has no rows"),
        (saved_splits, {"split": "val"}, r"saved has the splits train, test, not val: name one with data\.split"),
    ],
)  # fmt: skip
def test_unreadable_sources_are_refused(
    tmp_path: Path, write: Callable[[Path], Path], settings: dict[str, Any], found: str
) -> None:
    source = write(tmp_path)
    with pytest.raises(InputError, match=found) as error:
        read_all(open_(source, **settings))
    assert "\n" not in str(error.value)


def test_parquet_files_that_differ(tmp_path: Path) -> None:
    """A file without rows is passed over, and a stream reads each file in its own types."""
    source = parquet(a=NO_ROWS, b=TEXTS)(tmp_path)
    assert [record.captions for record in read_all(open_(source))] == [("007",)]
    source = parquet(a=INTEGERS, b=TEXTS)(tmp_path)
    assert [record.captions for record in read_all(open_(source, streaming=True))] == [("7",), ("007",)]


def test_a_damaged_cache_is_built_again(tmp_path: Path) -> None:
    source = text("rows.jsonl", ONE_ROW)(tmp_path)
    cache = Path(HF_DATASETS_CACHE) / "blip2"
    before = set(cache.glob("*.arrow"))
    first = read_all(open_(source))
    (cached,) = set(cache.glob("*.arrow")) - before
    content = cached.read_bytes()
    for kept in (0, 100, len(content) - 200):
        cached.write_bytes(content[:kept])
        assert read_all(open_(source)) == first
        assert cached.read_bytes() == content


def test_hub_dataset_without_a_network() -> None:
    with pytest.raises(InputError, match=r"^data source 'hub:nobody/nothing' cannot be read: .*nobody/nothing.*$"):
        open_("hub:nobody/nothing")
