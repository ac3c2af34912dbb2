"""What a turn of a conversation costs: with the key-value cache of a chat, and with everything computed again.

    python benchmarks/chat.py

Both ways answer the same questions about one image with SmolLM2-135M-Instruct, EfficientNet-Lite0 and an untrained
Q-Former (the cost does not depend on the weights), and must give the same answers. The turns are of like length: each
answer is cut at ``--tokens`` tokens, and no end token ends it before.

``--templates`` instead prints the first 18 tokens of the answers to two questions without an image, with the default
prompt and with the chat template of the LLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer

from blip2.backbones.language import load_language_model
from blip2.backbones.vision_loaders import load_image_encoder
from blip2.config import LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from blip2.data.assets import resolve
from blip2.decoding.options import Decoding
from blip2.model.generation import GenerationModel
from blip2.pipelines import Chat, GenerationPipeline

VISION, LANGUAGE = "package:efficientnet-lite0", "package:smollm2-135m-instruct"
QUESTIONS = [
    f"What do you see in part {word} of it?"
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
]


def make_pipeline(queries: int) -> GenerationPipeline:
    torch.manual_seed(0)
    vision, language = resolve(VISION), resolve(LANGUAGE)
    qformer = QFormerConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024, num_query_tokens=queries
    )
    model = GenerationModel(load_image_encoder(vision), qformer, load_language_model(language)).eval()
    tokenizer = AutoTokenizer.from_pretrained(language)
    config = ModelConfig("generation", VisionConfig(vision), qformer, LanguageConfig(language))
    return GenerationPipeline(model, tokenizer, config, Path("untrained"), tokenizer.eos_token_id)


def seconds(chat: Chat, question: str, decoding: Decoding) -> tuple[float, str]:
    """Return the CPU time of a turn, which other programs on the machine hardly change, and the answer."""
    start = time.process_time()
    answer = chat.ask(question, decoding)
    return time.process_time() - start, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12, help="length of each answer")
    parser.add_argument("--queries", type=int, default=32, help="number of queries of the image")
    parser.add_argument("--repeats", type=int, default=3, help="conversations; the median of each turn is reported")
    parser.add_argument("--templates", action="store_true", help="print answers with the two kinds of prompt instead")
    options = parser.parse_args()
    pipeline = make_pipeline(options.queries)
    if options.templates:
        for template in (None, "chat"):
            chat = pipeline.chat(template=template, decoding=Decoding(num_beams=1, max_new_tokens=18))
            for question in ("What is the capital of France?", "And of Italy?"):
                print(template, question, repr(chat.ask(question)), sep="\t")
        return
    decoding = Decoding(num_beams=1, max_new_tokens=options.tokens, min_new_tokens=options.tokens)
    image = Image.new("RGB", (224, 224), (200, 80, 40))
    pipeline.chat(image, decoding=replace(decoding, max_new_tokens=2, min_new_tokens=2)).ask("Warm?")
    times: dict[str, list[list[float]]] = {"kept": [], "again": []}
    for _ in range(options.repeats):
        chat, other = pipeline.chat(image), pipeline.chat(image)
        rows: dict[str, list[float]] = {"kept": [], "again": []}
        for question in QUESTIONS:  # both ways in turn, so that the machine treats them alike
            spent, answer = seconds(chat, question, decoding)
            rows["kept"].append(spent)
            other._decoder = None  # as if the conversation had come back from disk
            spent, same = seconds(other, question, decoding)
            rows["again"].append(spent)
            if answer != same:
                raise SystemExit(f"the answers differ: {answer!r} and {same!r}")
        for name, row in rows.items():
            times[name].append(row)
    kept, again = ([statistics.median(turn) for turn in zip(*times[name], strict=True)] for name in ("kept", "again"))
    assert chat._decoder is not None
    result = {
        "places_at_the_end": len(chat._decoder._keys),
        "turn_10_over_turn_2": round(kept[9] / kept[1], 2),
        "turn_10_over_turn_2_everything_again": round(again[9] / again[1], 2),
        "everything_again_over_kept_at_turn_10": round(again[9] / kept[9], 2),
        "cpu_seconds_kept": [round(each, 3) for each in kept],
        "cpu_seconds_again": [round(each, 3) for each in again],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
