"""LLMs that are spread over devices. Only the CPU and the disk are used: a layer on the disk has accelerate's hooks."""

import pytest
import torch

import blip2
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from conftest import draw
from fixtures.checkpoints import FLAVOURS, save_transformers

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7), draw("disc", "green", 3)]
PROMPTS = ["a photo of", "it", "two"]
LAYERS = {
    "opt": ["model.decoder.layers.0", "model.decoder.layers.1"],
    "llama": ["model.layers.0", "model.layers.1"],
    "t5": ["encoder.block.1", "decoder.block.0"],
}


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for flavor in FLAVOURS:
        save_transformers(root / flavor, flavor, parts.bert)
    return root


def place(network, on_disk):
    """Return the device map that puts some modules on the disk and everything else on the CPU."""
    names = [name for name, module in network.named_modules() if name and not list(module.children())]
    inside = tuple(f"{name}." for name in on_disk)
    return dict.fromkeys(on_disk, "disk") | {name: "cpu" for name in names if not name.startswith(inside)}


@pytest.mark.parametrize("flavor", FLAVOURS)
def test_layers_on_the_disk_change_nothing(saved, tmp_path, flavor):
    plain = blip2.load(saved / flavor, device="cpu")
    device_map = place(plain.model.language.network, LAYERS[flavor])
    spread = blip2.load(saved / flavor, device="cpu", device_map=device_map, offload_folder=tmp_path / "disk")
    language = spread.model.language
    assert any(parameter.is_meta for parameter in language.parameters()) and list((tmp_path / "disk").iterdir())
    assert language.has_kv_cache and language.shares_prompts
    for beams in (1, 3):
        decoding = Decoding(num_beams=beams, max_new_tokens=6)
        assert spread.generate(IMAGES, PROMPTS, decoding) == plain.generate(IMAGES, PROMPTS, decoding)
    texts = ["two dogs", "a cat on a mat", "it"]
    found, expected = (each.score(IMAGES, texts, prompt="a").per_token for each in (spread, plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_whole_llm_on_one_device(saved, device_map):
    plain = blip2.load(saved / "opt", device="cpu")
    placed = blip2.load(saved / "opt", device="cpu", device_map=device_map)
    assert hasattr(placed.model.language.network, "_hf_hook")  # its inputs may come from another device
    assert placed.model.language._has_plain_lm_head
    assert placed.caption(IMAGES) == plain.caption(IMAGES)


def test_a_stage_1_has_no_llm(saved, parts, tmp_path):
    save_transformers(tmp_path / "retrieval", None, parts.bert)
    with pytest.raises(InputError, match=r"is of stage 1, which has no LLM, but device_map would place one"):
        blip2.load(tmp_path / "retrieval", device="cpu", device_map="auto")
