"""A checkpoint on the hub as it was at a revision, in a cache of the hub without a network."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import blip2
from blip2.cli import main
from blip2.convert import convert
from blip2.errors import InputError, escape_control_characters
from blip2.interop.weights import open_folder
from conftest import draw
from fixtures.checkpoints import save_instructblip

NAME, IMAGE = "me/tiny-instruct", draw("disc", "red", 0)
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def cached(parts):
    """Two revisions, of which the branch main is the newer one, as the hub's library keeps them."""
    root = Path(constants.HF_HUB_CACHE) / "models--me--tiny-instruct"
    for flavor, commit, branch in (("t5", OLD, "v1"), ("llama", NEW, "main")):
        save_instructblip(root / "snapshots" / commit, flavor, parts.bert)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / branch).write_text(commit)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize(("revision", "kind"), [(None, "llama"), ("main", "llama"), ("v1", "t5"), (OLD, "t5")])
def test_load(cached, revision, kind):
    """The LLM, its tokenizer and the Q-Former are all those of the revision."""
    pipeline = blip2.load(NAME, device="cpu", revision=revision)
    assert pipeline.model.language.network.config.model_type == kind
    folder = cached / "snapshots" / (OLD if kind == "t5" else NEW)
    expected = blip2.load(folder, device="cpu").answer(IMAGE, "what is it?")
    assert pipeline.answer(IMAGE, "what is it?") == expected


def test_commands(cached, tmp_path, capsys):
    IMAGE.save(tmp_path / "cat.png")
    asked = ["ask", NAME, str(tmp_path / "cat.png"), "what is it?", "--revision", "v1", "--device", "cpu"]
    assert main(asked) == 0
    expected = blip2.load(cached / "snapshots" / OLD, device="cpu").answer(IMAGE, "what is it?")[0]
    assert capsys.readouterr().out.strip() == escape_control_characters(expected).strip()
    convert(NAME, tmp_path / "out", "transformers", revision="v1")
    here, there = open_folder(tmp_path / "out"), open_folder(cached / "snapshots" / OLD)
    assert set(here) == set(there)


@pytest.mark.parametrize(
    ("name", "revision", "match"),
    [
        (
            NAME,
            "v9",
            "revision 'v9' of 'me/tiny-instruct' is not in the cache and cannot be downloaded .*: check the rev",
        ),
        ("me/none", "main", "revision 'main' of 'me/none' is not in the cache and cannot be downloaded"),
        ("here", "main", "revision is 'main', but 'here' is not the name of a model on the hub, which alone has revis"),
        ("a.pth", "main", "'a.pth' is not the name of a model on the hub"),
    ],
)
def test_wrong_revisions(cached, name, revision, match):
    with pytest.raises(InputError, match=match) as error:
        blip2.load(name, device="cpu", revision=revision)
    assert "\n" not in str(error.value)


def test_another_model_at_a_revision(parts, cached):
    root = cached.parent / "models--me--llm"
    shutil.copytree(parts.llama, root / "snapshots" / NEW)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(NEW)
    with pytest.raises(InputError, match="revision 'main' of 'me/llm' is not a BLIP-2 of transformers: give a BLIP-2"):
        blip2.load("me/llm", device="cpu", revision="main")
    shutil.rmtree(root)
