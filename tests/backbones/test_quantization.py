import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BitsAndBytesConfig,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import blip2
from blip2 import checkpoint
from blip2.backbones.language import load_language_model
from blip2.builder import build_language_model
from blip2.config import LanguageConfig, LoraConfig
from blip2.convert import convert
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.training.trainer import train
from conftest import byte_tokenizer, draw
from fixtures.checkpoints import processor, save_transformers
from fixtures.runs import assert_same_run, cut_short
from fixtures.tiny import save_writer

CPU = torch.device("cpu")
BITS = ("4bit", "8bit")
LLMS = ("llama", "t5")


@pytest.mark.parametrize("bits", BITS)
def test_without_bitsandbytes(parts, monkeypatch, bits):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=rf"language\.quantization {bits} needs bitsandbytes: pip install 'blip2\["):
        build_language_model(LanguageConfig(parts.llama, quantization=bits), torch.float32)


def test_a_checkpoint_without_bitsandbytes(parts, monkeypatch, tmp_path):
    save_transformers(tmp_path / "blip2", "llama", parts.bert)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"^quantization_config needs bitsandbytes: pip install 'blip2\["):
        blip2.load(tmp_path / "blip2", device="cpu", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.fixture
def bitsandbytes():
    pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """A folder of LLMs whose widths are multiples of 64, the block size of the quantization."""
    root = tmp_path_factory.mktemp("llms")
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4, bos_token_id=None, eos_token_id=256)  # fmt: skip
    t5 = T5Config(vocab_size=258, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                  decoder_start_token_id=257, eos_token_id=256, pad_token_id=257)  # fmt: skip
    for name, network in (("llama", LlamaForCausalLM(llama)), ("t5", T5ForConditionalGeneration(t5))):
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.15)
        network.save_pretrained(root / name)
        byte_tokenizer(ends=name == "t5").save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", LLMS)
@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_llm_computes_with_its_rounded_matrices(bitsandbytes, llms, name, bits):
    """Logits and gradients are those of the dequantized matrices, on a CPU too."""
    whole = load_language_model(str(llms / name))
    small = build_language_model(LanguageConfig(str(llms / name), quantization=bits), torch.float32, device=CPU)
    assert small.is_frozen and small.hidden_size == 64 == whole.hidden_size
    kept = [sum(p.numel() * p.element_size() for p in llm.network.parameters()) for llm in (whole, small)]
    assert kept[1] < 0.7 * kept[0]
    rounded = 0
    for key, module in small.network.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit":
            matrix = sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            scales = weight.SCB if weight.SCB is not None else module.state.SCB
            matrix = weight.data.float() * scales[:, None] / 127
        else:
            continue
        own = whole.network.get_parameter(f"{key}.weight")
        assert 1e-4 < (matrix - own).norm() / own.norm() < (0.15 if bits == "4bit" else 0.02)
        own.data.copy_(matrix)
        rounded += 1
    assert rounded >= 14
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 250, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    found = []
    given = torch.randn(2, 3, 64)
    for llm in (whole, small):
        visual = given.clone().requires_grad_(True)
        logits = llm.lm_head(llm.hidden_states(visual, ids, mask, ids)[0])
        logits.square().mean().backward()
        found.append((logits.detach(), visual.grad))
    # In 8 bits the inputs of the layers are rounded too, and T5's attention, which is unscaled, amplifies the error.
    for one, other, allowed in zip(*found, (1e-3, 1e-3) if bits == "4bit" else (0.1, 0.3), strict=True):
        assert (one - other).norm() < allowed * one.norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_a_run_with_a_quantized_llm(bitsandbytes, parts, llms, tmp_path, bits, lora):
    rates = {"vision.*": "frozen", "language.*": "frozen", "*": 1e-2}
    if lora is not None:
        pytest.importorskip("peft")
        rates = {"language.*lora_*": 1e-2, **rates}
    recipe = parts.recipe(
        tmp_path / "run",
        stage="generation",
        language={"name": str(llms / "llama"), "quantization": bits, "lora": lora},
        optimizer={"learning_rate": rates, "warmup_steps": 0},
    )
    train(recipe)
    names = load_file(checkpoint.latest_checkpoint(tmp_path / "run") / "model.safetensors").keys()
    kept = {name for name in names if name.startswith("language.")}
    assert all(".lora_" in name for name in kept) and bool(kept) is (lora is not None)
    found = blip2.load(tmp_path / "run", device="cpu").model
    assert found.language.is_frozen
    copy = cut_short(tmp_path / "run", 2)
    train(replace(recipe, output=str(copy)), resume=True)
    assert_same_run(tmp_path / "run", copy)


# -- whole checkpoints -------------------------------------------------------------------------------------------------

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7)]
WIDE = {"vision": 64, "llm": 64, "inner": 128}
"""Sizes that are multiples of 64."""


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    for flavor in ("opt", "t5"):
        save_transformers(root / flavor, flavor, parts.bert, **WIDE)
    return root


@torch.no_grad()
@pytest.mark.parametrize("flavor", ["opt", "t5"])
@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_of_transformers_computes_as_in_transformers(bitsandbytes, saved, parts, flavor, bits):
    """Both quantize the image encoder and the LLM; transformers also the projection, unless it is told not to."""
    kept = {"llm_int8_skip_modules": ["qformer", "language_projection", "lm_head"]}
    settings = {f"load_in_{bits}": True, "bnb_4bit_quant_type": "nf4"}
    theirs = Blip2ForConditionalGeneration.from_pretrained(
        saved / flavor, quantization_config=BitsAndBytesConfig(**settings, **kept), device_map={"": CPU}
    )
    for module in theirs.language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a kernel in bfloat16, which is off here for the LLM
            module.support_avx512bf16_for_cpu = False
    ours = blip2.load(saved / flavor, device="cpu", quantization_config=BitsAndBytesConfig(**settings))
    kinds = [
        {type(module).__name__ for module in part.modules() if "bitsandbytes" in type(module).__module__}
        for part in (ours.model.vision, ours.model.language, ours.model.qformer)
    ]
    layer = {"Linear4bit"} if bits == "4bit" else {"Linear8bitLt"}
    assert layer == kinds[0] == kinds[1] and not kinds[2]
    inputs = processor(flavor, parts.bert)(images=IMAGES, text=["a dog", "two cats"], padding=True, return_tensors="pt")
    features = ours.encode_images(IMAGES)
    expected = theirs.vision_model(inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(ours.model.image_norm(features), expected, atol=1e-5, rtol=1e-5)
    visual = theirs.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(ours.model.visual_prompt(features), visual, atol=1e-5, rtol=1e-5)
    plain = blip2.load(saved / flavor, device="cpu").encode_images(IMAGES)
    assert (features - plain).abs().max() > 1e-3
    out = theirs.generate(**inputs, num_beams=1, max_new_tokens=6, min_new_tokens=1)
    new = out[:, 1:] if flavor == "t5" else out[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in ours.tokenizer.batch_decode(new, skip_special_tokens=True)]
    assert ours.generate(IMAGES, ["a dog", "two cats"], Decoding(num_beams=1, max_new_tokens=6)) == texts


def test_only_the_llm_of_a_checkpoint(bitsandbytes, saved):
    """As on the command line: --language.quantization 4bit."""
    ours = blip2.load(saved / "opt", device="cpu", overrides={"language.quantization": "4bit"})
    assert all(parameter.is_floating_point() for parameter in ours.model.vision.parameters())
    assert not all(parameter.is_floating_point() for parameter in ours.model.language.parameters())
    assert len(ours.caption(IMAGES)) == 2


def test_an_llm_that_is_stored_quantized_is_not_converted(bitsandbytes, parts, llms, tmp_path):
    """The formats with an LLM inside have no place for the quantization, so the output could not be used."""
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    llm = LlamaForCausalLM.from_pretrained(llms / "llama", quantization_config=quantization, device_map={"": "cpu"})
    llm.save_pretrained(tmp_path / "llm")
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    run = save_writer(parts, tmp_path / "run", str(tmp_path / "llm"))
    for to in ("transformers", "vllm"):
        with pytest.raises(InputError, match="is quantized, and only the format blip2, which names it"):
            convert(run, tmp_path / to, to)
    convert(run, tmp_path / "blip2", "blip2")


def test_weights_that_were_trained_are_not_quantized(bitsandbytes, parts, llms, tmp_path):
    recipe = parts.recipe(
        tmp_path / "run",
        stage="generation",
        language={"name": str(llms / "llama")},
        optimizer={"learning_rate": {"vision.*": "frozen", "*": 1e-3}},
        training={"max_steps": 1},
    )
    train(recipe)
    with pytest.raises(InputError, match=r"contains trained weights, such as language\..*convert it to transformers"):
        blip2.load(tmp_path / "run", device="cpu", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
