"""Run every command and all Python of docs/checkpoints.md, with tiny models under the names of published ones."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import blip2
from blip2 import checkpoint
from blip2.builder import build
from blip2.cli import main
from blip2.recipe import dump_config
from conftest import draw
from fixtures.checkpoints import lavis_state, save_instructblip, save_transformers

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (blip2 .*)$", PAGE, flags=re.MULTILINE)
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
SIZES = {"num_hidden_layers": 3, "bert": None, "hidden_size": 64, "num_attention_heads": 1}


@pytest.fixture(scope="module")
def place(parts, runs, tmp_path_factory):
    """Return a folder in which all names of the page exist."""
    root = tmp_path_factory.mktemp("page")
    draw("disc", "red", 0).save(root / "cat.jpg")
    for name, flavor in (("opt-2.7b", "opt"), ("flan-t5-xl", "t5"), ("itm-vit-g", None)):
        # LAVIS's files imply these sizes: heads of 64 in the Q-Former and of 88 in the image encoder.
        sizes = {"width": 64, "heads": 1, "vision": 176}
        save_transformers(root / "Salesforce" / f"blip2-{name}", flavor, parts.bert, **sizes)
    for name, folder in (("facebook/opt-2.7b", parts.opt), ("google/flan-t5-xl", parts.t5)):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(folder)
    for name, flavor in (("vicuna-7b", "llama"), ("flan-t5-xl", "t5")):
        save_instructblip(root / "Salesforce" / f"instructblip-{name}", flavor, parts.bert)
    torch.save({"model": lavis_state("instruct-llama", vision=False)}, root / "instruct_blip_vicuna7b_trimmed.pth")
    (root / "lmsys").mkdir()
    (root / "lmsys" / "vicuna-7b-v1.1").symlink_to(parts.llama)
    (root / "google-bert").mkdir()
    (root / "google-bert" / "bert-base-uncased").symlink_to(parts.bert)
    torch.save({"model": lavis_state("1", vision=False)}, root / "blip2_pretrained.pth")
    torch.save({"model": lavis_state("opt", vision=False)}, root / "blip2_pretrained_opt2.7b.pth")
    torch.save({"model": lavis_state("t5")}, root / "caption_coco_flant5xl.pth")
    eva = {k.removeprefix("visual_encoder."): t for k, t in lavis_state("1").items() if k.startswith("visual_encoder.")}
    last = {k.replace("blocks.1", "blocks.2"): t for k, t in eva.items() if "blocks.1" in k}
    torch.save({**eva, **last}, root / "eva_vit_g.pth")
    (root / "runs" / "mine").mkdir(parents=True)
    (root / "runs" / "mine" / "stage1").symlink_to(runs["stage1"])
    (root / "runs" / "mine" / "stage2").symlink_to(runs["llama"])
    for stage in ("stage1", "stage2"):
        language = {} if stage == "stage1" else {"language": {"name": parts.opt}}
        recipe = parts.recipe(
            root / "runs" / stage, stage="representation" if stage == "stage1" else "generation", qformer=SIZES,
            training={"max_steps": 1, "device": "cpu", "precision": "fp32"}, **language,
        )  # fmt: skip
        recipe = replace(recipe, qformer=replace(recipe.qformer, tokenizer=parts.bert))
        (root / f"{stage}.yaml").write_text(dump_config(recipe))
    row = {"image": str(root / "cat.jpg"), "question": "what shape?", "answers": ["disc"]}
    (root / "questions.jsonl").write_text(json.dumps(row) + "\n")
    asks = replace(
        recipe,
        output=str(root / "runs" / "mine" / "vqa"),
        vision=replace(recipe.vision, name="Salesforce/blip2-opt-2.7b"),
        qformer=replace(recipe.qformer, use_qformer_text_input=True),
        language=replace(recipe.language, name="facebook/opt-2.7b", prompt="Question: {} Answer:"),
        data=replace(recipe.data, train=str(root / "questions.jsonl"), validation=None),
    )
    (root / "vqa.yaml").write_text(dump_config(asks))
    frozen_stage_2(parts, runs, root / "runs" / "mine" / "stage2-frozen")
    return root


def frozen_stage_2(parts, runs, folder):
    """Save a stage 2 that kept the Q-Former of stage 1 frozen."""
    recipe = parts.recipe(folder, stage="generation", language={"name": parts.opt}, start_from=str(runs["stage1"]))
    built = build(recipe.model, torch.device("cpu"))
    checkpoint.load_previous_stage(checkpoint.open_checkpoint(str(runs["stage1"])), built.model)
    checkpoint.save_checkpoint(folder, 1, built.model, recipe, None, {}, {}, 1)


def test_the_commands(place, monkeypatch, capsys, hub):
    """The commands run in the order of the page."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(COMMANDS) >= 15
    for command in COMMANDS:
        if command.startswith("blip2 push"):
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        status = main(shlex.split(command)[1:])
        printed = capsys.readouterr()
        assert status == 0, f"{command}\n{printed.err}"
        assert printed.out.strip(), command
    assert set(hub.commits[0]) >= {"config.json", "README.md", "model.safetensors", "processor_config.json"}
    for written in ("mine", "mine-retrieval", "served", "from-lavis", "ours", "both"):
        assert (place / written / "README.md").is_file() and (place / written / "model.safetensors").is_file()
    images, texts = ["cat.jpg"], ["a disc", "red"]
    for source, target in (("runs/mine/stage2", "mine"), ("runs/mine/stage2", "served")):
        assert blip2.load(target, "cpu").caption(images) == blip2.load(source, "cpu").caption(images)
    published = blip2.load("Salesforce/blip2-itm-vit-g", "cpu").match(images, texts)
    tokenizer = {"qformer.tokenizer": "google-bert/bert-base-uncased"}
    for target, options in (("itm.pth", {"overrides": tokenizer}), ("ours", {})):
        torch.testing.assert_close(
            blip2.load(target, "cpu", **options).match(images, texts), published, atol=1e-4, rtol=0
        )
    assert blip2.load("from-lavis", "cpu").match(images, texts).shape == (1, 2)
    assert blip2.load("both", device="cpu", stage="representation").match("cat.jpg", "a disc").shape == (1, 1)


def test_the_python(place, monkeypatch):
    monkeypatch.chdir(place)
    assert len(PYTHON) == 3
    first, *others = (compile(each, "checkpoints.md", "exec") for each in PYTHON)
    exec(first, {})
    for each in others:  # they need bitsandbytes or GPUs: tests/backbones/test_quantization.py, test_device_map.py
        assert "load" in each.co_names
    assert (place / "served-2.7b" / "config.json").is_file()


def test_what_each_command_found_is_said(place, monkeypatch, caplog):
    monkeypatch.chdir(place)
    with caplog.at_level("INFO", logger="blip2"):
        assert main(["caption", "caption_coco_flant5xl.pth", "cat.jpg", "--language.name", "google/flan-t5-xl"]) == 0
    assert "LAVIS's stage 2 with T5, 4 queries, image encoder included" in caplog.text


def test_memory_is_not_taken_twice():
    """The model is loaded in another dtype than its file's, where two copies could be in memory."""
    script = str(ROOT / "benchmarks" / "loading_memory.py")
    done = subprocess.run([sys.executable, script, "--gigabytes", "0.3"], check=True, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| bf16")]
    assert [row[2].strip() for row in rows] == ["bf16", "fp32"]
    # A second copy would add 1 to the first row and 0.5 to the second; the pages of libraries add 0.1 GiB.
    for row, most in zip(rows, (1.7, 1.4), strict=True):
        assert max(float(row[4]), float(row[5])) < most, done.stdout


def test_a_conversion_is_not_written_over(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    shutil.copytree("Salesforce/blip2-opt-2.7b", "there")
    for target, to, match in (
        ("there", "vllm", "there already exists: give the name of a new folder"),
        ("new", "lavis", "new does not end in .pth, as LAVIS expects: give the name of a .pth file"),
        ("new/\udcff", "blip2", "new/\\udcff is not UTF-8: give an output with a name in UTF-8"),
    ):
        assert main(["convert", "Salesforce/blip2-opt-2.7b", target, "--to", to]) == 2
        assert match in capsys.readouterr().err
    assert not (place / "new").exists()
