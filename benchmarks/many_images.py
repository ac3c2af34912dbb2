"""python benchmarks/many_images.py [--images 10000] [--few 100]

Peak memory of a pipeline over many images, compared with itself over few: captions of stage 2 and embeddings of stage 1
of JPEG files, each in a process of its own, with tiny random networks. What is kept for each image would show: the
features of an image take 147 KiB and its pixels as many, so that those of 10,000 images take 2.8 GiB. Then the
similarity of 5,000 images with 25,000 texts, compared with the size of its result.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "small", "large", "round"]
NUM_IMAGES, NUM_TEXTS = 5_000, 25_000
"""The size of COCO's test set in the paper's Table 5."""


def save_images(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for number in range(count):
        low = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        low.resize((64, 64), Image.Resampling.BILINEAR).save(folder / f"{number:05}.jpg")


def make(stage: str, num_queries: int = 4, width: int = 16) -> Any:
    """Return a pipeline of tiny random networks, with an image encoder of 49 tokens of width 768.

    Args:
        stage: ``representation`` or ``generation``.
        num_queries: number of queries.
        width: width of the embeddings.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertTokenizerFast, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from blip2.backbones.language import LanguageModel
    from blip2.backbones.vision import ImageEncoder, Preprocessing
    from blip2.config import LanguageConfig, ModelConfig, ObjectivesConfig, QFormerConfig, VisionConfig
    from blip2.model.generation import GenerationModel
    from blip2.model.representation import RepresentationModel
    from blip2.pipelines import GenerationPipeline, RepresentationPipeline

    torch.manual_seed(0)
    patches = torch.nn.Conv2d(3, 24, 16, 16)
    encoder = ImageEncoder(patches, lambda pixels: patches(pixels).flatten(2).mT.repeat(1, 1, 32), Preprocessing(112))
    qformer = QFormerConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=len(WORDS) + 1,
        num_query_tokens=num_queries, image_text_hidden_size=width, max_position_embeddings=32, dropout=0.0,
    )  # fmt: skip
    vision, path = VisionConfig(name="random"), Path("random")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(WORDS))
        bert = BertTokenizerFast(vocab=str(Path(folder) / "vocab.txt"))
    if stage == "representation":
        model = RepresentationModel(encoder, qformer, ObjectivesConfig()).eval()
        return RepresentationPipeline(model, bert, ModelConfig("representation", vision, qformer), path)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]", pad_token="[PAD]")
    llama = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=3,
    )  # fmt: skip
    language = LanguageModel(LlamaForCausalLM(llama))
    config = ModelConfig("generation", vision, qformer, LanguageConfig(name="random"))
    return GenerationPipeline(GenerationModel(encoder, qformer, language).eval(), tokenizer, config, path, 3)


def peak() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(method: str, folder: Path, count: int) -> dict[str, float]:
    """Run a method over the first images of a folder, and return its peak memory and the images per second."""
    from blip2.decoding.options import Decoding
    from blip2.memory import tune_malloc

    tune_malloc()  # as the commands do
    paths = sorted(folder.glob("*.jpg"))[:count]
    pipeline = make("generation" if method == "caption" else "representation")
    options = {"decoding": Decoding(num_beams=1, max_new_tokens=4)} if method == "caption" else {}
    started = time.perf_counter()
    assert len(getattr(pipeline, method)(paths, **options)) == count
    return {"peak": peak(), "images_per_second": count / (time.perf_counter() - started)}


def run_similarity() -> dict[str, float]:
    """Return the memory that the similarity of given embeddings takes above its result, in MiB."""
    import torch

    pipeline = make("representation", 32)  # 32 queries; the width of the embeddings matters for the time alone
    images, texts = torch.randn(NUM_IMAGES, 32, 16), torch.randn(NUM_TEXTS, 16)
    before = peak()
    result = pipeline.similarity(images, texts)
    size = result.nbytes / 2**20
    return {"result": size, "above": peak() - before - size}


def start(*arguments: object) -> dict[str, float]:
    """Run this script in a process of its own."""
    command = [sys.executable, __file__, "--run", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        method, *rest = arguments.run
        print(json.dumps(run_similarity() if method == "similarity" else run(method, Path(rest[0]), int(rest[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_images(Path(folder), arguments.images)
        for method in ("caption", "embed_images"):
            few, many = (start(method, folder, count) for count in (arguments.few, arguments.images))
            print(
                f"{method}: peak {few['peak']:.0f} MiB over {arguments.few} images, {many['peak']:.0f} MiB over"
                f" {arguments.images}: {many['peak'] / few['peak']:.2f} times; {many['images_per_second']:.0f} images/s"
            )
    found = start("similarity")
    above, size = found["above"], found["result"]
    print(f"similarity {NUM_IMAGES} x {NUM_TEXTS}: {above:.0f} MiB above its result of {size:.0f} MiB")


if __name__ == "__main__":
    main()
