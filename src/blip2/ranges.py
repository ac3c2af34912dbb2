"""Between which values the numbers of a recipe may lie."""

from __future__ import annotations

COUNT, STEPS = 10**6, 10**9
"""Largest values of numbers that have no largest by nature: beyond what anybody needs, but nothing overflows."""

RANGES: dict[str, tuple[float, float]] = {
    "vision.image_size": (1, 8192),
    "vision.drop_path_rate": (0, 0.99),
    "vision.num_attention_heads": (1, COUNT),
    "qformer.hidden_size": (1, COUNT),
    "qformer.num_hidden_layers": (1, 1000),
    "qformer.num_attention_heads": (1, COUNT),
    "qformer.intermediate_size": (1, COUNT),
    "qformer.num_query_tokens": (1, COUNT),
    "qformer.cross_attention_frequency": (1, COUNT),
    "qformer.image_text_hidden_size": (1, COUNT),
    "qformer.vocab_size": (1, 2**31 - 1),
    "qformer.max_position_embeddings": (2, 2**31 - 1),
    "qformer.dropout": (0, 1),
    "qformer.layer_norm_eps": (0, 1),
    "qformer.image_norm_eps": (0, 1),
    "language.lora.rank": (1, 8192),
    "language.lora.alpha": (0, COUNT),
    "language.lora.dropout": (0, 1),
    "objectives.itc": (0, COUNT),
    "objectives.itm": (0, COUNT),
    "objectives.itg": (0, COUNT),
    "objectives.label_smoothing": (0, 1),
    "objectives.query_diversity": (0, COUNT),
    "data.train": (0, 1e15),
    "data.temperature": (0.1, COUNT),
    "data.max_bad_fraction": (0, 1),
    "data.group_share": (0, 1),
    "data.batch_size": (1, COUNT),
    "data.max_length": (2, COUNT),
    "data.min_crop_scale": (0.01, 1),
    "data.num_workers": (0, 4096),
    "data.cached_views": (0, COUNT),
    "optimizer.learning_rate": (0, 1e38),
    "optimizer.layer_decay": (0.01, 1),
    "optimizer.betas": (0, 0.999999),
    "optimizer.weight_decay": (0, COUNT),
    "optimizer.warmup_steps": (0, STEPS),
    "optimizer.min_lr_rate": (0, 1),
    "optimizer.max_grad_norm": (1e-6, 1e38),
    "training.max_steps": (1, STEPS),
    "training.gradient_accumulation_steps": (1, COUNT),
    "training.ddp_timeout": (1, 365 * 24 * 3600),
    "training.seed": (0, 2**32 - 1),
    "training.save_steps": (1, STEPS),
    "training.save_total_limit": (1, STEPS),
    "training.eval_steps": (1, STEPS),
    "evaluation.eval_steps": (1, STEPS),
    "evaluation.limit": (1, 10**12),
    "evaluation.num_beams": (1, COUNT),
    "evaluation.top_p": (1e-6, 1),
    "evaluation.temperature": (1e-6, COUNT),
    "evaluation.length_penalty": (-1000, 1000),
    "evaluation.max_new_tokens": (1, COUNT),
    "evaluation.rerank_k": (0, 10**12),
}
"""Smallest and largest value of numbers, both allowed; every element of a list and every value of a mapping."""


def outside(number: float | int, smallest: float | int, largest: float | int) -> str | None:
    """What was expected of a number that lies outside its range, or is no number at all; None where it lies within."""
    if smallest <= number <= largest:
        return None
    if number < smallest and largest >= 1000:
        return f"at least {smallest}"
    return f"at most {largest}" if number > largest >= 1000 else f"{smallest} to {largest}"
