"""Both stages on audio: spoken words, through a frozen, pretrained speech encoder (docs/any-modality.md).

    apt-get install flite && pip install 'blip2[audio]'
    python benchmarks/audio.py --output runs/audio

The held-out recordings are of people, who read out the names of 135 things for two Debian packages. In training, the
names are spoken by four computer voices, each time with another pitch, speed, room and noise: the model hears no person
and knows the names. The encoder is that of Moonshine tiny (Jeffries et al., 2024), which is in a wheel of
moonshine-voice; with `--encoder mel`, the Q-Former reads the log-mel frames of examples/09_audio_features.py instead,
which nobody trained. Stage 1 is measured by retrieval, beside the nearest recording by the mean of the tokens, and
stage 2 by the captions that are the exact name.
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
from typing import Any, NamedTuple

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
TAKES = 32
"""How often each name is spoken for training."""
RATE = 16_000
"""Samples a second that the encoder expects."""
WIDTHS = {"moonshine": 320, "mel": 288}
EXAMPLE = Path(__file__).parents[1] / "examples" / "09_audio_features.py"
# A small Q-Former with random weights. Its texts are spelled, since pieces of words say nothing about the sound.
MODEL = ["--qformer.bert=null", "--qformer.vocab_size=58", "--qformer.hidden_size=128", "--qformer.num_hidden_layers=2"]
MODEL += ["--qformer.cross_attention_frequency=1", "--qformer.num_attention_heads=4", "--qformer.num_query_tokens=4"]
MODEL += ["--qformer.intermediate_size=256", "--vision.name=features", "--vision.max_tokens=128"]
# Batches of names of one length would hold few different ones.
DATA = ["--data.validation=null", "--data.cached_views=0", "--data.group_by_length=false"]


class Features(NamedTuple):
    """Folders of arrays, each with a text file of the same name."""

    train: list[Path]
    """One folder for each take, with all names once."""
    held_out: Path


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
    for take in range(TAKES):
        rng = np.random.default_rng(take)
        folder = output / "train" / f"take-{take:02}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(people):
            target = folder / name.replace(" ", "_")
            sound = record(speak(name, output / "voice.wav", rng), rng)
            soundfile.write(f"{target}.wav", sound / (2 * np.abs(sound).max()), RATE, subtype="PCM_24")
            Path(f"{target}.txt").write_text(name, encoding="utf-8")
    (output / "held-out").mkdir()  # last: this folder says that all are there
    for name, sounds in people.items():
        for i, sound in enumerate(sounds):
            target = output / "held-out" / f"{name.replace(' ', '_')}-{i}"
            shutil.copy(sound, f"{target}.ogg")
            Path(f"{target}.txt").write_text(name, encoding="utf-8")


def resample(sound: NDArray[Any], length: int) -> NDArray[np.float64]:
    """Resample a sound to `length` samples."""
    return np.fft.irfft(np.fft.rfft(sound), length)


def speak(name: str, file: Path, rng: np.random.Generator) -> NDArray[np.float64]:
    """Speak a name by a random voice with random pitch and speed, and return its samples at `RATE`."""
    voice = VOICES[rng.integers(len(VOICES))]
    options = [
        f"duration_stretch={rng.uniform(0.75, 1.4):.2f}",
        f"int_f0_target_mean={rng.uniform(80, 220):.0f}",
        f"int_f0_target_stddev={rng.uniform(5, 40):.0f}",
    ]
    settings = [argument for option in options for argument in ("--setf", option)]
    subprocess.run(["flite", "-voice", voice, *settings, "-t", name, "-o", file], check=True)
    sound, rate = soundfile.read(file)
    # Another sampling rate also moves the formants, as the size of a person does.
    return resample(sound, round(len(sound) * RATE / rate / np.exp(rng.uniform(-0.2, 0.25))))


def record(sound: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Change a sound as a random room, microphone and background would."""
    sound = np.pad(sound, tuple(rng.integers(0, RATE // 4, 2)))
    samples, echo = len(sound), int(0.3 * RATE)
    room = np.exp(-np.arange(echo) / RATE / rng.uniform(0.01, 0.06)) * rng.standard_normal(echo)
    room *= rng.uniform(0, 0.6) / np.linalg.norm(room)
    room[0] = 1
    length = 2 * (samples + echo)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(length, 1 / RATE), 60) / 60)
    microphone = 10 ** (np.interp(octaves, np.arange(8), rng.normal(0, 6, 8)) / 20)
    sound = np.fft.irfft(np.fft.rfft(sound, length) * np.fft.rfft(room, length) * microphone)[:samples]
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    color = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 50) ** rng.uniform(0, 0.7)  # from white to nearly pink
    noise = np.fft.irfft(spectrum / color, samples)
    ratio = 10 ** (-rng.uniform(10, 40) / 20)
    return sound + noise * ratio * np.linalg.norm(sound) / np.linalg.norm(noise)


def moonshine(session: InferenceSession, path: Path) -> NDArray[np.float32]:
    """Return the outputs of the encoder for a recording: one of width 288 for each 24 ms."""
    sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    resampled = resample(sound.mean(axis=1), len(sound) * RATE // rate)
    inputs = (resampled / (2 * np.abs(resampled).max()))[None].astype("float32")
    mask = np.ones(inputs.shape, dtype="int64")
    (hidden,) = session.run(["last_hidden_state"], {"input_values": inputs, "attention_mask": mask})
    return hidden[0]  # [P, 288]


def encode(encoder: str, output: Path) -> Features:
    """Write the features of all folders of recordings, and return where they are."""
    takes = [f"train/take-{take:02}" for take in range(TAKES)]
    folders = {name: output / encoder / name for name in (*takes, "held-out")}
    features = Features([folders[name] for name in takes], folders["held-out"])
    if features.held_out.is_dir():
        return features
    if encoder == "mel":
        for name, folder in folders.items():
            subprocess.run([sys.executable, EXAMPLE, output / name, folder], check=True)
        return features
    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(output / "encoder.ort", options)
    arrays = {
        sound.relative_to(output): moonshine(session, sound)
        for name in folders
        for sound in sorted(path for path in (output / name).iterdir() if path.suffix != ".txt")
    }
    # A few outputs are always large, and hide the others.
    tokens = np.concatenate([array for path, array in arrays.items() if path.parts[0] == "train"])
    center, scale = tokens.mean(axis=0), tokens.std(axis=0)
    for path, array in arrays.items():
        target = output / encoder / path.with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        where = np.arange(len(array))[:, None] * 10 ** np.linspace(0, -2, 16)
        np.save(
            target, np.concatenate([(array - center) / scale, np.sin(where), np.cos(where)], axis=1, dtype="float32")
        )
        shutil.copy((output / path).with_suffix(".txt"), target.parent)
    return features


def nearest(features: Features) -> float:
    """Return how often the training recording with the most similar mean token has the name of a held-out recording."""

    def read(*folders: Path) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
        files = [file for folder in folders for file in sorted(folder.glob("*.npy"))]
        means = np.stack([np.load(file)[:, :-32].mean(axis=0) for file in files])
        names = np.array([file.with_suffix(".txt").read_text(encoding="utf-8") for file in files])
        return means / np.linalg.norm(means, axis=1, keepdims=True), names

    (train, train_names), (held_out, held_out_names) = read(*features.train), read(features.held_out)
    return float((train_names[(held_out @ train.T).argmax(axis=1)] == held_out_names).mean())


def spelling(folder: Path) -> Path:
    """Write a tokenizer whose tokens are letters."""
    letters = [prefix + letter for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir(exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def run(features: Features, model: list[str], output: Path, steps: tuple[int, int], seed: int) -> dict[str, Any]:
    """Train both stages from one seed, and measure them on the held-out recordings."""
    # All pairs of a batch are from one source, and a source has every name once. Two recordings of a name in a batch
    # would be each other's negatives, and the hardest ones.
    takes = json.dumps({str(folder): None for folder in features.train})

    def train(stage: int, *overrides: str) -> Path:
        overrides = (f"--data.train={takes}", f"--training.seed={seed}", *overrides)
        overrides += (f"--output={output / f'stage{stage}'}", f"--training.max_steps={steps[stage - 1]}")
        recipe = load_recipe(find_recipe(f"demo-stage{stage}"), [*MODEL, *model, *DATA, *overrides])
        return blip2.train(recipe, resume=True)

    rates = json.dumps({"vision.*": "frozen", "*": 1.5e-3})
    # With the demo's weights of 10, the Q-Former learns to spell later; with 1, ITM learns later.
    objectives = ["--objectives.itm=2", "--objectives.query_diversity=1"]
    stage1 = train(1, "--data.batch_size=32", f"--optimizer.learning_rate={rates}", *objectives)
    config = EvaluationConfig(task="retrieval", data=str(features.held_out), rerank_k=1000)
    retrieval = evaluate(stage1, config, output / "retrieval")
    stage2 = train(2, f"--start_from={stage1}")
    files = sorted(features.held_out.glob("*.npy"))
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
    parser.add_argument("--stage1-steps", type=int, default=1200)
    parser.add_argument("--stage2-steps", type=int, default=400)
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
