"""Benchmark against transformers: a step of stage 2, answers, matching. Run as a runner:

    python stage2.py {step,cached,answers,answers-from-pixels,matching} {blip2,transformers} FOLDER

Both sides read one folder in transformers' layout, with random weights. Images go in as pixels; the frozen encoder is
a ViT-S/16, the Q-Former 6 blocks of 384, the LLM has the shapes of OPT-125M or SmolLM2-135M.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import serve
from torch import Tensor

QUERIES = 32
LANGUAGE: dict[str, dict[str, Any]] = {
    "opt": {
        "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
        "dropout": 0.0,
    },
    "llama": {
        "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536,
    },
    "t5": {
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "num_heads": 6, "d_ff": 1024, "num_layers": 8,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "opt": {**LANGUAGE["opt"], "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": {**LANGUAGE["llama"], "vocab_size": 200, "hidden_size": 36, "num_hidden_layers": 2,
              "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 64},
    "t5": {**LANGUAGE["t5"], "vocab_size": 200, "d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 2},
}  # fmt: skip
END, IMAGE, UNKNOWN = 1, 2, 3


def prepare(
    work: str, language: str, folder: Path, batch: int = 8, texts: tuple[int, int] = (9, 14), tiny: bool = False
) -> None:
    """Save the model and the inputs of both sides.

    Args:
        tiny: networks of two narrow blocks and images of 32 pixels, to try the programs and not to time them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2ForImageTextRetrieval,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessorPil,
        LlamaConfig,
        OPTConfig,
        PreTrainedTokenizerFast,
        T5Config,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    depths, size, llm = (12, 6), 224, LANGUAGE[language]
    if tiny:
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        depths, size, llm = (2, 2), 32, TINY[language]
    words = (200 if tiny else 30523) if work == "matching" else llm["vocab_size"]
    kind: Any = {"opt": OPTConfig, "llama": LlamaConfig, "t5": T5Config}[language]
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **sizes, num_hidden_layers=depths[0], image_size=size, patch_size=16, initializer_range=0.02
        ),
        qformer_config=Blip2QFormerConfig(
            **sizes, num_hidden_layers=depths[1], vocab_size=words, use_qformer_text_input=work == "matching",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        text_config=kind(**llm, pad_token_id=0, bos_token_id=END, eos_token_id=END),
        num_query_tokens=QUERIES,
        image_token_index=None if work == "matching" else IMAGE,
    )  # fmt: skip
    model = (Blip2ForImageTextRetrieval if work == "matching" else Blip2ForConditionalGeneration)(config)
    model.query_tokens.data.normal_(std=0.02)  # zeros, as transformers begins, would make all queries one
    if work.startswith("answers"):
        model.language_projection.weight.data.normal_(std=0.05)
        if language == "t5":  # whose output matrix is its embeddings: it would say the last word again and again
            model.language_model.decoder.final_layer_norm.weight.data.normal_()
        else:
            model.language_model.get_output_embeddings().weight.data.mul_(20)  # or all words would be as probable
    model.save_pretrained(folder)
    known = {"[PAD]": 0, "</s>": END, "<image>": IMAGE, "[UNK]": UNKNOWN, "[DEC]": words - 1}
    known |= {f"w{i}": i for i in range(4, words - 1)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(known, unk_token="[UNK]")), pad_token="[PAD]", eos_token="</s>",
        unk_token="[UNK]", bos_token="[DEC]" if work == "matching" else "</s>", cls_token="</s>", sep_token="</s>",
    )  # fmt: skip
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = BlipImageProcessorPil(size={"height": size, "width": size})
    Blip2Processor(images, tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)

    shortest, longest = texts
    lengths = torch.randint(shortest, longest + 1, (batch,))
    lengths[0] = longest
    ids = torch.randint(4, words - 1, (batch, longest))
    mask = torch.arange(longest) < lengths[:, None]
    torch.save({"pixels": torch.randn(batch, 3, size, size), "ids": ids * mask, "mask": mask}, folder / "inputs.pt")


# -- this project ----------------------------------------------------------------------------------------------------


def ours(work: str, folder: Path, data: dict[str, Tensor]) -> Callable[[], Sequence[float]]:
    import blip2
    from blip2.decoding.search import Decoding
    from blip2.model.generation import GenerationBatch
    from blip2.training.optimizer import build_optimizer, configure_trainable

    pipeline = blip2.load(folder, device="cpu", dtype="fp32")
    model: Any = pipeline.model
    pixels, ids, mask = data["pixels"], data["ids"], data["mask"]
    if work.startswith("answers"):
        decoding = Decoding(num_beams=5, max_new_tokens=5, length_penalty=-1.0)
        with torch.no_grad():
            visual = model.visual_prompt(pixels)

        def answer() -> Sequence[float]:
            if work == "answers-from-pixels":
                return pad(model.generate(pixels, ids, mask, decoding, END), 5)
            return pad(model.language.generate(visual, ids, mask, decoding, END), 5)

        return answer
    if work == "matching":
        every = torch.arange(len(ids)).expand(len(pixels), -1)

        def match() -> Sequence[float]:
            return model.match_candidates(pixels, ids, mask, every)[..., 1].flatten().tolist()

        return match
    from blip2.config import OptimizerConfig

    config = OptimizerConfig()
    optimizer = build_optimizer(model, configure_trainable(model, config), config)
    with torch.no_grad():
        images = model.vision.encode(pixels) if work == "cached" else pixels
    batch = GenerationBatch(images, ids, mask, ids.masked_fill(~mask, -100))

    def step() -> Sequence[float]:
        return optimize(optimizer, lambda: model(batch).losses["lm"])

    return step


# -- transformers ----------------------------------------------------------------------------------------------------


def theirs(work: str, folder: Path, data: dict[str, Tensor]) -> Callable[[], Sequence[float]]:
    from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

    pixels, ids, mask = data["pixels"], data["ids"], data["mask"].long()
    if work == "matching":
        judge = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
        count = len(ids)

        @torch.no_grad()
        def match() -> Sequence[float]:
            # It takes as many images as texts: every image once for every text.
            out = judge(
                pixel_values=pixels.repeat_interleave(count, 0), input_ids=ids.repeat(len(pixels), 1),
                attention_mask=mask.repeat(len(pixels), 1), use_image_text_matching_head=True,
            )  # fmt: skip
            return out.logits_per_image[:, 1].tolist()

        return match
    model: Any = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    places = torch.full((len(ids), QUERIES), IMAGE)
    inputs = {
        "pixel_values": pixels,
        "input_ids": torch.cat([places, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(places), mask], 1),
    }
    if work.startswith("answers"):
        how = {
            "num_beams": 5, "max_new_tokens": 5, "min_new_tokens": 1, "length_penalty": -1.0, "eos_token_id": END,
            "pad_token_id": END,
        }  # fmt: skip
        with torch.no_grad():
            visual = model.get_image_features(pixels).pooler_output
            embeds = torch.cat([visual, model.get_input_embeddings()(ids)], 1)

        @torch.no_grad()
        def answer() -> Sequence[float]:
            if work == "answers-from-pixels":
                return pad(model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :], 5)
            seen = inputs["attention_mask"]
            return pad(model.language_model.generate(inputs_embeds=embeds, attention_mask=seen, **how), 5)

        return answer
    # Nothing is frozen there by itself; its users who know freeze what BLIP-2 freezes.
    for part in (model.vision_model, model.language_model):
        part.requires_grad_(False)
    model.vision_model.post_layernorm.requires_grad_(True)  # BLIP-2's norm of the image features
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.98), fused=True)
    labels = torch.cat([torch.full_like(places, -100), ids.masked_fill(mask == 0, -100)], 1)

    def step() -> Sequence[float]:
        return optimize(optimizer, lambda: model(**inputs, labels=labels).loss)

    return step


def optimize(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> list[float]:
    """One step, at a rate of zero: every round has the same loss, which can be compared."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    return [value.item()]


def pad(new: Tensor, length: int) -> list[float]:
    """Tokens, with the end where a text is shorter."""
    return torch.nn.functional.pad(new, (0, length - new.shape[1]), value=END).flatten().tolist()


if __name__ == "__main__":
    what, side, where = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if side == "blip2":
        from blip2.memory import tune_malloc

        tune_malloc()  # as the commands of blip2 do
    given = torch.load(where / "inputs.pt", weights_only=True)
    serve({"blip2": ours, "transformers": theirs}[side](what, where, given), warm_up=2, settle=True)
