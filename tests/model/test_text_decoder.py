"""Captions of stage 1 with cached keys, compared with the whole Q-Former run again for every token."""

import pytest
import torch

from blip2.config import ObjectivesConfig
from blip2.decoding.options import Decoding
from blip2.decoding.search import search
from blip2.model.qformer import attention_mask
from blip2.model.representation import RepresentationModel
from blip2.model.text_decoder import TextDecoder
from fixtures.tiny import QFORMER, no_encoder, randomize

END = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize(RepresentationModel(no_encoder(5, 12), QFORMER, ObjectivesConfig())).eval()


@pytest.fixture(scope="module")
def memory(model):
    features = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
    return model.build_image_memory(features)


class Recomputing(TextDecoder):
    """The same without a cache: [queries; text] again for every token, with the causal mask."""

    def __init__(self, model, memory):
        self.model, self.memory = model, memory
        self._prompt_index = torch.arange(len(memory))
        self.ids = torch.zeros(len(memory), 0, dtype=torch.long)
        self._step(torch.full((len(memory),), model.qformer.decoder_start_token_id))

    def _step(self, tokens):
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        mask = attention_mask("causal", QFORMER.num_query_tokens, torch.ones_like(self.ids).bool())
        text = self.model.qformer(self.memory.select(self._prompt_index), self.ids, mask).text
        self.logits = self.model.language_head(text[:, -1], self.model.qformer.word_embedding.weight)

    def _reorder(self, rows):
        self.ids = self.ids[rows]

    _reorder_suffix = _reorder


@torch.no_grad()
def test_logits_equal_those_without_a_cache(model, memory):
    ours, plain = TextDecoder(model, memory), Recomputing(model, memory)
    torch.testing.assert_close(ours.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert (ours.logits[0] - ours.logits[1]).abs().max() > 0.01  # the image matters
    for rows, tokens in (
        ([0, 1, 2], [7, 8, 9]),  # every row goes on
        ([0, 0, 1, 2, 2], [5, 6, 7, 8, 9]),  # rows are duplicated
        ([1, 0, 2, 4, 3], [9, 5, 5, 7, 6]),  # beams of one image change places
        ([4, 0], [6, 11]),  # rows end
    ):
        for decoder in (ours, plain):
            decoder.step(torch.tensor(tokens), torch.tensor(rows))
        torch.testing.assert_close(ours.logits, plain.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoding", [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 3, "repetition_penalty": 1.5}])
@torch.no_grad()
def test_captions_equal_those_without_a_cache(model, memory, decoding):
    options = Decoding(max_new_tokens=8, min_new_tokens=2, **decoding)
    new = search(TextDecoder(model, memory), options, [END])
    assert torch.equal(new, search(Recomputing(model, memory), options, [END]))
    assert len(set(map(tuple, new.tolist()))) == 3
    for image in range(3):  # a caption does not depend on the other images
        alone = search(TextDecoder(model, memory.select(torch.tensor([image]))), options, [END])[0]
        assert new[image, : len(alone)].tolist() == alone.tolist()


@torch.no_grad()
def test_texts_that_the_model_was_trained_on_are_likely(model, memory):
    """The logits are those that the ITG loss reads."""
    decoder = TextDecoder(model, memory)
    ids = torch.tensor([[2, 9, 7, 3]] * 3)
    total = torch.zeros(3)
    for token in ids.T[1:]:
        total += decoder.logits.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)
        decoder.step(token, torch.arange(3))
    torch.testing.assert_close(total, model.log_likelihood(memory, ids, torch.ones_like(ids).bool()))
