"""python benchmarks/memory.py FOLDER ROUNDS

Memory of a training process over 10,000 steps on streamed shards, compared with itself at step 100. The networks are
tiny, so that a leak of a few bytes a step would show.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from blip2.config import DataConfig, OptimizerConfig, QFormerConfig, Recipe, TrainingConfig, VisionConfig
from blip2.memory import tune_malloc

STEPS = 10_000
EARLY = 100


def shards(folder: Path, count: int = 4, pairs: int = 250) -> str:
    random, words = np.random.default_rng(0), ("red", "green", "blue", "small", "large", "round")
    for number in range(count):
        with tarfile.open(folder / f"{number:02}.tar", "w") as tar:
            for pair in range(pairs):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
                text = " ".join(random.choice(words, int(random.integers(2, 9)))).encode()
                for ending, data in (("jpg", file.getvalue()), ("txt", text)):
                    info = tarfile.TarInfo(f"{number:02}{pair:04}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / f"{{00..{count - 1:02}}}.tar")


def parts(folder: Path) -> tuple[str, str]:
    """A tiny ViT and a tiny BERT with its tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder / "vit")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "small", "large", "round"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    BertForMaskedLM(BertConfig(**sizes, vocab_size=len(words))).save_pretrained(folder / "bert")
    return str(folder / "vit"), str(folder / "bert")


def resident() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) * 1024


@contextmanager
def by_step(run: Path, look: Callable[[], int], every: float) -> Iterator[dict[int, int]]:
    """Note what `look` sees while a run runs, at regular intervals: by the number of steps that are done."""
    seen: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        metrics = run / "metrics.jsonl"
        while not done.wait(every):
            if metrics.exists():
                seen[sum(1 for _ in metrics.open("rb"))] = look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def main() -> None:
    tune_malloc()  # as the command does
    folder = Path(sys.argv[1])
    vit, bert = parts(folder)
    recipe = Recipe(
        stage="representation",
        output=str(folder / "run"),
        vision=VisionConfig(name=vit, layer="last"),
        qformer=QFormerConfig(
            bert=bert, hidden_size=32,
            num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_query_tokens=4,
            image_text_hidden_size=16,
            vocab_size=12,
        ),
        data=DataConfig(train=shards(folder), batch_size=4, num_workers=1, min_crop_scale=0.5),
        optimizer=OptimizerConfig(warmup_steps=10),
        training=TrainingConfig(max_steps=STEPS, save_steps=1000, device="cpu", precision="fp32"),
    )  # fmt: skip
    from blip2.training.trainer import train

    with by_step(Path(recipe.output), resident, 0.2) as seen:
        train(recipe)
    early = [memory for step, memory in sorted(seen.items()) if step >= EARLY][:1]
    late = [memory for step, memory in seen.items() if step >= STEPS - 5 * EARLY]
    ratios = [memory / max(early) for memory in late]
    print(
        json.dumps(
            {
                "ours": max(late) / 2**20,
                "peer": max(early) / 2**20,
                "ratio": max(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "of": "MiB",
                "curve": sorted(seen.items())[:: max(len(seen) // 50, 1)],
            }
        )
    )


if __name__ == "__main__":
    main()
