"""Arrays of features are read from every format, and a bad one is refused in one line without being executed."""

import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save, save_file

from blip2 import InputError
from blip2.backbones.features import FeatureFormat
from blip2.config import DataConfig
from blip2.data.arrays import read_features, read_input, split_key, stack_inputs
from blip2.data.images import ImageError
from blip2.data.sources import open_records

FORM = FeatureFormat(3, 5)
ARRAY = np.arange(12, dtype=np.float32).reshape(4, 3) / 8


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", "i1", "u2", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_number_is_read(dtype, order):
    array = (ARRAY * 8).astype(dtype, order=order)
    found = read_features(npy(array), FORM)
    assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(ARRAY * 8))


def test_every_format_is_read(tmp_path):
    np.save(tmp_path / "a.npy", ARRAY)
    np.savez(tmp_path / "one.npz", x=ARRAY)
    np.savez_compressed(tmp_path / "two.npz", x=ARRAY, y=ARRAY[:2])
    save_file({"x": torch.from_numpy(ARRAY).bfloat16(), "y": torch.ones(2, 3)}, tmp_path / "two.safetensors")
    for name in ("a.npy", "one.npz", "one.npz#x", "two.npz#x", "two.safetensors#x"):
        assert torch.equal(read_features(tmp_path / name, FORM), torch.from_numpy(ARRAY)), name
    for content in ((tmp_path / "one.npz").read_bytes(), save({"x": torch.from_numpy(ARRAY)})):
        assert torch.equal(read_features(content, FORM), torch.from_numpy(ARRAY))
    assert torch.equal(read_features(torch.from_numpy(ARRAY).double(), FORM), torch.from_numpy(ARRAY))
    assert split_key("a#b.npy") == ("a#b.npy", None)  # only files with keys have a key


def test_inputs_are_padded_to_the_longest():
    batch = stack_inputs([read_input(ARRAY, FORM), read_input(ARRAY[:1], FORM)])
    assert batch.shape == (2, 1, 4, 3)
    assert batch[1, 0, 1:].isnan().all() and not batch[0].isnan().any() and not batch[1, 0, 0].isnan().any()
    assert torch.equal(stack_inputs([torch.ones(3, 2, 2)] * 2), torch.ones(2, 3, 2, 2))


class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def holding(value, at=(2, 1)):
    array = ARRAY.copy()
    array[at] = value
    return npy(array)


BAD = {
    "NaN": (holding(np.nan), "holds nan at token 2, channel 1"),
    "infinity": (holding(-np.inf), "holds -inf at token 2, channel 1"),
    "too large for float32": (npy(np.full((1, 3), 1e300)), "holds inf at token 0, channel 0"),
    "width": (npy(np.ones((4, 2))), r"has the shape \[4, 2\], expected \[P, 3\] with P from 1 to 5"),
    "no tokens": (npy(np.ones((0, 3))), r"has the shape \[0, 3\]"),
    "too many tokens": (npy(np.ones((6, 3))), r"has the shape \[6, 3\]"),
    "one dimension": (npy(np.ones(3)), r"has the shape \[3\]"),
    "a scalar": (npy(np.float32(1)), r"has the shape \[\]"),
    "objects": (npy(np.array([[Attack()] * 3], dtype=object)), "holds Python objects, which are never unpickled"),
    "objects in npz": (None, "holds Python objects, which are never unpickled"),
    "a pickle": (pickle.dumps(Attack()), "is not an array"),
    "texts": (npy(np.array([["a", "b", "c"]])), "holds values of type <U1"),
    "bool": (npy(np.ones((1, 3), bool)), "holds values of type bool"),
    "complex": (npy(np.ones((1, 3), complex)), "holds values of type complex128"),
    "truncated": (npy(ARRAY)[:-1], "ends after 47 of 48 bytes"),
    "truncated header": (npy(ARRAY)[:30], "is damaged"),
    "empty": (b"", "is not an array .it is empty"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(40), "is not an array"),
    "a web page": (b"<html><body></body></html>", "is not an array"),
    "a claim of terabytes": (npy(ARRAY).replace(b"(4, 3)", b"(9999999999999, 3)", 1), "is damaged|has the shape"),
    "two keys": (None, r"holds 2 arrays \(x, y\), expected one: name it with #KEY"),
    "a broken archive": (b"PK\x03\x04" + bytes(30), "is damaged"),
    "broken safetensors": (save({"x": torch.ones(1, 3)})[:-5], "is damaged"),
    "a number": (7, "features are a int, expected an array"),
    "an URL": ("https://example.org/a.npy", "an array of features is the URL"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[name]
    if name == "two keys":
        content = save({"x": torch.ones(1, 3), "y": torch.ones(1, 3)})
    if name == "objects in npz":
        file = io.BytesIO()
        np.savez(file, x=np.array([[Attack()] * 3], dtype=object))
        content = file.getvalue()
    with pytest.raises(ImageError, match=message) as error:
        read_features(content, FORM)
    assert "\n" not in str(error.value) and ": " in str(error.value)
    assert not (tmp_path / "executed").exists()
    if isinstance(content, bytes):
        (tmp_path / "file.npy").write_bytes(content)
        with pytest.raises(ImageError):
            read_features(tmp_path / "file.npy", FORM)


def test_files_that_are_not_there_or_never_end(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    np.savez(tmp_path / "x.npz", x=ARRAY)
    save_file({"x": torch.ones(9, 3)}, tmp_path / "x.safetensors")
    (tmp_path / "array.npz").write_bytes(npy(ARRAY))
    for name, message in {
        "none.npy": "cannot be read .No such file",
        "pipe.npy": "is a pipe",
        ".": "cannot be read .Is a directory",
        "x.npz#y": "has no array 'y'; its arrays are x: correct the key",
        "none.npz#y": "cannot be read .No such file",
        "x.safetensors#y": "has no array 'y'",
        "x.safetensors#x": r"has the shape \[9, 3\]",
        "array.npz#x": "has a key, but the file is an .npy file of one array: remove the key",
    }.items():
        with pytest.raises(ImageError, match=message):
            read_features(tmp_path / name, FORM)


def test_a_small_archive_that_unpacks_to_much_is_not_unpacked(tmp_path):
    """Only the header and the bytes that the shape allows are decompressed."""
    header = npy(ARRAY)[:-48]
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(header + bytes(48))
        for _ in range(64):
            member.write(bytes(1 << 20))
    assert read_features(tmp_path / "bomb.npz", FORM).shape == (4, 3)


# -- records -----------------------------------------------------------------------------------------------------------


def records(source, **settings):
    return open_records(str(source), DataConfig(train=str(source), **settings), reads_features=True)


def test_lists_in_parquet_and_json(tmp_path):
    rows = {"features": [ARRAY.tolist(), ARRAY[:1].tolist()], "caption": ["a", "b"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    lines = [json.dumps({"features": f, "caption": c}) for f, c in zip(*rows.values(), strict=True)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    for name in ("t.parquet", "t.jsonl"):
        found = records(tmp_path / name)
        assert [
            torch.equal(read_features(r.image, FORM), torch.tensor(f))
            for r, f in zip(found, rows["features"], strict=True)
        ] == [True, True]
        assert found[0].image_id != found[1].image_id


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_of_shards(tmp_path, streaming):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i in range(3):
            for name, content in ((f"{i}.npy", npy(ARRAY + i)), (f"{i}.txt", b"a text")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found = records(tmp_path / "s.tar", streaming=streaming)
    found = list(found.read()) if streaming else list(found)
    assert [float(read_features(record.image, FORM)[0, 0]) for record in found] == [0, 1, 2]


def test_folder_of_arrays_with_texts(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", ARRAY)
    with pytest.raises(InputError, match=r"holds 2 arrays of features but no captions: .* the keys features and cap"):
        records(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    assert [record.captions for record in records(tmp_path)] == [("text a",), ("text b",)]
    with pytest.raises(InputError, match="holds no images"):
        open_records(str(tmp_path), DataConfig(train=str(tmp_path)))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([[1, 2, 3], [4, 5]], "holds a list of 2 that is no array of numbers"),
        ([["a", "b", "c"]], "no array of numbers"),
        ([1, 2, 3], "holds an array of 1 dimensions"),
        ([[[1, 2, 3]]], "holds an array of 3 dimensions"),
        ([{"x": 1}], "no array of numbers"),
    ],
)
def test_cells_that_are_no_arrays_are_named(tmp_path, cell, message):
    rows = [{"features": ARRAY.tolist(), "caption": "a"}, {"features": cell, "caption": "b"}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    record = records(tmp_path / "t.jsonl")[1]
    assert record.skip_reason is not None and record.skip_reason[0] == "image"
    assert message in record.skip_reason[1]


def test_a_parquet_file_reads_only_its_own_folder(tmp_path):
    """Not even through a link that its own folder does not have, with a key behind the name."""
    np.savez(tmp_path / "secret.npz", x=ARRAY)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.npz").symlink_to(tmp_path / "secret.npz")
    names = ["../secret.npz#x", "link.npz#x", str(tmp_path / "secret.npz#x")]
    pyarrow.parquet.write_table(pyarrow.table({"features": names, "caption": ["a"] * 3}), folder / "t.parquet")
    assert [record.image for record in records(folder / "t.parquet")] == [None] * 3


def test_the_column_is_named_if_there_is_none(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"sound": "a.npy", "caption": "a"}))
    with pytest.raises(InputError, match="has no features column: its columns are sound, caption; name one"):
        records(tmp_path / "t.jsonl")
    assert records(tmp_path / "t.jsonl", image_column="sound")[0].image == str(tmp_path / "a.npy")
