import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM

from blip2.errors import InputError
from blip2.model.bert_init import check_compatible, initialize_from_bert
from blip2.model.qformer import QFormer, attention_mask
from blip2.model.representation import LanguageHead
from fixtures.tiny import QFORMER, randomize, texts

CONFIG = replace(QFORMER, num_query_tokens=32)
WIDTH = 24


@pytest.fixture(scope="module")
def bert() -> BertForMaskedLM:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 29,
        "max_position_embeddings": 16,
    }
    return randomize(BertForMaskedLM(BertConfig(**sizes))).eval()


@pytest.fixture(scope="module")
def folder(bert, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(path)
    return str(path)


@torch.no_grad()
def test_the_text_transformer_is_bert(bert, folder):
    """BERT's token-type vector, which the Q-Former does not have, is in the positions."""
    qformer, head = QFormer(CONFIG, WIDTH).eval(), LanguageHead(CONFIG)
    assert initialize_from_bert(folder, qformer, head) == []
    ids, mask = texts(9, 5, 2)
    ours = qformer(None, ids, attention_mask("unimodal", 0, mask)).text
    theirs = bert.bert(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
    logits = head(ours[mask], qformer.word_embedding.weight)
    expected = bert(ids, attention_mask=mask.long()).logits[mask]
    torch.testing.assert_close(logits[:, :-1], expected, atol=1e-4, rtol=0)  # all but [DEC]


def test_query_feed_forwards_are_copies_of_berts(bert, folder):
    qformer = QFormer(CONFIG, WIDTH)
    initialize_from_bert(folder, qformer)
    for block, layer in zip(qformer.blocks, bert.bert.encoder.layer, strict=True):
        for ours in (block.query_feed_forward, block.text_feed_forward):
            torch.testing.assert_close(ours.expand.state_dict(), layer.intermediate.dense.state_dict())
            torch.testing.assert_close(ours.contract.state_dict(), layer.output.dense.state_dict())
            torch.testing.assert_close(ours.norm.state_dict(), layer.output.LayerNorm.state_dict())
        assert block.query_feed_forward.expand.weight.data_ptr() != block.text_feed_forward.expand.weight.data_ptr()


def test_queries_cross_attention_and_the_new_token_stay_as_drawn(folder):
    torch.manual_seed(0)
    qformer, head = QFormer(CONFIG, WIDTH), LanguageHead(CONFIG)
    before = {key: tensor.clone() for key, tensor in qformer.state_dict().items()}
    initialize_from_bert(folder, qformer, head)
    changed = {key for key, tensor in qformer.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if key != "queries" and "cross_attention" not in key}
    torch.testing.assert_close(qformer.word_embedding.weight[-1], before["word_embedding.weight"][-1])
    assert head.bias[-1] == 0
    assert head.bias[:-1].all()
    assert qformer.queries.std().item() == pytest.approx(0.02, rel=0.1)
    assert qformer.queries.mean().abs() < 0.002
    for block in qformer.blocks[::2]:
        assert block.cross_attention.key.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not block.cross_attention.key.bias.any()


def test_a_qformer_without_text_takes_its_part(bert, folder):
    qformer = QFormer(CONFIG, WIDTH, has_text=False)
    assert initialize_from_bert(folder, qformer) == []
    layer = bert.bert.encoder.layer[1]
    torch.testing.assert_close(qformer.blocks[1].query_feed_forward.expand.weight, layer.intermediate.dense.weight)
    torch.testing.assert_close(qformer.embedding_norm.weight, bert.bert.embeddings.LayerNorm.weight)


def test_what_a_sentence_encoder_lacks_is_listed_and_stays_as_drawn(bert, tmp_path):
    bert.bert.save_pretrained(tmp_path)
    qformer, head = QFormer(CONFIG, WIDTH), LanguageHead(CONFIG)
    before = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    assert initialize_from_bert(str(tmp_path), qformer, head) == [
        "cls.predictions.bias",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.dense.weight",
    ]
    torch.testing.assert_close(head.state_dict(), before)
    torch.testing.assert_close(qformer.word_embedding.weight[:-1], bert.bert.embeddings.word_embeddings.weight)


# -- errors --------------------------------------------------------------------------------------------------------


def test_a_bert_of_other_sizes_says_what_to_put_into_the_recipe(folder):
    wrong = replace(CONFIG, num_hidden_layers=2, vocab_size=30523)
    with pytest.raises(InputError, match=r"num_hidden_layers 2, vocab_size 30523") as caught:
        initialize_from_bert(folder, QFormer(wrong, WIDTH))
    assert "\n" not in str(caught.value)
    told = re.search(r"set qformer (\{.*\})", str(caught.value))
    assert yaml.safe_load(told[1]) == {"num_hidden_layers": 3, "vocab_size": 30}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 64),
        ("num_hidden_layers", 1),
        ("num_attention_heads", 8),
        ("intermediate_size", 96),
        ("vocab_size", 29),
        ("max_position_embeddings", 17),
    ],
)
def test_every_size_is_checked(folder, field, value):
    check_compatible(folder, CONFIG)
    with pytest.raises(InputError, match=rf"{field} {value}\): set qformer {{{field}: {getattr(CONFIG, field)}}}"):
        check_compatible(folder, replace(CONFIG, **{field: value}))


def test_a_model_that_is_no_bert(parts):
    with pytest.raises(InputError, match="is a llama model; the Q-Former starts from a model of type bert"):
        check_compatible(parts.llama, CONFIG)


@pytest.mark.parametrize("left", ["config.json", None])
def test_a_folder_without_a_bert(folder, tmp_path, left):
    if left:
        (tmp_path / left).write_text(Path(folder, left).read_text())
    with pytest.raises(InputError, match="no BERT could be loaded from") as caught:
        initialize_from_bert(str(tmp_path), QFormer(CONFIG, WIDTH))
    assert "\n" not in str(caught.value)
