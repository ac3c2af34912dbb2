"""Initialization of a Q-Former from a BERT checkpoint (paper §3.1).

The weights of BERT's embeddings, blocks and prediction head are copied. The feed-forwards of the queries and those of
the text both start as copies of BERT's feed-forwards. Cross-attentions and learned queries, which BERT does not have,
keep their random initialization.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from blip2.backbones.pretrained import load_config, load_model
from blip2.config import QFormerConfig
from blip2.errors import InputError
from blip2.model.qformer import QFormer
from blip2.model.representation import LanguageHead

# Pairs (name in BERT, name in the Q-Former); {} stands for the number of a layer. The feed-forwards appear twice.
NAMES = (
    ("bert.embeddings.word_embeddings", "word_embedding"),
    ("bert.embeddings.position_embeddings", "position_embedding"),
    ("bert.embeddings.LayerNorm", "embedding_norm"),
    ("bert.encoder.layer.{}.attention.self.query", "blocks.{}.self_attention.query"),
    ("bert.encoder.layer.{}.attention.self.key", "blocks.{}.self_attention.key"),
    ("bert.encoder.layer.{}.attention.self.value", "blocks.{}.self_attention.value"),
    ("bert.encoder.layer.{}.attention.output.dense", "blocks.{}.self_attention.output"),
    ("bert.encoder.layer.{}.attention.output.LayerNorm", "blocks.{}.self_attention.norm"),
    ("bert.encoder.layer.{}.intermediate.dense", "blocks.{}.text_feed_forward.expand"),
    ("bert.encoder.layer.{}.output.dense", "blocks.{}.text_feed_forward.contract"),
    ("bert.encoder.layer.{}.output.LayerNorm", "blocks.{}.text_feed_forward.norm"),
    ("bert.encoder.layer.{}.intermediate.dense", "blocks.{}.query_feed_forward.expand"),
    ("bert.encoder.layer.{}.output.dense", "blocks.{}.query_feed_forward.contract"),
    ("bert.encoder.layer.{}.output.LayerNorm", "blocks.{}.query_feed_forward.norm"),
)
HEAD_NAMES = (
    ("cls.predictions.transform.dense", "transform"),
    ("cls.predictions.transform.LayerNorm", "norm"),
)


def check_compatible(name: str, config: QFormerConfig) -> None:
    """Check that a BERT checkpoint has the sizes of a Q-Former.

    Args:
        name: folder or hub name of the BERT checkpoint.
        config: sizes of the Q-Former. ``vocab_size`` has to be one more than BERT's, for the token [DEC].

    Raises:
        InputError: the model cannot be loaded, is not a BERT, or has other sizes. For other sizes, the message contains
            the settings to put into the recipe.
    """
    bert = load_config(name, "BERT")
    if bert.model_type != "bert":
        raise InputError(
            f"{name!r} is a {bert.model_type} model; the Q-Former starts from a model of type bert: set qformer.bert to"
            " a BERT, for example google-bert/bert-base-uncased"
        )
    expected = {
        "hidden_size": bert.hidden_size,
        "num_hidden_layers": bert.num_hidden_layers,
        "num_attention_heads": bert.num_attention_heads,
        "intermediate_size": bert.intermediate_size,
        "vocab_size": bert.vocab_size + 1,  # [DEC] is added
        "max_position_embeddings": bert.max_position_embeddings,
    }
    mismatch = {key: value for key, value in expected.items() if getattr(config, key) != value}
    if mismatch:
        found = ", ".join(f"{key} {getattr(config, key)}" for key in mismatch)
        correct = ", ".join(f"{key}: {value}" for key, value in mismatch.items())
        raise InputError(f"BERT {name!r} does not fit the recipe's qformer ({found}): set qformer {{{correct}}}")


@torch.no_grad()
def initialize_from_bert(name: str, qformer: QFormer, head: LanguageHead | None = None) -> list[str]:
    """Copy the weights of a BERT checkpoint into a Q-Former and into a language head.

    Args:
        name: folder or hub name of a BERT with the sizes of ``qformer.config``.
        qformer: the Q-Former, changed in place.
        head: the language head, changed in place. None: BERT's prediction head is not copied.

    Returns:
        Names of the tensors of BERT's prediction head that the checkpoint lacks, sorted. (Sentence encoders have no
        prediction head.) The corresponding parameters of `head` keep their random initialization.

    Raises:
        InputError: the model cannot be loaded, is not a BERT, or has other sizes than `qformer`.
    """
    check_compatible(name, qformer.config)
    bert, missing = load_model(BertForMaskedLM, name, "BERT", optional=r"^cls\.")
    missing = {key for key in missing if "decoder" not in key}  # tied to the word embedding
    source = {key: tensor for key, tensor in bert.state_dict().items() if key not in missing}
    _copy(source, qformer, NAMES, qformer.config.num_hidden_layers)
    if qformer.position_embedding is not None:
        # BERT adds the same token-type vector to all tokens of a single text; the Q-Former has no such vectors.
        qformer.position_embedding.weight += source["bert.embeddings.token_type_embeddings.weight"][0]
    if head is not None:
        _copy(source, head, HEAD_NAMES, 0)
        if "cls.predictions.bias" in source:
            head.bias[:-1] = source["cls.predictions.bias"]
    return sorted(missing)


def _copy(source: dict[str, Tensor], target: nn.Module, names: tuple[tuple[str, str], ...], num_layers: int) -> None:
    parameters = dict(target.named_parameters())
    for bert_name, own_name in names:
        for layer in range(num_layers) if "{}" in bert_name else [0]:
            for kind in ("weight", "bias"):
                tensor = source.get(f"{bert_name.format(layer)}.{kind}")
                parameter = parameters.get(f"{own_name.format(layer)}.{kind}")
                if tensor is not None and parameter is not None:
                    parameter[: len(tensor)] = tensor  # the vocabulary has one more row, [DEC]
