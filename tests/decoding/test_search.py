"""Generated sequences equal those of transformers' ``generate`` token for token, with less computation."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blip2.backbones.language import LanguageModel
from blip2.config import MAX_COUNT
from blip2.decoding.conversation import ConversationDecoder, make_prompt
from blip2.decoding.kv_cache import CausalLMDecoder, supports_kv_cache
from blip2.decoding.search import (
    Decoding,
    cached_decoder_class,
    generate,
    generate_with_transformers,
    sample_tokens,
    sample_top_p,
)
from blip2.decoding.text import make_stopping_criteria
from blip2.errors import InputError

V, WIDTH, QUERIES = 24, 32, 4
END = 5
"""Since 1 of 24 tokens is the end, most sequences end before the maximum length."""
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
    elif name == "mistral":  # with a sliding window that is shorter than a prompt
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
        if parameter.ndim > 1:  # so large that the prompt matters
            parameter.data.normal_(std=0.5, generator=generator)
    return LanguageModel(network)


def prompts(seed: int, lengths: tuple[int, ...] = (3, 6, 0, 4), images: int = 4, side: str = "right") -> tuple:
    """Return visual prompts, token ids and attention mask."""
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(images, QUERIES, WIDTH, generator=generator)
    places = torch.arange(max(lengths))
    ids = torch.randint(0, V, (len(lengths), max(lengths)), generator=generator)
    return visual, ids, (places if side == "right" else places.flip(0)) < torch.tensor(lengths)[:, None]


def plain(
    name: str, *asked: Any, decoding: Decoding, eos_token_ids: list[int], num_return_sequences: int = 1
) -> Tensor:
    with torch.no_grad():
        return generate_with_transformers(
            llm(name).network, llm(name).prepare_prompts(*asked), decoding, eos_token_ids, num_return_sequences
        )


def ours(name: str, *asked: Any, decoding: Decoding, eos_token_ids: list[int], num_return_sequences: int = 1) -> Tensor:
    with torch.no_grad():
        return generate(
            llm(name).network, llm(name).prepare_prompts(*asked), decoding, eos_token_ids, num_return_sequences
        )


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
    assert supports_kv_cache(llm(name).network)
    texts = set()
    for seed in range(3):
        given: dict[str, Any] = {"decoding": decoding, "eos_token_ids": [[END], [END, 7], [END, 7, 11]][seed]}
        expected = plain(name, *prompts(seed), **given)
        assert torch.equal(ours(name, *prompts(seed), **given), expected)
        texts |= set(map(tuple, expected.tolist()))
    assert len(texts) > 2


@pytest.mark.parametrize("penalty", [-10.0, 10.0])
def test_the_longest_text_to_the_largest_penalty_is_a_number(penalty):
    assert 0 < MAX_COUNT ** Decoding(length_penalty=penalty).length_penalty < math.inf
    with pytest.raises(InputError, match=f"length_penalty is {10 * penalty}, expected -10 to 10"):
        Decoding(length_penalty=10 * penalty)


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_no_ngram_is_repeated(name, decoding):
    differences = 0
    for seed in range(3):
        given: dict[str, Any] = {"decoding": replace(decoding, no_repeat_ngram_size=2, max_new_tokens=20)}
        given["eos_token_ids"] = [END]
        new = ours(name, *prompts(seed), **given)
        assert torch.equal(new, plain(name, *prompts(seed), **given))
        for row in new.tolist():
            row = row[: row.index(END)] if END in row else row
            pairs = list(pairwise(row))
            assert len(set(pairs)) == len(pairs)
        given["decoding"] = replace(decoding, max_new_tokens=20)
        differences += not torch.equal(ours(name, *prompts(seed), **given), new)
    assert differences


LETTERS = "abcdefghijklmnopqrstuvwx"


def letters() -> PreTrainedTokenizerFast:
    """Each of the V tokens is a letter."""
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, replace(BEAMS, length_penalty=-1.0)])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_stop_strings_end_sequences_as_in_transformers(name, decoding):
    """Stop strings are two pairs of tokens that the LLM writes."""
    stopped = 0
    for seed in range(3):
        free = ours(name, *prompts(seed), decoding=decoding, eos_token_ids=NEVER)
        stop_strings = ["".join(LETTERS[token] for token in row[2:4]) for row in free[:2].tolist()]
        chosen = replace(decoding, stop_strings=stop_strings)
        network, asked = llm(name).network, llm(name).prepare_prompts(*prompts(seed))
        criteria = make_stopping_criteria(letters(), chosen)
        new = generate(network, asked, chosen, [END], 1, None, criteria)
        assert torch.equal(new, generate_with_transformers(network, asked, chosen, [END], 1, None, criteria))
        texts = ["".join(LETTERS[token] for token in row) for row in new.tolist()]
        stopped += sum(any(each in text for each in stop_strings) for text in texts)
        assert all(
            text.find(each) in (-1, len(text) - 2) or END in row
            for text, row in zip(texts, new.tolist(), strict=True)
            for each in stop_strings
            if text[-1] != LETTERS[END]
        )
    assert stopped


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_conversation_reads_each_token_once(name):
    """The logits are those of the whole sequence, also after a return to an earlier place."""
    network, generator = llm(name).network, torch.Generator().manual_seed(0)
    table = torch.randn(60, WIDTH, generator=generator)
    decoder, counts = None, []
    hook = network.register_forward_pre_hook(
        lambda _, __, given: counts.append(
            next(given[k].shape[1] for k in ("inputs_embeds", "input_ids") if k in given)
        ),
        with_kwargs=True,
    )
    kept: ConversationDecoder | None = None
    sequences = [list(range(5)), list(range(30)), [*range(9), 40, 41], [*range(9), 40, 41], list(range(50))]
    for step, keys in enumerate(sequences):
        prompt = make_prompt(torch.tensor(keys) % V, table[keys])
        counts.clear()
        with torch.no_grad():
            if decoder is None:
                decoder = ConversationDecoder(network, prompt, keys)
            else:
                decoder.read(prompt, keys)
            assert counts == [(5, 25, 2, 1, 41)[step]]
            torch.testing.assert_close(decoder.logits, CausalLMDecoder(network, prompt).logits, atol=1e-4, rtol=1e-4)
            if step == 1:
                kept = decoder.copy()
    hook.remove()
    assert kept is not None
    prompt = make_prompt(torch.tensor([*range(30), 50]) % V, table[[*range(30), 50]])
    with torch.no_grad():
        kept.read(prompt, [*range(30), 50])
        torch.testing.assert_close(kept.logits, CausalLMDecoder(network, prompt).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_decoder_that_was_extended_goes_on_as_if_it_was_not(name):
    """Also if each row is selected once and in order."""
    network, rows, one = llm(name).network, torch.arange(4), torch.ones(4, dtype=torch.long)
    with torch.no_grad():
        asked = llm(name).prepare_prompts(*prompts(0))
        straight, decoder = (cached_decoder_class(network)(network, asked) for _ in range(2))
        expected = []
        for token in (3, 8, 2):
            straight.step(token * one, rows)
            expected.append(straight.logits)
        decoder.step(3 * one, rows)
        tokens = torch.tensor([[7, 9, 1]] * 4)
        decoder.extend(tokens, torch.ones_like(tokens, dtype=torch.bool), rows)
        extended = decoder.extend(torch.tensor([[8, 2]] * 4), torch.ones(4, 2, dtype=torch.bool), rows)
        for token, logits, after in zip((8, 2), expected[1:], extended.unbind(1), strict=True):
            decoder.extend(tokens, torch.ones_like(tokens, dtype=torch.bool), rows)
            decoder.step(token * one, rows)
            decoder.extend(tokens, torch.ones_like(tokens, dtype=torch.bool), rows)
            torch.testing.assert_close(decoder.logits, logits)
            torch.testing.assert_close(after, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, replace(BEAMS, length_penalty=-1.0)])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_about_the_same_image(name, decoding):
    image_index = torch.tensor([1, 0, 1, 1, 0])
    for seed, lengths in enumerate([(3, 6, 0, 4, 2), (4, 4, 4, 4, 4), (0, 0, 0, 0, 0)]):
        visual, ids, mask = prompts(seed, lengths, images=2)
        expected = plain(name, visual[image_index], ids, mask, decoding=decoding, eos_token_ids=[END])
        assert torch.equal(ours(name, visual, ids, mask, image_index, decoding=decoding, eos_token_ids=[END]), expected)
        assert torch.equal(
            plain(name, visual, ids, mask, image_index, decoding=decoding, eos_token_ids=[END]), expected
        )


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_num_return_sequences(name, beams):
    given: dict[str, Any] = {
        "decoding": replace(BEAMS, num_beams=beams),
        "eos_token_ids": [END],
        "num_return_sequences": 3,
    }
    new = ours(name, *prompts(4), **given)
    assert torch.equal(new, plain(name, *prompts(4), **given))
    assert len(set(map(tuple, new[:3].tolist()))) == 3


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_many_prompts(name):
    """Some of them are done long before others."""
    for seed in range(20):
        decoding = Decoding(num_beams=2 + seed % 4, max_new_tokens=12, length_penalty=(-1.0, 0.0, 1.0, 2.0)[seed // 5])
        asked = prompts(seed, tuple(range(10)), images=10)
        given: dict[str, Any] = {"decoding": decoding, "eos_token_ids": [END, 7], "num_return_sequences": 1 + seed % 2}
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
def test_llms_without_kv_cache_use_transformers(name):
    assert not supports_kv_cache(llm(name).network)
    asked = prompts(1, (3, 3, 3, 3))
    assert torch.equal(
        llm(name).generate(*asked, GREEDY, END), plain(name, *asked, decoding=GREEDY, eos_token_ids=[END])
    )


# -- amount of computation ----------------------------------------------------------------------------------------


def passes(
    name: str, *asked: Any, decoding: Decoding, eos_token_ids: list[int], num_return_sequences: int = 1
) -> list[tuple[int, int]]:
    """Return rows and columns of the input of each forward pass (for an encoder-decoder, of the decoder's input)."""
    seen = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        tokens = next(given[key] for key in ("inputs_embeds", "decoder_input_ids", "input_ids") if key in given)
        seen.append(tuple(tokens.shape[:2]))

    hook = llm(name).network.register_forward_pre_hook(note, with_kwargs=True)
    ours(name, *asked, decoding=decoding, eos_token_ids=eos_token_ids, num_return_sequences=num_return_sequences)
    hook.remove()
    return seen


NEVER = [V + 1]
"""An end token that the LLM cannot generate."""


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_prompt_is_computed_once(name):
    asked = prompts(0, (3, 6, 1, 4))
    assert passes(name, *asked, decoding=BEAMS, eos_token_ids=NEVER) == [(4, QUERIES + 6), *[(20, 1)] * 6]
    assert passes(name, *asked, decoding=GREEDY, eos_token_ids=NEVER) == [(4, QUERIES + 6), *[(4, 1)] * 6]
    sampled = Decoding(top_p=0.9, max_new_tokens=7)
    assert passes(name, *asked, decoding=sampled, eos_token_ids=NEVER, num_return_sequences=3) == [
        (4, QUERIES + 6),
        *[(12, 1)] * 6,
    ]


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_visual_prompt_is_computed_once_per_image(name):
    asked = *prompts(0, (3, 6, 1, 4, 2), images=2), torch.tensor([0, 1, 1, 1, 0])
    assert passes(name, *asked, decoding=BEAMS, eos_token_ids=NEVER) == [(2, QUERIES), (5, 6), *[(25, 1)] * 6]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_cross_attention_compute_a_prompt_once(name):
    network, seen = llm(name).network, Counter()
    modules = {"encoder": network.get_encoder()}
    modules |= {
        key: m for key, m in network.named_modules() if key.endswith(("EncDecAttention.k", "encoder_attn.k_proj"))
    }
    assert len(modules) == 3
    hooks = [module.register_forward_hook(lambda *_, key=key: seen.update([key])) for key, module in modules.items()]
    assert passes(name, *prompts(0), decoding=BEAMS, eos_token_ids=NEVER) == [(4, 1), *[(20, 1)] * 6]
    for hook in hooks:
        hook.remove()
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_finished_sequences_leave_the_batch(name):
    asked, eos_token_ids = prompts(0, tuple(range(10)), images=10), [END, 7, 11]
    greedy = replace(GREEDY, max_new_tokens=20)
    new = ours(name, *asked, decoding=greedy, eos_token_ids=eos_token_ids)
    ended = torch.isin(new, torch.tensor(eos_token_ids))
    lengths = (ended.cumsum(dim=1) == 0).sum(dim=1)  # without the end token
    rows = [rows for rows, _ in passes(name, *asked, decoding=greedy, eos_token_ids=eos_token_ids)]
    assert rows == [10, *(int((lengths >= n).sum()) for n in range(1, len(rows)))]
    assert rows[-1] < 10
    short = replace(BEAMS, length_penalty=0.0, max_new_tokens=20)
    rows = [rows for rows, _ in passes(name, *asked, decoding=short, eos_token_ids=eos_token_ids)][1:]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0] == 50


# -- sampling ------------------------------------------------------------------------------------------------------


def test_sampled_tokens_have_the_probabilities_of_the_nucleus():
    probs = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    torch.manual_seed(0)
    sampled = sample_top_p((2.0 * probs.log()).expand(20000, 5), top_p=0.8, temperature=2.0)
    frequencies = sampled.bincount(minlength=5) / 20000
    torch.testing.assert_close(frequencies, torch.tensor([0, 0.4, 0.15, 0.3, 0]) / 0.85, atol=0.015, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_sampled_sequences_have_the_probabilities_of_transformers(name):
    asked = prompts(2, (3, 0), images=2)
    given: dict[str, Any] = {"eos_token_ids": [END], "num_return_sequences": 2000}
    decoding = Decoding(top_p=0.5, max_new_tokens=2)
    frequencies = []
    for path in (ours, plain):
        torch.manual_seed(0)
        new = path(name, *asked, decoding=decoding, **given)
        frequencies.append([Counter(map(tuple, rows.tolist())) for rows in new.split(2000)])
    for mine, theirs in zip(*frequencies, strict=True):
        assert sum(abs(mine[text] - theirs[text]) for text in mine | theirs) / 2000 < 0.25


def test_random_numbers_determine_the_sampled_tokens():
    probs = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    # The probabilities of the nucleus are 0.4, 0.3 and 0.15.
    uniforms = torch.tensor([0.0, 0.46, 0.48, 0.81, 0.83, 1 - 1e-9], dtype=torch.float64)
    sampled = sample_top_p((2.0 * probs.log()).expand(6, 5), top_p=0.8, temperature=2.0, uniforms=uniforms)
    assert sampled.tolist() == [1, 1, 3, 3, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_determine_the_sequences_for_every_function_and_batch(name):
    visual, ids, mask = prompts(2)
    decoding = Decoding(top_p=0.8, max_new_tokens=6, repetition_penalty=1.3)
    uniforms = torch.rand(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked = llm(name).prepare_prompts(visual, ids, mask)
    together = generate(llm(name).network, asked, decoding, [END], 3, uniforms)
    assert len(set(map(tuple, together.tolist()))) > 6
    assert torch.equal(generate_with_transformers(llm(name).network, asked, decoding, [END], 3, uniforms), together)
    alone = llm(name).prepare_prompts(visual[1:2], ids[1:2], mask[1:2])
    own = generate(llm(name).network, alone, decoding, [END], 3, uniforms[3:6])
    assert own.tolist() == together[3:6, : own.shape[1]].tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "temperature"),
    [
        (5, None, None, 1.0),
        (None, None, 0.2, 1.0),
        (8, 0.7, None, 0.7),
        (None, 0.9, 0.1, 1.5),
        (9, 0.8, 0.3, 1.3),
        (50, None, 0.0, 1.0),
    ],
)
def test_sampled_tokens_have_the_probabilities_of_transformers_processors(top_k, top_p, min_p, temperature):
    logits = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(4))
    expected: Any = TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
    for option, processor in ((top_k, TopKLogitsWarper), (top_p, TopPLogitsWarper), (min_p, MinPLogitsWarper)):
        expected = expected if option is None else processor(option)(None, expected)
    decoding = Decoding(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    frequencies = sample_tokens(logits.expand(4000, -1), decoding, uniforms).bincount(minlength=V) / 4000
    torch.testing.assert_close(frequencies, expected.softmax(dim=-1)[0], atol=1 / 2000, rtol=0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_top_k_and_min_p_sample_the_sequences_of_transformers(name):
    decoding = Decoding(top_k=6, top_p=0.95, min_p=0.02, temperature=1.2, max_new_tokens=6, no_repeat_ngram_size=3)
    uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked = llm(name).prepare_prompts(*prompts(2))
    new = generate(llm(name).network, asked, decoding, [END], 1, uniforms)
    assert torch.equal(new, generate_with_transformers(llm(name).network, asked, decoding, [END], 1, uniforms))
