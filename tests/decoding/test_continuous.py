"""Texts that are decoded together, joining and leaving between tokens, are those of each prompt alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from blip2.decoding import continuous
from blip2.decoding.continuous import ContinuousBatch, Row
from blip2.decoding.conversation import make_prompt
from blip2.decoding.kv_cache import CausalLMDecoder, Seq2SeqLMDecoder, UncachedDecoder
from blip2.decoding.options import Decoding
from blip2.decoding.search import sample
from blip2.errors import InputError

EOS = [256]
OPTIONS = [
    Decoding(num_beams=1, max_new_tokens=9),
    Decoding(top_p=0.9, temperature=1.5, max_new_tokens=14),
    Decoding(top_k=20, max_new_tokens=5, repetition_penalty=1.3),
    Decoding(num_beams=1, max_new_tokens=12, min_new_tokens=6, no_repeat_ngram_size=2),
]


@pytest.fixture(scope="module", params=["llama", "opt", "t5", "uncached"])
def language(parts, request):
    kind = request.param
    folder = parts.llama if kind == "uncached" else getattr(parts, kind)
    network = (AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).from_pretrained(folder).eval()
    return network, {"t5": Seq2SeqLMDecoder, "uncached": UncachedDecoder}.get(kind, CausalLMDecoder)


def prompts(network, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(0, 255, (length,), generator=generator)
        made.append(make_prompt(ids, network.get_input_embeddings()(ids).detach() + 0.01))
    return made


def alone(language, prompt, decoding, uniforms):
    network, decoder_class = language
    with torch.no_grad():
        sequences = sample(decoder_class(network, prompt), decoding, torch.tensor(EOS), 1, uniforms[None])
    return [token for token in sequences[0].tolist() if token >= 0]


def test_texts_that_join_and_leave_are_those_of_their_prompts_alone(language):
    network, decoder_class = language
    lengths = [3, 11, 6, 1, 8, 17]
    made = prompts(network, lengths)
    uniforms = torch.rand(len(lengths), 20, generator=torch.Generator().manual_seed(1))
    decodings = [OPTIONS[i % len(OPTIONS)] for i in range(len(lengths))]
    expected = [alone(language, *each) for each in zip(made, decodings, uniforms, strict=True)]
    assert len({len(each) for each in expected}) > 2  # they end at different times
    rows = [Row(decoding, each) for decoding, each in zip(decodings, uniforms, strict=True)]
    batch = ContinuousBatch(decoder_class, network, EOS)
    arrivals = {0: [0, 1], 2: [2], 5: [3, 4], 30: [5]}
    for step in range(60):
        new = arrivals.get(step, [])
        if new:
            batch.join([made[i] for i in new], [[rows[i]] for i in new])
        batch.choose()
        batch.advance()
    assert len(batch) == 0 and [row.tokens for row in rows] == expected


def test_several_texts_of_a_prompt_and_one_that_is_given_up(language):
    network, decoder_class = language
    [one, other] = prompts(network, [5, 9], seed=2)
    decoding = OPTIONS[1]
    uniforms = torch.rand(4, 20, generator=torch.Generator().manual_seed(3))
    rows = [Row(decoding, each) for each in uniforms]
    batch = ContinuousBatch(decoder_class, network, EOS)
    batch.join([one, other], [rows[:3], rows[3:]])
    for step in range(20):
        batch.choose()
        rows[1].is_done |= step == 1
        batch.advance()
    expected = [alone(language, one if i < 3 else other, decoding, uniforms[i]) for i in range(4)]
    assert rows[1].tokens == expected[1][:2]
    assert [rows[i].tokens for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


def test_probabilities_are_those_of_the_logits(language):
    network, decoder_class = language
    [prompt] = prompts(network, [4])
    batch = ContinuousBatch(decoder_class, network, EOS)
    row = Row(Decoding(num_beams=1, max_new_tokens=1, min_new_tokens=0), num_alternatives=3)
    batch.join([prompt], [[row]])
    [new] = batch.choose()
    with torch.no_grad():
        log_probs = decoder_class(network, prompt).logits[0].log_softmax(dim=-1)
    best = log_probs.topk(3)
    assert new.token == int(best.indices[0]) and new.log_prob == pytest.approx(float(best.values[0]), abs=1e-4)
    assert [token for token, _ in new.alternatives] == best.indices.tolist()


def test_a_text_that_is_given_up_while_its_token_is_chosen_stays_given_up(parts, monkeypatch):
    """Another thread sets is_done at any time."""
    network = AutoModelForCausalLM.from_pretrained(parts.llama).eval()
    row = Row(OPTIONS[0])
    batch = ContinuousBatch(CausalLMDecoder, network, EOS)
    batch.join(prompts(network, [3]), [[row]])
    process_logits = continuous.process_logits

    def process(*args):
        row.is_done = True
        return process_logits(*args)

    monkeypatch.setattr(continuous, "process_logits", process)
    assert len(batch.choose()) == 1
    batch.advance()
    assert row.is_done and len(batch) == 0 and batch.choose() == []


def test_beams_are_refused():
    with pytest.raises(InputError, match="num_beams to 1"):
        Row(Decoding(num_beams=3))
