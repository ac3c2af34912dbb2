"""Texts are read exactly as they were written, in every format."""

import csv
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2.config import DataConfig
from blip2.data.records import Record, Records
from blip2.data.sources import open_records

PIECES = (
    *("007", "1.50", "2", "2.5", "-0", "1e5", "0x10", "1_000", "1,000", "99999999999999999999", "3.0", "inf", "NaN"),
    *("", "NA", "N/A", "n/a", "null", "NULL", "None", "nan", "true", "False", "yes", "-", "#N/A", "<NA>"),
    *("2020-01-02", "2020-01-02T03:04:05Z", "12:30", "01/02/03", "Jan 2020"),
    *('"', '""', "'", ",", ";", ", ", "\t", "\n", "\r", "\r\n", " ", "\\", "\\n", "#", "=1+1", "[", "{"),
    *('{"a": 1}', "[1]"),
    *("a cat", "a dog", "Ünïcode", "写真", "\U0001f600", "e\u0301", "\u202e", "\ufeff", "\u2028", "\u0085", "\x0b"),
    *("\x1c", "\xa0"),
    *("\x01", "\x7f", "\ufffd", "\ufffe", "https://x.org/a.png", "~/a", "&amp;", "<b>", "%s", "{}", "$HOME"),
)  # fmt: skip


# Any character except NUL and lone surrogates, which are refused.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, min_size=1, max_size=5), max_size=5).map("".join)
ENDS = st.sampled_from(("\r\n", "\n"))
Draw = Callable[[st.SearchStrategy[Any]], Any]
"""Draws a value, as :class:`hypothesis.strategies.DrawFn` does."""


def on_one_line(text: str) -> str:
    return text.translate({ord("\t"): " ", ord("\n"): " ", ord("\r"): " "})


def expected(text: str) -> str:
    return " ".join(text.split())


def encode(text: str, draw: Draw) -> bytes:
    marked = text.startswith(("\ufeff", "\ufffe"))  # would be read as a byte order mark
    kind = draw(st.sampled_from(("utf-8-sig", "utf-16", "utf-16-be", "utf-8")))
    if kind == "utf-16-be":
        return b"\xfe\xff" + text.encode(kind)
    return text.encode("utf-8-sig" if kind == "utf-8" and marked else kind)


NAMES = ("000123", "1.50", "NA", "null", "true", "2020-01-02", "a b.png", "ü.png", "[1].png", "-1", "None.jpg")
Rows = list[tuple[str, str, str]]
"""Tuples of image, question and answer."""
ROWS = st.lists(st.tuples(st.sampled_from(NAMES), TEXTS, TEXTS), min_size=1, max_size=30)


def write_delimited(suffix: str) -> Callable[[Path, Rows, Draw], Path]:
    def write(folder: Path, rows: Rows, draw: Draw) -> Path:
        out = io.StringIO(newline="")
        if suffix == "csv":
            quoting = draw(st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
            end = draw(ENDS) if quoting == csv.QUOTE_ALL else "\r\n"
            writer = csv.writer(out, quoting=quoting, lineterminator=end)
            writer.writerows([("image", "question", "answer"), *rows])
        else:
            end = draw(ENDS)
            out.write("".join("\t".join(row) + end for row in [("image", "question", "answer"), *rows]))
        path = folder / f"rows.{suffix}"
        path.write_bytes(encode(out.getvalue(), draw))
        return path

    return write


def as_dicts(rows: Rows) -> list[dict[str, str]]:
    return [dict(zip(("image", "question", "answer"), row, strict=True)) for row in rows]


def write_jsonl(folder: Path, rows: Rows, draw: Draw) -> Path:
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in as_dicts(rows)]
    (folder / "rows.jsonl").write_bytes(encode("\n".join(lines), draw))
    return folder / "rows.jsonl"


def write_json(folder: Path, rows: Rows, draw: Draw) -> Path:
    text = json.dumps(as_dicts(rows), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from((None, 1))))
    (folder / "rows.json").write_bytes(encode(text, draw))
    return folder / "rows.json"


def write_parquet(folder: Path, rows: Rows, draw: Draw) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_dicts(rows)), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder: Path, rows: Rows, draw: Draw) -> Path:
    datasets.Dataset.from_list(as_dicts(rows)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def write_shard(folder: Path, rows: Rows, draw: Draw) -> Path:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, (image, question, answer) in enumerate(rows):
            content = json.dumps({"question": question, "answer": answer}).encode()
            for kind, data in (("png", image.encode()), ("json", content)):
                entry = tarfile.TarInfo(f"{number}.{kind}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return folder / "0.tar"


WRITE = {
    "csv": write_delimited("csv"),
    "tsv": write_delimited("tsv"),
    "jsonl": write_jsonl,
    "json": write_json,
    "parquet": write_parquet,
    "saved": write_saved,
    "shard": write_shard,
}


def read(source: Path, streaming: bool | None = None) -> list[Record]:
    records = open_records(str(source), DataConfig(train=str(source), streaming=streaming))
    return [records[i] for i in range(len(records))] if isinstance(records, Records) else list(records.read())


@contextmanager
def new_folder() -> Iterator[Path]:
    """An empty folder for one example; its name is also a pattern."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root).resolve() / "[1]"
        folder.mkdir()
        yield folder


@pytest.mark.parametrize("kind", WRITE)
@given(rows=ROWS, data=st.data())
def test_texts_in_tables(kind: str, rows: Rows, data: st.DataObject) -> None:
    """A row with a blank question cannot be used; a table needs a row that can."""
    rows = [("000123", "what?", "007"), *rows]
    if kind == "tsv":
        rows = [(image, on_one_line(question), on_one_line(answer)) for image, question, answer in rows]
    with new_folder() as folder:
        source = WRITE[kind](folder, rows, data.draw)
        streaming = None if kind == "saved" else data.draw(st.booleans(), label="streaming")
        records = read(source, streaming)
    found = [(record.image, record.question, record.captions) for record in records]
    images = [row[0].encode() if kind == "shard" else str(folder / row[0]) for row in rows]
    if kind == "saved":
        images = [str(folder / "saved" / row[0]) for row in rows]
    texts = [(expected(row[1]) or None, (expected(row[2]),) if expected(row[2]) else ()) for row in rows]
    assert found == [(image, *each) for image, each in zip(images, texts, strict=True)]
    assert [record.skip_reason is None for record in records] == [question is not None for question, _ in texts]


@given(texts=st.lists(TEXTS, min_size=1, max_size=30), data=st.data())
def test_texts_in_text_files_of_folders(texts: list[str], data: st.DataObject) -> None:
    texts = [on_one_line(text) for text in texts]
    with new_folder() as folder:
        for number, text in enumerate(texts):
            (folder / f"{number:06}.jfif").touch()
            (folder / f"{number:06}.txt").write_bytes(encode(f"{text}\nthe last line\n", data.draw))
        found = [record.captions for record in read(folder)]
    assert found == [tuple(filter(None, (expected(text), "the last line"))) for text in texts]


@given(texts=st.lists(TEXTS, min_size=1, max_size=30), data=st.data())
def test_texts_in_shards(texts: list[str], data: st.DataObject) -> None:
    with new_folder() as folder:
        with tarfile.open(folder / "0.tar", "w") as tar:
            for number, text in enumerate(texts):
                for kind, content in (("avif", b"image"), ("txt", encode(text, data.draw))):
                    entry = tarfile.TarInfo(f"{number}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        for streaming in (True, False):
            found = read(folder / "0.tar", streaming)
            assert [record.captions for record in found] == [(expected(t),) if expected(t) else () for t in texts]
            assert {record.image for record in found} == {b"image"}
