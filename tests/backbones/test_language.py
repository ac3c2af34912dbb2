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
    """One of the tiny LLMs by its name."""

    def load(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
        return LanguageModel(gpt2().to(dtype)) if name == "gpt2" else load_language_model(getattr(parts, name), dtype)

    return load


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2", "t5"])
def llm(request, load) -> LanguageModel:
    return load(request.param)


def draw(shape: tuple[int, ...], seed: int = 5) -> Tensor:
    """A soft visual prompt."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(*lengths: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Random ids and mask, padded on one side."""
    ids = torch.randint(0, 255, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(6))
    places = torch.arange(max(lengths))
    places = places if side == "right" else places.flip(0)
    return ids, places < torch.tensor(lengths)[:, None]


def training_texts(llm: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, labels: the first row has a label on its very first token, the last a prompt of two tokens."""
    ids, mask = words(4, 6, 5)
    if llm.is_encoder_decoder:
        targets, counted = words(3, 2, 4)
    else:
        targets, counted = ids, mask.clone()
        counted[2, :2] = False
    return ids, mask, targets.where(counted, -100)


# -- training ------------------------------------------------------------------------------------------------------


def loss(llm: LanguageModel, visual: Tensor) -> Tensor:
    states, labels = llm.states(visual, *training_texts(llm))
    return language_modeling(states, llm.head, labels).loss


def test_loss_is_that_of_transformers(llm):
    visual, (ids, mask, labels) = draw((3, 4, 32)), training_texts(llm)
    inputs = torch.cat([visual, llm.network.get_input_embeddings()(ids)], dim=1)
    seen = torch.cat([torch.ones(3, 4), mask], dim=1).long()
    if not llm.is_encoder_decoder:
        labels = torch.cat([torch.full((3, 4), -100), labels], dim=1)
    expected = llm.network(inputs_embeds=inputs, attention_mask=seen, labels=labels).loss
    assert loss(llm, visual).item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_positions_with_a_label_are_projected_to_the_vocabulary(llm):
    ids, mask, labels = training_texts(llm)
    states, chosen = llm.states(draw((3, 4, 32)), ids, mask, labels)
    assert states.shape == (int((labels != -100).sum()), 32)
    assert llm.head(states).shape == (len(states), 258)
    assert chosen.tolist() == labels[labels != -100].tolist()


def test_logits_that_are_changed_after_the_output_matrix():
    """Gemma 2 caps its logits, Cohere scales them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 258, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    for config in (Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.5), CohereConfig(**sizes)):
        llm = LanguageModel(randomize(AutoModelForCausalLM.from_config(config)))
        visual, (ids, mask, labels) = draw((3, 4, 32)), training_texts(llm)
        inputs = torch.cat([visual, llm.network.get_input_embeddings()(ids)], dim=1)
        seen = torch.cat([torch.ones(3, 4), mask], dim=1).long()
        whole = torch.cat([torch.full((3, 4), -100), labels], dim=1)
        expected = llm.network(inputs_embeds=inputs, attention_mask=seen, labels=whole).loss
        assert loss(llm, visual).item() == pytest.approx(expected.item(), abs=1e-5)
        assert llm.states(visual, ids, mask, labels)[0].shape[1] == 258


def test_an_encoder_decoder_that_adds_to_its_logits():
    """BART adds a bias as wide as the vocabulary, so its output matrix cannot be left out."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 258, "pad_token_id": 0}
    config = BartConfig(**sizes, max_position_embeddings=64, decoder_start_token_id=1, eos_token_id=END)
    llm = LanguageModel(randomize(AutoModelForSeq2SeqLM.from_config(config)))
    llm.network.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    visual, (ids, mask, labels) = draw((3, 4, 32)), training_texts(llm)
    inputs = torch.cat([visual, llm.network.get_input_embeddings()(ids)], dim=1)
    seen = torch.cat([torch.ones(3, 4), mask], dim=1).long()
    expected = llm.network(inputs_embeds=inputs, attention_mask=seen, labels=labels).loss
    assert loss(llm, visual).item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_visual_prompt_learns_and_the_llm_does_not(llm):
    visual = draw((3, 4, 32)).requires_grad_()
    loss(llm, visual).backward()
    assert (visual.grad.norm(dim=2) > 1e-4).all()
    assert all(p.grad is None and not p.requires_grad for p in llm.parameters())


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5"])  # the ones that have dropout by default
def test_a_frozen_llm_has_no_dropout_in_training(load, name):
    llm = load(name)
    model = nn.Sequential(llm).train()
    assert model.training
    assert torch.equal(loss(llm, draw((3, 4, 32))), loss(llm, draw((3, 4, 32))))
    llm.requires_grad_(True)
    model.train()
    assert not torch.equal(loss(llm, draw((3, 4, 32))), loss(llm, draw((3, 4, 32))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "t5"])
def test_half_precision_weights_stay_so(load, name, dtype):
    llm = load(name, dtype)
    assert llm.dtype == dtype
    # T5 overflows in float16, so transformers keeps one of its matrices in float32.
    spared = "wo.weight" if dtype == torch.float16 and name == "t5" else None
    assert {p.dtype for key, p in llm.named_parameters() if spared is None or spared not in key} == {dtype}
    visual = draw((3, 4, 32)).requires_grad_()
    assert llm.head(llm.states(visual, *training_texts(llm))[0]).dtype == dtype
    near, exact = loss(llm, visual), loss(load(name), visual)
    assert near.item() == pytest.approx(exact.item(), rel=0.03)
    near.backward()
    assert visual.grad.isfinite().all()
    assert visual.grad.any()


def test_a_frozen_llm_ignores_autocast(llm):
    visual = draw((3, 4, 32))
    with torch.autocast("cpu", torch.bfloat16):
        logits = llm.head(llm.states(visual.bfloat16(), *training_texts(llm))[0])
        new = llm.generate(visual, *words(*LENGTHS, side="left"), GREEDY, END)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, llm.head(llm.states(visual.bfloat16(), *training_texts(llm))[0]))
    assert torch.equal(new, llm.generate(visual, *words(*LENGTHS, side="left"), GREEDY, END))


# -- generation ----------------------------------------------------------------------------------------------------


def prompts(llm: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """Visual prompts, ids and mask of three prompts of different lengths."""
    return draw((3, 4, 32)), *words(*LENGTHS, side="right" if llm.is_encoder_decoder else "left")


def one_prompt(llm: LanguageModel, row: int) -> tuple[Tensor, Tensor, Tensor]:
    visual, ids, mask = prompts(llm)
    return visual[row : row + 1], ids[row : row + 1][mask[row : row + 1]][None], torch.ones(1, LENGTHS[row]).bool()


def until_end(tokens: Tensor) -> list[int]:
    written = tokens.tolist()
    return written[: written.index(END)] if END in written else written


@torch.no_grad()
def next_token_scores(llm: LanguageModel, row: int, written: list[int]) -> Tensor:
    """Logits after a prompt and what was written so far, by one pass of transformers' own model, without a cache."""
    visual, ids, _ = one_prompt(llm, row)
    embed = llm.network.get_input_embeddings()
    if llm.is_encoder_decoder:
        start = llm.network.config.decoder_start_token_id
        given: dict[str, Any] = {"decoder_input_ids": torch.tensor([[start, *written]])}
    else:
        given, ids = {}, torch.cat([ids, torch.tensor([written], dtype=torch.long)], dim=1)
    return llm.network(inputs_embeds=torch.cat([visual, embed(ids)], dim=1), **given).logits[0, -1]


def test_greedy_generation_takes_the_best_token_each_time(llm):
    new = llm.generate(*prompts(llm), GREEDY, END)
    for row in range(3):
        written: list[int] = []
        while len(written) < 8 and END not in written:
            scores = next_token_scores(llm, row, written)
            if not written:
                scores[END] = -torch.inf  # a text has at least one token
            written.append(int(scores.argmax()))
        assert until_end(new[row]) == until_end(torch.tensor(written))


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, dataclasses.replace(BEAMS, length_penalty=-1.0)])
def test_prompts_of_different_lengths_do_not_disturb_each_other(llm, decoding):
    together = [until_end(row) for row in llm.generate(*prompts(llm), decoding, END)]
    alone = [until_end(llm.generate(*one_prompt(llm, row), decoding, END)[0]) for row in range(3)]
    assert together == alone
    assert len(set(map(tuple, together))) > 1
    for row in range(3):
        visual, ids, _ = one_prompt(llm, row)
        theirs = llm.network.generate(
            inputs_embeds=torch.cat([visual, llm.network.get_input_embeddings()(ids)], dim=1),
            num_beams=decoding.beams,
            do_sample=False,
            min_new_tokens=1,
            max_new_tokens=8,
            eos_token_id=END,
            pad_token_id=END,
            **({"length_penalty": decoding.length_penalty} if decoding.beams > 1 else {}),
        )
        theirs = theirs[0, 1:] if llm.is_encoder_decoder else theirs[0]
        assert alone[row] == until_end(theirs)


def test_texts_end_and_are_padded_with_the_end(llm):
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
    end = int(llm.generate(*prompts(llm), BEAMS, END)[0, 2])  # a token that is likely
    lengths = []
    for penalty in (-5.0, 5.0):
        new = llm.generate(*prompts(llm), dataclasses.replace(BEAMS, length_penalty=penalty), end)
        lengths.append(int((new != end).sum()))
    assert lengths[0] < lengths[1]


def test_sampling_stays_in_the_nucleus(llm):
    decoding = Decoding(top_p=0.8, temperature=0.7, max_new_tokens=6)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(llm.generate(*prompts(llm), decoding, END, copies=8))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for row, tokens in enumerate(drawn[0]):
        written = until_end(tokens)
        for step, token in enumerate(written):
            scores = next_token_scores(llm, row // 8, written[:step]) / 0.7
            if step == 0:
                scores[END] = -torch.inf
            chances = scores.softmax(dim=0)
            assert chances[chances > chances[token]].sum() < 0.8


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, Decoding(top_p=0.9, max_new_tokens=8)])
def test_copies_of_a_prompt_stand_together(llm, decoding):
    torch.manual_seed(0)
    new = llm.generate(*prompts(llm), decoding, END, copies=3)
    assert len(new) == 9
    rows = [tuple(row) for row in new.tolist()]
    assert len(set(rows)) > 3
    if decoding is BEAMS:
        best = [until_end(row) for row in llm.generate(*prompts(llm), decoding, END)]
        assert [until_end(row) for row in new[::3]] == best


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS])
def test_a_visual_prompt_without_text(llm, decoding):
    visual = draw((2, 4, 32))
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
    assert (llm.vocabulary, llm.width) == weight.shape == (258, 32)
    assert llm.embedding_scale() == pytest.approx(weight.square().mean().sqrt().item(), rel=1e-5)


def test_embedding_scale_of_a_model_that_scales_inside():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GemmaConfig(**sizes, vocab_size=9000, num_key_value_heads=1, head_dim=8)
    llm = LanguageModel(GemmaForCausalLM(config))
    rms = llm.network.get_input_embeddings().weight.square().mean().sqrt().item()
    assert llm.embedding_scale() == pytest.approx(4 * rms, rel=0.02)  # of every second token


@pytest.mark.parametrize("part", ["vision", "pictures"])
def test_what_is_no_language_model(parts, part):
    with pytest.raises(InputError, match="no language model could be read from") as caught:
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
def test_decoding_that_makes_no_sense(name, value):
    with pytest.raises(InputError, match=f"{name} is .*, expected"):
        Decoding(**{name: value})
