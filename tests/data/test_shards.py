"""Reading shards, damaged ones included, from local files and object storage."""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from blip2.config import DataConfig
from blip2.corpus.units import Unit, read_unit
from blip2.data.records import Record, RecordStream
from blip2.data.shards import Sample, SkippedSample
from blip2.data.sources import open_records
from blip2.errors import InputError

BLOCK = 512


def shard(samples: list[dict[str, bytes]]) -> bytes:
    """Return a tar file in which sample i has the members i.KIND."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, sample in enumerate(samples):
            for kind, data in sample.items():
                entry = tarfile.TarInfo(f"{number:03d}.{kind}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def pairs(count: int, name: str = "") -> list[dict[str, bytes]]:
    return [{"png": f"{name}{i}".encode(), "txt": f"words {name}{i}".encode()} for i in range(count)]


def parquet(count: int, name: str = "") -> bytes:
    buffer = io.BytesIO()
    rows = [{"image": {"bytes": s["png"], "path": None}, "caption": s["txt"].decode()} for s in pairs(count, name)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def open_(source: Path | str, rank: int = 0, world_size: int = 1, **settings: str) -> RecordStream:
    records = open_records(str(source), DataConfig(train=str(source), streaming=True, **settings), rank, world_size)
    assert isinstance(records, RecordStream)
    return records


def captions(records: list[Record]) -> list[str]:
    return [record.captions[0] for record in records if record.error is None]


def errors(records: list[Record]) -> list[str]:
    return [f"{record.key}: {record.error}" for record in records if record.error is not None]


# -- samples -------------------------------------------------------------------------------------------------


def test_samples(tmp_path: Path) -> None:
    """Members with the same name are a sample, and its JSON adds columns."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
        folder = tarfile.TarInfo("a.b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("a.b/one.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in {
            "a.b/one.JPG": b"1",
            "a.b/one.json": b'{"question": "what?", "answers": ["this", "that"], "image_id": 7, "image": "x.png"}',
            "two.json": b"{",
            "two.webp": b"2",
            "three.seg.png": b"no",
            "three.json": b'{"question": "which?"}',
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    path = tmp_path / "0.tar"
    path.write_bytes(buffer.getvalue())
    one, two, three = open_(path).read()
    assert (one.image, one.question, one.captions, one.metadata) == (b"1", "what?", ("this", "that"), {"image_id": 7})
    assert one.key == f"{path} a.b/one"
    assert (two.image, two.question, two.captions) == (b"2", None, ())
    assert (three.image, three.question) == (None, "which?")
    assert [record.starts_shard for record in (one, two, three)] == [True, False, False]


def test_columns_are_collected_from_several_samples(tmp_path: Path) -> None:
    """The first sample may lack a caption."""
    (tmp_path / "0.tar").write_bytes(shard([{"png": b"0"}, {"txt": b"one"}, *pairs(2)]))
    read = list(open_(tmp_path / "0.tar").read())
    assert [(r.image, r.captions) for r in read[:2]] == [(b"0", ()), (None, ("one",))]


# Members of a sample, and its image and captions; an image of None means that it has none.
UNUSUAL: dict[str, tuple[dict[str, bytes], bytes | None, tuple[str, ...]]] = {
    "a text under the name of an image format": ({"json": b'{"jpg": "a.jpg"}', "png": b"1", "txt": b"a"}, b"1", ("a",)),
    "only a text under that name": ({"json": b'{"jpg": "a.jpg", "image": "b.jpg"}', "txt": b"a"}, None, ("a",)),
    "a number under that name": ({"json": b'{"png": 3, "txt": "b"}', "bmp": b"1", "txt": b"a"}, b"1", ("a",)),
    "two images": ({"json": b'{"jpg": 1, "png": 2}', "png": b"1", "jpg": b"2", "txt": b"a"}, b"1", ("a",)),
    "an unusual and a usual format": ({"avif": b"1", "jpg": b"2", "txt": b"a"}, b"2", ("a",)),
    "a member named image": ({"image": b"1", "txt": b"a"}, b"1", ("a",)),
    "captions in another member than before": ({"png": b"1", "json": b'{"caption": "a", "txt": "b"}'}, b"1", ("a",)),
    "captions in two members": ({"png": b"1", "json": b'{"sentence": "b"}', "txt": b"a"}, b"1", ("a",)),
    "a member named caption": ({"png": b"1", "caption": b"a", "txt": b"b"}, b"1", ("a",)),
    "upper case": ({"PNG": b"1", "TXT": b"a"}, b"1", ("a",)),
    "JSON in upper case": ({"Png": b"1", "JSON": b'{"text": "a"}'}, b"1", ("a",)),
    "a question": ({"png": b"1", "json": b'{"question": "b?", "answer": "a"}', "txt": b"c"}, b"1", ("a",)),
    "a member named image and another": (
        {"png": b"2", "image": b"1", "json": b'{"image": 3}', "txt": b"a"},
        b"1",
        ("a",),
    ),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_training_and_corpus_passes_read_the_same(tmp_path: Path, what: str) -> None:
    """The first sample has its caption in a .txt; the samples of one question come without others."""
    members, image, words = UNUSUAL[what]
    path = tmp_path / "0.tar"
    path.write_bytes(shard([members, members] if what == "a question" else [*pairs(1), members]))
    for streaming in (True, False):
        records = open_records(str(path), DataConfig(train=str(path), streaming=streaming))
        _, record = records.read() if isinstance(records, RecordStream) else (records[0], records[1])
        assert (record.image, record.captions) == (image, words)
    _, sample = read_unit(Unit("0", str(path)))
    if image is None:
        assert isinstance(sample, SkippedSample)
        assert sample.reason == "no image"
    else:
        assert isinstance(sample, Sample)
        assert (sample.image, sample.captions) == (image, words)
        assert {name.lower(): data for name, data in members.items()}[sample.suffix] == image


def test_a_question_after_the_samples_that_tell_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    question = {"png": b"1", "json": b'{"question": "what?", "answers": ["this", "this"], "caption": "a"}'}
    path.write_bytes(shard([*pairs(20), question]))
    *_, record = open_(path).read()
    *_, sample = read_unit(Unit("0", str(path)))
    assert isinstance(sample, Sample)
    assert (record.question, record.captions, sample.captions) == ("what?", ("this", "this"), ("this", "this"))


@pytest.mark.parametrize("pair", [("txt", "TXT"), ("JSON", "json"), ("png", "Png")])
def test_members_that_differ_in_case_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    """Which of them is meant cannot be told; the samples around them are read."""
    path = tmp_path / "0.tar"
    path.write_bytes(
        shard([*pairs(1), {"png": b"1", "txt": b"a"} | dict.fromkeys(pair, b'{"caption": "b"}'), *pairs(3)[2:]])
    )
    why = f"it has both 001.{pair[0]} and 001.{pair[1]}, expected one of them: remove the other"
    for streaming in (True, False):
        records = open_records(str(path), DataConfig(train=str(path), streaming=streaming))
        found = [record.skip_reason for record in (records.read() if isinstance(records, RecordStream) else records)]
        assert found == [None, ("image" if "png" in pair else "caption", why), None]
    _, refused, last = read_unit(Unit("0", str(path)))
    assert isinstance(refused, SkippedSample) and refused.message == why
    assert isinstance(last, Sample) and last.captions == ("words 2",)


# -- damaged shards --------------------------------------------------------------------------------------------------

WHOLE = shard(pairs(3))
"""Each member occupies a header and one block."""
BREAKS: dict[str, tuple[bytes, list[str], str]] = {
    "not a tar": (b"<html>404</html>" * 100, [], "invalid header|bad checksum"),
    "empty": (b"", [], "empty file"),
    "in a caption": (WHOLE[: 4 * 2 * BLOCK - BLOCK + 3], ["words 0"], "unexpected end of data"),
    "in an image": (WHOLE[: 5 * 2 * BLOCK - BLOCK], ["words 0", "words 1"], "unexpected end of data"),
    "in a header": (WHOLE[: 4 * 2 * BLOCK + 100], ["words 0", "words 1"], "damaged after 001 .truncated header"),
    "after a sample": (WHOLE[: 4 * 2 * BLOCK], ["words 0", "words 1"], "damaged after 001 .empty header"),
    "after an image": (WHOLE[: 3 * 2 * BLOCK], ["words 0"], "damaged after 001 .empty header"),
    "a header is overwritten": (
        WHOLE[: 4 * 2 * BLOCK] + b"x" * BLOCK + WHOLE[9 * BLOCK :], ["words 0", "words 1"], "checksum|invalid header"
    ),
    "no Parquet": (parquet(3)[:-4], [], "[Pp]arquet"),
}  # fmt: skip


@pytest.mark.parametrize("how", BREAKS)
def test_rows_before_the_damage_are_used(tmp_path: Path, how: str) -> None:
    data, expected, why = BREAKS[how]
    suffix, whole = (".parquet", parquet(2, "b")) if how == "no Parquet" else (".tar", shard(pairs(2, "b")))
    (tmp_path / f"0{suffix}").write_bytes(data)
    (tmp_path / f"1{suffix}").write_bytes(whole)
    read = list(open_(tmp_path / f"*{suffix}").read())
    assert captions(read) == [*expected, "words b0", "words b1"]
    (message,) = errors(read)
    assert message.startswith(f"{tmp_path / f'0{suffix}'}: ")
    assert re.search(why, message)
    assert "\n" not in message
    assert sum(record.starts_shard for record in read) == 2


def test_what_follows_the_end_of_a_tar_is_not_lost_in_silence(tmp_path: Path) -> None:
    """``cat a.tar b.tar`` writes a file that tar reads up to the end of the first."""
    padded = shard(pairs(2)) + bytes(3 * BLOCK)
    (tmp_path / "a.tar").write_bytes(padded)
    assert errors(list(open_(tmp_path / "a.tar").read())) == []
    (tmp_path / "a.tar").write_bytes(padded + shard(pairs(2, "b")))
    read = list(open_(tmp_path / "a.tar").read())
    assert captions(read) == ["words 0", "words 1"]
    (message,) = errors(read)
    assert "the archive goes on after its end after 001, as cat writes several into one" in message
    with pytest.raises(InputError, match="the archive goes on after its end"):
        open_records(str(tmp_path / "a.tar"), DataConfig(train="", streaming=False))


def test_a_missing_shard_counts_as_damaged(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for number in (0, 2):
        store.pipe(f"/missing/{number}.tar", shard(pairs(2, str(number))))
    read = list(open_("memory://missing/{0..2}.tar").read())
    assert captions(read) == ["words 00", "words 01", "words 20", "words 21"]
    assert [message.split(": ")[0] for message in errors(read)] == ["memory://missing/1.tar"]


def test_only_damaged_shards(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02d}.tar").write_bytes(b"no")
    with pytest.raises(InputError, match=r"\*\.tar' cannot be read: .*00\.tar: truncated header"):
        open_(tmp_path / "*.tar")


# -- compressed files --------------------------------------------------------------------------------------------------


def zipped(tar: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, tarfile.open(fileobj=io.BytesIO(tar)) as members:
        for member in members:
            archive.writestr(member.name, members.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]
    return buffer.getvalue()


COMPRESSIONS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "0 a.tar.gz": (gzip.compress, "gzip -dc '0 a.tar.gz' > '0 a.tar'"),
    "0.tgz": (gzip.compress, "gzip -dc 0.tgz > 0.tar"),
    "0.tar": (gzip.compress, "gzip -dc 0.tar > 0.tar.tmp && mv 0.tar.tmp 0.tar"),
    "0.tar.BZ2": (bz2.compress, "bzip2 -dc 0.tar.BZ2 > 0.tar"),
    "0.tar.xz": (lzma.compress, "xz -dc 0.tar.xz > 0.tar"),
    "0.tar.zst": (lambda data: b"\x28\xb5\x2f\xfd" + data, "zstd -dc 0.tar.zst > 0.tar"),
    "0.zip": (zipped, "unzip 0.zip -d 0 && tar --sort=name -C 0 . -cf 0.tar"),
    "1.tar": (zipped, "unzip 1.tar -d 1 && tar --sort=name -C 1 . -cf 1.tar"),
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_shards(tmp_path: Path, name: str) -> None:
    """The command of the message makes a shard that can be read."""
    compress, command = COMPRESSIONS[name]
    path = tmp_path / name
    path.write_bytes(compress(WHOLE))
    for streaming in (None, False):
        with pytest.raises(InputError) as error:
            open_records(str(path), DataConfig(train=str(path), streaming=streaming))
        kind = "zip" if compress is zipped else command.split()[0]
        assert f"is compressed with {kind}, expected an uncompressed shard, because a run resumes at a" in str(
            error.value
        )
        assert str(error.value).endswith(f": run {command}")
    if shutil.which(command.split()[0]) and "zstd" not in command:
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        assert captions(list(open_(tmp_path / "*.tar").read())) == ["words 0", "words 1", "words 2"]


def test_a_compressed_shard_among_others(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(WHOLE)
    (tmp_path / "1.tar").write_bytes(gzip.compress(WHOLE))
    found = list(open_(tmp_path / "*.tar").read())
    assert len(captions(found)) == 3
    assert errors(found)[0].startswith(f"{tmp_path / '1.tar'}: it is compressed with gzip, ")
    (skipped,) = read_unit(Unit("1", str(tmp_path / "1.tar")))
    assert isinstance(skipped, SkippedSample) and skipped.message.endswith(
        "gzip -dc 1.tar > 1.tar.tmp && mv 1.tar.tmp 1.tar"
    )


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv", "a.jsonl"])
def test_compressed_tables(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"image,caption\na.png,a\n"))
    with pytest.raises(InputError, match=r"is compressed with gzip, expected an uncompressed table: run gzip -dc a\."):
        open_records(str(tmp_path / name), DataConfig(train=str(tmp_path / name)))


# -- object storage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "write"), [("tar", lambda n: shard(pairs(3, n))), ("parquet", lambda n: parquet(3, n))]
)
@pytest.mark.parametrize("pattern", ["*", "{0..1}"])
def test_object_storage(suffix: str, write: Callable[[str], bytes], pattern: str) -> None:
    store = fsspec.filesystem("memory")
    for number in range(2):
        store.pipe(f"/{suffix}/{number}.{suffix}", write(str(number)))
    source = f"memory://{suffix}/{pattern}.{suffix}"
    records = open_records(source, DataConfig(train=source))
    assert isinstance(records, RecordStream)  # although data.streaming is not set
    read = list(records.read())
    assert captions(read) == [f"words {n}{i}" for n in range(2) for i in range(3)]
    assert [record.image for record in read] == [f"{n}{i}".encode() for n in range(2) for i in range(3)]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("memory://nowhere/*.tar", r"no file 'memory://nowhere/\*\.tar'"),
        ("memory://nowhere/{0..1000000}.tar", r"\{0\.\.1000000\} in .* is more than 1,000,000 files"),
        ("memory://nowhere/{0.." + "9" * 5000 + "}.tar", r"is more than 1,000,000 files"),
        ("memory://nowhere/0.tar", r"cannot be read: memory://nowhere/0\.tar"),
        ("nosuch://bucket/*.tar", r"cannot be read: .*[Pp]rotocol"),
        ("nosuch://bucket/0.tar", r"cannot be read: .*[Pp]rotocol"),
    ],
)
def test_object_storage_without_the_data(source: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as error:
        open_(source)
    assert "\n" not in str(error.value)


# -- shares of ranks --------------------------------------------------------------------------------------------------


def write_shards(folder: Path, count: int, size: int = 4) -> Path:
    for number in range(count):
        (folder / f"{number:02d}.tar").write_bytes(shard(pairs(size, f"{number:02d}/")))
    return folder / "*.tar"


@pytest.mark.parametrize(("shards", "world_size"), [(5, 1), (4, 2), (5, 2), (2, 3), (1, 2)])
def test_every_sample_is_read_once_per_epoch(tmp_path: Path, shards: int, world_size: int) -> None:
    source = write_shards(tmp_path, shards)
    orders = []
    for epoch in range(4):
        shares = [captions(list(open_(source, p, world_size).read(None, (3, epoch)))) for p in range(world_size)]
        together = [caption for share in shares for caption in share]
        assert len(together) == len(set(together)) == 4 * shards
        assert all(shares)
        orders.append(together)
        if shards >= world_size:  # otherwise every rank reads all shards and skips the samples of other ranks
            read = [{caption[6:8] for caption in share} for share in shares]
            assert sum(map(len, read)) == shards
    if shards > 2:
        assert len({tuple(order) for order in orders}) > 1  # shuffled again in each epoch


def test_the_larger_share_moves_to_another_rank(tmp_path: Path) -> None:
    source = write_shards(tmp_path, 3)
    sizes = [[len(list(open_(source, p, 2).read(None, (0, epoch)))) for p in range(2)] for epoch in range(4)]
    assert sizes == [[8, 4], [4, 8], [8, 4], [4, 8]]


def test_resume_after_a_damaged_shard(tmp_path: Path) -> None:
    source = write_shards(tmp_path, 3, 2)
    broken = tmp_path / "01.tar"
    broken.write_bytes(broken.read_bytes()[: 6 * BLOCK])
    every = list(open_(source).read(None, (1, 2)))
    assert len(errors(every)) == 1 and len(every) == 6
    for done in range(len(every) + 1):
        stream = open_(source)
        reader = stream.read(None, (1, 2))
        for _ in range(done):
            next(reader)
        position = json.loads(json.dumps(stream.position()))
        assert list(open_(source).read(position, (1, 2))) == every[done:]
