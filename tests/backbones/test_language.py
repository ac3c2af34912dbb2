import dataclasses
import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from blip2.backbones.language import LanguageModel, load_language_model
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.model.losses import language_modeling
from fixtures.tiny import randomize

END = 256
GREEDY = Decoding(num_beams=1, max_new_tokens=8)
BEAMS = Decoding(num_beams=5, max_new_tokens=8)
LENGTHS = (3, 5, 1)


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return randomize(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=END, eos_token_id=END)))


@pytest.fixture(scope="module")
def load(parts) -> Callable[..., LanguageModel]:
    """A function that loads one of the tiny LLMs by its name."""

    def load(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
        return LanguageModel(gpt2().to(dtype)) if name == "gpt2" else load_language_model(getattr(parts, name), dtype)

    return load


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2", "t5"])
def llm(request, load) -> LanguageModel:
    return load(request.param)


def visual_prompt(shape: tuple[int, ...], seed: int = 5) -> Tensor:
    """Return a random soft visual prompt."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_text(*lengths: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Return random ids and their mask, padded on one side."""
    ids = torch.randint(0, 255, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(6))
    places = torch.arange(max(lengths))
    places = places if side == "right" else places.flip(0)
    return ids, places < torch.tensor(lengths)[:, None]


def training_texts(llm: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and labels; the first row has no prompt, the last one a prompt of two tokens."""
    ids, mask = random_text(4, 6, 5)
    if llm.is_encoder_decoder:
        targets, counted = random_text(3, 2, 4)
    else:
        targets, counted = ids, mask.clone()
        counted[2, :2] = False
    return ids, mask, targets.where(counted, -100)


# -- training ------------------------------------------------------------------------------------------------------


def loss(llm: LanguageModel, visual: Tensor) -> Tensor:
    states, labels = llm.hidden_states(visual, *training_texts(llm))
    return language_modeling(states, llm.lm_head, labels).loss


def test_loss_is_that_of_transformers(llm):
    visual, (ids, mask, labels) = visual_prompt((3, 4, 32)), training_texts(llm)
    inputs = torch.cat([visual, llm.network.get_input_embeddings()(ids)], dim=1)
    seen = torch.cat([torch.ones(3, 4), mask], dim=1).long()
    if not llm.is_encoder_decoder:
        labels = torch.cat([torch.full((3, 4), -100), labels], dim=1)
    expected = llm.network(inputs_embeds=inputs, attention_mask=seen, labels=labels).loss
    assert loss(llm, visual).item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_positions_with_a_label_are_projected_to_the_vocabulary(llm):
    ids, mask, labels = training_texts(llm)
    states, chosen = llm.hidden_states(visual_prompt((3, 4, 32)), ids, mask, labels)
    assert states.shape == (int((labels != -100).sum()), 32)
    assert llm.lm_head(states).shape == (len(states), 258)
    assert chosen.tolist() == labels[labels != -100].tolist()


def test_logits_that_are_changed_after_the_output_matrix():
    """Gemma 2 caps its logits, Cohere scales them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 258, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    for config in (Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.5), CohereConfig(**sizes)):
        llm = LanguageModel(randomize(AutoModelForCausalLM.from_config(config)))
        visual, (ids, mask, labels) = visual_prompt((3, 4, 32)), training_texts(llm)
        inputs = torch.cat([visual, llm.network.get_input_embeddings()(ids)], dim=1)
        seen = torch.cat([torch.ones(3, 4), mask], dim=1).long()
        whole = torch.cat([torch.full((3, 4), -100), labels], dim=1)
        expected = llm.network(inputs_embeds=inputs, attention_mask=seen, labels=whole).loss
        assert loss(llm, visual).item() == pytest.approx(expected.item(), abs=1e-5)
        assert llm.hidden_states(visual, ids, mask, labels)[0].shape[1] == 258


def test_logits_are_capped_although_the_first_token_is_zero():
    """The embedding of the padding token is often zero, and so are its logits, with and without the cap."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 258, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    network = randomize(AutoModelForCausalLM.from_config(Gemma2Config(**sizes, final_logit_softcapping=0.5)))
    network.get_input_embeddings().weight.data[0] = 0
    llm = LanguageModel(network)
    ids, mask, labels = training_texts(llm)
    assert llm.lm_head(llm.hidden_states(visual_prompt((3, 4, 32)), ids, mask, labels)[0]).abs().max() <= 0.5


def test_tokens_without_an_embedding(llm):
    """A tokenizer may have more special tokens than its LLM has embeddings. On a GPU the process would end."""
    visual, (ids, mask, labels) = visual_prompt((3, 4, 32)), training_texts(llm)
    beyond = labels.masked_fill(labels == labels.max(), llm.vocab_size)
    calls = [
        lambda: llm.generate(visual, ids + llm.vocab_size, mask, GREEDY, END),
        lambda: llm.hidden_states(visual, *((ids, mask) if llm.is_encoder_decoder else (beyond, mask)), beyond),
        lambda: llm.continuation_log_probs(
            visual, ids, mask, torch.arange(3), beyond.clamp(min=0), torch.arange(3), batch_size=4
        ),
    ]
    for call in calls:
        with pytest.raises(
            InputError, match=r"contains the special token \d+ of the tokenizer.*: leave this token out"
        ):
            call()


def test_an_encoder_decoder_that_adds_to_its_logits():
    """BART adds a bias of vocabulary size, so its output layer cannot be bypassed."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 258, "pad_token_id": 0}
    config = BartConfig(**sizes, max_position_embeddings=64, decoder_start_token_id=1, eos_token_id=END)
    llm = LanguageModel(randomize(AutoModelForSeq2SeqLM.from_config(config)))
    llm.network.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    visual, (ids, mask, labels) = visual_prompt((3, 4, 32)), training_texts(llm)
    inputs = torch.cat([visual, llm.network.get_input_embeddings()(ids)], dim=1)
    seen = torch.cat([torch.ones(3, 4), mask], dim=1).long()
    expected = llm.network(inputs_embeds=inputs, attention_mask=seen, labels=labels).loss
    assert loss(llm, visual).item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_the_visual_prompt_has_a_gradient(llm):
    visual = visual_prompt((3, 4, 32)).requires_grad_()
    loss(llm, visual).backward()
    assert (visual.grad.norm(dim=2) > 1e-4).all()
    assert all(p.grad is None and not p.requires_grad for p in llm.parameters())


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5"])  # those with dropout by default
def test_a_frozen_llm_has_no_dropout_in_training(load, name):
    llm = load(name)
    model = nn.Sequential(llm).train()
    assert model.training
    assert torch.equal(loss(llm, visual_prompt((3, 4, 32))), loss(llm, visual_prompt((3, 4, 32))))
    llm.requires_grad_(True)
    model.train()
    assert not torch.equal(loss(llm, visual_prompt((3, 4, 32))), loss(llm, visual_prompt((3, 4, 32))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "t5"])
def test_half_precision_weights_keep_their_dtype(load, name, dtype):
    llm = load(name, dtype)
    assert llm.dtype == dtype
    # T5 overflows in float16, so transformers keeps one of its matrices in float32.
    spared = "wo.weight" if dtype == torch.float16 and name == "t5" else None
    assert {p.dtype for key, p in llm.named_parameters() if spared is None or spared not in key} == {dtype}
    visual = visual_prompt((3, 4, 32)).requires_grad_()
    assert llm.lm_head(llm.hidden_states(visual, *training_texts(llm))[0]).dtype == dtype
    near, exact = loss(llm, visual), loss(load(name), visual)
    assert near.item() == pytest.approx(exact.item(), rel=0.03)
    near.backward()
    assert visual.grad.isfinite().all()
    assert visual.grad.any()


def test_a_frozen_llm_ignores_autocast(llm):
    visual = visual_prompt((3, 4, 32))
    with torch.autocast("cpu", torch.bfloat16):
        logits = llm.lm_head(llm.hidden_states(visual.bfloat16(), *training_texts(llm))[0])
        new = llm.generate(visual, *random_text(*LENGTHS, side="left"), GREEDY, END)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, llm.lm_head(llm.hidden_states(visual.bfloat16(), *training_texts(llm))[0]))
    assert torch.equal(new, llm.generate(visual, *random_text(*LENGTHS, side="left"), GREEDY, END))


# -- generation ----------------------------------------------------------------------------------------------------


def prompts(llm: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """Return visual prompts, ids and mask of three prompts of different lengths."""
    return visual_prompt((3, 4, 32)), *random_text(*LENGTHS, side="right" if llm.is_encoder_decoder else "left")


def one_prompt(llm: LanguageModel, row: int) -> tuple[Tensor, Tensor, Tensor]:
    visual, ids, mask = prompts(llm)
    return visual[row : row + 1], ids[row : row + 1][mask[row : row + 1]][None], torch.ones(1, LENGTHS[row]).bool()


def until_end(tokens: Tensor) -> list[int]:
    generated = tokens.tolist()
    return generated[: generated.index(END)] if END in generated else generated


@torch.no_grad()
def next_token_scores(llm: LanguageModel, row: int, generated: list[int]) -> Tensor:
    """Return the logits after a prompt and generated tokens from one forward pass of transformers' model, uncached."""
    visual, ids, _ = one_prompt(llm, row)
    embed = llm.network.get_input_embeddings()
    if llm.is_encoder_decoder:
        start = llm.network.config.decoder_start_token_id
        given: dict[str, Any] = {"decoder_input_ids": torch.tensor([[start, *generated]])}
    else:
        given, ids = {}, torch.cat([ids, torch.tensor([generated], dtype=torch.long)], dim=1)
    return llm.network(inputs_embeds=torch.cat([visual, embed(ids)], dim=1), **given).logits[0, -1]


def test_greedy_generation_takes_the_best_token_each_time(llm):
    new = llm.generate(*prompts(llm), GREEDY, END)
    for row in range(3):
        generated: list[int] = []
        while len(generated) < 8 and END not in generated:
            scores = next_token_scores(llm, row, generated)
            if not generated:
                scores[END] = -torch.inf  # at least one token is generated
            generated.append(int(scores.argmax()))
        assert until_end(new[row]) == until_end(torch.tensor(generated))


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, dataclasses.replace(BEAMS, length_penalty=-1.0)])
def test_prompts_of_different_lengths_are_independent(llm, decoding):
    together = [until_end(row) for row in llm.generate(*prompts(llm), decoding, END)]
    alone = [until_end(llm.generate(*one_prompt(llm, row), decoding, END)[0]) for row in range(3)]
    assert together == alone
    assert len(set(map(tuple, together))) > 1
    for row in range(3):
        visual, ids, _ = one_prompt(llm, row)
        theirs = llm.network.generate(
            inputs_embeds=torch.cat([visual, llm.network.get_input_embeddings()(ids)], dim=1),
            num_beams=decoding.num_beams,
            do_sample=False,
            min_new_tokens=1,
            max_new_tokens=8,
            eos_token_id=END,
            pad_token_id=END,
            **({"length_penalty": decoding.length_penalty} if decoding.num_beams > 1 else {}),
        )
        theirs = theirs[0, 1:] if llm.is_encoder_decoder else theirs[0]
        assert alone[row] == until_end(theirs)


def test_sequences_are_padded_with_the_end_token(llm):
    free = llm.generate(*prompts(llm), GREEDY, END).tolist()
    row, at = next((r, i) for r in range(3) for i in range(1, 8) if free[r][i] not in free[r][:i])
    end = free[row][at]
    ended = llm.generate(*prompts(llm), GREEDY, end).tolist()[row]
    assert ended[:at] == free[row][:at]
    assert set(ended[at:]) == {end}
    longer = llm.generate(*prompts(llm), dataclasses.replace(GREEDY, min_new_tokens=8), end)
    assert longer.shape == (3, 8)
    assert end not in longer


def test_a_negative_length_penalty_favors_short_texts(llm):
    end = int(llm.generate(*prompts(llm), BEAMS, END)[0, 2])  # a likely token
    lengths = []
    for penalty in (-5.0, 5.0):
        new = llm.generate(*prompts(llm), dataclasses.replace(BEAMS, length_penalty=penalty), end)
        lengths.append(int((new != end).sum()))
    assert lengths[0] < lengths[1]


def test_sampling_stays_in_the_nucleus(llm):
    decoding = Decoding(top_p=0.8, temperature=0.7, max_new_tokens=6)
    sampled = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sampled.append(llm.generate(*prompts(llm), decoding, END, num_return_sequences=8))
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    for row, tokens in enumerate(sampled[0]):
        generated = until_end(tokens)
        for step, token in enumerate(generated):
            scores = next_token_scores(llm, row // 8, generated[:step]) / 0.7
            if step == 0:
                scores[END] = -torch.inf
            probs = scores.softmax(dim=0)
            assert probs[probs > probs[token]].sum() < 0.8


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, Decoding(top_p=0.9, max_new_tokens=8)])
def test_sequences_of_a_prompt_are_consecutive_rows(llm, decoding):
    torch.manual_seed(0)
    new = llm.generate(*prompts(llm), decoding, END, num_return_sequences=3)
    assert len(new) == 9
    rows = [tuple(row) for row in new.tolist()]
    assert len(set(rows)) > 3
    if decoding is BEAMS:
        best = [until_end(row) for row in llm.generate(*prompts(llm), decoding, END)]
        assert [until_end(row) for row in new[::3]] == best


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS])
def test_a_visual_prompt_without_text(llm, decoding):
    visual = visual_prompt((2, 4, 32))
    nothing = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.bool)
    new = llm.generate(visual, *nothing, decoding, END)
    assert len(new) == 2
    assert not torch.equal(new[0], new[1])


def test_repetition_penalty(llm):
    decoding = dataclasses.replace(GREEDY, min_new_tokens=8, repetition_penalty=100.0)
    assert all(len(set(row)) == 8 for row in llm.generate(*prompts(llm), decoding, END).tolist())


def test_the_weights_own_generation_settings_are_ignored(load, parts, tmp_path):
    shutil.copytree(parts.opt, tmp_path, dirs_exist_ok=True)
    settings = {"max_length": 3, "repetition_penalty": 9.0, "do_sample": True, "suppress_tokens": list(range(200))}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    plain, other = load("opt"), load_language_model(str(tmp_path))
    assert torch.equal(
        plain.generate(*prompts(plain), BEAMS, END),
        other.generate(*prompts(plain), BEAMS, END),
    )


# -- sizes and errors ----------------------------------------------------------------------------------------------


def test_embedding_scale(llm):
    weight = llm.network.get_input_embeddings().weight
    assert (llm.vocab_size, llm.hidden_size) == weight.shape == (258, 32)
    assert llm.embedding_scale() == pytest.approx(weight.square().mean().sqrt().item(), rel=1e-5)


def test_embedding_scale_of_a_model_that_scales_inside():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GemmaConfig(**sizes, vocab_size=9000, num_key_value_heads=1, head_dim=8)
    llm = LanguageModel(GemmaForCausalLM(config))
    rms = llm.network.get_input_embeddings().weight.square().mean().sqrt().item()
    assert llm.embedding_scale() == pytest.approx(4 * rms, rel=0.02)  # estimated from every second token


def test_an_llm_without_token_embeddings_is_refused(monkeypatch):
    def missing(_):
        raise NotImplementedError("not auto-handled")

    network = GemmaForCausalLM(GemmaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9))
    monkeypatch.setattr(GemmaForCausalLM, "get_input_embeddings", missing)
    with pytest.raises(InputError, match=r"the LLM, a GemmaForCausalLM, has no token embeddings: set language.name"):
        LanguageModel(network)


@pytest.mark.parametrize("part", ["vision", "images"])
def test_models_that_are_no_language_model(parts, part):
    with pytest.raises(InputError, match="no language model could be loaded from") as caught:
        load_language_model(getattr(parts, part))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 0),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("temperature", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_invalid_decoding(name, value):
    with pytest.raises(InputError, match=f"{name} is .*, expected"):
        Decoding(**{name: value})
