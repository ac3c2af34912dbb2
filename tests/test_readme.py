"""The code of the README runs, and its commands exist."""

import re
from pathlib import Path

from conftest import draw

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_there_is_python():
    assert len(PYTHON) == 1
    assert "blip2.load" in PYTHON[0]


def test_its_python_runs(runs, tmp_path, monkeypatch):
    """Tiny models stand in for those of the folders that it names."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "twins").symlink_to(runs["stage1"])
    (tmp_path / "runs" / "demo" / "stage2").symlink_to(runs["llama"])
    (tmp_path / "runs" / "demo" / "vqa").symlink_to(runs["llama"])
    for name in set(re.findall(r'"(\w+\.(?:png|jpg))"', PYTHON[0])):
        draw("disc", "red", 0).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(PYTHON[0], "README.md", "exec"), names)
    assert len(names["captions"]) == 2
    assert names["probabilities"].shape == (1, 2)
    assert names["similarities"].shape == (2, 2)
    assert names["embeddings"].shape[:1] == (2,)


def test_its_commands_exist():
    """Check every make target and every blip2 command that the README names."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    from blip2.cli import build_parser

    commands = build_parser().format_help()
    code = "\n".join(re.findall(r"`[^`]+`|^    .*$", README, flags=re.MULTILINE))
    named = re.findall(r"\bmake ([a-z]+)", code)
    assert {"demo", "test"} <= set(named) <= set(targets)
    for command in re.findall(r"\bblip2 ([a-z]+)", code):
        assert re.search(rf"^    {command} ", commands, flags=re.MULTILINE), command
