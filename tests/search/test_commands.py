"""``blip2 index`` and ``blip2 search``."""

import json
import os
import re

from blip2.cli import main


def run_command(capsys, *arguments):
    assert main([*map(str, arguments), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def error(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_index_and_search(capsys, run, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "copy.png").write_bytes((photos / "red-disc.png").read_bytes())
    library = tmp_path / "library"
    report = json.loads(run_command(capsys, "index", run, photos, "--output", library))
    assert report["added"] == 13 and report["embedded"] == 12 and report["duplicates"] == 1
    assert report["skipped"] == {"image not decoded": 1}

    head, *lines = run_command(capsys, "search", library, "a red disc", "--k", 5, "--rerank", 2).splitlines()
    assert head.split("\t") == ["match", "similarity", "image", "caption", "metadata"]
    assert len(lines) == 5 and [bool(line.split("\t")[0]) for line in lines] == [True, True, False, False, False]
    found = json.loads(run_command(capsys, "search", library, "a red disc", "--k", 5, "--rerank-k", 2, "--json"))
    assert [hit["image"] for hit in found] == [line.split("\t")[2].split(" (")[0] for line in lines]
    assert found[0]["match"] and found[1]["match"] and found[2]["match"] is None

    page = tmp_path / "page.html"
    query = photos / "red-disc.png"
    out = run_command(capsys, "search", library, query, "--html", page, "--k", 3, "--where", "captions IS NOT NULL")
    assert "\t1.000\t" in out and "with the same bytes" in out
    html = page.read_text()
    assert html.count("<img") == 6 and "attention of the queries" in html and "http" not in html
    report = json.loads(run_command(capsys, "index", "--check", library))
    assert (report["rows"], report["recall"], report["has_index"]) == (13, 1.0, False)


def test_what_is_refused(capsys, run, photos, tmp_path):
    library = tmp_path / "library"
    assert "no MODEL and DATA was given: run blip2 index MODEL DATA --output" in error(capsys, "index", "--output", "x")
    assert "leave out MODEL, DATA and --output" in error(capsys, "index", run, "--check", library)
    assert "there is no library in" in error(capsys, "search", library, "words")
    assert "there is no library in" in error(capsys, "index", "--check", library)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no images" in error(capsys, "index", run, empty, "--output", library)
    main(["index", str(run), str(photos), "--output", str(library), "--device", "cpu"])
    assert "--k is 0, expected at least 1" in error(capsys, "search", library, "a", "--k", "0")
    assert "nowhere.png cannot be read" in error(capsys, "search", library, "nowhere.png")
    assert re.search(
        "the condition 'yeer > 1' cannot be used", error(capsys, "search", library, "a", "--where", "yeer > 1")
    )
    page = tmp_path / "no" / "page.html"
    assert "cannot be written" in error(capsys, "search", library, "a", "--html", page)
    os.mkfifo(tmp_path / "pipe")
    assert "(it is a device, a pipe or a socket)" in error(capsys, "search", library, "a", "--html", tmp_path / "pipe")
