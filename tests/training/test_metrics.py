import io

import pytest
from rich.console import Console

from blip2.console import Display
from blip2.training.metrics import METRICS_FILE, JsonlLog, format_progress, read_metrics


def test_metrics_are_on_disk_at_once(tmp_path):
    metrics = JsonlLog(tmp_path / METRICS_FILE)
    metrics.write({"step": 1, "loss": 0.1})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1}]  # though the file is still open
    metrics.close()
    again = JsonlLog(tmp_path / METRICS_FILE)
    again.write({"step": 2, "loss": 1 / 3})
    again.close()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [0.1, 1 / 3]


def test_a_disabled_file_takes_calls(tmp_path):
    metrics = JsonlLog(tmp_path / METRICS_FILE, enabled=False)
    metrics.write({"step": 1})
    metrics.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (2, 2), (9, 3)])
def test_truncate(tmp_path, step, kept):
    """Lines that stay are not touched; a line torn by a kill goes, wherever it is."""
    whole = ['{"step": 1}', '{"step": 2, "loss": 0.10}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*whole[:2], '{"ste', whole[2], '{"step": 4, "los']))
    JsonlLog.truncate(tmp_path / METRICS_FILE, step)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == whole[:kept]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_where_there_is_nothing(tmp_path):
    JsonlLog.truncate(tmp_path / METRICS_FILE, 3)
    assert list(tmp_path.iterdir()) == []


def test_note():
    values = {"lm": 1.23456, "loss": 9.0, "lm_accuracy": 0.5, "images_per_second": 12.34}
    assert format_progress(values) == "lm 1.235  lm_accuracy 0.500  12.3 images/s"
    values = {"itc_r1": 0.5, "query_diversity": 0.25, "itm": 2.0, "images_per_second": 1.0}
    assert format_progress(values) == "itm 2.000  query_diversity 0.250  itc_r1 0.500  1.0 images/s"


def test_lines_where_there_is_no_terminal(capsys):
    display = Display("run")
    display.log("[bold] is said as it is written")
    display.start(total=50, done=10)
    for done in range(11, 51):
        display.update(done, "itc 1.0")
    display.close()
    said, first, last = capsys.readouterr().err.splitlines()
    assert said == "[bold] is said as it is written"
    assert first.startswith("run 11/50  itc 1.0  ") and first.endswith(" s left")
    assert last.startswith("run 50/50  itc 1.0  0 s left")


def test_a_bar_on_a_terminal():
    display = Display("run")
    screen = io.StringIO()
    display.console = Console(file=screen, force_terminal=True, width=120)
    display.start(total=4)
    for done in range(1, 5):
        display.update(done, f"itc {done}")
    display.close()
    assert "4/4" in screen.getvalue() and "itc 4" in screen.getvalue()


def test_a_disabled_display_shows_nothing(capsys):
    display = Display("run", enabled=False)
    display.start(total=2)
    display.log("something")
    display.table("title", ["a"], [("b",)])
    display.update(2)
    display.close()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
