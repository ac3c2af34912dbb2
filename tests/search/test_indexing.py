"""What an index run adds, changes and deletes, and that a killed run loses and doubles nothing."""

import json
import os
import random
import signal
import tempfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image

from blip2.errors import InputError
from blip2.io import lock_folder
from blip2.search import indexing
from blip2.search.columns import TYPES, column_name, convert_cell, infer_types
from blip2.search.indexing import index
from blip2.search.library import Library
from conftest import draw
from fixtures.corpus import write_tar
from fixtures.library import die_while_writing
from fixtures.processes import finish, start


def counts(report):
    return {name: getattr(report, name) for name in ("added", "updated", "deleted", "unchanged", "embedded")}


def contents(uri):
    """The rows of a library, but for times of modification; a name comes once."""
    rows = Library.open(uri).table.to_arrow().to_pylist()
    assert len({(row["source"], row["image"]) for row in rows}) == len(rows)
    return {row["image"]: {key: cell for key, cell in row.items() if key != "modified"} for row in rows}


def same(found, expected):
    """Equal rows, whose vectors may differ in the last bits: batches are of other sizes."""
    assert found.keys() == expected.keys()
    for name, row in found.items():
        other = expected[name]
        assert {**row, "vectors": None} == {**other, "vectors": None}
        assert np.allclose(row["vectors"], other["vectors"], atol=2e-3)


# -- bringing up to date ---------------------------------------------------------------------------------------------


def test_only_what_changed_is_embedded(pipeline, photos, tmp_path):
    library = tmp_path / "library"
    first = index(pipeline, str(photos), library)
    assert counts(first) == {"added": 12, "updated": 0, "deleted": 0, "unchanged": 0, "embedded": 12}
    again = index(pipeline, str(photos), library)
    assert counts(again) == {"added": 0, "updated": 0, "deleted": 0, "unchanged": 12, "embedded": 0}

    (photos / "red-disc.png").unlink()
    (photos / "red-square.png").rename(photos / "sub.png")
    draw("disc", "yellow", 70).save(photos / "blue-disc.png")
    (photos / "green-disc.txt").write_text("a green disc\nround")
    os.utime(photos / "blue-stripe.png", (1, 1))
    draw("stripe", "red", 70).save(photos / "new.png")
    changed = index(pipeline, str(photos), library)
    # The caption and the time are written, but nothing is embedded for them, nor for the new name.
    assert counts(changed) == {"added": 2, "updated": 3, "deleted": 2, "unchanged": 8 - 1, "embedded": 2}
    index(pipeline, str(photos), tmp_path / "fresh")
    same(contents(library), contents(tmp_path / "fresh"))
    assert counts(index(pipeline, str(photos), library))["unchanged"] == 12


def test_two_images_that_change_places(pipeline, photos, tmp_path, monkeypatch):
    """The vectors of each are those of the other, one of which is gone when the second row is written."""
    monkeypatch.setattr("blip2.search.indexing.WRITE_ROWS", 1)
    index(pipeline, str(photos), tmp_path / "library")
    a, b = photos / "blue-disc.png", photos / "red-disc.png"
    a.rename(photos / "x"), b.rename(a), (photos / "x").rename(b)
    report = index(pipeline, str(photos), tmp_path / "library")
    assert report.updated == 2 and report.skipped == []
    index(pipeline, str(photos), tmp_path / "fresh")
    same(contents(tmp_path / "library"), contents(tmp_path / "fresh"))


def test_several_sources(pipeline, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    draw("disc", "red", 33).save(other / "a.png")
    library = tmp_path / "library"
    index(pipeline, str(photos), library)
    report = index(pipeline, str(other), library)
    assert (report.added, report.deleted, report.images) == (1, 0, 13)
    assert index(pipeline, str(photos), library).images == 13
    assert Library.open(library).delete(f"source = '{photos}'") == 12
    assert index(pipeline, str(other), library).images == 1


def test_broken_images_are_counted_and_named(pipeline, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "cut.png").write_bytes((photos / "red-disc.png").read_bytes()[:60])
    (photos / "empty.jpg").touch()
    library = tmp_path / "library"
    report = index(pipeline, str(photos), library)
    assert report.added == 12 and report.as_json()["skipped"] == {"image not decoded": 3}
    named = [json.loads(line) for line in (library / "skipped.jsonl").read_text().splitlines()]
    assert [Path(row["image"]).name for row in named] == ["broken.png", "cut.png", "empty.jpg"]
    assert "is not an image" in named[0]["message"]
    draw("disc", "red", 9).save(photos / "broken.png")  # repaired
    (photos / "red-disc.png").write_bytes(b"damaged")
    report = index(pipeline, str(photos), library)
    assert (report.added, report.deleted, len(report.skipped)) == (1, 1, 3)


def test_an_image_that_cannot_be_read_for_now_stays(pipeline, photos, tmp_path):
    table = photos / "images.csv"
    table.write_text("image\nred-disc.png\nblue-disc.png\n")
    library = tmp_path / "library"
    index(pipeline, str(table), library)
    (photos / "red-disc.png").rename(tmp_path / "away.png")
    report = index(pipeline, str(table), library)
    assert (report.deleted, report.images) == (0, 2)
    assert report.as_json()["skipped"] == {"image not read": 1}


# -- forms of data ---------------------------------------------------------------------------------------------------


def test_a_table_in_which_an_image_has_several_rows(pipeline, photos, tmp_path):
    table = photos / "images.csv"
    table.write_text(
        "image,caption,year,code\nred-disc.png,a disc,2001,007\nblue-disc.png,b,2002,x\nred-disc.png,round,2001,1\n"
    )
    report = index(pipeline, str(table), tmp_path / "library")
    assert report.images == 2 and report.notes == []
    library = Library.open(tmp_path / "library", pipeline)
    assert library.columns == {"year": "int64", "code": "string"}
    (hit,) = library.search("a disc", where="year = 2001")
    assert hit.captions == ("a disc", "round") and hit.metadata["code"] == "007"


def test_shards_store_their_images_in_the_library(pipeline, photos, tmp_path):
    names = sorted(photos.glob("*.png"))
    members = {}
    for number, path in enumerate(names[:4]):
        members[f"{number}.png"] = path.read_bytes()
        members[f"{number}.txt"] = f"caption {number}".encode()
        members[f"{number}.json"] = json.dumps({"score": number / 4, "tags": ["a", number]}).encode()
    write_tar(tmp_path / "0.tar", members)
    source, library = str(tmp_path / "{0..0}.tar"), tmp_path / "library"
    assert index(pipeline, source, library).added == 4
    assert counts(index(pipeline, source, library))["unchanged"] == 4
    opened = Library.open(library, pipeline)
    assert opened.columns["score"] == "double" and opened.columns["tags"] == "string"
    for path in photos.glob("*.png"):
        path.unlink()
    hits = opened.search("a disc", where="score >= 0.5")
    assert sorted(hit.captions for hit in hits) == [("caption 2",), ("caption 3",)]
    assert all(hit.match is not None for hit in hits)
    assert opened.read_image(hits[0]) in members.values()
    # What cannot be read to its end deletes nothing.
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:4096])
    report = index(pipeline, source, library)
    assert report.images == 4 and report.as_json()["skipped"] == {"shard broken": 1}
    assert report.notes == ["no image was deleted, because a part of the source could not be read"]


def test_data_sets_of_the_library_datasets(pipeline, photos, tmp_path):
    names = sorted(map(str, photos.glob("*.png")))[:3]
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), "day": datasets.Value("date32")}
    )
    days = [np.datetime64(f"2020-01-0{n}").astype(object) for n in (1, 2, 3)]
    rows = {"image": [Path(name).read_bytes() for name in names], "kind": [0, 1, 0], "day": days}
    rows["image"] = [{"bytes": data, "path": None} for data in rows["image"]]
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    assert index(pipeline, str(tmp_path / "saved"), tmp_path / "library").added == 3
    (hit,) = Library.open(tmp_path / "library", pipeline).search("a", where="kind = 'dog' AND day < '2020-01-03'")
    assert hit.metadata == {"kind": "dog", "day": "2020-01-02"}


def test_columns_that_come_later(pipeline, photos, tmp_path):
    table, library = photos / "images.jsonl", tmp_path / "library"
    rows = [{"image": "red-disc.png", "year": 1}, {"image": "blue-disc.png", "year": 2}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index(pipeline, str(table), library)
    rows = [{**rows[0], "place": "Rome"}, {**rows[1], "year": "late"}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = index(pipeline, str(table), library)
    assert (report.updated, report.embedded) == (2, 0)
    assert report.notes == [
        f"column year: 1 cells are stored as missing; the first, of {table} row 1 ({photos}/blue-disc.png), is 'late',"
        " expected int"
    ]
    assert {row["place"] for row in contents(library).values()} == {"Rome", None}


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([1, 2], "int"), (["1", "-20"], "int"), (["1", 2.5], "float"), (["1e-3", None], "float"), (["007"], "text"),
        ([True, False], "bool"), ([True, 1], "text"), ([2**70], "text"), (["nan", 1.0], "text"),
        ([float("nan"), 1], "int"), ([["a"], 1], "text"), ([{"a": 1}], "text"),
    ],
)  # fmt: skip
def test_types_of_columns(cells, kind):
    found = infer_types({"a": cell} for cell in cells if cell is not None)
    assert found == {"a": TYPES[kind]}
    for cell in cells:
        assert pyarrow.array([convert_cell(cell, found["a"])], found["a"])


def test_names_of_columns():
    names = ["year", "Taken at", "digest", "2020", "a.b", "\udcff", "straße"]
    found = ["year", "Taken_at", "source_digest", "source_2020", "a_b", "_", "stra_e"]
    assert [column_name(name, ["digest"]) for name in names] == found
    assert convert_cell("\ud800", TYPES["text"]) == "\\ud800"


def test_two_columns_with_one_name(pipeline, photos, tmp_path):
    (photos / "images.csv").write_text("image,Taken at,Taken_at\nred-disc.png,1,2\n")
    with pytest.raises(InputError, match="found the columns 'Taken at' and 'Taken_at', which would both be"):
        index(pipeline, str(photos / "images.csv"), tmp_path / "library")


# -- writing ---------------------------------------------------------------------------------------------------------


def test_one_writer_at_a_time(pipeline, photos, tmp_path):
    with lock_folder(tmp_path / "library"), pytest.raises(InputError, match="is in use by another job"):
        index(pipeline, str(photos), tmp_path / "library")


def test_a_locked_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = "s3://photos/library"
    with indexing._lock(uri), pytest.raises(InputError, match=f"^{uri} is in use by"), indexing._lock(uri):
        pass


def test_another_writer_is_noticed(pipeline, photos, tmp_path, monkeypatch):
    """One that does not know the lock, such as a process on another machine."""
    library = tmp_path / "library"
    index(pipeline, str(photos), library)
    draw("disc", "red", 33).save(photos / "new.png")
    embed = pipeline.embed_images

    def change(*arguments):
        Library.open(library).delete("true")
        return embed(*arguments)

    monkeypatch.setattr(pipeline, "embed_images", change)
    with pytest.raises(InputError, match="was changed by another process while this one was writing to it"):
        index(pipeline, str(photos), library)


KILLS = int(os.environ.get("BLIP2_KILLS", 2))
"""BLIP2_KILLS=10 kills ten times."""


def test_killed_at_random_moments(run, pipeline, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60 * KILLS):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(photos / f"{number:04}.png")
    library, log, moments = tmp_path / "library", tmp_path / "log", random.Random(5)
    index(pipeline, str(photos), tmp_path / "calm")

    arguments = ["index", str(run), str(photos), "--output", str(library), "--device", "cpu"]
    resumed_from = []
    for _ in range(KILLS):
        status, printed = finish(start(arguments, log, partial(die_while_writing, 3, moments.uniform(0, 0.1))), log)
        assert status == -signal.SIGKILL, printed
        resumed_from.append(len(contents(library)))
    assert resumed_from == sorted(set(resumed_from)) and resumed_from[-1] < 60 * KILLS
    status, printed = finish(start(arguments, log), log)
    assert status == 0, printed
    same(contents(library), contents(tmp_path / "calm"))
