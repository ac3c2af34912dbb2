"""Starting a Q-Former from a BERT checkpoint (paper §3.1).

Everything that BERT has is copied; the feed-forwards of the queries start as copies of the text ones, and
cross-attentions and queries stay as they were drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from blip2.backbones.pretrained import read_config, read_model
from blip2.config import QFormerConfig
from blip2.errors import InputError
from blip2.model.qformer import QFormer
from blip2.model.representation import LanguageHead

# BERT's names to the Q-Former's; a layer's number goes where {} is. The same BERT tensor may have two places.
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


def check_fits(name: str, config: QFormerConfig) -> None:
    """Raise :class:`InputError`, with the lines to put into the recipe, when BERT `name` has other sizes."""
    bert = read_config(name, "BERT")
    if bert.model_type != "bert":
        raise InputError(f"{name!r} is a {bert.model_type} model; the Q-Former starts from a model of type bert")
    there = {
        "hidden_size": bert.hidden_size,
        "layers": bert.num_hidden_layers,
        "heads": bert.num_attention_heads,
        "intermediate_size": bert.intermediate_size,
        "vocabulary": bert.vocab_size + 1,  # [DEC] is added
        "max_position_embeddings": bert.max_position_embeddings,
    }
    wrong = {key: value for key, value in there.items() if getattr(config, key) != value}
    if wrong:
        found = ", ".join(f"{key} {getattr(config, key)}" for key in wrong)
        wanted = ", ".join(f"{key}: {value}" for key, value in wrong.items())
        raise InputError(f"BERT {name!r} does not fit the recipe's qformer ({found}): set qformer {{{wanted}}}")


@torch.no_grad()
def initialize_from_bert(name: str, qformer: QFormer, head: LanguageHead | None = None) -> list[str]:
    """Copy the weights of a BERT checkpoint into a Q-Former and, where there is one, the head that writes text.

    Args:
        name: folder or hub name of a BERT of the sizes of ``qformer.config``.

    Returns:
        Names of BERT tensors that the checkpoint does not have (sentence encoders come without a prediction head),
        whose places stay as they were drawn.

    Raises:
        InputError: no such model, or it does not fit.
    """
    check_fits(name, qformer.config)
    bert, missing = read_model(BertForMaskedLM, name, "BERT", optional=r"^cls\.")
    missing = {key for key in missing if "decoder" not in key}  # which is tied to the word embedding
    source = {key: tensor for key, tensor in bert.state_dict().items() if key not in missing}
    _copy(source, qformer, NAMES, qformer.config.num_hidden_layers)
    if qformer.position_embedding is not None:
        # BERT adds the same token-type vector to every token of a single text; the Q-Former has none of its own.
        qformer.position_embedding.weight += source["bert.embeddings.token_type_embeddings.weight"][0]
    if head is not None:
        _copy(source, head, HEAD_NAMES, 0)
        if "cls.predictions.bias" in source:
            head.bias[:-1] = source["cls.predictions.bias"]
    return sorted(missing)


def _copy(source: dict[str, Tensor], target: nn.Module, names: tuple[tuple[str, str], ...], layers: int) -> None:
    places = dict(target.named_parameters())
    for theirs, ours in names:
        for layer in range(layers) if "{}" in theirs else [0]:
            for kind in ("weight", "bias"):
                tensor = source.get(f"{theirs.format(layer)}.{kind}")
                place = places.get(f"{ours.format(layer)}.{kind}")
                if tensor is not None and place is not None:
                    place[: len(tensor)] = tensor  # the vocabulary has one more row, [DEC]
