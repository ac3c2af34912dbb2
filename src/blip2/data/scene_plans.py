"""Plans scenes: which objects an image shows, what training may show, and how near twins differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from blip2.data.scene_images import TEXTURES, Cutout
from blip2.data.scene_kinds import COLORS
from blip2.errors import InputError

SHARES = {"pair": 0.55, "count": 0.20, "single": 0.10, "triple": 0.15}
"""How many of the groups are of each type."""
GROUP = 4
"""Images of a group of near twins."""
HELD_OUT_PAIRS = 31
"""Pairs of 256 that are held out."""
HELD_OUT_COUNTS = 90
"""Kinds of 256 of which one count, two or three, is held out."""
HOLD_OUT_FROM = 3
"""Kinds with so many cut-outs hold the last one out."""
TWINS = ("order", "relation", "color", "count")
"""How the two images of a pair of twins differ."""


@dataclass(frozen=True)
class Scene:
    """Everything of an image but its pixels."""

    type: str
    kinds: tuple[str, ...]
    """In order; of counts and single objects one."""
    cutouts: tuple[Cutout, ...]
    """The cut-out of each object; counts have three, of which the first ones are shown."""
    flips: tuple[bool, ...]
    scales: tuple[float, ...]
    """How large each object is for its type, between 0 and 1."""
    color: str
    texture: str
    relation: str = ""
    count: int = 0
    size: str = ""

    @property
    def shown(self) -> int:
        """Number of objects."""
        return self.count or len(self.kinds)


def pair_of(one: str, other: str) -> tuple[str, str]:
    """An unordered pair of kinds."""
    return (one, other) if one < other else (other, one)


def is_held_out(one: str, other: str) -> bool:
    """Whether two kinds never stand beside each other in training, by a hash of their names."""
    return hashlib.sha256("|".join(pair_of(one, other)).encode()).digest()[0] < HELD_OUT_PAIRS


def held_out_count(kind: str) -> int:
    """The count of a kind that is never shown in training; 0: there is none."""
    digest = hashlib.sha256(f"{kind}|count".encode()).digest()
    return 2 + digest[1] % 2 if digest[0] < HELD_OUT_COUNTS else 0


def draw_type(rng: np.random.Generator) -> str:
    """A type of scenes, by their shares."""
    return str(rng.choice(list(SHARES), p=list(SHARES.values())))


class Planner:
    """Draws scenes, of what may be shown."""

    def __init__(self, cutouts: Mapping[str, tuple[Cutout, ...]]) -> None:
        self.kinds = tuple(sorted(cutouts))
        self.held = {kind: these[-1:] for kind, these in cutouts.items() if len(these) >= HOLD_OUT_FROM}
        self.train = {kind: these[:-1] if kind in self.held else these for kind, these in cutouts.items()}
        self.held_pairs = [pair for pair in combinations(self.kinds, 2) if is_held_out(*pair)]
        self.held_counts = [(kind, n) for kind in self.kinds if (n := held_out_count(kind))]
        self.allowed_counts = {kind: [n for n in (1, 2, 3) if n != held_out_count(kind)] for kind in self.kinds}
        if len(self.kinds) < 8 or len(self.held) < 4 or not self.held_pairs or not self.held_counts:
            raise InputError(
                f"there are {len(self.kinds)} kinds of cut-outs, {len(self.held)} of them with {HOLD_OUT_FROM} or more"
                f" cut-outs, {len(self.held_pairs)} pairs and {len(self.held_counts)} counts to hold out: expected"
                " 8, 4, 1 and 1 at least, so add kinds"
            )

    # -- what is shown

    def scene(
        self, type: str, kinds: Sequence[str], rng: np.random.Generator, count: int = 0, held_cutouts: bool = False
    ) -> Scene:
        """A scene of these kinds, in this order, whatever it is like otherwise."""
        copies = 3 if type == "count" else 1
        source = self.held if held_cutouts else self.train
        cutouts = [source[kind][int(rng.integers(len(source[kind])))] for kind in kinds for _ in range(copies)]
        return Scene(
            type,
            tuple(kinds),
            tuple(cutouts),
            tuple(bool(flip) for flip in rng.integers(2, size=len(cutouts))),
            tuple(rng.random(len(cutouts)).tolist()),
            str(rng.choice(list(COLORS))),
            "plain" if rng.random() < 0.5 else str(rng.choice(TEXTURES)),
            str(rng.choice(["left", "above"])) if type in ("pair", "triple") else "",
            count or (1 if type == "single" else 0),
            str(rng.choice(["small", "large"])) if type == "single" else "",
        )

    def draw(self, rng: np.random.Generator) -> Scene:
        """Any scene that training may show."""
        type = draw_type(rng)
        while True:
            kinds = tuple(rng.permutation(self.kinds)[: {"pair": 2, "triple": 3}.get(type, 1)].tolist())
            if not any(is_held_out(*pair) for pair in combinations(kinds, 2)):
                break
        count = int(rng.choice(self.allowed_counts[kinds[0]])) if type == "count" else 0
        return self.scene(type, kinds, rng, count)

    def again(self, seen: Scene, rng: np.random.Generator, held_cutouts: bool = False) -> Scene:
        """Another scene of the same kinds, or of the same kind and count."""
        kinds = rng.permutation(seen.kinds).tolist()
        return self.scene(seen.type, kinds, rng, seen.count if seen.type == "count" else 0, held_cutouts)

    def held_out(self, rng: np.random.Generator, count: bool) -> Scene:
        """A pair of kinds, or a kind and a count, that training never shows."""
        if count:
            n = int(rng.choice(sorted({n for _, n in self.held_counts})))  # each of them as often
            kinds = [kind for kind, count in self.held_counts if count == n]
            return self.scene("count", [str(rng.choice(kinds))], rng, n)
        pair = self.held_pairs[int(rng.integers(len(self.held_pairs)))]
        return self.scene("pair", rng.permutation(pair).tolist(), rng)

    # -- near twins

    def variants(self, base: Scene, rng: np.random.Generator) -> list[Scene]:
        """Three scenes that differ from one in one fact each."""
        if base.type == "count":
            others = [replace(base, count=n) for n in self.allowed_counts[base.kinds[0]] if n != base.count]
            ways = [*others, *self.recolored(base, rng, 2)]
        elif base.type == "single":
            resized = replace(base, size="small" if base.size == "large" else "large")
            ways = [resized, *self.recolored(base, rng), self.with_other_kind(base, rng)]
        else:
            last = self.turned(base) if rng.random() < 0.5 else self.with_other_kind(base, rng)
            ways = [self.swapped(base, rng), *self.recolored(base, rng), last]
        return ways[: GROUP - 1]

    def recolored(self, scene: Scene, rng: np.random.Generator, number: int = 1) -> list[Scene]:
        others = rng.permutation([color for color in COLORS if color != scene.color])
        return [replace(scene, color=color) for color in others[:number].tolist()]

    def turned(self, scene: Scene) -> Scene:
        return replace(scene, relation="above" if scene.relation == "left" else "left")

    def swapped(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Two objects in each other's place."""
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
        """One object replaced by another kind."""
        at = int(rng.integers(len(scene.kinds)))
        rest = [kind for i, kind in enumerate(scene.kinds) if i != at]
        able = [k for k in self.kinds if k not in scene.kinds and not any(is_held_out(k, other) for other in rest)]
        kinds, cutouts = list(scene.kinds), list(scene.cutouts)
        kinds[at] = able[int(rng.integers(len(able)))]
        these = self.train[kinds[at]]
        cutouts[at] = these[int(rng.integers(len(these)))]
        return replace(scene, kinds=tuple(kinds), cutouts=tuple(cutouts))

    def twins(self, twin_type: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
        """Two scenes of held-out combinations that differ in one fact."""
        first = self.held_out(rng, count=twin_type == "count")
        if twin_type == "count":
            pair = [replace(first, count=n) for n in rng.permutation([2, 3]).tolist()]
            return pair[0], pair[1]
        if twin_type == "color":
            return first, self.recolored(first, rng)[0]
        return first, self.swapped(first, rng)
