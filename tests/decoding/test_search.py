"""Texts are token for token those of transformers' ``generate``, for less work."""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2.backbones.language import LanguageModel
from blip2.decoding.kv_cache import is_supported
from blip2.decoding.search import Decoding, draw, write, write_plainly

V, WIDTH, QUERIES = 24, 32, 4
END = 5
"""Of 24 tokens one is the end: most texts end before they must."""
ROPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": V,
}
SEQ2SEQ = {"vocab_size": V, "d_model": WIDTH, "decoder_start_token_id": 0, "pad_token_id": 0}
BART = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 48))}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
NAMES = ("llama", "opt", "gpt2", "bloom", "mistral", "t5", "bart")
DECODER_ONLY = NAMES[:5]


@cache
def llm(name: str) -> LanguageModel:
    if name == "llama":
        network: Any = LlamaForCausalLM(LlamaConfig(**ROPE))
    elif name == "opt":
        sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 48, "num_hidden_layers": 2}
        network = OPTForCausalLM(OPTConfig(**sizes, vocab_size=V, num_attention_heads=4, max_position_embeddings=64))
    elif name == "gpt2":
        network = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64))
    elif name == "bloom":
        network = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=WIDTH, n_layer=2, n_head=4))
    elif name == "mistral":  # with a window that is shorter than a prompt
        network = MistralForCausalLM(MistralConfig(**ROPE, sliding_window=5))
    elif name == "t5":
        network = T5ForConditionalGeneration(T5Config(**SEQ2SEQ, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    elif name == "bart":
        network = BartForConditionalGeneration(BartConfig(**SEQ2SEQ, **BART, **HEADS, max_position_embeddings=64))
    elif name == "bart decoder":
        network = BartForCausalLM(BartConfig(**SEQ2SEQ, **BART, **HEADS))
    else:
        network = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=WIDTH, num_hidden_layers=1, state_size=4))
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.ndim > 1:  # so large that what was read matters
            parameter.data.normal_(std=0.5, generator=generator)
    return LanguageModel(network)


def prompts(seed: int, lengths: tuple[int, ...] = (3, 6, 0, 4), pictures: int = 4, side: str = "right") -> tuple:
    """Visual prompts, ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(pictures, QUERIES, WIDTH, generator=generator)
    places = torch.arange(max(lengths))
    ids = torch.randint(0, V, (len(lengths), max(lengths)), generator=generator)
    return visual, ids, (places if side == "right" else places.flip(0)) < torch.tensor(lengths)[:, None]


def plain(name: str, *asked: Any, decoding: Decoding, ends: list[int], copies: int = 1) -> Tensor:
    with torch.no_grad():
        return write_plainly(llm(name).network, llm(name).prompts(*asked), decoding, ends, copies)


def ours(name: str, *asked: Any, decoding: Decoding, ends: list[int], copies: int = 1) -> Tensor:
    with torch.no_grad():
        return write(llm(name).network, llm(name).prompts(*asked), decoding, ends, copies)


GREEDY = Decoding(num_beams=1, max_new_tokens=7)
BEAMS = Decoding(num_beams=5, max_new_tokens=7)
DECODINGS = {
    "greedy": GREEDY,
    "greedy from the start": replace(GREEDY, min_new_tokens=0),
    "greedy without repetitions": replace(GREEDY, min_new_tokens=3, repetition_penalty=1.8),
    "one token": replace(BEAMS, max_new_tokens=1),
    "3 beams, short": Decoding(num_beams=3, max_new_tokens=7, length_penalty=-1.0, min_new_tokens=0),
    "3 beams, long": Decoding(num_beams=3, max_new_tokens=7, length_penalty=2.0),
    "5 beams": BEAMS,
    "5 beams, short": replace(BEAMS, length_penalty=-1.0),
    "5 beams, no penalty": replace(BEAMS, length_penalty=0.0, min_new_tokens=3),
    "5 beams, long": replace(BEAMS, length_penalty=2.0, max_new_tokens=20),
    "5 beams without repetitions": replace(BEAMS, repetition_penalty=1.5),
}


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_transformers(name, decoding):
    assert is_supported(llm(name).network)
    texts = set()
    for seed in range(3):
        given: dict[str, Any] = {"decoding": decoding, "ends": [[END], [END, 7], [END, 7, 11]][seed]}
        expected = plain(name, *prompts(seed), **given)
        assert torch.equal(ours(name, *prompts(seed), **given), expected)
        texts |= set(map(tuple, expected.tolist()))
    assert len(texts) > 2


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, replace(BEAMS, length_penalty=-1.0)])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_about_the_same_picture(name, decoding):
    image_of = torch.tensor([1, 0, 1, 1, 0])
    for seed, lengths in enumerate([(3, 6, 0, 4, 2), (4, 4, 4, 4, 4), (0, 0, 0, 0, 0)]):
        visual, ids, mask = prompts(seed, lengths, pictures=2)
        expected = plain(name, visual[image_of], ids, mask, decoding=decoding, ends=[END])
        assert torch.equal(ours(name, visual, ids, mask, image_of, decoding=decoding, ends=[END]), expected)
        assert torch.equal(plain(name, visual, ids, mask, image_of, decoding=decoding, ends=[END]), expected)


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_copies(name, beams):
    given: dict[str, Any] = {"decoding": replace(BEAMS, num_beams=beams), "ends": [END], "copies": 3}
    new = ours(name, *prompts(4), **given)
    assert torch.equal(new, plain(name, *prompts(4), **given))
    assert len(set(map(tuple, new[:3].tolist()))) == 3


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_many_prompts(name):
    """Some of which are settled long before others."""
    for seed in range(20):
        decoding = Decoding(num_beams=2 + seed % 4, max_new_tokens=12, length_penalty=(-1.0, 0.0, 1.0, 2.0)[seed // 5])
        asked = prompts(seed, tuple(range(10)), pictures=10)
        given: dict[str, Any] = {"decoding": decoding, "ends": [END, 7], "copies": 1 + seed % 2}
        assert torch.equal(ours(name, *asked, **given), plain(name, *asked, **given))


@pytest.mark.parametrize("name", NAMES)
def test_padding_may_be_on_either_side(name):
    visual, ids, mask = prompts(0, side="left")
    right = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        right[0][row, :length], right[1][row, :length] = ids[row][mask[row]], True
    expected = llm(name).generate(visual, *right, BEAMS, END)
    assert torch.equal(llm(name).generate(visual, ids, mask, BEAMS, END), expected)


@pytest.mark.parametrize("name", ["mamba", "bart decoder"])
def test_other_llms_are_left_to_transformers(name):
    assert not is_supported(llm(name).network)
    asked = prompts(1, (3, 3, 3, 3))
    assert torch.equal(llm(name).generate(*asked, GREEDY, END), plain(name, *asked, decoding=GREEDY, ends=[END]))


# -- how much the LLM computes -------------------------------------------------------------------------------------


def passes(name: str, *asked: Any, decoding: Decoding, ends: list[int], copies: int = 1) -> list[tuple[int, int]]:
    """Rows and columns of each pass through the LLM: its decoder, where it has two parts."""
    seen = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        tokens = next(given[key] for key in ("inputs_embeds", "decoder_input_ids", "input_ids") if key in given)
        seen.append(tuple(tokens.shape[:2]))

    hook = llm(name).network.register_forward_pre_hook(note, with_kwargs=True)
    ours(name, *asked, decoding=decoding, ends=ends, copies=copies)
    hook.remove()
    return seen


NEVER = [V + 1]
"""An end that the LLM cannot write."""


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_prompt_is_read_once(name):
    asked = prompts(0, (3, 6, 1, 4))
    assert passes(name, *asked, decoding=BEAMS, ends=NEVER) == [(4, QUERIES + 6), *[(20, 1)] * 6]
    assert passes(name, *asked, decoding=GREEDY, ends=NEVER) == [(4, QUERIES + 6), *[(4, 1)] * 6]
    sampled = Decoding(top_p=0.9, max_new_tokens=7)
    assert passes(name, *asked, decoding=sampled, ends=NEVER, copies=3) == [(4, QUERIES + 6), *[(12, 1)] * 6]


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_visual_prompt_is_read_once_a_picture(name):
    asked = *prompts(0, (3, 6, 1, 4, 2), pictures=2), torch.tensor([0, 1, 1, 1, 0])
    assert passes(name, *asked, decoding=BEAMS, ends=NEVER) == [(2, QUERIES), (5, 6), *[(25, 1)] * 6]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_reads_a_prompt_once_and_so_does_cross_attention(name):
    network, seen = llm(name).network, Counter()
    modules = {"encoder": network.get_encoder()}
    modules |= {
        key: m for key, m in network.named_modules() if key.endswith(("EncDecAttention.k", "encoder_attn.k_proj"))
    }
    assert len(modules) == 3
    hooks = [module.register_forward_hook(lambda *_, key=key: seen.update([key])) for key, module in modules.items()]
    assert passes(name, *prompts(0), decoding=BEAMS, ends=NEVER) == [(4, 1), *[(20, 1)] * 6]
    for hook in hooks:
        hook.remove()
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_texts_that_are_settled_leave(name):
    asked, ends = prompts(0, tuple(range(10)), pictures=10), [END, 7, 11]
    greedy = replace(GREEDY, max_new_tokens=20)
    new = ours(name, *asked, decoding=greedy, ends=ends)
    ended = torch.isin(new, torch.tensor(ends))
    lengths = (ended.cumsum(dim=1) == 0).sum(dim=1)  # without the end
    rows = [rows for rows, _ in passes(name, *asked, decoding=greedy, ends=ends)]
    assert rows == [10, *(int((lengths >= n).sum()) for n in range(1, len(rows)))]
    assert rows[-1] < 10
    short = replace(BEAMS, length_penalty=0.0, max_new_tokens=20)
    rows = [rows for rows, _ in passes(name, *asked, decoding=short, ends=ends)][1:]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0] == 50


# -- sampling ------------------------------------------------------------------------------------------------------


def test_what_is_drawn_has_the_chances_of_the_nucleus():
    chances = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    torch.manual_seed(0)
    drawn = draw((2.0 * chances.log()).expand(20000, 5), top_p=0.8, temperature=2.0)
    shares = drawn.bincount(minlength=5) / 20000
    torch.testing.assert_close(shares, torch.tensor([0, 0.4, 0.15, 0.3, 0]) / 0.85, atol=0.015, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_sampled_texts_have_the_chances_that_transformers_gives_them(name):
    asked = prompts(2, (3, 0), pictures=2)
    given: dict[str, Any] = {"ends": [END], "copies": 2000}
    decoding = Decoding(top_p=0.5, max_new_tokens=2)
    shares = []
    for path in (ours, plain):
        torch.manual_seed(0)
        new = path(name, *asked, decoding=decoding, **given)
        shares.append([Counter(map(tuple, rows.tolist())) for rows in new.split(2000)])
    for mine, theirs in zip(*shares, strict=True):
        assert sum(abs(mine[text] - theirs[text]) for text in mine | theirs) / 2000 < 0.25


def test_a_die_says_what_is_drawn():
    chances = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    dice = torch.tensor([0.0, 0.46, 0.48, 0.81, 0.83, 1 - 1e-9], dtype=torch.float64)  # the nucleus is 0.4, 0.3, 0.15
    drawn = draw((2.0 * chances.log()).expand(6, 5), top_p=0.8, temperature=2.0, die=dice)
    assert drawn.tolist() == [1, 1, 3, 3, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_given_dice_are_the_same_whoever_writes_them_and_what_lies_beside_them(name):
    visual, ids, mask = prompts(2)
    decoding = Decoding(top_p=0.8, max_new_tokens=6, repetition_penalty=1.3)
    dice = torch.rand(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked = llm(name).prompts(visual, ids, mask)
    together = write(llm(name).network, asked, decoding, [END], 3, dice)
    assert len(set(map(tuple, together.tolist()))) > 6
    assert torch.equal(write_plainly(llm(name).network, asked, decoding, [END], 3, dice), together)
    alone = llm(name).prompts(visual[1:2], ids[1:2], mask[1:2])
    own = write(llm(name).network, alone, decoding, [END], 3, dice[3:6])
    assert own.tolist() == together[3:6, : own.shape[1]].tolist()
