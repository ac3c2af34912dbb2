"""Count the parameters and the operations of the models in Tables 1 and 2 of the BLIP-2 paper.

Each model is built as its recipe in recipes/ says, with networks of full size, on PyTorch's meta device: nothing is
downloaded, and no weights exist. What trains is what the recipe's optimizer.learning_rate leaves unfrozen.

The operations (FLOPs, two for a multiplication with an addition) of a training step are those of one image of 224
pixels with a caption of 16 tokens, counted by torch.utils.flop_counter. The backward pass of a frozen part computes no
gradients of weights; that of the image encoder does not exist. The Q-Former's passes run on the CPU with random
weights, because hard negatives and packed texts need values.

Three tables are printed: the trainable and the total parameters beside the paper's; the parameters of each part, which
show where a difference comes from; and the operations of each part with its share of the step. The last column of the
first table has the LLM's nominal size in its total (2.7B for OPT-2.7B), as the paper's totals seem to have.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from torch import nn
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import estimate_cost

from blip2.backbones.language import LanguageModel
from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.backbones.vision_loaders import wrap_transformers
from blip2.model.generation import GenerationModel
from blip2.model.representation import RepresentationModel
from blip2.recipe import load_recipe
from blip2.training.optimizer import configure_trainable

RECIPES = Path(__file__).parents[2] / "recipes"
Model = RepresentationModel | GenerationModel


class Paper(NamedTuple):
    """What the paper says about the model of a recipe."""

    model: str
    trainable: float
    total: float | None = None
    """None: the paper does not say."""


PAPER = {
    "pretrain-stage1-vit-l": Paper("stage 1, ViT-L", 188e6),
    "pretrain-stage1-vit-g": Paper("stage 1, ViT-g", 188e6),
    "pretrain-stage2-vit-l-opt-2.7b": Paper("ViT-L, OPT-2.7B", 104e6, 3.1e9),
    "pretrain-stage2-vit-g-opt-2.7b": Paper("ViT-g, OPT-2.7B", 107e6, 3.8e9),
    "pretrain-stage2-vit-g-opt-6.7b": Paper("ViT-g, OPT-6.7B", 108e6, 7.8e9),
    "pretrain-stage2-vit-l-flan-t5-xl": Paper("ViT-L, FlanT5-XL", 103e6, 3.4e9),
    "pretrain-stage2-vit-g-flan-t5-xl": Paper("ViT-g, FlanT5-XL", 107e6, 4.1e9),
    "pretrain-stage2-vit-g-flan-t5-xxl": Paper("ViT-g, FlanT5-XXL", 108e6, 12.1e9),
}
"""Table 1 and §3.1 (stage 1; neither names the ViT), and Table 2 (stage 2)."""
LANGUAGE = {
    "facebook/opt-2.7b": ("OPT-2.7B", 2.7e9),
    "facebook/opt-6.7b": ("OPT-6.7B", 6.7e9),
    "google/flan-t5-xl": ("FlanT5-XL", 3e9),
    "google/flan-t5-xxl": ("FlanT5-XXL", 11e9),
}
"""The LLMs of the recipes: their name in estimate_cost, and their nominal size, which is that of their papers."""
PARTS = {
    r"vision\.": "image encoder",
    r"language\.": "LLM",
    r"projection\.": "projection to the LLM",
    r"qformer\.blocks\.\d+\.self_attention": "self-attention",
    r"qformer\.blocks\.\d+\.cross_attention": "cross-attention",
    r"qformer\.blocks\.\d+\.query_feed_forward": "feed-forwards of the queries",
    r"qformer\.blocks\.\d+\.text_feed_forward": "feed-forwards of the text",
    r"qformer\.(word|position)_embedding": "text embeddings",
    r"qformer\.|image_norm\.": "queries, norms of the inputs",
    r"": "heads of ITC, ITM and ITG",
}
"""The part of a parameter, by the first of these patterns with which its name begins."""


# -- parameters --------------------------------------------------------------------------------------------------------


def vision_network(name: str) -> nn.Module:
    """Return the image encoder that a recipe names, as its files have it."""
    if name == "eva_vit_g.pth":
        # blip2 reads this file without the last layer, unlike CLIP's, whose last layer wrap_transformers removes.
        return Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=estimate_cost.LAYERS))
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    return CLIPVisionModel(config)


@contextmanager
def without_values() -> Iterator[None]:
    """Skip the steps of building a model that read the values of weights, which the meta device does not have."""

    def probe(encoder: Any) -> tuple[int, int]:
        return estimate_cost.TOKENS, encoder.network.config.hidden_size

    skipped = patch.object(GenerationModel, "initialize_projection", lambda model: None)
    with torch.device("meta"), patch.object(ImageEncoder, "_probe", probe), skipped:
        yield


@cache
def language_model(name: str) -> tuple[nn.Module, estimate_cost.Count]:
    return estimate_cost.language_model(LANGUAGE[name][0])


def build(name: str) -> Model:
    """Return the model of a recipe on the meta device. What the recipe freezes requires no gradients."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    with without_values():
        network = vision_network(recipe.vision.name)
        vision = wrap_transformers(network, Preprocessing(recipe.vision.image_size or 224), recipe.vision.layer)
        if recipe.language is None:
            model = RepresentationModel(vision, recipe.qformer, recipe.objectives)
        else:
            language = LanguageModel(language_model(recipe.language.name)[0])
            model = GenerationModel(vision, recipe.qformer, language, recipe.objectives)
    configure_trainable(model, recipe.optimizer)
    return model


def count_parameters(name: str, model: Model) -> dict[str, Any]:
    """Return the parameters of the model of a recipe, and the paper's numbers.

    Returns:
        ``trainable`` and ``total``; ``parts``, by the names in :data:`PARTS`; ``paper_trainable`` and ``paper_total``;
        and ``nominal_total``: the total with the LLM's nominal size in place of its own. The last two are None in
        stage 1.
    """
    parts: Counter[str] = Counter()
    for parameter, weight in model.named_parameters():
        parts[next(part for pattern, part in PARTS.items() if re.match(pattern, parameter))] += weight.numel()
    total, nominal = sum(parts.values()), None
    if isinstance(model, GenerationModel):
        language = load_recipe(RECIPES / f"{name}.yaml").language
        assert language is not None
        nominal = total - parts["LLM"] + LANGUAGE[language.name][1]
    return {
        "model": PAPER[name].model,
        "trainable": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "total": total,
        "parts": dict(parts),
        "paper_trainable": PAPER[name].trainable,
        "paper_total": PAPER[name].total,
        "nominal_total": nominal,
    }


# -- operations --------------------------------------------------------------------------------------------------------


@cache
def qformer_operations(stage: int, width: int) -> estimate_cost.Count:
    """Count the Q-Former's operations for a pair, with dropout, which PyTorch's counter needs on a CPU.

    Without dropout a CPU computes attention by one operator, which the counter does not know.
    """
    return (estimate_cost.stage_one(0.1, width) if stage == 1 else estimate_cost.stage_two(width=width))[1]


def count_operations(name: str, model: Model) -> dict[str, dict[str, float]]:
    """Return the operations of the forward and of the backward pass for one image with a caption, by part."""
    with torch.device("meta"):
        pixels = torch.empty(1, 3, 224, 224)
        z = torch.empty(1, 32, model.qformer.config.hidden_size, requires_grad=True)
    encoder, width = model.vision.network, model.vision.hidden_size
    counts = {
        "image encoder": estimate_cost.count(lambda: encoder(pixel_values=pixels).last_hidden_state.sum(), set()),
        "Q-Former": qformer_operations(1 if isinstance(model, RepresentationModel) else 2, width),
    }
    if isinstance(model, GenerationModel):
        projection = model.projection
        counts["projection"] = estimate_cost.count(lambda: projection(z).sum(), set())
        language = load_recipe(RECIPES / f"{name}.yaml").language
        assert language is not None
        counts["LLM"] = language_model(language.name)[1]
    every = sum(each.operations for each in counts.values())
    return {
        part: {
            "forward": each.forward,
            "backward": each.operations - each.forward,
            "share": each.operations / every,
        }
        for part, each in counts.items()
    }


# -- output ------------------------------------------------------------------------------------------------------------


def difference(ours: float, paper: float) -> str:
    return f"{100 * (ours / paper - 1):+.1f} %"


def print_parameters(rows: list[dict[str, Any]]) -> None:
    print("| model | trainable | paper | difference | total | paper | difference | total with the LLM's nominal size |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        trainable, total, paper = row["trainable"], row["total"], row["paper_total"]
        rest = "| |"
        if paper is not None:
            rest = f"{paper / 1e9:.1f}B | {difference(total, paper)} | {row['nominal_total'] / 1e9:.3f}B"
        print(
            f"| {row['model']} | {trainable / 1e6:.2f}M | {row['paper_trainable'] / 1e6:.0f}M |"
            f" {difference(trainable, row['paper_trainable'])} | {total / 1e9:.3f}B | {rest} |"
        )


def print_parts(rows: list[dict[str, Any]]) -> None:
    print(f"\n| parameters, million | {' | '.join(row['model'] for row in rows)} |")
    print("|---" + "|---:" * len(rows) + "|")
    for part in dict.fromkeys(PARTS.values()):
        found = [row["parts"].get(part) for row in rows]
        if any(found):
            print(f"| {part} | {' | '.join(f'{n / 1e6:,.2f}' if n else '' for n in found)} |")


def print_operations(rows: list[dict[str, Any]]) -> None:
    print("\n| GFLOP per pair: forward + backward (share) | image encoder | Q-Former | projection | LLM | step |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        cells: list[str] = []
        for part in ("image encoder", "Q-Former", "projection", "LLM"):
            each = row["operations"].get(part)
            passes = [each[key] / 1e9 for key in ("forward", "backward")] if each else []
            cells.append(f"{passes[0]:.1f} + {passes[1]:.1f} ({100 * each['share']:.1f} %)" if each else "")
        step = sum(each["forward"] + each["backward"] for each in row["operations"].values())
        print(f"| {row['model']} | {' | '.join(cells)} | {step / 1e9:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python benchmarks/claims/cost.py pretrain-stage2-vit-g-opt-2.7b --json cost.json",
    )
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE",
        help=f"the models to count, by the names of their recipes. Default: all of {', '.join(PAPER)}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers, unrounded, to this file")
    options = parser.parse_args()
    if unknown := [name for name in options.recipes if name not in PAPER]:
        parser.error(f"{unknown[0]!r} is no recipe of Tables 1 and 2: choose from {', '.join(PAPER)}")
    started, rows = time.perf_counter(), []
    for name in options.recipes or PAPER:
        model = build(name)
        counted = count_parameters(name, model)
        rows.append({"recipe": name, **counted, "operations": count_operations(name, model)})
    print_parameters(rows)
    print_parts(rows)
    print_operations(rows)
    seconds, busy = time.perf_counter() - started, time.process_time()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(
        f"\nCounted in {seconds:.0f} s; {busy:.0f} s of processor time, imports included. "
        + ", ".join(" ".join(version) for version in versions.items())
    )
    if options.json:
        options.json.write_text(
            json.dumps({"seconds": seconds, "processor_seconds": busy, **versions, "models": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
