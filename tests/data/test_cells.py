"""Values that cells of tables may hold, and the errors for those that are refused."""

import io
import json
import logging
import os
import struct
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from blip2.config import DataConfig
from blip2.data import json_stream, tables
from blip2.data.cells import CellError, read_image_cell, read_text, read_texts
from blip2.data.records import Record, Records
from blip2.data.sources import open_records
from blip2.errors import InputError
from fixtures.corpus import write_tar


def read(source: Path | str, **settings: Any) -> list[Record]:
    records = open_records(str(source), DataConfig(train=str(source), **settings))
    return [records[i] for i in range(len(records))] if isinstance(records, Records) else list(records.read())


def skip_reason(record: Record) -> str:
    assert record.skip_reason is not None
    return f"{record.skip_reason[0]}: {record.skip_reason[1]}"


# -- cells -----------------------------------------------------------------------------------------------------------

ANSWER = {"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}


@pytest.mark.parametrize(
    ("cell", "texts", "num_blank"),
    [
        ([ANSWER, {**ANSWER, "answer": "no"}], ("yes", "no"), 0),
        ({"answer": ["yes", "no"], "answer_id": [1, 2]}, ("yes", "no"), 0),
        ({"raw": " A  cat. ", "tokens": ["a", "cat"], "sentid": 2}, ("A cat.",), 0),
        (["cat", "", " ", None], ("cat",), 2),
        (b"un caf\xc3\xa9", ("un café",), 0),
        ("a cat".encode("utf-16"), ("a cat",), 0),
        ([7, 2.5], ("7", "2.5"), 0),
    ],
)
def test_read_texts(cell: object, texts: tuple[str, ...], num_blank: int) -> None:
    assert read_texts(cell) == (texts, num_blank)


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (
            {"text": "a", "lang": "en"},
            "holds an object with the keys text, lang, expected text, or an object with either",
        ),
        ({"answer": "a", "raw": "b"}, "holds an object with the keys answer, raw"),
        ({}, "holds {}, expected text"),
        ([["a cat"], ["a dog"]], "holds a list of 1, expected text"),
        ([{"from": "human", "value": "hi"}], "holds an object with the keys from, value"),
        (True, "holds the truth value true, expected text"),
        (float("nan"), "holds nan, expected text"),
        (b"un caf\xe9", "holds the byte 0xe9, which is not UTF-8, after 'un caf'"),
        ("a \ud83d cat", r"holds half of a surrogate pair (\ud83d) after 'a '"),
        ("a\0b", "holds the character NUL after 'a'"),
        ("a cat".encode("utf-16-le"), "holds the character NUL"),
        ("<image>\nWhat is it?", "holds <image>, expected text only"),
        (object, "holds a value of type type"),
    ],
)
def test_invalid_texts_are_refused(cell: object, found: str) -> None:
    with pytest.raises(CellError) as error:
        read_texts(cell)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_a_question_is_one_text() -> None:
    assert read_text(b"what?") == "what?"
    with pytest.raises(CellError, match="a list of 2, expected text"):
        read_text(["what?", "why?"])


@pytest.mark.parametrize(
    ("cell", "image"),
    [
        ("000123", "000123"), (5, "5"), (["a.png"], "a.png"), (b"png", b"png"), (bytearray(b"png"), b"png"), ("", None),
        ({"bytes": None, "path": "a.png"}, "a.png"), ([{"bytes": b"png", "path": "a.png"}], b"png"), ([], None),
        ("C:/a.png", "C:/a.png"), ("~a.png", "~a.png"),
    ],
)  # fmt: skip
def test_read_image_cell(cell: object, image: object) -> None:
    assert read_image_cell(cell) == image


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (["a.png", "b.png"], "holds a list of 2 images, expected one"),
        ("https://x.org/a.png", "holds the URL 'https://x.org/a.png', expected the path of a file: download"),
        ("s3://bucket/a.png", "holds the URL"),
        ("file:///a.png", "holds the URL 'file:///a.png', expected the path of a file: leave out file://"),
        ("data:image/png;base64,AAAA", "holds the data URL"),
        ("~/a.png", "whose ~ only a shell expands"),
        ("/9j/4AAQ" * 1000, "holds a text of 8,000 characters that begins with '/9j/4AAQ/9j/4AAQ/9j/4AAQ/9j/4A'"),
        ({"coco_url": "x", "id": 1}, "holds an object with the keys coco_url, id, expected a path"),
        (True, "holds the truth value true"),
    ],
)
def test_invalid_image_cells_are_refused(cell: object, found: str) -> None:
    with pytest.raises(CellError) as error:
        read_image_cell(cell)
    assert found in str(error.value)


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        (
            "a.csv",
            "image,caption\na.png,a cat\n\nb.png,a cat, a dog\n",
            "a.csv line 4 has 3 cells, expected 2 (image, cap",
        ),
        ("a.csv", "image,caption\na.png,a cat\nb.png\n", "a.csv line 3 has 1 cells, expected 2"),
        (
            "a.csv",
            'image,caption\na.png,"a\ncat"\nb.png,"a dog\nc.png,a cow\n',
            "a.csv line 4 is not CSV (unexpected end",
        ),
        ("a.csv", 'image,caption\na.png,"a" cat\n', "a.csv line 2 is not CSV"),
        ("a.csv", "image,image\na.png,b.png\n", "a.csv has the column image more than once"),
        ("a.tsv", "image\tcaption\na.png\ta\tcat\n", "a.tsv line 2 has 3 cells, expected 2"),
        (
            "a.jsonl",
            '{"image": "a.png", "caption": "a"}\n\n["a"]\n',
            "a.jsonl line 3 is a list of 1, expected an object",
        ),
        ("a.jsonl", "[" * 100_000, "a.jsonl"),
        ("a.json", '[{"image": "a.png", "caption": "a"}, {"image"]', "a.json is not JSON after entry 1"),
        ("a.json", '{\n "data": []\n}', "a.json line 1 is not JSON"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_tables_are_refused(tmp_path: Path, name: str, text: str, found: str, streaming: bool) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        read(tmp_path / name, streaming=streaming)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_without_end_is_not_read_into_memory(
    tmp_path: Path, name: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file may have hundreds of gigabytes."""
    parts: list[str] = []

    class Text(io.TextIOWrapper):
        def readline(self, size: int = -1) -> str:
            parts.append(super().readline(size))
            return parts[-1]

        def read(self, size: int | None = -1) -> str:
            parts.append(super().read(size))
            return parts[-1]

    monkeypatch.setattr(io, "TextIOWrapper", Text)
    for module in (tables, json_stream):
        monkeypatch.setattr(module, "MAX_LINE_CHARACTERS", 1000, raising=False)
        monkeypatch.setattr(module, "MAX_VALUE_CHARACTERS", 1000)
    start = {"a.json": '[{"image": "a.png", "caption": "a"}, {"image": "', "a.jsonl": '{"image": "'}
    (tmp_path / name).write_text(start.get(name, "") + "x" * 3_000_000)
    with pytest.raises(InputError, match=r"has more than the 1,000 characters allowed|is not JSON after entry 1"):
        read(tmp_path / name, streaming=streaming)
    assert sum(map(len, parts)) < 1_100_000  # a chunk of JSON is 1 << 20


@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_rows_use_themselves_are_no_columns(tmp_path: Path, streaming: bool) -> None:
    others = {"__where__": 3, "__broken__": "x", "__refused__": 5, "__begins__": "y"}
    rows = [{"image": f"{n}.png", "caption": "a disc", **others} for n in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.parquet", "saved"):
        found = read(tmp_path / name, streaming=streaming)
        assert [(record.captions, record.error, record.skip_reason) for record in found] == [
            (("a disc",), None, None)
        ] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_that_pandas_stored_as_floats(tmp_path: Path, streaming: bool) -> None:
    """A column of integers with an empty cell is a column of floats with NaN."""
    columns = {
        "image": ["a", "b", "c"],
        "question": ["q"] * 3,
        "answer": ["x"] * 3,
        "question_id": [1.0, float("nan"), 2.5],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    found = [record.metadata.get("question_id") for record in read(tmp_path / "a.parquet", streaming=streaming)]
    assert found == [1, None, 2.5] and type(found[0]) is int


def test_a_pipe_in_a_saved_dataset_is_not_opened(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"image": "a.png", "caption": "a"}]).save_to_disk(tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match=f"has no file {file.name}: copy or save the dataset again"):
        read(tmp_path)


def test_numbers_in_json_are_read_as_written(tmp_path: Path) -> None:
    texts = ["2", "2.50", "1e5", "-0", "123456789012345678901234567890", "1" * 5000]
    rows = "".join(
        f'{{"image": "a.png", "question": "q", "answer": {text}, "question_id": {n}}}\n' for n, text in enumerate(texts)
    )
    (tmp_path / "a.jsonl").write_text(rows)
    found = read(tmp_path / "a.jsonl")
    assert [record.captions for record in found] == [(text,) for text in texts]
    assert [record.metadata for record in found] == [{"question_id": n} for n in range(6)]


def test_ids_in_csv_are_numbers_if_no_digit_is_lost(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "image,question,answer,question_id\na,q,2,7\na,q,2,007\na,q,2,x\na,q,2,1.0\na,q,2,\n"
    )
    assert [r.metadata.get("question_id") for r in read(tmp_path / "a.csv")] == [7, "007", "x", "1.0", None]


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_rows_have_a_skip_reason(tmp_path: Path, streaming: bool) -> None:
    cells = ["fine", {"text": "x"}, "\ud83d", True, "fine"]
    rows = [json.dumps({"image": "a.png", "caption": cell}) for cell in cells]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl").write_bytes(
        b'{"image": "a.png", "caption": "fine"}\n{"image": "a.png", "caption": "caf\xe9"}\n'
    )
    found = read(tmp_path / "*.jsonl", streaming=streaming)
    assert [record.captions for record in found] == [("fine",), (), (), (), ("fine",), ("fine",), ()]
    assert [record.skip_reason is None for record in found] == [True, False, False, False, True, True, False]
    assert skip_reason(found[1]).startswith("caption: caption holds an object with the keys text")
    assert "0xe9" in skip_reason(found[6])


def test_a_table_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": [["a"]]}\n' * 3)
    with pytest.raises(InputError, match=r"none of the first 3 rows of .*a\.jsonl row 0 .*: caption holds a list of 1"):
        read(tmp_path / "a.jsonl")


def test_questions_with_an_image_placeholder_are_skipped(tmp_path: Path) -> None:
    """Files of LLaVA contain the placeholder."""
    rows = [{"image": "a.png", "question": question, "answer": "a"} for question in ("what?", "<image>\nwhat?")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read(tmp_path / "a.jsonl")
    assert first.skip_reason is None
    assert skip_reason(second).startswith("question: question holds <image>")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet", "tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_blank_questions_are_skipped(tmp_path: Path, suffix: str, streaming: bool) -> None:
    """Their answers are no captions. A row of JSON may also lack the question."""
    cells = ["what?", "", " \t "[: 1 if suffix == "tsv" else 3], None]
    rows: list[dict[str, Any]] = [{"image": "a.png", "question": cell, "answer": "red"} for cell in cells]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "tar":
        members = [{f"{n}.png": b"png", f"{n}.json": json.dumps(row).encode()} for n, row in enumerate(rows)]
        write_tar(path, {name: data for each in members for name, data in each.items()})
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]) + '{"image": "a.png", "answer": "red"}\n')
    else:
        comma = {"csv": ",", "tsv": "\t"}[suffix]
        lines = ([row["image"], row["question"] or "", row["answer"]] for row in rows)
        path.write_text("".join(comma.join(line) + "\n" for line in [list(rows[0]), *lines]))
    first, *blank = read(path, streaming=streaming)
    assert (first.question, first.captions, first.skip_reason) == ("what?", ("red",), None)
    assert {skip_reason(record) for record in blank} == {
        "question: question is blank, expected a question: write the question, or remove the row"
    }


def test_a_table_of_blank_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,question,answer\na.png,,yes\nb.png,,no\n")
    with pytest.raises(InputError, match=r"none of the first 2 rows .* question is blank, expected a question"):
        read(tmp_path / "a.csv")


def test_the_rows_of_a_json_file_may_have_different_captions(tmp_path: Path) -> None:
    rows = [{"caption": "a"}, {"sentences": ["b", "c"]}, {"text": "e", "captions": "d"}, {}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
    for streaming in (False, True):
        found = read(tmp_path / "a.jsonl", streaming=streaming)
        assert [record.captions for record in found] == [("a",), ("b", "c"), ("d",), ()]
        found = read(tmp_path / "a.jsonl", streaming=streaming, caption_column="captions")
        assert [record.captions for record in found] == [(), (), ("d",), ()]


# -- datasets of the Hub ---------------------------------------------------------------------------------------------


def hub_like() -> datasets.Dataset:
    answer = {"answer": datasets.Value("string"), "answer_id": datasets.Value("int64")}
    features = {
        "images": datasets.List(datasets.Image()),
        "mask": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "labels": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
        "answers": datasets.List(answer),
    }
    row = {
        "images": [{"bytes": b"png", "path": None}],
        "mask": {"bytes": b"no image", "path": None},
        "labels": [1, 0],
        "answers": [{"answer": "yes", "answer_id": 1}] * 2,
    }
    return datasets.Dataset.from_list([{**row, "label": n} for n in (1, 0, -1)], datasets.Features(features))


@pytest.mark.parametrize("kind", ["saved", "parquet", "parquet stream"])
def test_class_labels_and_objects(tmp_path: Path, kind: str) -> None:
    streaming = True if kind == "parquet stream" else None
    (tmp_path / "[1]").mkdir()
    source = tmp_path / "[1]" / ("saved" if kind == "saved" else "a.parquet")
    hub_like().save_to_disk(str(source)) if kind == "saved" else hub_like().to_parquet(str(source))

    def texts(column: str) -> list[tuple[str, ...]]:
        found = read(source, image_column="images", caption_column=column, streaming=streaming)
        assert [record.image for record in found] == [b"png"] * 3
        return [record.captions for record in found]

    assert texts("label") == [("dog",), ("cat",), ()]
    assert texts("labels") == [("dog", "cat")] * 3
    assert texts("answers") == [("yes", "yes")] * 3


# -- folders and shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_parquet_with_texts_that_are_not_utf_8(tmp_path: Path, streaming: bool, listed: bool) -> None:
    """Arrow does not check texts. One such text makes one row unusable."""
    buffers = [None, pyarrow.py_buffer(struct.pack("<3i", 0, 4, 9)), pyarrow.py_buffer(b"caf\xe9a dog")]
    captions = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    captions = pyarrow.ListArray.from_arrays([0, 1, 2], captions) if listed else captions
    table = pyarrow.table({"image": ["a.png", "b.png"], "caption": captions})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    bad, good = read(tmp_path / "rows.parquet", streaming=streaming)
    assert "caption holds the byte 0xe9, which is not UTF-8, after 'caf'" in skip_reason(bad)
    assert good.captions == ("a dog",)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_without_a_name_is_one_unusable_row(tmp_path: Path, streaming: bool) -> None:
    features = datasets.Features(
        {"image": datasets.Value("string"), "caption": datasets.ClassLabel(names=["cat", "dog"])}
    )
    table = pyarrow.table({"image": ["a.png", "b.png"], "caption": [5, 1]}, metadata=features.arrow_schema.metadata)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    bad, good = read(tmp_path / "rows.parquet", streaming=streaming)
    assert "caption holds the class 5, expected a number from 0 to 1" in skip_reason(bad)
    assert good.captions == ("dog",)


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow"])
def test_the_format_of_a_saved_dataset_has_no_effect(tmp_path: Path, kind: str) -> None:
    pairs = datasets.Dataset.from_dict({"image": ["a.png"], "caption": [["a", "b"]], "question_id": [7]})
    pairs.with_format(kind, columns=["image"]).save_to_disk(str(tmp_path / "saved"))
    (record,) = read(tmp_path / "saved")
    assert (record.captions, record.metadata) == (("a", "b"), {"question_id": 7})


def test_text_files_in_other_encodings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "a.jfif": b"\xef\xbb\xbfa dog",
        "b.avif": "a cat".encode("utf-16"),
        "c.JPE": b"un caf\xe9",
        "d.png": b"a\0",
    }
    for name, text in texts.items():
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_bytes(text)
    for name in ("e.heic", "e.txt", "f.mp4", "README"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING, "blip2"):
        found = read(tmp_path)
    assert [record.captions for record in found] == [("a dog",), ("a cat",), (), ()]
    assert "0xe9" in skip_reason(found[2]) and "NUL" in skip_reason(found[3])
    (message,) = caplog.messages
    assert "left out 4 files, which are neither images that Pillow reads nor the .txt file of an image: " in message
    assert all(part in message for part in ("1 .heic", "1 .mp4", "1 .txt", "1 without a suffix"))


def test_suffixes_in_upper_case(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.png", "c.Png"):
        (tmp_path / name).touch()
    for name, text in (("a.Txt", "one"), ("b.TXT", "two"), ("c.txt", "three")):
        (tmp_path / name).write_text(text)
    assert [record.captions for record in read(tmp_path)] == [("one",), ("two",), ("three",)]
    (tmp_path / "b.txt").write_text("two")
    with pytest.raises(InputError, match=r"holds \S*b\.TXT and \S*b\.txt, expected one of them: remove the other"):
        read(tmp_path)
    (tmp_path / "metadata.JSONL").write_text('{"image": "a.JPG", "caption": "first"}\n')
    assert [record.captions for record in read(tmp_path)] == [("first",)]
    write_tar(tmp_path / "0.TAR", {"a.PNG": b"png", "a.TXT": b"four"})
    write_tar(tmp_path / "1.tar", {"a.PNG": b"png", "a.TXT": b"five"})
    assert [record.captions for record in read(tmp_path / "*.tar")] == [("four",), ("five",)]
    assert [record.captions for record in read(f"laion:train:{tmp_path}")] == [("four",), ("five",)]
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.JPG", "caption": "second"}\n')
    with pytest.raises(InputError, match=r"holds metadata\.JSONL and metadata\.jsonl, expected one of them"):
        read(tmp_path)


def test_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / name).write_bytes(b"png")
    except OSError:
        pytest.skip("this file system has no such names")
    (tmp_path / name).with_suffix(".txt").write_text("a cup")
    (tmp_path / "a.csv").write_bytes(b"image,caption\ncaf\xe9.png,a cup\n")
    shard = write_tar(tmp_path / os.fsdecode(b"\xe9.tar"), {name: b"png", name.replace("png", "txt"): b"a cup"})
    for source in (tmp_path, tmp_path / "a.csv", shard):
        (record,) = read(source)
        image = record.image if isinstance(record.image, bytes) else Path(record.image or "").read_bytes()
        assert (image, record.captions) == (b"png", ("a cup",))
        assert record.image_id >= 0


def test_patterns_with_brackets_in_names(tmp_path: Path) -> None:
    for name in ("[2024] a.jsonl", "[2024] b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"image": "a.png", "caption": name}) + "\n")
    assert [record.captions for record in read(tmp_path / "[2024] *.jsonl")] == [
        ("[2024] a.jsonl",),
        ("[2024] b.jsonl",),
    ]


def test_common_image_formats_are_preferred_in_samples(tmp_path: Path) -> None:
    """A sample may have several members that Pillow reads."""
    write_tar(tmp_path / "0.tar", {"0.bw": b"no", "0.jpg": b"yes", "0.txt": b"a", "1.jpe": b"yes", "1.txt": b"b"})
    assert [record.image for record in read(tmp_path / "0.tar")] == [b"yes", b"yes"]
