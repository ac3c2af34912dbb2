"""Both stages on audio: spoken words, through a frozen, pretrained speech encoder (docs/any-modality.md).

    apt-get install flite && pip install 'blip2[audio]'
    python benchmarks/audio.py --output runs/audio

The held-out recordings are of people, who read out the names of 135 things for two Debian packages. In training, the
names are spoken by four computer voices, at two speeds: the model hears no person and knows the names. The encoder is
that of Moonshine tiny (Jeffries et al., 2024), which is in a wheel of moonshine-voice; with `--encoder mel`, the
Q-Former reads the log-mel frames of examples/09_audio_features.py instead, which nobody trained. Stage 1 is measured by
retrieval, beside the nearest recording by the mean of the tokens, and stage 2 by the captions that are the exact name.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions
from transformers import BertTokenizerFast

import blip2
from blip2.config import EvaluationConfig
from blip2.evaluation.run import evaluate
from blip2.recipe import find_recipe, load_recipe

PACKAGES = ["tuxpaint-stamps-default", "ktuberling-data"]
WHEEL = "moonshine-voice==0.0.59"
"""Newer wheels download the weights when they are first used."""
VOICES = ["awb", "kal16", "rms", "slt"]
SPEEDS = [0.9, 1.1]
RATE = 16_000
"""Samples a second that the encoder expects."""
WIDTHS = {"moonshine": 320, "mel": 288}
EXAMPLE = Path(__file__).parents[1] / "examples" / "09_audio_features.py"
# A small Q-Former with random weights. Its texts are spelled, since pieces of words say nothing about the sound.
MODEL = ["--qformer.bert=null", "--qformer.vocab_size=58", "--qformer.hidden_size=128", "--qformer.num_hidden_layers=2"]
MODEL += ["--qformer.cross_attention_frequency=1", "--qformer.num_attention_heads=4", "--qformer.num_query_tokens=4"]
MODEL += ["--qformer.intermediate_size=256", "--vision.name=features", "--vision.max_tokens=100"]
DATA = ["--data.validation=null", "--data.cached_views=0"]


def download(output: Path) -> None:
    """Unpack the Debian packages and the encoder."""
    if not (output / "debian").is_dir():
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=output, check=True)
        for package in output.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, output / "debian"], check=True)
    if not (output / "encoder.ort").is_file():
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", output, WHEEL], check=True)
        with zipfile.ZipFile(next(output.glob("moonshine_voice-*.whl"))) as wheel:
            (output / "encoder.ort").write_bytes(wheel.read("moonshine_voice/assets/tiny-en/encoder_model.ort"))


def collect(debian: Path, output: Path) -> None:
    """Fill the folders ``train`` and ``held-out`` with recordings, each with a text file of the same name."""
    people: dict[str, list[Path]] = {}
    for sound in sorted(debian.glob("usr/share/tuxpaint/stamps/**/*_desc.ogg")):
        text = sound.with_name(sound.name.replace("_desc.ogg", ".txt"))
        if text.is_file():  # its first line is, for example, "A red kangaroo."
            name = text.read_text(encoding="utf-8").splitlines()[0].lower().strip(" .")
            people.setdefault(re.sub(r"^(an?|the) ", "", name), []).append(sound)
    for sound in sorted(debian.glob("usr/share/ktuberling/sounds/en/*.ogg")):  # for example moon_star.ogg
        people.setdefault(sound.stem.split("_")[-1], []).append(sound)
    for folder in ("train", "held-out"):
        (output / folder).mkdir()
    for name, sounds in people.items():
        key = name.replace(" ", "_")
        for i, sound in enumerate(sounds):
            shutil.copy(sound, output / "held-out" / f"{key}-{i}.ogg")
            (output / "held-out" / f"{key}-{i}.txt").write_text(name, encoding="utf-8")
        for voice in VOICES:
            subprocess.run(["flite", "-voice", voice, "-t", name, "-o", output / "voice.wav"], check=True)
            samples, rate = soundfile.read(output / "voice.wav")
            for speed in SPEEDS:  # another sampling rate changes the speed and the pitch
                path = output / "train" / f"{key}-{voice}-{speed}"
                soundfile.write(f"{path}.wav", samples, round(rate * speed))
                Path(f"{path}.txt").write_text(name, encoding="utf-8")


def moonshine(session: InferenceSession, path: Path) -> NDArray[np.float32]:
    """Encode a recording: a token of 24 ms has 288 outputs of the encoder, then sines and cosines of its position."""
    sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    length = len(sound) * RATE // rate
    resampled = np.fft.irfft(np.fft.rfft(sound.mean(axis=1)), length)
    inputs = (resampled / (2 * np.abs(resampled).max()))[None].astype("float32")
    mask = np.ones(inputs.shape, dtype="int64")
    (hidden,) = session.run(["last_hidden_state"], {"input_values": inputs, "attention_mask": mask})
    where = np.arange(hidden.shape[1])[:, None] * 10 ** np.linspace(0, -2, 16)
    return np.concatenate([hidden[0], np.sin(where), np.cos(where)], axis=1, dtype="float32")  # [P, 320]


def encode(encoder: str, output: Path) -> dict[str, Path]:
    """Write the features of both folders, and return where they are."""
    folders = {name: output / encoder / name for name in ("train", "held-out")}
    if folders["held-out"].is_dir():
        return folders
    if encoder == "mel":
        for name, folder in folders.items():
            subprocess.run([sys.executable, EXAMPLE, output / name, folder], check=True)
        return folders
    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(output / "encoder.ort", options)
    statistics: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    for name, folder in folders.items():
        sounds = sorted(path for path in (output / name).iterdir() if path.suffix != ".txt")
        arrays = [moonshine(session, sound) for sound in sounds]
        if statistics is None:  # of the training data: a few outputs are always large, and hide the others
            tokens = np.concatenate(arrays)
            statistics = tokens.mean(axis=0), tokens.std(axis=0)
        folder.mkdir(parents=True)
        for sound, array in zip(sounds, arrays, strict=True):
            np.save(folder / f"{sound.stem}.npy", (array - statistics[0]) / statistics[1])
            shutil.copy(sound.with_suffix(".txt"), folder)
    return folders


def nearest(features: dict[str, Path]) -> float:
    """Return how often the training recording with the most similar mean token has the name of a held-out recording."""

    def read(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
        files = sorted(folder.glob("*.npy"))
        means = np.stack([np.load(file)[:, :-32].mean(axis=0) for file in files])
        names = np.array([file.with_suffix(".txt").read_text(encoding="utf-8") for file in files])
        return means / np.linalg.norm(means, axis=1, keepdims=True), names

    (train, train_names), (held_out, held_out_names) = read(features["train"]), read(features["held-out"])
    return float((train_names[(held_out @ train.T).argmax(axis=1)] == held_out_names).mean())


def spelling(folder: Path) -> Path:
    """Write a tokenizer whose tokens are letters."""
    letters = [prefix + letter for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir(exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def run(features: dict[str, Path], model: list[str], output: Path, steps: tuple[int, int], seed: int) -> dict[str, Any]:
    """Train both stages from one seed, and measure them on the held-out recordings."""

    def train(stage: int, *overrides: str) -> Path:
        overrides = (f"--data.train={features['train']}", f"--training.seed={seed}", *overrides)
        overrides += (f"--output={output / f'stage{stage}'}", f"--training.max_steps={steps[stage - 1]}")
        recipe = load_recipe(find_recipe(f"demo-stage{stage}"), [*MODEL, *model, *DATA, *overrides])
        return blip2.train(recipe, resume=True)

    rates = json.dumps({"vision.*": "frozen", "*": 1.5e-3})
    stage1 = train(1, "--data.batch_size=16", f"--optimizer.learning_rate={rates}")
    config = EvaluationConfig(task="retrieval", data=str(features["held-out"]), rerank_k=1000)
    retrieval = evaluate(stage1, config, output / "retrieval")
    stage2 = train(2, f"--start_from={stage1}")
    files = sorted(features["held-out"].glob("*.npy"))
    names = [file.with_suffix(".txt").read_text(encoding="utf-8") for file in files]
    result = {key: retrieval[key] for key in ("chance", "itc", "itm")}
    for stage, checkpoint in (("stage 1", stage1), ("stage 2", stage2)):
        captions = blip2.load(checkpoint).caption(files, decoding=blip2.Decoding(num_beams=1))
        exact = [caption.lower() == name for caption, name in zip(captions, names, strict=True)]
        result[f"captions of {stage}"] = {
            "exact": mean(exact),
            "examples": list(zip(names, captions, strict=True))[::8],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/audio"))
    parser.add_argument("--encoder", choices=WIDTHS, default="moonshine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stage1-steps", type=int, default=1000)
    parser.add_argument("--stage2-steps", type=int, default=150)
    options = parser.parse_args()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    download(output)
    if not (output / "held-out").is_dir():
        collect(output / "debian", output)
    features = encode(options.encoder, output)
    model = [f"--vision.hidden_size={WIDTHS[options.encoder]}", f"--qformer.tokenizer={spelling(output / 'letters')}"]
    results = []
    for seed in options.seeds:
        folder = output / options.encoder / f"seed-{seed}"
        results.append(run(features, model, folder, (options.stage1_steps, options.stage2_steps), seed))
        (folder / "result.json").write_text(json.dumps(results[-1], indent=1), encoding="utf-8")
    print(f"nearest recording  {100 * nearest(features):.1f} %")
    for part in ("chance", "itc", "itm", "captions of stage 1", "captions of stage 2"):
        for key in (key for key in results[0][part] if key != "examples"):
            values = [result[part][key] for result in results]
            spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
            print(f"{part} {key}  {100 * mean(values):.1f}{spread} %")
    print(*(f"{name}: {caption}" for name, caption in results[0]["captions of stage 2"]["examples"]), sep="\n")


if __name__ == "__main__":
    main()
