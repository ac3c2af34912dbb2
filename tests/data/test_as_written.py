"""Texts are read exactly as they were written, in every format.

Texts are random. BLIP2_CASES sets their number for each format (10000 take some minutes), BLIP2_SEED the seed.
"""

import csv
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from blip2.config import DataConfig
from blip2.data.records import Record, Records
from blip2.data.sources import open_records

CASES, SEED = int(os.environ.get("BLIP2_CASES", "150")), int(os.environ.get("BLIP2_SEED", "0"))
BATCH_SIZE = max(50, CASES // 40)
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


def draw_text(rng: random.Random) -> str:
    def piece() -> str:
        if rng.random() < 0.7:
            return rng.choice(PIECES)
        # Any character except NUL and lone surrogates, which are refused.
        spans = ((1, 128), (1, 0xD800), (0xE000, 0x110000))
        return "".join(chr(rng.randrange(*rng.choice(spans))) for _ in range(rng.randrange(1, 6)))

    return "".join(piece() for _ in range(rng.choice((1, 1, 2, 3, 5))))


def on_one_line(text: str) -> str:
    return text.translate({ord("\t"): " ", ord("\n"): " ", ord("\r"): " "})


def expected(text: str) -> str:
    return " ".join(text.split())


def encode(text: str, rng: random.Random) -> bytes:
    marked = text.startswith(("\ufeff", "\ufffe"))  # would be read as a byte order mark
    kind = rng.choice(("utf-8-sig", "utf-16", "utf-16-be", "utf-8"))
    if kind == "utf-16-be":
        return b"\xfe\xff" + text.encode(kind)
    return text.encode("utf-8-sig" if kind == "utf-8" and marked else kind)


Rows = list[tuple[str, str, str]]
"""Tuples of image, question and answer."""


def write_delimited(suffix: str) -> Callable[[Path, Rows, random.Random], Path]:
    def write(folder: Path, rows: Rows, rng: random.Random) -> Path:
        out = io.StringIO(newline="")
        if suffix == "csv":
            quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
            end = rng.choice(("\r\n", "\n")) if quoting == csv.QUOTE_ALL else "\r\n"
            writer = csv.writer(out, quoting=quoting, lineterminator=end)
            writer.writerows([("image", "question", "answer"), *rows])
        else:
            end = rng.choice(("\r\n", "\n"))
            out.write("".join("\t".join(row) + end for row in [("image", "question", "answer"), *rows]))
        path = folder / f"rows.{suffix}"
        path.write_bytes(encode(out.getvalue(), rng))
        return path

    return write


def as_dicts(rows: Rows) -> list[dict[str, str]]:
    return [dict(zip(("image", "question", "answer"), row, strict=True)) for row in rows]


def write_jsonl(folder: Path, rows: Rows, rng: random.Random) -> Path:
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in as_dicts(rows)]
    (folder / "rows.jsonl").write_bytes(encode("\n".join(lines), rng))
    return folder / "rows.jsonl"


def write_json(folder: Path, rows: Rows, rng: random.Random) -> Path:
    text = json.dumps(as_dicts(rows), ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    (folder / "rows.json").write_bytes(encode(text, rng))
    return folder / "rows.json"


def write_parquet(folder: Path, rows: Rows, rng: random.Random) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_dicts(rows)), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder: Path, rows: Rows, rng: random.Random) -> Path:
    datasets.Dataset.from_list(as_dicts(rows)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def write_shard(folder: Path, rows: Rows, rng: random.Random) -> Path:
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
NAMES = ("000123", "1.50", "NA", "null", "true", "2020-01-02", "a b.png", "ü.png", "[1].png", "-1", "None.jpg")


def read(source: Path, streaming: bool | None = None) -> list[Record]:
    records = open_records(str(source), DataConfig(train=str(source), streaming=streaming))
    return [records[i] for i in range(len(records))] if isinstance(records, Records) else list(records.read())


@pytest.mark.parametrize("kind", WRITE)
def test_texts_in_tables(kind: str, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} {kind}")
    for batch in range(-(-CASES // BATCH_SIZE)):
        rows = [(rng.choice(NAMES), draw_text(rng), draw_text(rng)) for _ in range(BATCH_SIZE)]
        if kind == "tsv":
            rows = [(image, on_one_line(question), on_one_line(answer)) for image, question, answer in rows]
        folder = tmp_path / f"[{batch}]"
        folder.mkdir()
        source = WRITE[kind](folder, rows, rng)
        streaming = None if kind == "saved" else batch % 2 == 1
        found = [(record.image, record.question, record.captions) for record in read(source, streaming)]
        images = [row[0].encode() if kind == "shard" else str(folder / row[0]) for row in rows]
        if kind == "saved":
            images = [str(folder / "saved" / row[0]) for row in rows]
        texts = [(expected(row[1]) or None, (expected(row[2]),) if expected(row[2]) else ()) for row in rows]
        assert found == [(image, *each) for image, each in zip(images, texts, strict=True)]


def test_texts_in_text_files_of_folders(tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} txt")
    texts = [on_one_line(draw_text(rng)) for _ in range(CASES)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:06}.jfif").touch()
        (tmp_path / f"{number:06}.txt").write_bytes(encode(f"{text}\nthe last line\n", rng))
    found = [record.captions for record in read(tmp_path)]
    assert found == [tuple(filter(None, (expected(text), "the last line"))) for text in texts]


def test_texts_in_shards(tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} tar")
    texts = [draw_text(rng) for _ in range(CASES)]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, text in enumerate(texts):
            for kind, data in (("avif", b"image"), ("txt", encode(text, rng))):
                entry = tarfile.TarInfo(f"{number}.{kind}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    for streaming in (True, False):
        found = read(tmp_path / "0.tar", streaming)
        assert [record.captions for record in found] == [(expected(t),) if expected(t) else () for t in texts]
        assert {record.image for record in found} == {b"image"}
