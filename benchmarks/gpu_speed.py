"""Measure the speed of a GPU on the paper's work, compared with LAVIS, transformers and its matrix products.

The parts of `gpu.py` that measure time. Each yields results as it has them, as dicts that `gpu.py` makes tables of.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import stage1
import torch
from compare import Runner, measure, profile_work
from gpu_checks import Place, stage1_case
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Result = dict[str, Any]
END, IMAGE = 2, 4


def rates(place: Place) -> Iterator[Result]:
    """What the card can do: a large product of matrices in bf16, and a large copy."""
    size, numbers = (128, 2**16) if place.tiny else (8192, 2**31)
    a, b = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    took = measure(lambda: [a @ b], place.device.type, 20)["seconds"]
    yield {"name": "product", "operations_a_second": 2 * size**3 / took, "size": size}
    source = torch.randn(numbers // 4, device=place.device)
    target = torch.empty_like(source)
    took = measure(lambda: [target.copy_(source)], place.device.type, 20)["seconds"]
    yield {"name": "copy", "bytes_a_second": 2 * source.nbytes / took}


def operations(work: Callable[[], Any]) -> float:
    """Of the matrix products in it."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


# -- stage 1, compared with LAVIS --------------------------------------------------------------------------------------


def representation(place: Place) -> Iterator[Result]:
    """A step of stage 1 from features of ViT-g's shape, and re-ranking, compared with LAVIS."""
    case = replace(stage1_case(place), device=place.device.type)
    folder = place.folder / "stage1"
    folder.mkdir()
    stage1.prepare(case, folder)
    script = [sys.executable, Path(__file__).with_name("gpu_stage1.py")]
    sides = {name: Runner(name, [*script, name, folder]) for name in ("blip2", "LAVIS")}
    batch, small, repeats = (4, 4, 1) if place.tiny else (128, 16, 5)

    def versus_lavis(name: str, turns: int = 3, **order: Any) -> Result:
        """Both sides at the same order, in turns."""
        order = {"repeats": repeats, **order}
        found: dict[str, list[Result]] = {side: [] for side in sides}
        for _ in range(1 if place.tiny else turns):
            for side, runner in sides.items():
                found[side].append(runner.ask(**order))
        return {"name": name, "peer": "LAVIS", **order, **summary(found["blip2"], found["LAVIS"])}

    yield versus_lavis("stage-1 step, fp32", turns=1, work="step", batch=small, bf16=False)
    same = {"work": "step", "batch": batch, "bf16": True}
    plain = versus_lavis("stage-1 step, bf16", **same)
    yield {**plain, "batch": batch}
    own = [sides["blip2"].ask(**same, repeats=repeats, checkpointing=True)]
    yield {**plain, "name": "stage-1 step, bf16, activation checkpointing", **only(own, plain)}
    images = 2 if place.tiny else 16
    yield versus_lavis("re-ranking, bf16", turns=2, work="rerank", images=images, bf16=True)
    for name, runner in sides.items():
        yield {"name": f"stage-1 step, bf16, largest batch, {name}", **runner.ask("largest", repeats=repeats)}
    for side, runner in sides.items():
        yield {"name": f"profile of a stage-1 step, {side}", **runner.ask("profile", what="step", count=batch)}
    yield {"name": "profile of re-ranking", **sides["blip2"].ask("profile", what="rerank", count=images)}
    if place.is_gpu:  # last: compiling takes a while
        own = [sides["blip2"].ask(**same, repeats=repeats, compile=True)]
        yield {**plain, "name": "stage-1 step, bf16, compiled", **only(own, plain)}
    for runner in sides.values():
        runner.close()
    model = stage1.build(case).to(place.device)
    import gpu_stage1

    data = gpu_stage1.inputs(json.loads((folder / "about.json").read_text()), batch, batch)
    step = stage1.step(replace(case, bf16=True, batch=batch), model, data)
    yield {"name": "operations of a stage-1 step", "operations": operations(step), "batch": batch}


def summary(ours: Sequence[Result], theirs: Sequence[Result]) -> Result:
    """Medians of both sides, the ratio turn by turn, and how far apart their values are."""
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True))
    pairs = zip(ours[0]["values"], theirs[0]["values"], strict=True)
    return {
        "ours": middle(ours), "theirs": middle(theirs), "ratio": ratios[len(ratios) // 2], "lowest": ratios[0],
        "highest": ratios[-1], "our_peak": ours[-1]["peak"], "their_peak": theirs[-1]["peak"],
        "difference": max((abs(a - b) for a, b in pairs), default=0.0),
    }  # fmt: skip


def only(ours: Sequence[Result], plain: Result) -> Result:
    """Compare another setting of ours with the same measurement of the peer."""
    seconds = middle(ours)
    ratio = plain["theirs"] / seconds
    return {"ours": seconds, "ratio": ratio, "lowest": ratio, "highest": ratio, "our_peak": ours[-1]["peak"],
            "difference": None}  # fmt: skip


def middle(results: Sequence[Result]) -> float:
    return sorted(result["seconds"] for result in results)[len(results) // 2]


# -- stage 2, compared with transformers -------------------------------------------------------------------------------


def sizes(place: Place, language: str) -> tuple[Any, Any, int]:
    """Configurations of ViT-g (its last layer is gone) and of the LLM, and the Q-Former's width."""
    from transformers import Blip2VisionConfig, OPTConfig, T5Config

    tiny = place.tiny
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    vision = Blip2VisionConfig(
        num_hidden_layers=2 if tiny else 38, image_size=28 if tiny else 224, patch_size=14, initializer_range=0.02,
        **(small if tiny else {}),
    )  # fmt: skip
    ends = {"pad_token_id": 1, "bos_token_id": END, "eos_token_id": END}
    if language == "OPT-2.7B":
        width, layers, heads = (32, 2, 2) if tiny else (2560, 32, 32)
        llm: Any = OPTConfig(
            vocab_size=200 if tiny else 50272, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, word_embed_proj_dim=width, dropout=0.0, **ends,
        )  # fmt: skip
    else:
        width, inside, layers, heads = (32, 64, 2, 2) if tiny else (2048, 5120, 24, 32)
        llm = T5Config(
            vocab_size=200 if tiny else 32128, d_model=width, d_kv=16 if tiny else 64, d_ff=inside, num_layers=layers,
            num_heads=heads, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
            dropout_rate=0.0, **ends,
        )  # fmt: skip
    return vision, llm, 32 if tiny else 768


@contextmanager
def bf16_on(place: Place) -> Iterator[None]:
    """Networks that are made within have their weights in bf16, on the device from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with place.device:
            yield
    finally:
        torch.set_default_dtype(before)


def both(place: Place, language: str) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same weights; what is frozen is in bf16 and lies in memory once."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig

    from blip2.backbones.language import LanguageModel
    from blip2.backbones.vision import Preprocessing
    from blip2.backbones.vision_loaders import wrap_transformers
    from blip2.config import QFormerConfig
    from blip2.interop.transformers import KEY_MAP
    from blip2.interop.weights import Weights
    from blip2.model.generation import GenerationModel

    vision, llm, width = sizes(place, language)
    heads, layers, queries = (2, 2, 8) if place.tiny else (12, 12, 32)
    config = Blip2Config(
        vision_config=vision,
        qformer_config=Blip2QFormerConfig(
            hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=4 * width,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, encoder_hidden_size=vision.hidden_size,
        ),
        text_config=llm, num_query_tokens=queries, image_token_index=IMAGE,
    )  # fmt: skip
    torch.manual_seed(0)
    with bf16_on(place):
        theirs: Any = Blip2ForConditionalGeneration(config)
    theirs.query_tokens.data.normal_(std=0.02)
    for part in (theirs.qformer, theirs.language_projection, theirs.vision_model.post_layernorm):
        part.float()
    theirs.query_tokens.data = theirs.query_tokens.data.float()
    theirs.eval()

    def shared(network: nn.Module) -> Any:
        """The same weights in modules of their own."""
        return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})

    encoder = wrap_transformers(shared(theirs.vision_model), Preprocessing(vision.image_size))
    qformer = QFormerConfig(
        bert=None, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        num_query_tokens=queries,
        dropout=0.0, image_norm_eps=vision.layer_norm_eps,
    )  # fmt: skip
    ours = GenerationModel(encoder, qformer, LanguageModel(shared(theirs.language_model))).to(place.device)
    weights = Weights(theirs.state_dict()).rename_keys(KEY_MAP, "the model")
    own = {name: weights[name] for name in ours.state_dict() if not name.startswith(("vision.", "language."))}
    ours.load_state_dict(own, strict=False)
    theirs.vision_model.requires_grad_(False)
    theirs.vision_model.post_layernorm.requires_grad_(True)
    theirs.language_model.requires_grad_(False)
    return theirs, ours


def generation(place: Place, language: str) -> Iterator[Result]:
    """A step of stage 2 from pixels, and captions by 5 beams, compared with transformers."""
    from blip2.config import OptimizerConfig
    from blip2.decoding.search import Decoding
    from blip2.model.generation import GenerationBatch
    from blip2.training.optimizer import build_optimizer, configure_trainable

    theirs, ours = both(place, language)
    device = place.device
    batch, length, repeats = (2, 8, 1) if place.tiny else (64, 16, 5)
    size = theirs.config.vision_config.image_size
    queries, words = theirs.config.num_query_tokens, theirs.config.text_config.vocab_size
    pixels = torch.randn(batch, 3, size, size, device=device)
    ids = torch.randint(5, words, (batch, length), device=device)
    seen = torch.ones_like(ids)
    places = torch.full((batch, queries), IMAGE, device=device)
    reads_prefix = theirs.language_model.config.is_encoder_decoder
    # T5 reads half of each text and writes the other half; OPT writes all of it.
    half = length // 2
    read, written = (ids[:, :half].contiguous(), ids[:, half:].contiguous()) if reads_prefix else (ids, ids)
    labels = written if reads_prefix else torch.cat([torch.full_like(places, -100), written], 1)
    inputs = {
        "input_ids": torch.cat([places, read], 1),
        "attention_mask": torch.cat([torch.ones_like(places), seen[:, : read.shape[1]]], 1),
    }
    config = OptimizerConfig()
    optimizers = {
        "blip2": build_optimizer(ours, configure_trainable(ours, config), config),
        "transformers": torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.0, fused=True),
    }
    our_batch = GenerationBatch(pixels, read, torch.ones_like(read, dtype=torch.bool), written)

    def training(side: str, loss: Callable[[], Tensor]) -> Callable[[], list[float]]:
        optimizer = optimizers[side]
        for group in optimizer.param_groups:
            group["lr"] = 0.0

        def run() -> list[float]:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()
            return [value.item()]

        return run

    steps = {
        "blip2": training("blip2", lambda: ours(our_batch).losses["lm"]),
        "transformers": training("transformers", lambda: theirs(pixel_values=pixels, **inputs, labels=labels).loss),
    }

    def in_turns(
        name: str, works: dict[str, Callable[[], Sequence[float]]], turns: int = 3, again: int = repeats
    ) -> Result:
        found: dict[str, list[Result]] = {side: [] for side in works}
        for turn in range(1 if place.tiny else turns):
            for side, work in works.items():
                found[side].append(measure(work, device.type, again, warm_up=1 if turn else 2))
        return {"name": name, "peer": "transformers", "batch": batch, **summary(found["blip2"], found["transformers"])}

    yield {**in_turns(f"stage-2 step, {language}, from pixels", steps), "operations": operations(steps["blip2"])}
    with torch.no_grad():
        features = ours.vision.encode(pixels)
    cached = GenerationBatch(features, read, our_batch.mask, written)
    own = training("blip2", lambda: ours(cached).losses["lm"])
    yield {"name": f"stage-2 step, {language}, cached features", "batch": batch, "operations": operations(own),
           **measure(own, device.type, repeats)}  # fmt: skip
    yield {"name": f"profile of a stage-2 step, {language}", **profile_work(steps["blip2"], device.type)}

    longest = 4 if place.tiny else 30
    some = pixels[: max(batch // 4, 1)]
    none = ids[: len(some), :0]
    decoding = Decoding(num_beams=5, max_new_tokens=longest)
    prompt = {
        "input_ids": places[: len(some)], "attention_mask": torch.ones_like(places[: len(some)]),
        "num_beams": 5, "max_new_tokens": longest, "min_new_tokens": 1, "eos_token_id": END, "pad_token_id": 1,
    }  # fmt: skip

    @torch.no_grad()
    def our_captions() -> list[float]:
        with torch.autocast(device.type, torch.bfloat16):
            new = ours.language.generate(ours.visual_prompt(some), none, none.bool(), decoding, END)
        return nn.functional.pad(new, (0, longest - new.shape[1]), value=END).flatten().tolist()

    @torch.no_grad()
    def their_captions() -> list[float]:
        with torch.autocast(device.type, torch.bfloat16):
            new = theirs.generate(pixel_values=some, **prompt)
        new = new[:, -longest:] if reads_prefix else new[:, queries:]
        return nn.functional.pad(new, (0, longest - new.shape[1]), value=END).flatten().tolist()

    captions = {"blip2": our_captions, "transformers": their_captions}
    found = in_turns(f"captions of {longest} tokens, 5 beams, {language}", captions, 2, 1)
    same = sum(a == b for a, b in zip(our_captions(), their_captions(), strict=True)) / (len(some) * longest)
    yield {**found, "batch": len(some), "difference": None, "same_tokens": same}
    yield {"name": f"profile of captions, {language}", **profile_work(our_captions, device.type)}


def encoding(place: Place) -> Iterator[Result]:
    """Images that ViT-g encodes in a second: transformers' network as it is, and with `training.torch_compile`."""
    from transformers import Blip2VisionModel

    from blip2.backbones.vision import Preprocessing
    from blip2.backbones.vision_loaders import wrap_transformers

    config, _, _ = sizes(place, "OPT-2.7B")
    with bf16_on(place):
        network = Blip2VisionModel(config).eval().requires_grad_(False)
    batch = 2 if place.tiny else 128
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, device=place.device, dtype=torch.bfloat16)

    @torch.no_grad()
    def theirs() -> Sequence[float]:
        return network(pixel_values=pixels).last_hidden_state[0, 0, :2].tolist()

    peer = measure(theirs, place.device.type, 1 if place.tiny else 5)
    yield {"name": "images encoded, transformers", "batch": batch, "operations": operations(theirs), **peer}
    encoder = wrap_transformers(network, Preprocessing(config.image_size))

    def ours() -> Sequence[float]:
        return encoder.encode(pixels)[0, 0, :2].tolist()

    yield {
        "name": "images encoded, blip2",
        "batch": batch,
        **measure(ours, place.device.type, 1 if place.tiny else 5),
    }
    yield {"name": "profile of encoding", **profile_work(ours, place.device.type)}
    if place.is_gpu:
        encoder.compile_network()
        yield {"name": "images encoded, blip2, compiled", "batch": batch, **measure(ours, place.device.type, 5)}


SPEED: dict[str, Callable[[Place], Iterator[Result]]] = {
    "rates": rates,
    "stage1": representation,
    "encode": encoding,
    "stage2-opt": lambda place: generation(place, "OPT-2.7B"),
    "stage2-t5": lambda place: generation(place, "FlanT5-XL"),
}
