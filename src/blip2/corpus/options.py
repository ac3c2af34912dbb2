"""Options of passes over a corpus. The command line is made from this module, so it does not import PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip2.config import MAX_COUNT, bounded, check_ranges
from blip2.corpus.selection import SelectionRules
from blip2.decoding.options import Decoding, Sampling
from blip2.errors import InputError

NUCLEUS_SAMPLING = Decoding(num_beams=1, top_p=0.9)
"""The default decoding of CapFilt: BLIP's nucleus sampling."""
RULES = SelectionRules()


@dataclass(frozen=True)
class Engine:
    """The place where a job runs: this process or a Ray cluster."""

    kind: Literal["local", "ray"] = field(default="local", metadata={"option": "engine"})
    """local: run in this process. ray: run on the Ray cluster whose address is in the environment variable RAY_ADDRESS,
    or on a new Ray cluster on this machine."""
    num_workers: int | None = bounded(None, 1, MAX_COUNT)
    """Number of Ray processes. null: one per GPU; if there is no GPU, one per two CPU cores."""
    num_threads: int | None = bounded(None, 1, 1024)  # if the system refuses a thread, OpenMP ends the process
    """CPU threads per worker. This number can change the last digits of floating-point results: use the same number for
    runs whose outputs must be bit-identical. null: without Ray, PyTorch's default; with Ray, an equal share of the
    cores."""

    def __post_init__(self) -> None:
        if self.kind == "local" and self.num_workers is not None:
            raise InputError("--num-workers needs the engine ray: add --engine ray, or leave out --num-workers")
        check_ranges(self)


LOCAL = Engine()


@dataclass(frozen=True, kw_only=True)
class Check:
    """The check of a round of CapFilt on held-out pairs (:mod:`blip2.corpus.check`)."""

    recipe: str | None = field(default=None, metadata={"option": "check"})
    """Recipe of stage 1 with evaluation.task retrieval, by which the round is checked: it trains on the captions before
    and on those after the round, and the round is refused if R@1 on the recipe's evaluation.data is worse by more than
    the spread over runs. null: no check."""
    runs: int = bounded(3, 1, MAX_COUNT, option="check_runs")
    """Number of runs per corpus (before and after the round), with different seeds."""

    def __post_init__(self) -> None:
        check_ranges(self)


NO_CHECK = Check()


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Options of sharding."""

    shard_size: int = bounded(1000, 1, MAX_COUNT)
    """Number of images per output shard, for a corpus that has no shards."""


@dataclass(frozen=True)
class CapFiltConfig(Sampling, Sharding):
    """Options of CapFilt."""

    num_captions: int = bounded(10, 0, MAX_COUNT, option="captions")
    """N, the number of captions to generate per image (§3.4)."""
    decoding: Decoding = field(default=NUCLEUS_SAMPLING, metadata={"option": None})
    """Options of the captioner's generation."""
    prompt: str | None = None
    """Text that the captions continue. null: the prompt of the captioner's config."""
    rules: SelectionRules = RULES
    """Rules that select the captions to keep."""
    batch_size: int = bounded(16, 1, MAX_COUNT)
    """Images per batch."""

    def __post_init__(self) -> None:
        check_ranges(self)
        num_beams = self.decoding.beam_width(1)
        if not self.decoding.do_sample and self.num_captions > 1 and num_beams < self.num_captions:
            raise InputError(
                f"--num-beams is {num_beams}, expected at least the number of captions,"
                f" {self.num_captions}: raise --num-beams, lower --captions, or leave out --num-beams to sample"
            )
