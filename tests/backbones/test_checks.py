"""LLMs are run on a few tokens when they are loaded, and refused if they cannot be used."""

import warnings
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from blip2.backbones.language import LanguageModel, extract_text_model, load_language_model
from blip2.decoding.kv_cache import CausalLMDecoder
from blip2.decoding.search import (
    Decoding,
    generate,
    generate_by_length,
    generate_with_transformers,
    generate_without_cache,
)
from blip2.errors import InputError
from blip2.model.losses import IGNORE_INDEX

V, WIDTH, QUERIES, END = 64, 32, 4, 2
TOKENS = {"vocab_size": V, "eos_token_id": END, "pad_token_id": 1, "bos_token_id": 0}
ROPE = {
    **TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SEQ2SEQ = {
    **TOKENS,
    "d_model": WIDTH,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **{f"{part}_{key}": n for part in ("encoder", "decoder")
       for key, n in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))},
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
PER_LAYER = {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}


def gemma3() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config={**ROPE, **LAYERS}, vision_config=vision, mm_tokens_per_image=4, image_token_index=5,
            eos_token_id=[1, END],
        )
    )  # fmt: skip


MAKES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE)),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=V, hidden_size=WIDTH, num_hidden_layers=2, intermediate_size=48)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=V, hidden_size=WIDTH, num_hidden_layers=1, state_size=4)
    ),
    "bart decoder": lambda: hf.BartForCausalLM(hf.BartConfig(**{**SEQ2SEQ, "is_encoder_decoder": False})),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(
        hf.OpenAIGPTConfig(vocab_size=V, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
    ),
    "ctrl": lambda: hf.CTRLLMHeadModel(
        hf.CTRLConfig(vocab_size=V, n_embd=WIDTH, dff=48, n_layer=2, n_head=4, n_positions=64)
    ),
    "gemma4": lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**ROPE, **LAYERS, **PER_LAYER)),
    "m2m100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**SEQ2SEQ)),
    "gemma3": lambda: extract_text_model(gemma3()),
    "xlstm": lambda: hf.xLSTMForCausalLM(
        hf.xLSTMConfig(vocab_size=V, hidden_size=WIDTH, num_hidden_layers=1, num_heads=2, chunk_size=16)
    ),
    "t5gemma": lambda: hf.T5GemmaForConditionalGeneration(
        hf.T5GemmaConfig(encoder={**ROPE, **LAYERS}, decoder={**ROPE, **LAYERS, "sliding_window": 4}, **TOKENS)
    ),
}
GENERATE_FNS = {
    "llama": generate,
    "rwkv": generate_without_cache,  # its state cannot be reordered, so it has no beams
    "mamba": generate_with_transformers,
    "bart decoder": generate_by_length,
    "openai-gpt": generate_without_cache,
    "gemma4": generate,
    "gemma3": generate,
    "m2m100": generate,
    "t5gemma": generate,
}


def enlarged(network: nn.Module) -> Any:
    """Return the network with weights so large that the prompt matters."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return network.eval()


@cache
def llm(name: str) -> LanguageModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LanguageModel(enlarged(MAKES[name]()))


def prompts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    visual = torch.randn(3, QUERIES, WIDTH, generator=generator)
    return visual, torch.randint(6, V, (3, 6), generator=generator), torch.arange(6) < torch.tensor([3, 6, 0])[:, None]


@pytest.mark.parametrize("name", GENERATE_FNS)
def test_the_fastest_correct_function_is_selected(name):
    assert llm(name).generate_fn is GENERATE_FNS[name]


@pytest.mark.parametrize("name", MAKES)
def test_a_batch_generates_the_same_as_single_prompts(name):
    decoding = Decoding(num_beams=3, max_new_tokens=5)
    visual, ids, mask = prompts()
    together = llm(name).generate(visual, ids, mask, decoding, END)
    for i, length in enumerate(mask.sum(dim=1).tolist()):
        one = slice(i, i + 1)
        alone = llm(name).generate(visual[one], ids[one, :length], mask[one, :length], decoding, END)[0]
        assert together[i, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("name", MAKES)
def test_greedy_tokens_are_the_most_likely_in_training(name):
    """In the training forward pass no token is more likely than the generated one."""
    visual, ids, mask = prompts()
    written = llm(name).generate(visual, ids, mask, Decoding(num_beams=1, max_new_tokens=5, min_new_tokens=5), END)
    if llm(name).is_encoder_decoder:
        labels = written
    else:
        rows = [torch.cat([row[seen], new]) for row, seen, new in zip(ids, mask, written, strict=True)]
        targets = [torch.cat([torch.full_like(row[seen], IGNORE_INDEX), new]) for row, seen, new in
                   zip(ids, mask, written, strict=True)]  # fmt: skip
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    with torch.no_grad():
        logits = llm(name).lm_head(llm(name).hidden_states(visual, ids, mask, labels)[0])
    logits[:, END] = -torch.inf
    assert logits.argmax(dim=-1).tolist() == written.flatten().tolist()


def test_per_layer_embeddings_give_the_logits_of_tokens():
    language, text = llm("gemma4"), torch.tensor([[9, 14, 30, 7]])
    blank = torch.full((1, QUERIES), 1)
    with torch.no_grad():
        theirs = language.network(input_ids=torch.cat([blank, text], dim=1)).logits[0, QUERIES - 1 : -1]
        states, _ = language.hidden_states(language.embed(blank), text, torch.ones_like(text).bool(), text)
        ours = language.lm_head(states)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_llm_of_a_model_with_an_image_encoder_is_used(tmp_path):
    whole = enlarged(gemma3())
    whole.save_pretrained(tmp_path)
    language = load_language_model(str(tmp_path))
    assert type(language.network) is hf.Gemma3ForCausalLM
    assert not any("vision" in name for name, _ in language.network.named_parameters())
    ids = torch.tensor([[9, 14, 30, 7]])
    with torch.no_grad():
        torch.testing.assert_close(language.network(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert language.eos_token_ids(END) == [END, 1]


class Bent(hf.LlamaForCausalLM):
    """An LLM that silently changes its input embeddings."""

    def forward(self, input_ids=None, inputs_embeds=None, **arguments):
        if inputs_embeds is not None:
            inputs_embeds = self.bend(inputs_embeds)
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **arguments)

    bend: Any = None


@pytest.mark.parametrize(
    ("bend", "backward", "message"),
    [
        (lambda x: 3 * x, False, r"a Bent, cannot be used .* given as tokens differ .* set language.name to another"),
        (lambda x: x.mean(dim=1, keepdim=True).expand_as(x), False, "given as tokens"),
        (lambda x: x * torch.nan, False, "its logits are not finite: its weights are damaged"),
        (lambda x: x[:, :, :-1], False, "RuntimeError"),
        (lambda x: x.detach(), True, "no gradient goes through it"),
        (lambda x: x + 0 * x.detach(), True, None),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(bend, backward, message):
    network = enlarged(Bent(hf.LlamaConfig(**ROPE)))
    network.bend = bend
    language = LanguageModel(network)
    if message is None:
        language.check(backward=backward)
        return
    with pytest.raises(InputError, match=message) as caught:
        language.check(backward=backward)
    assert "\n" not in str(caught.value)


def test_an_llm_without_causal_mask_is_refused():
    sizes = {key: ROPE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    language = LanguageModel(enlarged(hf.BertLMHeadModel(hf.BertConfig(vocab_size=V, **sizes))))
    with pytest.raises(InputError, match=r"a BertLMHeadModel, cannot .* depend on tokens that come later"):
        language.check()


def test_a_broken_cache_is_not_used(monkeypatch):
    """The checks compare logits, so they detect a cache with wrong content and select a slower function."""
    monkeypatch.setattr(CausalLMDecoder, "_reorder_suffix", lambda decoder, rows: None)
    language = LanguageModel(enlarged(MAKES["llama"]()))
    assert language.generate_fn is generate_with_transformers


def test_half_precision_uses_the_fastest_function():
    for dtype in (torch.float16, torch.bfloat16):
        assert LanguageModel(enlarged(MAKES["llama"]()).to(dtype)).generate_fn is generate


def test_the_checks_restore_random_state_and_training_mode():
    network = enlarged(hf.OPTForCausalLM(hf.OPTConfig(vocab_size=V, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=1,
                                                      num_attention_heads=4, word_embed_proj_dim=WIDTH)))  # fmt: skip
    language = LanguageModel(network)
    network.train()
    before = torch.get_rng_state()
    language.check(backward=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in network.modules())


def test_decoder_start_token_id(tmp_path):
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = hf.T5Config(vocab_size=V, **sizes, pad_token_id=1, eos_token_id=END)
    config.decoder_start_token_id = None
    network = hf.T5ForConditionalGeneration(config)
    network.generation_config = hf.GenerationConfig(decoder_start_token_id=7)
    network.save_pretrained(tmp_path)
    language = load_language_model(str(tmp_path))
    assert language.network.generation_config.decoder_start_token_id == 7
    assert language.network.config.decoder_start_token_id == 7  # which conversion saves
    network.generation_config = hf.GenerationConfig()
    network.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not say which token its texts begin with: add decoder_start_token_id"):
        load_language_model(str(tmp_path))
