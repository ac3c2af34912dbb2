"""Benchmark stage 1 against LAVIS: a training step, its memory, and re-ranking. Run as a runner:

python stage1.py {step,rerank} FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from compare import serve
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One size of the work; the defaults are BERT-base, EVA-CLIP's features and 16 captions of COCO's lengths."""

    batch: int = 16
    shortest: int = 9
    longest: int = 14
    tokens: int = 257
    width: int = 1408
    queries: int = 32
    layers: int = 12
    hidden: int = 768
    vocabulary: int = 30523
    dropout: float = 0.0
    bf16: bool = False
    peer_bf16: bool = False
    checkpointing: bool = False
    candidates: int = 128
    device: str = "cpu"


def config_of(case: Case) -> Any:
    from blip2.config import QFormerConfig

    return QFormerConfig(
        bert=None,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        intermediate_size=4 * case.hidden,
        num_query_tokens=case.queries,
        vocab_size=case.vocabulary,
        dropout=case.dropout,
    )


def prepare(case: Case, folder: Path, texts: int | None = None) -> None:
    """Write the weights, once for each side, and the inputs of both: `texts` captions, or one for each image."""
    from blip2.interop.lavis import QFORMER_KEYS, add_tied
    from blip2.interop.weights import Weights

    torch.manual_seed(0)
    model = build(case)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vision.")}
    torch.save(state, folder / "weights.pt")
    theirs = dict(Weights(state).rename_keys(QFORMER_KEYS, "the model", inverse=True))
    add_tied(theirs, config_of(case).max_position_embeddings)
    torch.save({"model": theirs}, folder / "lavis.pth")
    count = texts or case.batch
    lengths = torch.randint(case.shortest, case.longest + 1, (count,))
    lengths[0] = case.longest
    ids = torch.randint(1, case.vocabulary - 1, (count, case.longest))
    mask = torch.arange(case.longest) < lengths[:, None]
    candidates = torch.stack([torch.randperm(count)[: case.candidates] for _ in range(case.batch)])
    features = torch.randn(case.batch, case.tokens, case.width)
    torch.save({"ids": ids * mask, "mask": mask, "features": features, "candidates": candidates}, folder / "inputs.pt")
    about = {
        **asdict(case),
        "qformer": asdict(config_of(case)),
        "padded": 35 if texts else 32,  # what LAVIS pads to in evaluation and in training
        "package": str(peers.lavis()),
    }
    (folder / "about.json").write_text(json.dumps(about))


def build(case: Case) -> Any:
    from blip2.backbones.vision import ImageEncoder, Preprocessing
    from blip2.config import ObjectivesConfig
    from blip2.model.representation import RepresentationModel

    encoder = ImageEncoder(  # never used: the features are given
        nn.Conv2d(3, case.width, 1),
        lambda pixels: pixels.mean((1, 2, 3))[:, None, None].expand(-1, case.tokens, case.width),
        Preprocessing(14),
    )
    return RepresentationModel(encoder, config_of(case), ObjectivesConfig())


def work(kind: str, folder: Path) -> None:
    from blip2.memory import tune_malloc

    tune_malloc()  # as the commands of blip2 do
    about = json.loads((folder / "about.json").read_text())
    case = Case(**{key: value for key, value in about.items() if key in Case.__dataclass_fields__})
    model = build(case)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True), strict=False)
    model.to(case.device)
    model.qformer.gradient_checkpointing = case.checkpointing
    data = {name: t.to(case.device) for name, t in torch.load(folder / "inputs.pt", weights_only=True).items()}
    if kind == "step":
        serve(step(case, model, data), case.device, warm_up=2)
    else:
        serve(rerank(case, model, data), case.device, warm_up=0)


def step(case: Case, model: Any, data: dict[str, Tensor]) -> Any:
    from blip2.config import OptimizerConfig
    from blip2.model import representation
    from blip2.model.representation import RepresentationBatch
    from blip2.training.optimizer import build_optimizer, configure_trainable

    # Both sides take the hardest negatives, so that they compare the same pairs.
    representation.sample_hard_negatives = hardest
    config = OptimizerConfig()
    optimizer = build_optimizer(model, configure_trainable(model, config), config)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # every step gives the same losses, which can be compared
    batch = RepresentationBatch(
        data["features"], data["ids"], data["mask"], torch.arange(case.batch, device=case.device)
    )
    precision = torch.autocast(case.device, torch.bfloat16) if case.bf16 else nullcontext()

    def run() -> list[float]:
        optimizer.zero_grad()
        with precision:
            losses = model(batch).losses
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return [losses[name].item() for name in ("itc", "itm", "itg")]

    return run


def hardest(similarity: Tensor, positive: Tensor, chances: Tensor | None = None) -> Tensor:
    """In place of drawing in proportion to the similarity."""
    return similarity.masked_fill(positive, -torch.inf).argmax(dim=1)


def rerank(case: Case, model: Any, data: dict[str, Tensor]) -> Any:
    model.eval()

    def run() -> Sequence[float]:
        scores = model.match_candidates(data["features"], data["ids"], data["mask"], data["candidates"])
        return scores[..., 1].flatten().tolist()

    return run


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
