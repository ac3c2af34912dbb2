"""Initialization of a Q-Former from a BERT checkpoint (paper §3.1).

All weights of BERT are copied. The feed-forwards of the queries start as copies of those of the text; cross-attentions
and queries keep their random initialization.
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

# Names in BERT and in the Q-Former; {} is the number of a layer. A tensor of BERT may be copied twice.
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
    """Check that the BERT `name` has the sizes of `config`.

    Raises:
        InputError: it has not; the message has the lines to put into the recipe.
    """
    bert = load_config(name, "BERT")
    if bert.model_type != "bert":
        raise InputError(f"{name!r} is a {bert.model_type} model; the Q-Former starts from a model of type bert")
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
    """Copy the weights of a BERT checkpoint into a Q-Former and, if given, its language head.

    Args:
        name: folder or hub name of a BERT with the sizes of ``qformer.config``.

    Returns:
        Names of BERT tensors that the checkpoint lacks (sentence encoders have no prediction head). What would be
        copied from them keeps its random initialization.

    Raises:
        InputError: there is no such model, or its sizes differ.
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
