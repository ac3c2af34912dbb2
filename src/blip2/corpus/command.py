"""The command line of passes over a corpus."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip2.errors import InputError


def add_capfilt(command: Callable[..., argparse.ArgumentParser]) -> None:
    """``blip2 capfilt``."""
    parser = command(
        "capfilt",
        run_capfilt,
        "bootstrap the captions of a corpus: write new ones, rank them with the old, keep the best",
        "blip2 capfilt runs/mine/stage2 runs/mine/stage1 --data 'shards/{00000..00127}.tar' --output bootstrapped",
    )
    parser.add_argument(
        "captioner", metavar="CAPTIONER", help="of stage generation, of any format; or of transformers: BLIP, GIT ..."
    )
    parser.add_argument(
        "ranker", metavar="RANKER", help="of stage representation, of any format; or of transformers: CLIP, SigLIP ..."
    )
    add_corpus(parser, required=True, holds="for shards (.tar), metrics.json and report.html")
    parser.add_argument("--captions", type=int, default=10, metavar="N", help="written of each picture (default: 10)")
    parser.add_argument("--keep", type=int, default=2, metavar="K", help="that stay of each picture (default: 2)")
    parser.add_argument("--prompt", help="text that captions go on from (default: the captioner's own)")
    parser.add_argument("--top-p", type=float, default=0.9, help="of nucleus sampling (default: 0.9)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: 1)")
    parser.add_argument("--num-beams", type=int, help="beam search of this width instead of sampling")
    parser.add_argument("--max-new-tokens", type=int, default=30, help="longest caption in tokens (default: 30)")
    parser.add_argument("--min-words", type=int, default=1, help="shorter captions are dropped (default: 1)")
    parser.add_argument("--max-words", type=int, help="longer captions are dropped (default: none)")
    parser.add_argument("--language", metavar="CODE", help="captions in another one are dropped: en (default: none)")
    parser.add_argument(
        "--max-word-overlap",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of captions that share so many of their words the best stays (default: 1, those with the same words)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="pictures taken at once (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the frozen parts (default: the recipe's)")


def add_corpus(parser: argparse.ArgumentParser, required: bool, holds: str) -> None:
    """What a pass over a corpus reads, where it writes, and who does it."""
    source = "what data.train of a recipe may say (docs/data.md)"
    parser.add_argument("--data", required=required, metavar="SOURCE", help=source)
    parser.add_argument("--output", required=True, metavar="FOLDER", help=holds)
    parser.add_argument(
        "--shard-size",
        type=int,
        default=1000,
        metavar="N",
        help="pictures a shard of the output, where SOURCE has no shards (default: 1000)",
    )
    add_engine(parser)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Where the work is done."""
    parser.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="this process, or a Ray cluster: that of RAY_ADDRESS, or else one on this machine (default: local)",
    )
    parser.add_argument(
        "--num-workers", type=int, help="processes of Ray (default: one a GPU, or one for every two cores)"
    )
    parser.add_argument("--num-threads", type=int, help="CPU threads a worker (default: an even share)")


def run_capfilt(options: argparse.Namespace) -> None:
    from blip2.corpus.capfilt import Settings, capfilt
    from blip2.corpus.selection import Rules
    from blip2.decoding.search import Decoding

    sampled = options.num_beams is None
    top_p = options.top_p if sampled else None
    decoding = Decoding(
        1 if sampled else options.num_beams, options.max_new_tokens, top_p=top_p, temperature=options.temperature
    )
    rules = Rules(options.keep, options.min_words, options.max_words, options.language, options.max_word_overlap)
    settings = Settings(
        options.captions, decoding, options.prompt, rules, options.seed, options.batch_size, options.shard_size
    )
    metrics = capfilt(
        options.captioner, options.ranker, options.data, options.output, settings,
        engine=_engine(options), device=options.device, dtype=options.dtype,
    )  # fmt: skip
    print(json.dumps({name: metrics[name] for name in ("counts", "dropped", "skipped", "mean_scores")}, indent=1))
    print(f"report: {Path(options.output) / 'report.html'}")


def embed_corpus(options: argparse.Namespace) -> None:
    """``blip2 embed --data``."""
    from blip2.corpus import embed

    if options.data is None:
        raise InputError("--engine ray embeds a whole corpus: name it with --data")
    if options.images or options.text:
        raise InputError("--data embeds a whole corpus: leave out image files and --text, or --data")
    metrics = embed.embed_corpus(
        options.model, options.data, options.output, shard_size=options.shard_size, engine=_engine(options),
        device=options.device, dtype=options.dtype, changes=options.changes or None,
    )  # fmt: skip
    print(json.dumps({name: metrics[name] for name in ("pictures", "texts", "skipped")}, indent=1))


def make_features_on(options: argparse.Namespace, recipe: Any) -> None:
    """``blip2 features --engine ray``: on its cluster; without it they are made where they are asked for."""
    engine = _engine(options)
    if engine.kind == "local":
        if engine.threads is not None:
            raise InputError("--num-threads is of --engine ray: set OMP_NUM_THREADS, or leave it out")
        return
    from blip2.corpus import features

    features.make_features_on(engine, recipe)


def _engine(options: argparse.Namespace) -> Any:
    from blip2.corpus.job import Engine

    return Engine(options.engine, options.num_workers, options.num_threads)
