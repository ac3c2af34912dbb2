"""Both stages on audio: recordings of sentences in four languages, from a Debian package (docs/any-modality.md).

    python benchmarks/audio.py --output runs/audio

Tux Paint's stamps have a sentence each, which speakers of several languages read out. The Q-Former reads log-mel frames
(examples/09_audio_features.py), and the texts are "French: Une vache." A tenth of the stamps is held out, in all
languages, so that no sentence of the held-out recordings was heard in training. Stage 1 is measured by retrieval, and
stage 2 by its captions: how many name the language, and how many of the words are right.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import blip2
from blip2.config import EvaluationConfig
from blip2.evaluation.run import evaluate
from blip2.recipe import find_recipe, load_recipe

PACKAGE = "tuxpaint-stamps-default=2022.06.04-1"
LANGUAGES = {"ca": "Catalan", "es": "Spanish", "fr": "French", "ro": "Romanian"}
MAX_TOKENS, MAX_CHARACTERS = 96, 32
"""Longer recordings, of almost four seconds and more, and longer sentences are left out."""
MODEL = ["--vision.name=features", "--vision.hidden_size=288", f"--vision.max_tokens={MAX_TOKENS}"]
# A small Q-Former with random weights: about a tenth of a second for a step on one core.
MODEL += ["--qformer.bert=null", "--qformer.tokenizer=package:minilm", "--qformer.hidden_size=128"]
MODEL += ["--qformer.num_hidden_layers=2", "--qformer.num_attention_heads=4", "--qformer.intermediate_size=256"]
MODEL += ["--qformer.num_query_tokens=8", "--data.max_length=24"]
EXAMPLE = Path(__file__).parents[1] / "examples" / "09_audio_features.py"


def collect(output: Path, deb: Path | None) -> dict[str, Path]:
    """Copy the recordings, with their sentences, into one folder for training and one that is held out."""
    folders = {name: output / name for name in ("train", "held-out")}
    if folders["held-out"].is_dir():
        return folders
    output.mkdir(parents=True, exist_ok=True)
    if deb is None:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=output, check=True)
        deb = next(output.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", deb, output / "stamps"], check=True)
    for folder in folders.values():
        folder.mkdir()
    for file in sorted((output / "stamps").rglob("*.txt")):
        sentences = dict(re.findall(r"^(\w\w)\.utf8=(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE))
        is_held_out = hashlib.sha256(file.stem.encode()).digest()[0] < 26
        for code, language in LANGUAGES.items():
            sound = file.with_name(f"{file.stem}_desc_{code}.ogg")
            if sound.is_file() and len(sentences.get(code, " " * 99)) <= MAX_CHARACTERS:
                target = folders["held-out" if is_held_out else "train"] / f"{file.stem}-{code}"
                target.with_suffix(".ogg").write_bytes(sound.read_bytes())
                target.with_suffix(".txt").write_text(f"{language}: {sentences[code].strip()}", encoding="utf-8")
    return folders


def train(recipe: str, features: dict[str, Path], output: Path, overrides: list[str]) -> Path:
    """Train with the demo's recipe of a stage."""
    data = [f"--data.train={features['train']}", "--data.validation=null", "--data.cached_views=0"]
    return blip2.train(load_recipe(find_recipe(recipe), [*MODEL, *data, f"--output={output}", *overrides]), resume=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/audio"))
    parser.add_argument("--deb", type=Path, help="the Debian package, if it was downloaded before")
    parser.add_argument("--stage1-steps", type=int, default=400)
    parser.add_argument("--stage2-steps", type=int, default=60)
    options = parser.parse_args()
    features: dict[str, Path] = {}
    for name, sounds in collect(options.output, options.deb).items():
        features[name] = options.output / f"{name}-features"
        if not features[name].is_dir():
            subprocess.run([sys.executable, EXAMPLE, sounds, features[name]], check=True)
            for file in features[name].glob("*.npy"):
                if len(np.load(file, mmap_mode="r")) > MAX_TOKENS:
                    file.unlink()
                    file.with_suffix(".txt").unlink()

    result: dict[str, object] = {name: len(list(folder.glob("*.npy"))) for name, folder in features.items()}
    started = time.monotonic()
    stage1 = options.output / "stage1"
    train("demo-stage1", features, stage1, [f"--training.max_steps={options.stage1_steps}", "--data.batch_size=32"])
    result["stage 1 seconds"] = round(time.monotonic() - started)
    config = EvaluationConfig(task="retrieval", data=str(features["held-out"]), rerank_k=0)
    retrieval = evaluate(stage1, config, options.output / "retrieval")
    result |= {key: retrieval[key] for key in ("images", "chance", "itc")}

    started = time.monotonic()
    stage2 = options.output / "stage2"
    overrides = [f"--training.max_steps={options.stage2_steps}", f"--start_from={stage1}"]
    train("demo-stage2", features, stage2, overrides)
    result["stage 2 seconds"] = round(time.monotonic() - started)
    pipeline = blip2.load(stage2)
    files = sorted(features["held-out"].glob("*.npy"))
    captions = pipeline.caption(files, decoding=blip2.Decoding(num_beams=1))
    truth = [file.with_suffix(".txt").read_text(encoding="utf-8") for file in files]
    pairs = list(zip(captions, truth, strict=True))
    result["language right"] = sum(a.split(":")[0] == b.split(":")[0] for a, b in pairs) / len(pairs)
    shared = [
        len({*a.lower().split()[1:]} & {*b.lower().split()[1:]}) / len({*b.lower().split()[1:]}) for a, b in pairs
    ]
    result["share of words right"] = sum(shared) / len(shared)
    result["examples"] = pairs[:: max(len(pairs) // 8, 1)]
    (options.output / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
