"""python benchmarks/estimate_cost.py

Print the tables of docs/scale.md: the time of the paper's pre-training on 8 and on 64 GPUs, and the memory of its
fine-tuning on the paper's 16. Operations and saved activations are counted by PyTorch on networks of full size, the
frozen ones on the meta device, the Q-Former on the CPU. Communicated bytes are those of benchmarks/traffic.py, which a
test compares with measured ones. The constants below state what is assumed: utilization of the GPUs, network bandwidth
and size of an image file.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from traffic import step_traffic
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.backbones.vision_loaders import wrap_transformers
from blip2.config import DataConfig, LanguageConfig, ObjectivesConfig, QFormerConfig, Recipe, VisionConfig
from blip2.model.qformer import QFormer
from blip2.model.representation import RepresentationBatch, RepresentationModel

PEAK = {"A100": 312e12, "H100": 989e12}
"""Peak half-precision operations per second without sparsity, from the data sheets."""
SHARES = (0.5, 0.4)
"""Fractions of the peak that training reaches (assumed)."""
NETWORKS = {8: ("NVLink, 200 GB/s", 200e9), 64: ("400 Gbit/s a GPU", 50e9)}
"""Bytes per second that a process sends (assumed)."""
LENGTH = 16
"""Tokens per caption (assumed, slightly more than COCO's)."""
IMAGES, IMAGE_BYTES = 129e6, 30e3
"""Number of images in the paper, and bytes of a JPEG of 256 pixels (assumed)."""
TOKENS, WIDTH = 257, 1408
PAIRS = 2
GIB = 2**30
LAYERS = 39
"""Number of layers of ViT-g/14 without the last one (§3.4)."""
TUNED = {"captions": (364, 256), "answers": (490, 128)}
"""Image size and pairs per step of fine-tuning (Tables 7 and 8)."""
TUNING_GPUS = 16


class Count(NamedTuple):
    """The cost of one pair in one step."""

    operations: float
    kept: float
    """Bytes that autograd saves for the backward pass."""
    forward: float
    """The operations of the forward pass alone."""


def count(forward: Any, parameters: set[int], pairs: int = 1, backward: bool = True) -> Count:
    """Count the operations of a forward and backward pass, and the bytes saved between them except weights.

    Args:
        forward: the forward pass.
        parameters: storages that are not counted; see :func:`weights`.
        pairs: number of pairs in the pass.
        backward: whether to run and count the backward pass.
    """
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(tensor) not in parameters and storage._cdata not in parameters:  # pyright: ignore[reportPrivateUsage]
            kept[storage._cdata] = storage  # pyright: ignore[reportPrivateUsage]
        return tensor

    # PyTorch does not count the operations of oneDNN's own linear layer.
    with patch("blip2.model.kernels.linear._onednn", None), FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward()
        forwards = counter.get_total_flops()
        size = sum(storage.nbytes() for storage in kept.values())
        if out.requires_grad and backward:
            out.backward()
    return Count(counter.get_total_flops() / pairs, size / pairs, forwards / pairs)


def weights(network: nn.Module) -> set[int]:
    """Return the storages of a network's weights."""
    return {p.untyped_storage()._cdata for p in network.parameters()}  # pyright: ignore[reportPrivateUsage]


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def vit_g() -> tuple[nn.Module, Count]:
    """EVA-CLIP's ViT-g/14 without its last layer (§3.4), for an image of 224 pixels."""
    with torch.device("meta"):
        network = Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=LAYERS))
        pixels = torch.empty(1, 3, 224, 224)
    network.requires_grad_(False)
    return network, count(lambda: network(pixel_values=pixels).last_hidden_state.sum(), weights(network))


def stage_one(dropout: float, width: int = WIDTH) -> tuple[nn.Module, Count]:
    """The Q-Former of §3.1 with its three objectives, given features of this width."""
    torch.manual_seed(0)
    probe = nn.Linear(1, 1)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((1, 2, 3))[:, None, None].expand(len(pixels), TOKENS, width)

    encoder = ImageEncoder(probe, encode, Preprocessing(8))
    model = RepresentationModel(encoder, QFormerConfig(bert=None, dropout=dropout), ObjectivesConfig()).train()
    ids = torch.randint(5, 30000, (PAIRS, LENGTH))
    features = torch.randn(PAIRS, TOKENS, width)
    batch = RepresentationBatch(features, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(PAIRS))
    return model, count(lambda: torch.stack(list(model(batch).losses.values())).sum(), weights(model), PAIRS)


def stage_two(
    tokens: int = TOKENS, trains: bool = False, checkpointing: bool = False, width: int = WIDTH
) -> tuple[nn.Module, Count]:
    """The Q-Former without text.

    Args:
        trains: the image encoder, which asks for gradients of its features.
        width: of the features.
    """
    model = QFormer(QFormerConfig(bert=None), width, has_text=False).train()
    model.gradient_checkpointing = checkpointing
    norm = nn.LayerNorm(width)
    features = torch.randn(PAIRS, tokens, width, requires_grad=trains)
    return model, count(
        lambda: model(model.project_image(features, norm)).queries.sum(), weights(model), PAIRS, not trains
    )


def trained_block(size: int, checkpointing: bool) -> tuple[float, float]:
    """What a block of a ViT-g that trains keeps in half precision: bytes an image, and copies of its weights.

    It is what the second of two blocks adds, counted at an eighth of ViT-g's width and so multiplied.
    """
    part = 8

    def keep(layers: int, pairs: int) -> float:
        torch.manual_seed(0)
        config = Blip2VisionConfig(
            hidden_size=1408 // part, intermediate_size=6144 // part, num_attention_heads=16 // part,
            num_hidden_layers=layers, image_size=size, attn_implementation="sdpa",
        )  # fmt: skip
        encoder = wrap_transformers(Blip2VisionModel(config), Preprocessing(size))
        encoder.requires_grad_(True).train()
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        pixels = torch.zeros(pairs, 3, size, size)
        with torch.autocast("cpu", torch.bfloat16):
            return count(lambda: encoder.encode(pixels).sum(), weights(encoder), backward=False).kept

    one, two = (keep(2, pairs) - keep(1, pairs) for pairs in (1, 2))
    return part * (two - one), part**2 * (2 * one - two)


def opt(width: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=50272, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=32, num_attention_heads=32,
        word_embed_proj_dim=width, max_position_embeddings=2048,
    )  # fmt: skip


def t5(width: int, inside: int, heads: int) -> T5Config:
    return T5Config(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=inside, num_layers=24, num_heads=heads,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip


LANGUAGE_CONFIGS = {
    "OPT-2.7B": opt(2560), "OPT-6.7B": opt(4096), "FlanT5-XL": t5(2048, 5120, 32), "FlanT5-XXL": t5(4096, 10240, 64)
}  # fmt: skip


def language_model(name: str) -> tuple[nn.Module, Count]:
    """A frozen LLM: forward, and back to what it reads. Half precision."""
    config = LANGUAGE_CONFIGS[name]
    is_t5 = isinstance(config, T5Config)
    config._attn_implementation = "eager"  # the other looks at the mask, which has no values here
    with torch.device("meta"):
        network: Any = (T5ForConditionalGeneration if is_t5 else OPTForCausalLM)(config).to(torch.bfloat16).eval()
        if is_t5:  # FlanT5's files have an output matrix of its own, which transformers ties only when it has no files
            network.lm_head.weight = nn.Parameter(torch.empty_like(network.lm_head.weight))
        read = LENGTH // 2 if is_t5 else LENGTH
        inputs = torch.empty(1, 32 + read, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        written = torch.zeros(1, LENGTH // 2, dtype=torch.long)
        seen = torch.ones(1, 32 + read, dtype=torch.long)
    network.requires_grad_(False)
    more = {"decoder_input_ids": written} if is_t5 else {"logits_to_keep": LENGTH, "attention_mask": seen}

    def forward() -> Tensor:
        return network(inputs_embeds=inputs, use_cache=False, **more).logits.float().sum()

    return network, count(forward, weights(network))


def tuning(encoder: nn.Module, llms: dict[str, tuple[nn.Module, Count]]) -> None:
    """The table of fine-tuning: memory without and with training.gradient_checkpointing."""
    print("\n| fine-tuning | image size | pairs a GPU | LLM | weights, GiB: frozen + trained | activations, GiB |"
          " with activation_checkpointing | all in all: without, with | and with shard_frozen |")  # fmt: skip
    print("|---|---:|---:|---|---|---:|---:|---:|---:|")
    for name, (pixels, batch) in TUNED.items():
        tokens, pairs = (pixels // 14) ** 2 + 1, batch // TUNING_GPUS
        blocks = [trained_block(pixels, checkpointing) for checkpointing in (False, True)]
        reader = [stage_two(tokens, True, checkpointing)[1].kept for checkpointing in (False, True)]
        with torch.device("meta"):  # of questions it has the text transformer, too
            qformer = QFormer(QFormerConfig(bert=None), WIDTH, has_text=name == "answers")
        trained = 20 * (size(encoder) + size(qformer)) / GIB
        for llm, (network, each) in llms.items():
            if llm == "FlanT5-XXL":
                continue
            layers, read = (24, 40) if "T5" in llm else (32, 48)
            inputs = layers * read * 2 * network.config.hidden_size  # pyright: ignore
            kept = [
                LAYERS * (pairs * blocks[0][0] + blocks[0][1]) + pairs * (reader[0] + each.kept),
                LAYERS * pairs * blocks[1][0] + pairs * blocks[0][0] + blocks[0][1]
                + pairs * (reader[1] + inputs + each.kept / layers),
            ]  # fmt: skip
            frozen = 2 * size(network) / GIB
            sums = [frozen + trained + each / GIB for each in kept]
            dealt = sums[1] - frozen * (1 - 1 / TUNING_GPUS)
            print(
                f"| {name} | {pixels} | {pairs} | {llm} | {frozen:.1f} + {trained:.1f} | {kept[0] / GIB:.1f} |"
                f" {kept[1] / GIB:.1f} | {sums[0]:.1f}, {sums[1]:.1f} | {dealt:.1f} |"
            )


def recipe(stage: Any, batch: int) -> Recipe:
    language = None if stage == "representation" else LanguageConfig(name="")
    data = DataConfig(train="", batch_size=batch)
    return Recipe(stage, "", VisionConfig(name=""), data, QFormerConfig(bert=None), language)


def main() -> None:
    encoder, encoded = vit_g()
    llms = {name: language_model(name) for name in LANGUAGE_CONFIGS}
    model, step = stage_one(0.1)
    _, plain = stage_one(0.0)
    reader, read = stage_two()
    print("| network | weights, million | operations a pair, GFLOP | kept for the backward pass, MB a pair |")
    print("|---|---:|---:|---:|")
    rows = {
        "ViT-g/14, 40 layers less the last": (encoder, encoded._replace(kept=0)),
        "Q-Former, stage 1, dropout 0.1, fp32": (model, step),
        "the same without dropout": (model, plain),
        "Q-Former, stage 2, dropout 0.1, fp32": (reader, read),
        **{f"{name}, bf16": found for name, found in llms.items()},
    }
    for name, (network, each) in rows.items():
        kept = f"{each.kept / 1e6:,.0f}" if each.kept else "none"
        print(f"| {name} | {size(network) / 1e6:,.0f} | {each.operations / 1e9:,.0f} | {kept} |")

    runs = {"stage 1": ("representation", 1680, 250_000, size(model), step, 0, Count(0, 0, 0))}
    for name, (network, each) in llms.items():
        batch = 1920 if name.startswith("OPT") else 1520
        trained = size(reader) + 768 * network.config.hidden_size  # pyright: ignore
        runs[f"stage 2, {name}"] = ("generation", batch, 80_000, trained, read, size(network), each)
    print("\n| run | GPUs | pairs a GPU | memory, GiB: frozen + trained + activations | sent, MB | its time, ms |"
          " step, s (A100) | days on A100 | days on H100 |")  # fmt: skip
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|")
    for name, (stage, batch, steps, trained, own, frozen, llm) in runs.items():
        for gpus in (8, 64):
            each = -(-batch // gpus)
            weights_frozen = 2 * (size(encoder) + frozen) / GIB
            weights_trained = 20 * trained / GIB  # weights, gradients, DDP's copy of them, two moments
            activations = each * (own.kept + llm.kept) / GIB
            label, speed = NETWORKS[8 if gpus < 64 else 64]
            sent = sum(t.sent(gpus) for t in step_traffic(recipe(stage, each), trained, TOKENS, WIDTH, LENGTH, gpus))
            operations = each * gpus * (encoded.operations + own.operations + llm.operations)
            seconds = {gpu: [operations / gpus / peak / share for share in SHARES] for gpu, peak in PEAK.items()}
            days = {gpu: [s * steps / 86400 for s in both] for gpu, both in seconds.items()}
            print(
                f"| {name} | {gpus} | {each} | {weights_frozen:.1f} + {weights_trained:.1f} + {activations:.1f} |"
                f" {sent / 1e6:,.0f} | {1000 * sent / speed:.0f} ({label}) |"
                f" {' to '.join(f'{s:.2g}' for s in seconds['A100'])} |"
                f" {' to '.join(f'{d:.2g}' for d in days['A100'])} | {' to '.join(f'{d:.2g}' for d in days['H100'])} |"
            )
    paper = 16 * PEAK["A100"] * 86400
    stage1 = 250_000 * 1680 * (encoded.operations + step.operations) / paper
    stage2 = 80_000 * 1520 * (encoded.operations + read.operations + llms["FlanT5-XXL"][1].operations) / paper
    print(f"\nOn 16 A100 at their peak: stage 1 {stage1:.2f} days, stage 2 with FlanT5-XXL {stage2:.2f} days.")
    print(f"The paper's 6 and 3 days are {100 * stage1 / 6:.0f} % and {100 * stage2 / 3:.0f} % of the peak.")
    view = 2 * TOKENS * WIDTH
    print(
        f"Images {IMAGES * IMAGE_BYTES / 1e12:.1f} TB; features in one view {IMAGES * view / 1e12:.0f} TB in"
        f" bf16, {IMAGES * (view / 2 + 4 * TOKENS) / 1e12:.0f} TB in int8."
    )
    tuning(encoder, llms)
    kept = [f"{16 * each.kept / GIB:.2f}" for each in (plain, step)]
    print(f"Kept by stage 1 for 16 pairs: {kept[0]} GiB, with dropout {kept[1]} GiB.")


if __name__ == "__main__":
    main()
