"""Stage 1 and re-ranking on a GPU, as a runner that is told line by line what to do:

    python gpu_stage1.py {blip2,LAVIS} FOLDER

A line is JSON: {"work": "step", "batch": 64, "bf16": true, "repeats": 5}, or rerank, largest, profile. Features are
given to both sides; both have the same weights, draw the same inputs and take the hardest negatives.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import measure, profile_work, serve_jobs
from torch import Tensor

TEXTS = 128
"""That are re-ranked."""


def inputs(about: dict[str, Any], count: int, texts: int) -> dict[str, Tensor]:
    """Features of images, texts, and for each image the order in which it meets the texts."""
    device = about["device"]
    random = torch.Generator(device).manual_seed(count)
    lengths = torch.randint(about["shortest"], about["longest"] + 1, (texts,), generator=random, device=device)
    lengths[0] = about["longest"]
    shape = (texts, about["longest"])
    ids = torch.randint(1, about["vocabulary"] - 1, shape, generator=random, device=device)
    mask = torch.arange(about["longest"], device=device) < lengths[:, None]
    features = torch.randn(count, about["tokens"], about["width"], generator=random, device=device)
    candidates = torch.arange(texts, device=device).expand(count, -1)
    return {"ids": ids * mask, "mask": mask, "features": features, "candidates": candidates}


class Blip2:
    """This project."""

    def __init__(self, about: dict[str, Any], folder: Path) -> None:
        import stage1

        self.case = stage1.Case(**{key: about[key] for key in stage1.Case.__dataclass_fields__})
        self.model = stage1.build(self.case)
        self.model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True), strict=False)
        self.model.to(about["device"])

    def step(self, data: dict[str, Tensor], bf16: bool, **settings: bool) -> Callable[[], Sequence[float]]:
        from dataclasses import replace

        import stage1

        self.model.train()
        self.model.qformer.gradient_checkpointing = settings.get("checkpointing", False)
        if settings.get("compile"):
            self.model.qformer.compile_blocks()
        return stage1.step(replace(self.case, bf16=bf16, batch=len(data["features"])), self.model, data)

    def rerank(self, data: dict[str, Tensor], bf16: bool) -> Callable[[], Sequence[float]]:
        import stage1

        work = stage1.rerank(self.case, self.model, data)

        def run() -> Sequence[float]:
            with torch.autocast(self.case.device, torch.bfloat16, enabled=bf16):
                return work()

        return run


class Lavis:
    """LAVIS's own code."""

    def __init__(self, about: dict[str, Any], folder: Path) -> None:
        import lavis_peer

        self.about, self.peer = about, lavis_peer
        self.model = lavis_peer.build(about, folder)

    def texts(self, data: dict[str, Tensor], length: int) -> Any:
        return self.peer.pad(data["ids"], data["mask"], length)

    def step(self, data: dict[str, Tensor], bf16: bool, **settings: bool) -> Callable[[], Sequence[float]]:
        return self.peer.stepper(self.model, self.about, data["features"], self.texts(data, 32), bf16)

    def rerank(self, data: dict[str, Tensor], bf16: bool) -> Callable[[], Sequence[float]]:
        texts = self.texts(data, 35)
        return self.peer.reranker(self.model, data["features"], texts, data["candidates"], bf16)


def largest(side: Any, about: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The largest batch that fits in bf16, found from the memory that two smaller ones take, and its step."""
    if about["device"] != "cuda":
        return {"batch": 8, **step(side, about, 8, True, repeats)}
    peaks = {count: step(side, about, count, True, 1)["peak"] for count in (32, 64)}
    each = (peaks[64] - peaks[32]) / 32
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    count = int((0.97 * free - peaks[32]) / each) + 32
    while True:
        count -= count % 8
        try:
            return {"batch": count, **step(side, about, count, True, repeats)}
        except torch.OutOfMemoryError:
            pass
        gc.collect()
        torch.cuda.empty_cache()
        count = int(count * 0.95)


def step(side: Any, about: dict[str, Any], batch: int, bf16: bool, repeats: int, **settings: bool) -> dict[str, Any]:
    return measure(side.step(inputs(about, batch, batch), bf16, **settings), about["device"], repeats)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    about = json.loads((folder / "about.json").read_text())
    side: Any = Blip2(about, folder) if name == "blip2" else Lavis(about, folder)

    def rerank(images: int, bf16: bool, repeats: int) -> dict[str, Any]:
        return measure(side.rerank(inputs(about, images, TEXTS), bf16), about["device"], repeats)

    def profile(what: str, count: int) -> dict[str, Any]:
        made = side.step(inputs(about, count, count), True) if what == "step" else side.rerank(
            inputs(about, count, TEXTS), True
        )  # fmt: skip
        return profile_work(made, about["device"])

    serve_jobs(
        {
            "step": lambda **order: step(side, about, **order),
            "largest": lambda **order: largest(side, about, **order),
            "rerank": rerank,
            "profile": profile,
        },
        about["device"],
    )


if __name__ == "__main__":
    main()
