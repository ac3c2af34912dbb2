"""Every number of the recipes of the paper, and of what stands in the code, held to the paper's and to LAVIS's.

The tables are written down from the paper's sections and tables and, where it is silent, from its reference
implementation. A field of a recipe that is in no table is an error, and so is a default that changes.
"""

from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2.config import EvaluationConfig, ObjectivesConfig
from blip2.corpus.capfilt import CapFiltConfig
from blip2.data.collate import LAVIS_PUNCTUATION, MAX_WORDS, split_caption
from blip2.decoding.options import ANSWER_DECODING, CAPTION_DECODING
from blip2.model.losses import sample_hard_negatives
from blip2.model.representation import RepresentationModel
from blip2.pipelines import QUESTION_TEMPLATE, SHORT_QUESTION_TEMPLATE
from blip2.recipe import find_recipe, load_recipe, override
from fixtures.tiny import QFORMER, no_encoder

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
PROCESSES = 16
"""§3.4: 16 A100."""
VIT_L, VIT_G = "openai/clip-vit-large-patch14", "eva_vit_g.pth"
COCO = "coco-karpathy:train+restval:/data/coco"
COCO_CAPTIONS = 566_747
"""Of Karpathy's training split."""
VQAV2 = {"train": 443_757, "val": 214_354}
VISUAL_GENOME = 1_700_000
"""Questions, as its paper counts them."""

# -- what holds for every run ------------------------------------------------------------------------------------------

PAPER = {
    "qformer.bert": "google-bert/bert-base-uncased",  # §3.1
    "qformer.hidden_size": 768,  # §3.1
    "qformer.num_query_tokens": 32,  # §3.1
    "qformer.cross_attention_frequency": 2,  # §3.1: every other block
    "objectives.itc": 1.0,  # §3.2: jointly
    "objectives.itm": 1.0,
    "objectives.itg": 1.0,
    "optimizer.weight_decay": 0.05,  # §3.4, Tables 7-9
    "data.horizontal_flip": True,  # §3.4
    "vision.drop_path_rate": 0.0,  # Tables 7-9
    "vision.layer": None,  # §3.4: the second last, which null is
    "data.temperature": 1.0,  # of a mixture: as many as each source has
}
REFERENCE = {  # BERT-base's sizes, and what LAVIS has where the paper is silent
    "qformer.num_hidden_layers": 12,
    "qformer.num_attention_heads": 12,
    "qformer.intermediate_size": 3072,
    "qformer.max_position_embeddings": 512,
    "qformer.vocab_size": 30_523,
    "qformer.tokenizer": None,
    "qformer.image_text_hidden_size": 256,
    "qformer.dropout": 0.1,
    "qformer.layer_norm_eps": 1e-12,
    "qformer.image_norm_eps": 1e-5,
    "objectives.label_smoothing": 0.1,
    "data.max_length": 32,
    "data.min_crop_scale": 0.5,
    "data.text_normalization": "lavis",
}
OURS = {  # docs/paper.md says why, or it has no bearing on results
    "optimizer.max_grad_norm": 1.0,
    "objectives.query_diversity": 0.0,
    "vision.position_encoding": "auto",
    "vision.num_attention_heads": None,
    "vision.hidden_size": None,
    "vision.max_tokens": None,
    "vision.trust_remote_code": None,
    "qformer.text_input": "question",
    "qformer.lora": None,
    "qformer.window": None,
    "qformer.stride": None,
    "data.group_by_length": True,
    "data.group_column": None,
    "data.group_share": 1.0,
    "data.max_bad_fraction": 0.05,
    "data.cached_views": 0,
    "data.cached_dtype": "bf16",
    "data.features": None,
    "data.streaming": None,
    "data.split": "train",
    "data.image_column": None,
    "data.caption_column": None,
    "data.question_column": None,
    "data.validation": None,
    "data.allow_overlap": False,
    "data.num_workers": 8,
    "training.gradient_accumulation_steps": 1,
    "training.torch_compile": False,
    "training.full_determinism": False,
    "training.shard_frozen": False,
    "training.ddp_timeout": 1800,
    "training.device": None,
    "training.seed": 0,
    "training.save_steps": 1000,
    "training.save_total_limit": 2,
    "training.eval_steps": 1000,
    "training.report_to": [],
}
EVERY = PAPER | REFERENCE | OURS

# -- stages and tasks --------------------------------------------------------------------------------------------------

ALL_DATA = {  # §3.4, with CapFilt's captions of the web's images; as many as BLIP's paper counts
    COCO: None,
    "vg-regions:all:/data/vg": None,
    "/data/cc3m-bootstrapped/*.tar": 3e6,
    "/data/cc12m-bootstrapped/*.tar": 10e6,
    "/data/sbu-bootstrapped/*.tar": 0.86e6,
    "/data/laion-bootstrapped/*.tar": 115e6,
}
PRETRAINING = {
    "data.train": ALL_DATA,
    "vision.image_size": 224,  # §3.4
    "vision.dtype": "fp16",  # §3.4
    "optimizer.betas": (0.9, 0.98),  # §3.4
    "optimizer.warmup_steps": 2000,  # §3.4
    "optimizer.layer_decay": 1.0,  # nothing to decay
    "qformer.use_qformer_text_input": False,
    "training.gradient_checkpointing": False,
    "training.metric_for_best_model": None,
}
REPRESENTATION = {"stage": "representation", "language": None}
GENERATION = {
    "stage": "generation",
    "language.question_prompt": None,
    "language.projection_init": "random",
    "language.lora": None,  # §4.2: the LLM is frozen
    "language.quantization": None,
    "language.bos_token": None,
}
OPT = {
    "language.trust_remote_code": None,
    "language.dtype": "fp16",
    "language.stop_string": "\n",
    "language.activation": None,
    "training.precision": "fp16",
}
FLAN_T5 = {
    "language.trust_remote_code": None,
    "language.dtype": "bf16",
    "language.stop_string": None,
    "language.activation": "gelu",
    "training.precision": "bf16",
}
OPT_2_7B, OPT_6_7B = (OPT | {"language.name": f"facebook/opt-{size}"} for size in ("2.7b", "6.7b"))
FLAN_T5_XL, FLAN_T5_XXL = (FLAN_T5 | {"language.name": f"google/flan-t5-{size}"} for size in ("xl", "xxl"))
STAGE_1 = (
    PRETRAINING
    | REPRESENTATION
    | {
        "training.max_steps": 250_000,  # §3.4
        "training.precision": "fp16",
        "optimizer.learning_rate": {"vision.*": "frozen", "*": 1e-4},  # §3.4
        "optimizer.min_lr_rate": 0.1,  # the reference implementation's: down to 1e-5
        "start_from": None,
        "evaluation": None,
    }
)
STAGE_2 = (
    PRETRAINING
    | GENERATION
    | {
        "training.max_steps": 80_000,  # §3.4
        "optimizer.learning_rate": {"vision.*": "frozen", "language.*": "frozen", "*": 1e-4},  # §3.4
        "optimizer.min_lr_rate": 0.5,  # §3.4: down to 5e-5
        "language.prompt": "",  # and so prefix language modeling for FlanT5 (§3.3)
        "evaluation": None,
    }
)
FINETUNING = {
    "vision.dtype": "fp32",  # it trains
    "optimizer.betas": (0.9, 0.999),
    "optimizer.warmup_steps": 1000,
    "optimizer.min_lr_rate": 0.0,  # the reference implementation's
    "qformer.use_qformer_text_input": False,
    "training.gradient_checkpointing": True,
}
EVALUATION = {
    f"evaluation.{key}": None
    for key in (
        "limit",
        "prompt",
        "top_p",
        "top_k",
        "min_p",
        "temperature",
        "length_penalty",
        "max_new_tokens",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "stop_strings",
        "rank_by",
        "answer_list",
    )
} | {
    "evaluation.num_beams": None,
    "evaluation.rerank_k": 128,
    "evaluation.fusion": "itm",
    "evaluation.rules": "official",
    "evaluation.lemmatize": False,
    "evaluation.control": False,
    "evaluation.calibration": False,
}
# Table 7
CAPTIONING = (
    FINETUNING
    | GENERATION
    | EVALUATION
    | {
        "vision.name": VIT_G,
        "vision.image_size": 364,
        "data.train": COCO,
        "data.batch_size": 256 / PROCESSES,
        "optimizer.learning_rate": {"language.*": "frozen", "*": 1e-5},
        "optimizer.layer_decay": 1.0,
        "language.prompt": "a photo of",
        "training.max_steps": 5 * COCO_CAPTIONS // 256,
        "training.metric_for_best_model": "evaluation_CIDEr",
        "evaluation.task": "captioning",
        "evaluation.data": "coco-karpathy:val:/data/coco",
        "evaluation.eval_steps": 2214,
        "evaluation.num_beams": 5,
    }
)
# Table 8
VQA = (
    FINETUNING
    | GENERATION
    | {
        "vision.name": VIT_G,
        "vision.image_size": 490,
        "data.train": {"vqav2:train+val:/data/coco": None, "vg-qa:all:/data/vg": None},  # §4.3
        "data.batch_size": 128 / PROCESSES,
        "data.max_length": 16,  # ours, of an answer
        "optimizer.learning_rate": {"language.*": "frozen", "*": 1e-5},
        "optimizer.layer_decay": 0.95,
        "language.prompt": "Question: {} Answer:",
        "qformer.use_qformer_text_input": True,  # §4.3
        "training.max_steps": 92_000,
        "training.metric_for_best_model": None,
        "evaluation": None,
    }
)
# Table 9
RETRIEVAL = (
    FINETUNING
    | REPRESENTATION
    | EVALUATION
    | {
        "vision.name": VIT_G,
        "vision.image_size": 364,
        "data.train": COCO,
        "data.batch_size": 224 / PROCESSES,
        "optimizer.learning_rate": {"*": 1e-5},
        "optimizer.layer_decay": 0.95,
        "training.precision": "fp16",
        "training.max_steps": round(5 * COCO_CAPTIONS / 224),
        "training.metric_for_best_model": "evaluation_itm_TR@1",
        "evaluation.task": "retrieval",
        "evaluation.data": "coco-karpathy:val:/data/coco",
        "evaluation.eval_steps": 2530,
        "start_from": "runs/pretrain/stage1-vit-g",
    }
)
FIGURE_5 = EVALUATION | {
    "data.allow_overlap": True,
    "evaluation.task": "vqa",
    "evaluation.data": "vqav2:val:/data/coco",
    "evaluation.eval_steps": 8000,
    "evaluation.num_beams": 5,  # §4.1
    "evaluation.length_penalty": -1.0,  # §4.1
    "evaluation.rules": "lavis",
}


def begun(vit: str, llm: str | None = None) -> dict[str, object]:
    """The image encoder, and what a stage 2 starts from."""
    name = {"l": VIT_L, "g": VIT_G}[vit]
    return {"vision.name": name} | ({"start_from": f"runs/pretrain/stage1-vit-{vit}"} if llm is None else {})


def batch(pairs: int) -> dict[str, float]:
    return {"data.batch_size": pairs / PROCESSES}


def after(llm: str, *others: str) -> dict[str, object]:
    """What a fine-tuning starts from."""
    start = f"runs/pretrain/stage2-vit-g-{llm}"
    return {"start_from": [start, *others] if others else start}


RUNS = {
    # §3.4
    "pretrain-stage1-vit-l": STAGE_1 | {"vision.name": VIT_L} | batch(2320),
    "pretrain-stage1-vit-g": STAGE_1 | {"vision.name": VIT_G} | batch(1680),
    # §3.4, Table 2
    "pretrain-stage2-vit-l-opt-2.7b": STAGE_2 | OPT_2_7B | begun("l") | batch(1920),
    "pretrain-stage2-vit-g-opt-2.7b": STAGE_2 | OPT_2_7B | begun("g") | batch(1920),
    "pretrain-stage2-vit-g-opt-6.7b": STAGE_2 | OPT_6_7B | begun("g") | batch(1920),
    "pretrain-stage2-vit-l-flan-t5-xl": STAGE_2 | FLAN_T5_XL | begun("l") | batch(1520),
    "pretrain-stage2-vit-g-flan-t5-xl": STAGE_2 | FLAN_T5_XL | begun("g") | batch(1520),
    "pretrain-stage2-vit-g-flan-t5-xxl": STAGE_2 | FLAN_T5_XXL | begun("g") | batch(1520),
    # Figure 5
    "pretrain-stage2-vit-g-opt-2.7b-figure-5": STAGE_2 | OPT_2_7B | begun("g") | batch(1920) | FIGURE_5
    | {"evaluation.prompt": "Question: {} Answer:"},
    "pretrain-stage2-vit-g-flan-t5-xl-figure-5": STAGE_2 | FLAN_T5_XL | begun("g") | batch(1520) | FIGURE_5
    | {"evaluation.prompt": "Question: {} Short answer:"},
    # Tables 3 and 7
    "finetune-captioning-flan-t5-xl": CAPTIONING | FLAN_T5_XL | after("flan-t5-xl"),
    "finetune-captioning-opt-2.7b": CAPTIONING | OPT_2_7B | after("opt-2.7b"),
    "finetune-captioning-opt-6.7b": CAPTIONING | OPT_6_7B | after("opt-6.7b") | {"optimizer.layer_decay": 0.95},
    # Tables 4 and 8
    "finetune-vqa-flan-t5-xl": VQA | FLAN_T5_XL | after("flan-t5-xl", "runs/pretrain/stage1-vit-g"),
    "finetune-vqa-opt-2.7b": VQA | OPT_2_7B | after("opt-2.7b", "runs/pretrain/stage1-vit-g"),
    "finetune-vqa-opt-6.7b": VQA | OPT_6_7B | after("opt-6.7b", "runs/pretrain/stage1-vit-g")
    | {"optimizer.layer_decay": 0.9},
    "finetune-vqa-opt-2.7b-without-val": VQA | OPT_2_7B | after("opt-2.7b", "runs/pretrain/stage1-vit-g")
    | {"data.train": {"vqav2:train:/data/coco": None, "vg-qa:all:/data/vg": None}, "training.max_steps": 83_700},
    # Tables 5, 6 and 9
    "finetune-retrieval-vit-g": RETRIEVAL,
    "finetune-retrieval-vit-l": RETRIEVAL
    | {
        "vision.name": VIT_L, "start_from": "runs/pretrain/stage1-vit-l", "optimizer.learning_rate": {"*": 5e-6},
        "optimizer.layer_decay": 1.0, "optimizer.betas": (0.9, 0.98),
    },
    "finetune-retrieval-vit-g-without-itg": RETRIEVAL | {"objectives.itg": 0.0},
}  # fmt: skip


@cache
def read(name):
    return load_recipe(find_recipe(name))


def spread(recipe):
    """Every field of a recipe by its name, but for the folder of the run."""

    def each(values, prefix):
        for key, value in values.items():
            if isinstance(value, dict) and f"{prefix}{key}" not in ("data.train", "optimizer.learning_rate"):
                yield from each(value, f"{prefix}{key}.")
            elif prefix or key != "output":
                yield f"{prefix}{key}", value

    return dict(each(asdict(recipe), ""))


def differs(recipe, name):
    """The fields of a recipe that are not as the table says, with what they are and should be."""
    found, wanted = spread(recipe), EVERY | RUNS[name]
    sections = {key.split(".")[0] for key in wanted if "." in key}
    wanted = {key: value for key, value in wanted.items() if key not in sections}  # given by its keys
    absent = "absent"
    both = {key: (found.get(key, absent), wanted.get(key, absent)) for key in found.keys() | wanted.keys()}
    return {key: (one, other) for key, (one, other) in both.items() if one != other}


@pytest.mark.parametrize("name", RUNS)
def test_every_value_of_a_recipe_is_in_the_table(name):
    recipe = read(name)
    assert differs(recipe, name) == {}
    assert recipe.output.split("/")[-1] == name.removeprefix("pretrain-").removeprefix("finetune-")
    befores = [read(f"pretrain-{start.split('/')[-1]}") for start in recipe.start_checkpoints]
    for before, start in zip(
        befores, recipe.start_checkpoints, strict=True
    ):  # what other recipes make, with one image encoder
        assert before.output == start and before.vision.name == recipe.vision.name
        assert before.language is None or before.language.name == recipe.language.name
    if recipe.qformer.use_qformer_text_input:  # what stage 2 has no place for
        assert [before.stage for before in befores] == ["generation", "representation"]


def test_every_recipe_of_the_paper_is_in_the_table():
    assert {path.stem for path in RECIPES if path.stem.startswith(("pretrain-", "finetune-"))} == set(RUNS)


@pytest.mark.parametrize(("splits", "steps"), [(("train", "val"), 92_000), (("train",), 83_700)])
def test_vqa_trains_for_five_epochs(splits, steps):
    assert 5 * (sum(VQAV2[split] for split in splits) + VISUAL_GENOME) / 128 == pytest.approx(steps, rel=2e-3)


CHANGED = [
    ("pretrain-stage1-vit-l", {"data.train": {k: v for k, v in ALL_DATA.items() if "laion" not in k}}),
    ("pretrain-stage1-vit-l", {"data.train": {k.replace("-bootstrapped", ""): v for k, v in ALL_DATA.items()}}),
    ("pretrain-stage1-vit-g", {"data.horizontal_flip": False}),
    ("pretrain-stage1-vit-g", {"data.min_crop_scale": 0.01}),
    ("pretrain-stage2-vit-g-opt-2.7b", {"training.precision": "fp32"}),
    ("pretrain-stage2-vit-g-opt-2.7b", {"language.dtype": "fp32"}),
    ("pretrain-stage2-vit-g-opt-6.7b", {"data.max_length": 5}),
    ("pretrain-stage2-vit-l-flan-t5-xl", {"optimizer.min_lr_rate": 1.0}),
    ("finetune-captioning-opt-2.7b", {"data.train": "coco-karpathy:test:/data/coco"}),
    ("finetune-captioning-opt-2.7b", {"optimizer.max_grad_norm": None}),
    ("finetune-vqa-opt-6.7b", {"qformer.dropout": 0.0}),
    ("finetune-vqa-opt-6.7b", {"data.text_normalization": "none"}),
    ("finetune-retrieval-vit-l", {"evaluation.rerank_k": 16}),
    ("finetune-retrieval-vit-l", {"start_from": None}),
]


@pytest.mark.parametrize(("name", "change"), CHANGED)
def test_a_change_is_seen(name, change):
    assert set(differs(override(read(name), change), name)) == set(change)


# -- what stands in the code -------------------------------------------------------------------------------------------


def test_capfilt():
    """§3.4: ten captions by nucleus sampling (BLIP's), of which two stay with the original among them."""
    config = CapFiltConfig()
    assert (config.num_captions, config.rules.keep, config.decoding.top_p) == (10, 2, 0.9)
    assert (config.rules.min_words, config.rules.max_words, config.rules.max_word_overlap) == (1, None, 1.0)
    assert config.decoding.temperature == 1.0


def test_generation():
    """§4.1, Tables 7 and 8; lengths are the reference implementation's."""
    assert (
        CAPTION_DECODING.beam_width(1),
        CAPTION_DECODING.length_penalty,
        CAPTION_DECODING.max_new_tokens,
        CAPTION_DECODING.top_p,
    ) == (5, 1.0, 30, None)
    assert (
        ANSWER_DECODING.beam_width(1),
        ANSWER_DECODING.length_penalty,
        ANSWER_DECODING.max_new_tokens,
        ANSWER_DECODING.top_p,
    ) == (5, -1.0, 10, None)
    assert CAPTION_DECODING.repetition_penalty == ANSWER_DECODING.repetition_penalty == 1.0
    assert (QUESTION_TEMPLATE, SHORT_QUESTION_TEMPLATE) == ("Question: {} Answer:", "Question: {} Short answer:")
    assert EvaluationConfig("retrieval", "").rerank_k == 128  # §4.4
    assert (MAX_WORDS, set(LAVIS_PUNCTUATION)) == (50, set('.!"()*#:;~'))


def test_the_temperature_starts_at_its_number():
    """The reference implementation's, a plain divisor."""
    model = RepresentationModel(no_encoder(2, 8), QFORMER, ObjectivesConfig())
    assert model.temperature.item() == pytest.approx(0.07) and model.temperature.requires_grad


def test_a_hard_negative_is_drawn_with_its_probability():
    """ALBEF's and BLIP's softmax with 1e-4 added, §3.2."""
    similarity = torch.tensor([[0.0, 0.0, -50.0]])
    positive = torch.tensor([[True, False, False]])
    # Of the two that are left one has half the mass, and the other 1e-4 of all there is.
    below = 0.5001 / 0.5002
    assert [
        int(sample_hard_negatives(similarity, positive, torch.tensor([chance]))[0])
        for chance in (0.0, below - 1e-5, below + 1e-5, 0.99999)
    ] == [1, 1, 2, 2]


def test_captions_are_split_before_their_middle():
    """For prefix language modeling (§3.3), as the reference implementation's author says."""
    words = [str(n) for n in range(9)]
    cuts = {len(split_caption(" ".join(words), np.random.default_rng(seed))[0].split()) for seed in range(60)}
    assert cuts == {1, 2, 3, 4}


def test_the_objectives_have_no_more_weights_than_the_table():
    assert {f"objectives.{field.name}" for field in fields(ObjectivesConfig)} == {
        key for key in EVERY if key.startswith("objectives.")
    }
