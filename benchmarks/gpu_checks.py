"""What has to hold on a GPU: its results are those of the CPU, of the other settings, and of a run that was stopped.

The parts of `gpu.py` that check. Each yields rows as it measures them; a row that misses its limit is a failure.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import stage1
import stage2
import torch
from memory import by_step
from PIL import Image
from torch import Tensor, nn

from blip2.config import (
    DataConfig,
    LanguageConfig,
    OptimizerConfig,
    QFormerConfig,
    Recipe,
    TrainingConfig,
    VisionConfig,
)
from blip2.decoding.search import Decoding

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 1024.0
"""Losses in fp16 are multiplied by it before the backward pass, so that small gradients do not become zero."""


@dataclass(frozen=True)
class Place:
    """Where the work is done, and at what size."""

    device: torch.device
    tiny: bool
    folder: Path
    """For files; empty at first."""

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


class Row(NamedTuple):
    """One thing that was measured."""

    name: str
    value: float | str
    limit: float | None = None
    """What the value must not exceed."""

    @property
    def holds(self) -> bool:
        return self.limit is None or (isinstance(self.value, float | int) and self.value <= self.limit)  # NaN does not


class Outcome(NamedTuple):
    """Losses and gradients of one step, on the CPU."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]


def one_step(model: nn.Module, batch: Any, device: torch.device, half: str | None = None, **named: Any) -> Outcome:
    """The losses of a batch and the gradients of their sum.

    Args:
        half: bf16 or fp16 for autocast, None for fp32.
    """
    from blip2.data.dataset import to_device

    model.zero_grad()
    with torch.autocast(device.type, HALF[half]) if half else nullcontext():
        losses = model(to_device(batch, device), **named).losses
    scale = SCALE if half == "fp16" else 1.0
    (torch.stack([loss.float() for loss in losses.values()]).sum() * scale).backward()
    gradients = {
        name: (parameter.grad.detach().double() / scale).cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Outcome({name: loss.item() for name, loss in losses.items()}, gradients)


def differences(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """(largest difference of a loss as a share of it, length of the gradients' difference as a share of theirs)."""
    assert found.gradients.keys() == expected.gradients.keys(), "other parameters have gradients"
    losses = max(abs(found.losses[name] - value) / max(abs(value), 1.0) for name, value in expected.losses.items())
    apart = sum(float((found.gradients[name] - g).square().sum()) for name, g in expected.gradients.items())
    length = sum(float(g.square().sum()) for g in expected.gradients.values())
    return losses, (apart / length) ** 0.5


def compared(name: str, found: Outcome, expected: Outcome, losses: float, gradients: float) -> Iterator[Row]:
    loss, gradient = differences(found, expected)
    yield Row(f"{name}: losses", loss, losses)
    yield Row(f"{name}: gradients", gradient, gradients)


# -- models and batches ----------------------------------------------------------------------------------------------


def stage1_case(place: Place, dropout: float = 0.0) -> stage1.Case:
    if place.tiny:
        return stage1.Case(
            batch=4, tokens=17, width=64, layers=2, hidden=64, vocabulary=200, queries=8, dropout=dropout
        )
    return stage1.Case(batch=8, dropout=dropout)


def stage1_parts(place: Place, dropout: float = 0.0) -> tuple[Any, Any]:
    """Return a Q-Former of BERT-base's size for 257 features of width 1408, with the hardest negatives, and a batch."""
    from blip2.model import representation
    from blip2.model.representation import RepresentationBatch

    representation.sample_hard_negatives = stage1.hardest
    case = stage1_case(place, dropout)
    torch.manual_seed(0)
    model = stage1.build(case).train()
    ids = torch.randint(5, case.vocabulary - 1, (case.batch, case.longest))
    lengths = torch.randint(case.shortest, case.longest + 1, (case.batch,))
    mask = torch.arange(case.longest) < lengths[:, None]
    features = torch.randn(case.batch, case.tokens, case.width)
    return model, RepresentationBatch(features, ids * mask, mask, torch.arange(case.batch))


def checkpoint(place: Place, language: str) -> Path:
    """A random BLIP-2 in transformers' layout, made once."""
    folder = place.folder / f"blip2-{language}"
    if not folder.exists():
        stage2.prepare("answers", language, folder, batch=4, tiny=place.tiny)
    return folder


def stage2_parts(place: Place, language: str) -> tuple[Any, Any]:
    """ViT, Q-Former and LLM, and a batch of pixels, texts and labels."""
    import blip2
    from blip2.model.generation import GenerationBatch

    folder = checkpoint(place, language)
    model: Any = blip2.load(folder, device="cpu", dtype="fp32").model
    data = torch.load(folder / "inputs.pt", weights_only=True)
    ids, mask = data["ids"], data["mask"]
    return model.train(), GenerationBatch(data["pixels"], ids, mask, ids.masked_fill(~mask, -100))


WORDS = ("red", "green", "blue", "small", "large", "round")


def images(folder: Path, count: int = 24, language: bool = False) -> str:
    """A table of images and captions."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        words = [f"w{i}" for i in range(4, 40)] if language else WORDS
        text = " ".join(random.choice(words, int(random.integers(2, 9))))
        lines.append(json.dumps({"image": f"{number}.png", "caption": text}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "captions.jsonl")


def bert_tokenizer(folder: Path) -> tuple[str, int]:
    """A folder with a tokenizer of few words, and how many it has with [DEC]."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder), len(words) + 1


def recipe(place: Place, stage: Any, output: str, **training: Any) -> Recipe:
    """A small run of a stage, with dropout, on the device."""
    folder = checkpoint(place, "opt")
    sizes: dict[str, Any] = {"bert": None, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
                             "intermediate_size": 128, "num_query_tokens": 8, "image_text_hidden_size": 16,
                             "dropout": 0.1}  # fmt: skip
    if stage == "representation":
        sizes["tokenizer"], sizes["vocab_size"] = bert_tokenizer(place.folder / "bert")
        language = None
        table = images(place.folder / "images")
    else:
        language = LanguageConfig(name=str(folder), dtype="fp32")
        table = images(place.folder / "images-llm", language=True)
    return Recipe(
        stage=stage,
        output=str(place.folder / output),
        vision=VisionConfig(name=str(folder), dtype="fp32"),
        qformer=QFormerConfig(**sizes),
        data=DataConfig(train=table, batch_size=4, num_workers=0),
        language=language,
        optimizer=OptimizerConfig(warmup_steps=2),
        training=TrainingConfig(**{"max_steps": 8, "save_steps": 100, "device": place.device.type, **training}),
    )


def metrics(of: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(of.output) / "metrics.jsonl").read_text().splitlines()]


# -- the parts -------------------------------------------------------------------------------------------------------

EXACT = 1e-4
"""Of fp32 on two devices."""
ROUNDING = {"bf16": (0.02, 0.05), "fp16": (0.003, 0.01)}
"""Losses and gradients, as shares, that autocast may be off. A number in bf16 has 8 bits, one in fp16 has 11."""


def losses(place: Place) -> Iterator[Row]:
    """Losses and gradients of both stages, in fp32 compared with the CPU's, and in bf16 and fp16 compared with fp32."""
    cpu = torch.device("cpu")
    for name, make in {
        "stage 1": lambda: stage1_parts(place),
        "stage 2, OPT": lambda: stage2_parts(place, "opt"),
        "stage 2, T5": lambda: stage2_parts(place, "t5"),
    }.items():
        model, batch = make()
        expected = one_step(model, batch, cpu)
        model.to(place.device)
        yield from compared(
            f"{name}, fp32 against the CPU", one_step(model, batch, place.device), expected, EXACT, EXACT
        )
        for half, limits in ROUNDING.items():
            found = one_step(model, batch, place.device, half)
            yield from compared(f"{name}, {half} against fp32", found, expected, *limits)


def settings(place: Place) -> Iterator[Row]:
    """torch.compile and activation checkpointing, on compared with off."""
    model, batch = stage1_parts(place)
    model.to(place.device)
    plain = {half: one_step(model, batch, place.device, half) for half in (None, "bf16")}
    model.qformer.gradient_checkpointing = True
    found = one_step(model, batch, place.device)
    yield from compared("stage 1, activation checkpointing, fp32", found, plain[None], 1e-6, 1e-5)
    model.qformer.gradient_checkpointing = False
    model.qformer.compile_blocks()
    started = time.monotonic()
    found = one_step(model, batch, place.device)
    yield Row("seconds of the first compiled step", time.monotonic() - started)
    yield from compared("stage 1, torch.compile, fp32", found, plain[None], EXACT, EXACT)
    found = one_step(model, batch, place.device, "bf16")
    yield from compared("stage 1, torch.compile, bf16", found, plain["bf16"], *ROUNDING["bf16"])

    # With dropout the second pass of checkpointing has to draw the same masks.
    model, batch = stage1_parts(place, dropout=0.1)
    model.to(place.device)
    outcomes = []
    for checkpointing in (False, True):
        model.qformer.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        outcomes.append(one_step(model, batch, place.device, "bf16"))
    yield from compared("stage 1, activation checkpointing, dropout, bf16", outcomes[1], outcomes[0], 1e-6, 1e-2)

    model, batch = stage2_parts(place, "opt")
    model.to(place.device)
    plain[None] = one_step(model, batch, place.device)
    model.qformer.compile_blocks()
    model.vision.compile_network()
    found = one_step(model, batch, place.device)
    yield from compared("stage 2, torch.compile with the image encoder, fp32", found, plain[None], EXACT, EXACT)


def resume(place: Place) -> Iterator[Row]:
    """A run that is stopped and goes on ends with the same weights as one that is not, bit for bit."""
    from safetensors.torch import load_file

    from blip2.training.interruption import TrainingInterrupted
    from blip2.training.trainer import train

    for stage in ("representation", "generation"):
        for precision in ("fp32", "bf16", "fp16") if place.is_gpu else ("fp32",):
            ends = []
            for is_stopped in (False, True):
                name = f"{stage}-{precision}-{'stopped' if is_stopped else 'whole'}"
                plan = recipe(place, stage, name, precision=precision, full_determinism=True)
                if is_stopped:
                    stopper = threading.Thread(target=stop_at, args=(Path(plan.output) / "metrics.jsonl", 3))
                    stopper.start()
                    with suppress(TrainingInterrupted):
                        train(plan)
                    stopper.join()
                ends.append(load_file(train(plan, resume=is_stopped) / "model.safetensors"))
            different = sum(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
            yield Row(f"{stage}, {precision}: tensors of {len(ends[0])} that differ", float(different), 0)


def stop_at(file: Path, step: int) -> None:
    """Send SIGTERM to this process when a run has recorded this number of steps."""
    for _ in range(30_000):
        if file.exists() and file.read_text().count("\n") >= step:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.002)


def tokens(place: Place) -> Iterator[Row]:
    """What is written, in fp32: the CPU's tokens, greedily, by beams, and sampled with the same dice."""
    import blip2

    ways = {
        "greedy": Decoding(num_beams=1, max_new_tokens=16),
        "5 beams": Decoding(max_new_tokens=16),
        "nucleus": Decoding(top_p=0.9, max_new_tokens=16),
    }
    for language in ("opt", "llama", "t5"):
        folder = checkpoint(place, language)
        model: Any = blip2.load(folder, device="cpu", dtype="fp32").model
        data = torch.load(folder / "inputs.pt", weights_only=True)
        dice = torch.rand(len(data["ids"]), 16)

        def write(
            device: torch.device, how: Decoding, model: Any = model, data: Any = data, dice: Tensor = dice
        ) -> Any:
            model.to(device)
            pixels, ids, mask = (data[name].to(device) for name in ("pixels", "ids", "mask"))
            with torch.no_grad():
                visual = model.visual_prompt(pixels)
            thrown = dice.to(device) if how.top_p else None
            return model.language.generate(visual, ids, mask, how, stage2.END, uniforms=thrown).cpu()

        for name, how in ways.items():
            expected, found = (write(device, how) for device in (torch.device("cpu"), place.device))
            same = found.shape == expected.shape and torch.equal(found, expected)
            share = 0.0 if same else 1.0 if found.shape != expected.shape else float((found != expected).float().mean())
            yield Row(f"{language}, {name}: share of other tokens", share, 0)


def features(place: Place) -> Iterator[Row]:
    """Features cached on the GPU: those of the encoder there, within the rounding of their store, and the CPU's."""
    from blip2.builder import build_image_encoder
    from blip2.data.images import preprocess, read_image
    from blip2.data.sources import open_records
    from blip2.feature_cache.cache import Augmentation, cache_features

    plan = recipe(place, "representation", "features")
    encoder = build_image_encoder(plan.vision, torch.float32)
    records: Any = open_records(plan.data.train, plan.data)
    pixels = torch.stack([preprocess(read_image(records[i].image), encoder.preprocessing) for i in range(len(records))])
    expected = encoder.encode(pixels)
    encoder.to(place.device)
    direct = encoder.encode(pixels.to(place.device)).cpu()
    yield Row("the encoder on the GPU against the CPU, fp32", relative(direct, expected), EXACT)
    for dtype, limit in {"bf16": 2**-8, "int8": 0.01}.items():
        folder = place.folder / f"stored-{dtype}"
        stored = cache_features(folder, records, encoder, Augmentation(1, 1.0, False), dtype, place.device).read_all()
        yield Row(f"stored in {dtype} against the encoder", relative(stored, direct), limit)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def quantization(place: Place) -> Iterator[Row]:
    """An LLM of 4 and 8 bits: it trains the Q-Former through it, and writes."""
    import blip2
    from blip2.training.trainer import train

    plan = recipe(place, "generation", "whole", precision="fp32", max_steps=6)
    language = place.folder / "llm"
    save_language_model(checkpoint(place, "opt"), language)
    assert plan.language is not None
    plain = replace(plan, language=replace(plan.language, name=str(language)))
    train(plain)
    expected = metrics(plain)
    for bits, limit in {"8bit": 0.05, "4bit": 0.2}.items():
        changed = replace(plain.language, quantization=bits, dtype=None)  # pyright: ignore
        found = replace(plain, output=str(place.folder / bits), language=changed)
        train(found)
        losses = [row["loss"] for row in metrics(found)]
        yield Row(f"{bits}: first loss against fp32", abs(losses[0] / expected[0]["loss"] - 1), limit)
        norm = metrics(found)[0].get("gradient_norm", 0.0)
        yield Row(f"{bits}: gradient norm against fp32", abs(norm / expected[0]["gradient_norm"] - 1), 2 * limit)
        pipeline: Any = blip2.load(found.output, device=place.device.type)
        [written] = pipeline.caption(Path(str(plan.data.train)).parent / "0.png", decoding=Decoding(max_new_tokens=6))
        yield Row(f"{bits}: it writes", float(not isinstance(written, str)), 0)


def save_language_model(blip2_folder: Path, folder: Path) -> None:
    """The LLM within a BLIP-2 as files of its own, with its tokenizer."""
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration

    model: Any = Blip2ForConditionalGeneration.from_pretrained(blip2_folder)
    model.language_model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(blip2_folder).save_pretrained(folder)


def processes(place: Place) -> Iterator[Row]:
    """DDP and FSDP2 of one process, over NCCL: the same losses and gradients as without."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from blip2.training.sharding import ignore_frozen_in_ddp, move_trainable, shard_frozen

    backend = "nccl" if place.is_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{place.folder / 'store'}", rank=0, world_size=1)
    try:
        for name, make in {
            "stage 1": lambda: stage1_parts(place), "stage 2": lambda: stage2_parts(place, "opt")
        }.items():  # fmt: skip
            model, batch = make()
            model.to(place.device)
            plain = one_step(model, batch, place.device)
            ignore_frozen_in_ddp(model)
            wrapped = DistributedDataParallel(model, device_ids=[place.device.index or 0] if place.is_gpu else None)
            found = one_step(wrapped, batch, place.device)
            unwrapped = {key.removeprefix("module."): value for key, value in found.gradients.items()}
            yield from compared(f"DDP, {name}", Outcome(found.losses, unwrapped), plain, 1e-6, 1e-5)
            del wrapped
        model, batch = stage2_parts(place, "opt")  # pyright: ignore[reportPossiblyUnboundVariable]
        model.cpu()
        move_trainable(model, place.device)
        count = shard_frozen(model, {"vision": "encode", "language": "hidden_states"}, place.device)
        yield Row("weights sharded by FSDP2", float(count))
        yield from compared("FSDP2, stage 2", one_step(model, batch, place.device), plain, 1e-6, 1e-5)  # pyright: ignore
    finally:
        dist.destroy_process_group()


def memory(place: Place) -> Iterator[Row]:
    """The memory of a run is flat from step 50 to step 300, whatever the lengths of its texts."""
    from blip2.training.trainer import train

    steps = 60 if place.tiny else 300
    for stage in ("representation", "generation"):
        plan = recipe(place, stage, f"memory-{stage}", max_steps=steps)
        with by_step(Path(plan.output), lambda: torch.cuda.memory_reserved() if place.is_gpu else 0, 0.02) as seen:
            train(plan)
        early = max(held for step, held in seen.items() if step <= max(steps // 6, min(seen)))
        late = max(held for step, held in seen.items() if step >= 0.9 * steps or step == max(seen))
        yield Row(f"{stage}: MiB reserved more at step {steps} than at step {steps // 6}", (late - early) / 2**20, 2.0)
        rows = metrics(plan)
        if place.is_gpu:
            grown = rows[-1]["gpu_memory_gib"] - rows[steps // 6]["gpu_memory_gib"]
            yield Row(f"{stage}: MiB that the peak has grown since", grown * 1024, 2.0)
        yield Row(f"{stage}: steps that were done", float(len(rows)))


def clean_up(place: Place) -> None:
    gc.collect()
    if place.is_gpu:
        torch.cuda.empty_cache()


CHECKS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "losses": losses,
    "settings": settings,
    "resume": resume,
    "tokens": tokens,
    "features": features,
    "quantization": quantization,
    "processes": processes,
    "memory": memory,
}
