"""Turn recordings, each with a text file of the same name, into arrays that a Q-Former reads (docs/any-modality.md).

python examples/09_audio_features.py recordings features
"""

import sys
from pathlib import Path
from shutil import copy

import numpy as np
import soundfile
import torch

RATE, WINDOW, HOP, BANDS, STACK = 16_000, 400, 160, 64, 4  # a frame every 10 ms, four frames a token


def mel_filters() -> torch.Tensor:  # triangles whose corners are equally far apart in mel
    corners = 700 * (10 ** (torch.linspace(0, 2595 * np.log10(1 + RATE / 1400), BANDS + 2) / 2595) - 1)
    hertz = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    sides = (hertz - corners[:-2]) / corners.diff()[:-1], (corners[2:] - hertz) / corners.diff()[1:]
    return torch.minimum(*sides).clamp(min=0)  # [201, 64]


def features(path: Path) -> np.ndarray:
    sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = torch.from_numpy(sound).mean(dim=1)[None, None]
    mono = torch.nn.functional.interpolate(mono, scale_factor=RATE / rate, mode="linear").flatten()
    spectrum = torch.stft(mono, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    frames = (spectrum.T @ mel_filters()).clamp(min=1e-8).log()  # [T, 64]
    tokens = ((frames - frames.mean()) / frames.std())[: len(frames) // STACK * STACK].reshape(-1, STACK * BANDS)
    where = torch.arange(len(tokens))[:, None] * 10 ** torch.linspace(0, -2, 16)  # the order of tokens, as in a ViT
    return torch.cat([tokens, where.sin(), where.cos()], dim=1).numpy()  # [P, 288]


sounds, output = map(Path, sys.argv[1:])
output.mkdir(parents=True, exist_ok=True)
for sound in sorted(path for path in sounds.iterdir() if path.suffix != ".txt"):
    np.save(output / f"{sound.stem}.npy", features(sound))
    copy(sound.with_suffix(".txt"), output)
