"""Scene planning: the objects of each image, the combinations held out from training, and near twins."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from blip2.data.scene_images import TEXTURES, Cutout
from blip2.data.scene_kinds import COLORS
from blip2.errors import InputError

TYPE_PROBABILITIES = {"pair": 0.55, "count": 0.20, "single": 0.10, "triple": 0.15}
"""Probability of each type of scene."""
GROUP_SIZE = 4
"""Number of near twins in a group."""
HELD_OUT_PAIRS_OF_256 = 31
"""A pair of kinds is held out if the first byte of the hash of the pair is less than this number."""
HELD_OUT_COUNTS_OF_256 = 90
"""A count (2 or 3) of a kind is held out if the first byte of the hash of the kind is less than this number."""
MIN_CUTOUTS_TO_HOLD_OUT = 3
"""Minimum number of cut-outs of a kind whose last cut-out is held out."""
TWIN_TYPES = ("order", "relation", "color", "count")
"""Facts in which the two images of a pair of twins differ."""


@dataclass(frozen=True)
class Scene:
    """The content of an image, without places and pixels."""

    type: str
    kinds: tuple[str, ...]
    """Kinds from left to right or from top to bottom; one kind for the types ``count`` and ``single``."""
    cutouts: tuple[Cutout, ...]
    """The cut-out of each object. Scenes of type ``count`` have three, of which the first ``count`` are shown."""
    flips: tuple[bool, ...]
    scales: tuple[float, ...]
    """Size of each object: 0 and 1 are the minimum and the maximum in :data:`~blip2.data.scene_images.OBJECT_SIZES`."""
    color: str
    texture: str
    relation: str = ""
    count: int = 0
    size: str = ""

    @property
    def num_objects(self) -> int:
        """Number of objects that are shown."""
        return self.count or len(self.kinds)


def pair_of(one: str, other: str) -> tuple[str, str]:
    """Return two kinds in alphabetical order."""
    return (one, other) if one < other else (other, one)


def is_held_out(one: str, other: str) -> bool:
    """Return whether two kinds never occur together in training, by a hash of their names."""
    return hashlib.sha256("|".join(pair_of(one, other)).encode()).digest()[0] < HELD_OUT_PAIRS_OF_256


def held_out_count(kind: str) -> int:
    """Return the count of a kind that training never shows (2 or 3), or 0 if no count of the kind is held out."""
    digest = hashlib.sha256(f"{kind}|count".encode()).digest()
    return 2 + digest[1] % 2 if digest[0] < HELD_OUT_COUNTS_OF_256 else 0


class Planner:
    """Draws scenes with and without held-out combinations.

    Args:
        cutouts: the cut-outs of each kind.
        types: types of scenes to draw; ``pair`` is always one of them.
        textured: whether half of the backgrounds have a texture.
        cutouts_per_kind: maximum number of cut-outs of each kind outside the held-out ones. None: all.

    Raises:
        InputError: there are too few kinds or cut-outs to hold some out, a type is unknown, or cutouts_per_kind is less
            than 1.
    """

    def __init__(
        self,
        cutouts: Mapping[str, tuple[Cutout, ...]],
        types: Collection[str] = tuple(TYPE_PROBABILITIES),
        textured: bool = True,
        cutouts_per_kind: int | None = None,
    ) -> None:
        unknown = set(types) - set(TYPE_PROBABILITIES)
        if unknown or "pair" not in types:
            raise InputError(
                f"types are {', '.join(types) or 'empty'}, expected pair and optionally"
                f" {', '.join(sorted(set(TYPE_PROBABILITIES) - {'pair'}))}: correct them"
            )
        if cutouts_per_kind is not None and cutouts_per_kind < 1:
            raise InputError(f"cutouts_per_kind is {cutouts_per_kind}, expected 1 or more: choose such a number")
        self.textured = textured
        self.types = {type: share for type, share in TYPE_PROBABILITIES.items() if type in types}
        self.kinds = tuple(sorted(cutouts))
        self.held_out_cutouts = {
            kind: these[-1:] for kind, these in cutouts.items() if len(these) >= MIN_CUTOUTS_TO_HOLD_OUT
        }
        self.train_cutouts = {
            kind: (these[:-1] if kind in self.held_out_cutouts else these)[:cutouts_per_kind]
            for kind, these in cutouts.items()
        }
        self.held_out_pairs = [pair for pair in combinations(self.kinds, 2) if is_held_out(*pair)]
        self.held_out_counts = [(kind, n) for kind in self.kinds if (n := held_out_count(kind))]
        self.allowed_counts = {kind: [n for n in (1, 2, 3) if n != held_out_count(kind)] for kind in self.kinds}
        if len(self.kinds) < 8 or len(self.held_out_cutouts) < 4 or not self.held_out_pairs or not self.held_out_counts:
            raise InputError(
                f"there are {len(self.kinds)} kinds of cut-outs, {len(self.held_out_cutouts)} of them with"
                f" {MIN_CUTOUTS_TO_HOLD_OUT} or more cut-outs, {len(self.held_out_pairs)} pairs of kinds and"
                f" {len(self.held_out_counts)} counts to hold out, expected at least 8, 4, 1 and 1: add kinds of"
                f" cut-outs, {MIN_CUTOUTS_TO_HOLD_OUT} or more of each"
            )

    # -- scenes

    def scene(
        self, type: str, kinds: Sequence[str], rng: np.random.Generator, count: int = 0, held_out_cutouts: bool = False
    ) -> Scene:
        """Draw a scene of the given type and kinds.

        Args:
            type: a key of :data:`TYPE_PROBABILITIES`.
            kinds: the kinds from left to right or from top to bottom.
            rng: the random number generator.
            count: the number of objects, for the type ``count``.
            held_out_cutouts: whether to show held-out cut-outs instead of those of training.
        """
        copies = 3 if type == "count" else 1
        source = self.held_out_cutouts if held_out_cutouts else self.train_cutouts
        cutouts = [source[kind][int(rng.integers(len(source[kind])))] for kind in kinds for _ in range(copies)]
        return Scene(
            type,
            tuple(kinds),
            tuple(cutouts),
            tuple(bool(flip) for flip in rng.integers(2, size=len(cutouts))),
            tuple(rng.random(len(cutouts)).tolist()),
            str(rng.choice(list(COLORS))),
            "plain" if rng.random() < 0.5 or not self.textured else str(rng.choice(TEXTURES)),
            str(rng.choice(["left", "above"])) if type in ("pair", "triple") else "",
            count or (1 if type == "single" else 0),
            str(rng.choice(["small", "large"])) if type == "single" else "",
        )

    def draw_type(self, rng: np.random.Generator) -> str:
        """Draw a type of scene by :data:`TYPE_PROBABILITIES`."""
        shares = np.array(list(self.types.values()))
        return str(rng.choice(list(self.types), p=shares / shares.sum()))

    @property
    def twin_types(self) -> tuple[str, ...]:
        """The types of twins that can be drawn; ``count`` only if scenes show counts."""
        return tuple(each for each in TWIN_TYPES if each != "count" or "count" in self.types)

    def draw(self, rng: np.random.Generator) -> Scene:
        """Draw a scene without held-out combinations."""
        type = self.draw_type(rng)
        while True:
            kinds = tuple(rng.permutation(self.kinds)[: {"pair": 2, "triple": 3}.get(type, 1)].tolist())
            if not any(is_held_out(*pair) for pair in combinations(kinds, 2)):
                break
        count = int(rng.choice(self.allowed_counts[kinds[0]])) if type == "count" else 0
        return self.scene(type, kinds, rng, count)

    def vary(self, scene: Scene, rng: np.random.Generator, held_out_cutouts: bool = False) -> Scene:
        """Draw another scene of the same type, kinds and count.

        Args:
            scene: the scene with the kinds.
            rng: the random number generator.
            held_out_cutouts: whether to show held-out cut-outs instead of those of training.
        """
        kinds = rng.permutation(scene.kinds).tolist()
        return self.scene(scene.type, kinds, rng, scene.count if scene.type == "count" else 0, held_out_cutouts)

    def held_out(self, rng: np.random.Generator, count: bool) -> Scene:
        """Draw a scene with a held-out pair of kinds or, if `count`, with a held-out count of a kind."""
        if count:
            n = int(rng.choice(sorted({n for _, n in self.held_out_counts})))  # each count equally often
            kinds = [kind for kind, count in self.held_out_counts if count == n]
            return self.scene("count", [str(rng.choice(kinds))], rng, n)
        pair = self.held_out_pairs[int(rng.integers(len(self.held_out_pairs)))]
        return self.scene("pair", rng.permutation(pair).tolist(), rng)

    # -- near twins

    def variants(self, base: Scene, rng: np.random.Generator) -> list[Scene]:
        """Draw three scenes that each differ from `base` in one fact."""
        if base.type == "count":
            others = [replace(base, count=n) for n in self.allowed_counts[base.kinds[0]] if n != base.count]
            ways = [*others, *self.recolored(base, rng, 2)]
        elif base.type == "single":
            resized = replace(base, size="small" if base.size == "large" else "large")
            ways = [resized, *self.recolored(base, rng), self.with_other_kind(base, rng)]
        else:
            last = self.turned(base) if rng.random() < 0.5 else self.with_other_kind(base, rng)
            ways = [self.swapped(base, rng), *self.recolored(base, rng), last]
        return ways[: GROUP_SIZE - 1]

    def recolored(self, scene: Scene, rng: np.random.Generator, number: int = 1) -> list[Scene]:
        others = rng.permutation([color for color in COLORS if color != scene.color])
        return [replace(scene, color=color) for color in others[:number].tolist()]

    def turned(self, scene: Scene) -> Scene:
        return replace(scene, relation="above" if scene.relation == "left" else "left")

    def swapped(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Exchange the places of two objects."""
        order = list(range(len(scene.kinds)))
        i, j = (0, 1) if len(order) == 2 else rng.permutation(len(order))[:2].tolist()
        order[i], order[j] = order[j], order[i]
        return replace(
            scene,
            kinds=tuple(scene.kinds[k] for k in order),
            cutouts=tuple(scene.cutouts[k] for k in order),
            flips=tuple(scene.flips[k] for k in order),
            scales=tuple(scene.scales[k] for k in order),
        )

    def with_other_kind(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Replace one object by an object of another kind."""
        at = int(rng.integers(len(scene.kinds)))
        rest = [kind for i, kind in enumerate(scene.kinds) if i != at]
        candidates = [
            k for k in self.kinds if k not in scene.kinds and not any(is_held_out(k, other) for other in rest)
        ]
        kinds, cutouts = list(scene.kinds), list(scene.cutouts)
        kinds[at] = candidates[int(rng.integers(len(candidates)))]
        these = self.train_cutouts[kinds[at]]
        cutouts[at] = these[int(rng.integers(len(these)))]
        return replace(scene, kinds=tuple(kinds), cutouts=tuple(cutouts))

    def twins(self, twin_type: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
        """Draw two scenes of held-out combinations that differ in one fact.

        Args:
            twin_type: the fact in which the scenes differ, one of :data:`TWIN_TYPES`.
            rng: the random number generator.
        """
        first = self.held_out(rng, count=twin_type == "count")
        if twin_type == "count":
            pair = [replace(first, count=n) for n in rng.permutation([2, 3]).tolist()]
            return pair[0], pair[1]
        if twin_type == "color":
            return first, self.recolored(first, rng)[0]
        return first, self.swapped(first, rng)
