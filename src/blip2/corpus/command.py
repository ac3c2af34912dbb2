"""Command line of jobs on a corpus."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip2.errors import InputError


def add_capfilt(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command ``blip2 capfilt``."""
    parser = command(
        "capfilt",
        run_capfilt,
        "Bootstrap the captions of a corpus: generate captions, rank them with the originals, keep the best.",
        "blip2 capfilt runs/mine/stage2 runs/mine/stage1 --data 'shards/{00000..00127}.tar' --output bootstrapped",
    )
    parser.add_argument(
        "captioner",
        metavar="CAPTIONER",
        help="Stage-2 model of any format, or a captioning model of transformers (BLIP, GIT ...).",
    )
    parser.add_argument(
        "ranker",
        metavar="RANKER",
        help="Stage-1 model of any format, or a dual encoder of transformers (CLIP, SigLIP ...).",
    )
    add_corpus(parser, required=True, output="Folder for shards (.tar), metrics.json and report.html.")
    parser.add_argument(
        "--captions", type=int, default=10, metavar="N", help="Captions to generate per image (default: 10)."
    )
    parser.add_argument("--keep", type=int, default=2, metavar="K", help="Captions to keep per image (default: 2).")
    parser.add_argument("--prompt", help="Text that captions continue (default: the captioner's own).")
    parser.add_argument(
        "--top-p", type=float, default=0.9, help="Cumulative probability of nucleus sampling (default: 0.9)."
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Sampling temperature (default: 1).")
    parser.add_argument("--num-beams", type=int, help="Use beam search with this number of beams instead of sampling.")
    parser.add_argument("--max-new-tokens", type=int, default=30, help="Maximum length in tokens (default: 30).")
    parser.add_argument("--min-words", type=int, default=1, help="Drop shorter captions (default: 1).")
    parser.add_argument("--max-words", type=int, help="Drop longer captions (default: no limit).")
    parser.add_argument(
        "--language", metavar="CODE", help="Drop captions in other languages than this, such as en (default: keep all)."
    )
    parser.add_argument(
        "--max-word-overlap",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="Of captions that share at least this fraction of their words, keep the best (default: 1, equal words).",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of sampling (default: 0).")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="Images per batch (default: 16).")
    parser.add_argument("--device", help="Device to run on: cpu, cuda, cuda:1 or mps (default: a GPU if there is one).")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="Data type of the frozen image encoder and LLM (default: the recipe's).",
    )


def add_corpus(parser: argparse.ArgumentParser, required: bool, output: str) -> None:
    """Add the options of the input, the output and the engine.

    Args:
        parser: the parser of the command.
        required: whether ``--data`` is required.
        output: help of ``--output``.
    """
    source = "Corpus: any source that data.train of a recipe may name (docs/data.md)."
    parser.add_argument("--data", required=required, metavar="SOURCE", help=source)
    parser.add_argument("--output", required=True, metavar="FOLDER", help=output)
    parser.add_argument(
        "--shard-size",
        type=int,
        default=1000,
        metavar="N",
        help="Images per output shard, if SOURCE has no shards (default: 1000).",
    )
    add_engine(parser)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options of the engine."""
    parser.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="Run in this process, or on the Ray cluster at RAY_ADDRESS or a new one on this machine (default: local).",
    )
    parser.add_argument(
        "--num-workers", type=int, help="Number of Ray processes (default: one per GPU, or one per two CPU cores)."
    )
    parser.add_argument("--num-threads", type=int, help="CPU threads per worker (default: an equal share).")


def run_capfilt(options: argparse.Namespace) -> None:
    """Run ``blip2 capfilt``."""
    from blip2.corpus.capfilt import CapFiltConfig, capfilt
    from blip2.corpus.selection import SelectionRules
    from blip2.decoding.search import Decoding

    sampled = options.num_beams is None
    top_p = options.top_p if sampled else None
    decoding = Decoding(
        1 if sampled else options.num_beams, options.max_new_tokens, top_p=top_p, temperature=options.temperature
    )
    rules = SelectionRules(
        options.keep, options.min_words, options.max_words, options.language, options.max_word_overlap
    )
    config = CapFiltConfig(
        options.captions, decoding, options.prompt, rules, options.seed, options.batch_size, options.shard_size
    )
    metrics = capfilt(
        options.captioner, options.ranker, options.data, options.output, config,
        engine=_engine(options), device=options.device, dtype=options.dtype,
    )  # fmt: skip
    print(json.dumps({name: metrics[name] for name in ("counts", "dropped", "skipped", "mean_scores")}, indent=1))
    print(f"report: {Path(options.output) / 'report.html'}")


def embed_corpus(options: argparse.Namespace) -> None:
    """Run ``blip2 embed --data``."""
    from blip2.corpus import embed

    if options.data is None:
        raise InputError("--engine ray embeds a whole corpus: name it with --data")
    if options.images or options.text:
        raise InputError("--data embeds a whole corpus: leave out image files and --text, or --data")
    metrics = embed.embed_corpus(
        options.model, options.data, options.output, shard_size=options.shard_size, engine=_engine(options),
        device=options.device, dtype=options.dtype, overrides=options.overrides or None,
    )  # fmt: skip
    print(json.dumps({name: metrics[name] for name in ("images", "texts", "skipped")}, indent=1))


def make_features_with_engine(options: argparse.Namespace, recipe: Any) -> None:
    """Run ``blip2 features --engine ray``; with the local engine, do nothing."""
    engine = _engine(options)
    if engine.kind == "local":
        if engine.num_threads is not None:
            raise InputError("--num-threads needs --engine ray: set OMP_NUM_THREADS instead, or leave it out")
        return
    from blip2.corpus import features

    features.make_features_with_engine(engine, recipe)


def _engine(options: argparse.Namespace) -> Any:
    from blip2.corpus.job import Engine

    return Engine(options.engine, options.num_workers, options.num_threads)
