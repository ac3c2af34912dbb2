"""python benchmarks/loading_memory.py

How much memory loading a checkpoint takes, compared with the size of the model that is loaded: a BLIP-2 of 1 GB
in transformers' layout, loaded in the dtype of its file and in others, each in a process of its own. Every weight is
read once after loading, so that what is mapped from the file counts too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import torch

# Imported before the processes are forked, because imports are not what is measured.
PRELOAD = ("__main__", "blip2.pipelines", "blip2.backbones.language", "transformers.models.llama.modeling_llama")
GIB = 2**30
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def save(folder: Path, gigabytes: float) -> None:
    """A Llama of about this number of gigabytes in bfloat16 after a tiny image encoder and Q-Former."""
    from tokenizers import Tokenizer, models
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessorPil,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    layers = max(int(gigabytes * GIB / 2 / (4 * 1024**2 + 3 * 1024 * 4096)), 1)
    llama = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**sizes, image_size=28, patch_size=14),
        qformer_config=Blip2QFormerConfig(**sizes),
        text_config=llama,
        num_query_tokens=4,
        image_token_index=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):  # drawing random weights would take longer than everything else
        model = Blip2ForConditionalGeneration(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<image>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)


def memory() -> tuple[int, int]:
    """Bytes of this process: all that is resident, and what of it is its own and not mapped from files."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(rows[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def measure(folder: str, dtype: str) -> tuple[int, int, int]:
    """Bytes of the loaded model, and both peaks of :func:`memory` while it was loaded and read."""
    import blip2

    before, peak, done = memory(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[:] = [max(old, new) for old, new in zip(peak, memory(), strict=True)]
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    model = blip2.load(folder, device="cpu", dtype=dtype).model  # type: ignore[arg-type]
    size = 0
    for parameter in model.parameters():
        size += parameter.nbytes
        parameter.sum()
    done.set()
    thread.join()
    return size, peak[0] - before[0], peak[1] - before[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the LLM in its file (default: 1)")
    options = parser.parse_args()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(list(PRELOAD))
    with tempfile.TemporaryDirectory() as folder, processes.Pool(1, maxtasksperchild=1) as pool:
        pool.apply(save, (Path(folder), options.gigabytes))
        print("| file | loaded as | size in memory | peak, with pages mapped from the file | peak of its own memory |")
        print("|---|---|---:|---:|---:|")
        for dtype in DTYPES:
            size, resident, own = pool.apply(measure, (folder, dtype))
            shares = f"{resident / size:.2f} | {own / size:.2f}"
            print(f"| bf16 | {dtype} | {size / GIB:.2f} GiB | {shares} |", flush=True)


if __name__ == "__main__":
    main()
