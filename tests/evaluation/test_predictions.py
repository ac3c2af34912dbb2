import json
from pathlib import Path

import pytest

from blip2.errors import InputError
from blip2.evaluation.predictions import PredictionFormat, check_ids, read_predictions, write_predictions


@pytest.mark.parametrize(
    ("format", "predictions", "expected"),
    [
        ("answer", {7: "a dog", 458752000: "2"}, [{"question_id": 7, "answer": "a dog"},
                                                  {"question_id": 458752000, "answer": "2"}]),
        ("caption", {3: 'a "red" café'}, [{"image_id": 3, "caption": 'a "red" café'}]),
        ("gqa", {"07333408": "yes"}, [{"questionId": "07333408", "prediction": "yes"}]),
    ],
)  # fmt: skip
def test_what_the_servers_take(
    format: PredictionFormat, predictions: dict[int, str], expected: list[dict[str, object]], tmp_path: Path
) -> None:
    path = tmp_path / "new folder" / "results.json"
    write_predictions(path, format, predictions)
    assert json.loads(path.read_text(encoding="utf-8")) == expected
    assert read_predictions(path, format, predictions.keys()) == predictions
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("format", "key"), [("answer", "7"), ("answer", True), ("caption", 7.0), ("caption", None), ("gqa", 7)]
)
def test_ids_that_the_servers_refuse(format: PredictionFormat, key: object, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(
        InputError,
        match=r" cannot be written: 1 \w+ \(.+\) of the wrong type, expected (whole number|text); convert these ids",
    ):
        write_predictions(path, format, {key: "yes"})
    assert not path.exists()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.mkdir()
    with pytest.raises(
        InputError, match=r"^.*results\.json cannot be written \(Is a directory\): check .* or choose another path$"
    ):
        write_predictions(path, "answer", {1: "yes"})
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_predictions(path, "answer", {1: "yes", 2: "no"})
    write_predictions(path, "answer", {3: "2"})
    assert read_predictions(path, "answer", [3]) == {3: "2"}


def save(tmp_path: Path, rows: object) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def answers(*ids: int) -> list[dict[str, object]]:
    return [{"question_id": number, "answer": "yes"} for number in ids]


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        ([1, 2], [1, 2, 3], "1 missing question_id (3), expected all 3 ids of the data: add the missing entries"),
        (
            [],
            range(9),
            "9 missing question_id (0, 1, 2, 3, 4, ...), expected all 9 ids of the data: add the missing entries",
        ),
        ([1, 2, 1, 2, 2, 3], [1, 2, 3], "2 repeated question_id (1, 2): keep one entry for each id"),
        (
            [1, 4, 5],
            [1],
            "2 unknown question_id (4, 5), expected only ids of the data: check that both are of the same split",
        ),
    ],
)
def test_missing_doubled_and_unknown_ids(found: list[int], expected: list[int], message: str, tmp_path: Path) -> None:
    path = save(tmp_path, answers(*found))
    with pytest.raises(InputError) as error:
        read_predictions(path, "answer", expected)
    assert str(error.value) == f"{path}: {message}"


def test_ids_in_another_order_are_the_same(tmp_path: Path) -> None:
    assert list(read_predictions(save(tmp_path, answers(3, 1, 2)), "answer", {1, 2, 3})) == [3, 1, 2]


def test_ids_of_a_dict() -> None:
    check_ids("the captions", "image_id", {1: "a", 2: "b"}, {2: "c", 1: "d"})
    with pytest.raises(InputError, match=r"^the captions: 1 missing image_id \('x'\), expected all 1 ids"):
        check_ids("the captions", "image_id", {}, {"x": 1})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"1": "yes"}, "holds one dict, expected a list: write the predictions as [{\"question_id\": whole number"),
        (["yes"], '1 entry (0) in another format, the first is "yes": write the predictions as [{"question_id"'),
        ([{"image_id": 1, "caption": "a dog"}], '1 entry (0) in another format, the first is {"image_id": 1'),
        ([*answers(1), {"question_id": "2", "answer": "yes"}], '1 entry (1) in another format, the first is {"'),
        ([{"question_id": 2, "answer": 3}] * 7, "7 entries (0, 1, 2, 3, 4, ...) in another format"),
        ([{"question_id": True, "answer": "no"}], "1 entry (0) in another format"),
    ],
)  # fmt: skip
def test_files_of_another_kind(rows: object, message: str, tmp_path: Path) -> None:
    path = save(tmp_path, rows)
    with pytest.raises(InputError) as error:
        read_predictions(path, "answer", [1])
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[{", b"\xff\xfe[]"])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged or not JSON \(.+\): write the predictions again$"):
        read_predictions(path, "answer", [1])


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\): check the path"):
        read_predictions(tmp_path / "results.json", "answer", [1])
