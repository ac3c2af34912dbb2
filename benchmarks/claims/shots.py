"""In-context examples (paper §5): colors are named by made-up words that examples before the question define.

    python benchmarks/claims/shots.py --output runs/claims/shots
    python benchmarks/claims/shots.py --output runs/claims/shots-large --scale 8      # larger, on a GPU
    python benchmarks/claims/shots.py --output runs/claims/shots-try --quick          # to see that it works

The paper finds no in-context learning, and explains it by its pre-training data, which has one image per text. An
episode here has four background colors, each named by a made-up word. Its examples are images, each followed by the
word for its color; a last image, whose color is one of the four, has to be named:

    <image> "dax" <image> "wug" ... <image> "

Which word belongs to which color is drawn anew for each episode, so that only the examples can tell. With k examples,
of k different colors, a model that reads them can name k / 4 of the last images and has to guess the others.

Stage 2 is trained on single pairs of an image and a caption, from stage 1. Then it is trained on interleaved episodes
of one to four examples, in which the last color is always among the examples. Both models are asked about held-out
images with words that no episode of training has, with 0, 1, 2 and 4 examples; the answer is the likeliest of all these
words. The LLM is frozen throughout.

Results go to results.json, shots.png and table.md in the output folder. A run that was killed continues; what is done
is not done again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import Claim, draw_curves, fit, learn, load_stage2, make_parser, markdown, mean_spread

from blip2.model.losses import IGNORE_INDEX, language_modeling, query_diversity
from blip2.pipelines import GenerationPipeline

STEPS, EPISODE_STEPS = 100, 150
"""Steps of stage 2 on pairs, and on episodes."""
BATCH_SIZE = 4
TRAIN_IMAGES, QUICK_IMAGES = 1200, 32
NUM_COLORS = 4
"""Number of colors of an episode."""
SHOTS = (0, 1, 2, 4)
QUESTIONS = 160
"""Number of episodes that are evaluated for each number of examples."""
BEFORE, AFTER = '\n"', '"\n'
"""The text before and after a word."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
NUM_WORDS = 8
"""Number of the words of the evaluation; the others are for training."""
PAIRS, EPISODES = "pairs alone", "pairs, then episodes"
RATES = {"vision.*": "frozen", "language.*": "frozen", "projection.*": 1e-3, "*": 2e-4}
"""Learning rates on episodes."""


@dataclass(frozen=True)
class Words:
    """Made-up words that have the same number of tokens."""

    train: Tensor
    """Token ids [W, U]."""
    test: Tensor
    """Token ids [V, U], whose first tokens all differ."""

    @classmethod
    def make(cls, tokenizer: Any) -> Words:
        """Draw words of two syllables, such as "dafo", of two tokens, or else of the least number of tokens."""
        rng = np.random.default_rng(0)
        letters = [rng.choice(list(kind), 400) for kind in (CONSONANTS, VOWELS) * 2]
        words = sorted({"".join(word) for word in zip(*letters, strict=True)})
        rows = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        lengths = {len(row) for row in rows}
        rows = [row for row in rows if len(row) == (2 if 2 in lengths else min(lengths))]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        test = list({row[0]: row for row in rows}.values())[:NUM_WORDS]
        starts = {row[0] for row in test}
        return cls(torch.tensor([row for row in rows if row[0] not in starts]), torch.tensor(test))


@dataclass(frozen=True)
class Episodes:
    """B episodes with k examples each."""

    images: Tensor
    """Indices of the images [B, k + 1]; the last one is asked about."""
    words: Tensor
    """Token ids of the words of the images [B, k + 1, U]."""


def draw_episodes(
    rng: np.random.Generator, by_color: list[np.ndarray], words: Tensor, count: int, shots: int, given: bool
) -> Episodes:
    """Draw episodes.

    Args:
        rng: source of randomness.
        by_color: the indices of the images of each color.
        words: token ids of the words [W, U].
        count: number of episodes.
        shots: number of examples, each of another color.
        given: whether the last color is always one of the examples.
    """
    images, chosen = [], []
    for _ in range(count):
        colors = rng.choice(len(by_color), NUM_COLORS, replace=False)
        names = rng.choice(len(words), NUM_COLORS, replace=False)
        last = rng.integers(shots if given else NUM_COLORS)
        order = [*range(shots), last]
        images.append([rng.choice(by_color[colors[i]]) for i in order])
        chosen.append(names[order])
    return Episodes(torch.from_numpy(np.array(images)), words[torch.from_numpy(np.array(chosen))])


class Reader:
    """Gives episodes to a model of stage 2.

    Args:
        pipeline: the model.
        features: features of all images [I, P, E].
    """

    def __init__(self, pipeline: GenerationPipeline, features: Tensor) -> None:
        self.model, self.features, self.device = pipeline.model, features, pipeline.device
        texts = [pipeline.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (BEFORE, AFTER)]
        self.before, self.after = (torch.tensor(ids, device=self.device) for ids in texts)
        self.end = torch.tensor([pipeline.eos_token_id], device=self.device)

    def read(self, episodes: Episodes, first_only: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the LLM's hidden states at the tokens of the last words, these tokens, and Z of all images.

        Args:
            episodes: the episodes.
            first_only: whether to return the first token of each word only.
        """
        language, (count, num_images) = self.model.language, episodes.images.shape
        z = self.model.query_outputs(self.features[episodes.images.flatten()].to(self.device))
        visual = self.model.projection(z).unflatten(0, (count, num_images))  # [B, k + 1, Q, L]
        words = episodes.words.to(self.device)
        before = self.before.expand(count, -1)
        parts = []
        for i in range(num_images - 1):
            text = torch.cat([before, words[:, i], self.after.expand(count, -1)], dim=1)
            parts += [visual[:, i], language.embed(text).to(visual.dtype)]
        # All before the last word is one long prompt, in which images and texts take turns.
        prompt = torch.cat([*parts, visual[:, -1]], dim=1)
        ids = torch.cat([before, words[:, -1]], dim=1)
        labels = torch.cat([torch.full_like(before, IGNORE_INDEX), words[:, -1]], dim=1)
        if first_only:
            labels[:, before.shape[1] + 1 :] = IGNORE_INDEX
        states, tokens = language.hidden_states(prompt, ids, torch.ones_like(ids, dtype=torch.bool), labels)
        return states, tokens, z

    def loss(self, episodes: Episodes) -> Tensor:
        states, tokens, z = self.read(episodes, first_only=False)
        lm = language_modeling(states, self.model.language.lm_head, tokens).loss
        return lm + self.model.objectives.query_diversity * query_diversity(z)

    @torch.no_grad()
    def right(self, episodes: Episodes, words: Tensor) -> float:
        """Return the share of episodes whose last word is the likeliest of `words`, by the first token."""
        states, tokens, _ = self.read(episodes, first_only=True)
        starts = words[:, 0].to(self.device)
        best = self.model.language.lm_head(states)[:, starts].argmax(dim=1)
        return float((starts[best] == tokens).float().mean())


def group_by_color(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """Return the indices of the images of each background color."""
    colors = sorted({row["truth"]["color"] for row in rows})
    return [np.array([i for i, row in enumerate(rows) if row["truth"]["color"] == color]) for color in colors]


def evaluate(claim: Claim, pipeline: GenerationPipeline) -> dict[str, float]:
    """Return the share of right words by the number of examples; the episodes are the same for every model."""
    rows, features = claim.images("test_compositions.jsonl", QUICK_IMAGES if claim.quick else 240)
    reader, words, by_color = Reader(pipeline, features), Words.make(pipeline.tokenizer), group_by_color(rows)
    found = {}
    for shots in SHOTS:
        rng, shares = np.random.default_rng([0, shots]), []
        for _ in range(-(-claim.limit(QUESTIONS) // BATCH_SIZE)):
            shares.append(reader.right(draw_episodes(rng, by_color, words.test, BATCH_SIZE, shots, False), words.test))
        found[str(shots)] = sum(shares) / len(shares)
    return found


def measure(claim: Claim, variant: str, seed: int) -> dict[str, float]:
    """Train on pairs and, for :data:`EPISODES`, on episodes, and return the share of right words by shots."""
    recipe = replace(claim.recipe("stage2", f"pairs-{seed}", seed, STEPS), start_from=str(claim.stage1(seed)))
    pipeline = load_stage2(learn(recipe))
    if variant == EPISODES:
        rows, features = claim.images("train.jsonl", QUICK_IMAGES if claim.quick else TRAIN_IMAGES)
        reader, words, by_color = Reader(pipeline, features), Words.make(pipeline.tokenizer), group_by_color(rows)

        def loss_of(step: int) -> Tensor:
            rng = np.random.default_rng([seed, step])
            shots = 1 + int(rng.integers(NUM_COLORS))
            return reader.loss(draw_episodes(rng, by_color, words.train, BATCH_SIZE, shots, True))

        state = claim.output / "runs" / f"episodes-{seed}" / "state.pt"
        optimizer = replace(recipe.optimizer, learning_rate=RATES)
        pipeline.model.objectives = recipe.objectives
        fit(pipeline.model, optimizer, claim.steps(EPISODE_STEPS), seed, loss_of, state)
    return evaluate(claim, pipeline)


def main() -> None:
    parser = make_parser(__doc__, "shots")
    claim = Claim.start(parser, parser.parse_args())
    scores = claim.compare([PAIRS, EPISODES], lambda variant, seed: measure(claim, variant, seed))
    rows = [
        [variant, *(mean_spread([run[str(shots)] for run in by_seed.values()]) for shots in SHOTS)]
        for variant, by_seed in scores.items()
    ]
    ceiling = [(k + (NUM_COLORS - k) / NUM_WORDS) / NUM_COLORS for k in SHOTS]
    rows.append(["reads the examples, guesses else", *(f"{100 * share:.1f}" for share in ceiling)])
    text = markdown(["right words, %, by the number of examples", *map(str, SHOTS)], rows)
    figure = draw_curves(scores, ("examples", "right words, %"), {"chance": 1 / NUM_WORDS})
    claim.finish({"scores": scores, "chance": 1 / NUM_WORDS}, text, figure)


if __name__ == "__main__":
    main()
