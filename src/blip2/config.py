"""Recipes: one tree of frozen dataclasses describes a training run.

Every field has a docstring, which is its ``--help``. A recipe is a YAML file with these fields; any of them can be
overridden on the command line (``--data.batch_size 32``). A key that is not a field is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from blip2.errors import InputError
from blip2.ranges import RANGES, outside

Precision = Literal["fp32", "bf16", "fp16"]
TextNormalization = Literal["none", "lavis"]
Stage = Literal["representation", "generation"]
QUESTION_PLACE = "{}"
"""Where a prompt takes its question."""
IMAGE_TOKEN = "<image>"
"""The token that stands for an image in prompts of other programs and in transformers' BLIP-2."""


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder (§3.4), frozen unless optimizer.learning_rate trains it (§4.2-4.4)."""

    name: str
    """Folder or hub name in transformers' format (CLIP, SigLIP, DINO, ViT, EVA-g, CNNs ...), timm:NAME with the extra
    blip2[timm], or package:efficientnet-lite0."""
    layer: Literal["second-last", "last"] | None = None
    """Whose features to use; null: second-last for transformers, as the paper does, last for CNNs."""
    image_size: int | None = None
    """Height and width of images in pixels; null: the encoder's own. Position embeddings are interpolated."""
    num_attention_heads: int | None = None
    """Attention heads of an image encoder whose file does not say it: an EVA-CLIP in LAVIS's format of another width
    than ViT-g's. null: as its file says."""
    position_encoding: Literal["auto", "sine2d", "none"] = "auto"
    """Fixed 2-D sine encoding added to the normalized features before the Q-Former's keys and values, as DETR adds one
    to the features of a CNN. auto: sine2d where the encoder's tokens do not tell their places (CNNs, Swin), which is
    tested by moving an image; none for ViTs with position embeddings. Published BLIP-2 checkpoints have none."""
    dtype: Precision | None = None
    """Of its weights and computation; null: fp32 where it trains or runs on a CPU, otherwise bf16."""
    drop_path_rate: float = 0.0
    """Stochastic depth while it trains: how often its last block is left out for an image; falls evenly to 0 at its
    first. The paper fine-tunes with 0."""
    trust_remote_code: str | None = None
    """The encoder's name again, to run Python code that lies beside its weights (docs/security.md); null: no code runs,
    and an encoder that needs it is refused. A checkpoint cannot set it, only a recipe of one's own or an option."""


@dataclass(frozen=True)
class QFormerConfig:
    """The Querying Transformer (§3.1). The sizes are BERT-base's, as in the paper."""

    bert: str | None = "google-bert/bert-base-uncased"
    """BERT whose weights and tokenizer it starts from: folder, hub name or package:minilm. null: random weights, when
    its weights come from a checkpoint; then tokenizer must be given."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer of its text; null: BERT's."""
    hidden_size: int = 768
    """D, its width."""
    num_hidden_layers: int = 12
    """Number of blocks."""
    num_attention_heads: int = 12
    """Number of attention heads."""
    intermediate_size: int = 3072
    """Width inside a feed-forward."""
    num_query_tokens: int = 32
    """Q, the number of learned queries."""
    cross_attention_frequency: int = 2
    """Every how many blocks the queries look at the image, beginning with the first."""
    image_text_hidden_size: int = 256
    """C, the width in which images and texts are compared."""
    vocab_size: int = 30523
    """Number of its tokens, [DEC] included, which is the last."""
    max_position_embeddings: int = 512
    """Longest text in tokens that it has positions for."""
    use_qformer_text_input: bool = False
    """The question's tokens go into the Q-Former beside the queries, so that it looks for what is asked (Figure 7).
    Only for stage generation."""
    dropout: float = 0.1
    """Share of hidden units and attention weights dropped in training."""
    layer_norm_eps: float = 1e-12
    """Epsilon of its LayerNorms, BERT's."""
    image_norm_eps: float = 1e-5
    """Epsilon of the LayerNorm on the image features, LAVIS's; transformers' checkpoints have 1e-6."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) that train in an LLM whose own weights stay frozen. Needs the extra blip2[lora]; their
    rate is that of "language.*lora_*" in optimizer.learning_rate, before "language.*"."""

    r: int = 16
    """Rank of what is added to a matrix."""
    lora_alpha: int = 32
    """What is added is scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs dropped in training."""
    target_modules: list[str] | None = None
    """Ends of the names of the matrices that get one (q_proj); null: PEFT's choice for the LLM."""


@dataclass(frozen=True)
class LanguageConfig:
    """The frozen LLM (§3.3). Only for stage generation."""

    name: str
    """Folder or hub name of any decoder-only or encoder-decoder LLM of transformers, or
    package:smollm2-135m-instruct."""
    dtype: Precision | None = None
    """Of its weights and computation; null: fp32 where it trains or runs on a CPU, otherwise bf16. The paper: fp16 for
    OPT, bf16 for FlanT5."""
    prompt: str = ""
    """Text after the visual prompt and before the caption ("a photo of", §4.2), which carries no loss. An
    encoder-decoder reads it in its encoder; without one, captions are split at random into a prefix for the
    encoder and the rest for the decoder (§3.3). {} in it stands for the question of a record, whose answer is then
    what is written: "Question: {} Answer:" for OPT, "Question: {} Short answer:" for FlanT5 (§4.1)."""
    question_prompt: str | None = None
    """Prompt with {} for records that have a question, where captions are learned in the same run: those have prompt.
    null: all records are of one kind, and prompt is theirs."""
    projection_init: Literal["random", "least_squares"] = "random"
    """How the projection to the LLM starts where no checkpoint has one. least_squares: the linear map from Z to the
    LLM's token embeddings of the captions, solved for on some hundred images of the first table of data.train
    (docs/queries.md)."""
    stop_string: str | None = None
    """Text that ends a caption; null: the tokenizer's end-of-text token. The paper's OPT models use a newline."""
    activation: str | None = None
    """Of its feed-forwards, where it has to be another than its own: the paper's FlanT5 models ran with gelu."""
    lora: LoraConfig | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    """Bits a number of its matrices (4: NF4), by bitsandbytes, the extra blip2[quantization]; dtype is then that of the
    computation. null: all in dtype."""
    trust_remote_code: str | None = None
    """The LLM's name again, to run Python code that lies beside its weights (docs/security.md); null: no code runs, and
    an LLM that needs it is refused. A checkpoint cannot set it, only a recipe of one's own or an option."""

    @property
    def asks(self) -> bool:
        """Whether every record needs a question: the prompt holds one."""
        return QUESTION_PLACE in self.prompt

    @property
    def question_template(self) -> str | None:
        """The prompt of records with a question, if the model is trained on any."""
        return self.prompt if self.asks else self.question_prompt


@dataclass(frozen=True)
class ObjectivesConfig:
    """Weights of the losses of stage representation (§3.2); 0 switches one off, as Table 6 does."""

    itc: float = 1.0
    """Image-text contrastive learning."""
    itm: float = 1.0
    """Image-text matching with hard negatives."""
    itg: float = 1.0
    """Image-grounded text generation."""
    label_smoothing: float = 0.1
    """Of ITC and ITG, between 0 and 1."""
    query_diversity: float = 0.0
    """Weight of the mean squared cosine between the output queries of an image, in both stages. The paper has no such
    term; without it the queries of small runs collapse into one vector (docs/queries.md)."""


@dataclass(frozen=True)
class DataConfig:
    """Where image-text pairs come from and how they become batches."""

    train: str | dict[str, float | None]
    """JSONL, CSV, TSV or Parquet file(s), a folder of images with a .txt beside each or a metadata.jsonl, WebDataset
    shards (.tar, globs and {000..127} allowed), a folder of datasets' save_to_disk, hub:NAME, or a data set of the
    paper in its publisher's own files as NAME:SPLIT:FOLDER (docs/data.md). Files may lie where fsspec reads (s3://,
    gs://, hf:// ...). Several of these, each with its weight, are a mixture: how often a step is drawn from it; null:
    as its number of records, which a stream has to be told."""
    temperature: float = 1.0
    """Of a mixture: sources are drawn as weight ** (1 / temperature). More than 1 draws small ones more often."""
    validation: str | None = None
    """Pairs of the same kind to measure the losses on, never trained on."""
    allow_overlap: bool = False
    """Measure on images that are trained on, too. Otherwise data.validation and evaluation.data may share none with
    data.train, as far as that can be seen (docs/data.md)."""
    split: str = "train"
    """Which split of a hub:NAME to train on."""
    image_column: str | None = None
    """Column with the image (a path, a URL-free Hugging Face image, or bytes); null: found by its usual names."""
    caption_column: str | None = None
    """Column with a caption or a list of captions, of which one is drawn at each step, or with the answers to a
    question, which are drawn as often as they were given; null: found by its usual names."""
    question_column: str | None = None
    """Column with the question that the answers are to; null: question, where there is one."""
    group_column: str | None = None
    """Column of a table whose equal values go into the same batch: near twins then are each other's hard negatives
    (§3.2, ITM). Batches are not grouped by length then. null: records are mixed."""
    group_share: float = 1.0
    """Share of the groups that stay together in an epoch, drawn anew in each; the records of the others are mixed."""
    streaming: bool | None = None
    """Read in order without counting or copying; null: for WebDataset shards, and what a URL names."""
    batch_size: int = 64
    """Pairs a process takes at once."""
    max_length: int = 32
    """Longer captions are cut, and counted."""
    text_normalization: TextNormalization = "none"
    """Normalization of captions and questions before they are tokenized, in training and by everything that uses the
    model. lavis: lower case, without .!"()*#:;~ and at most 50 words, as LAVIS and so the published checkpoints do it,
    for which it is the default. Answers and prompts are left as they are."""
    min_crop_scale: float = 0.5
    """Random crops cover between this share and all of an image (§3.4)."""
    horizontal_flip: bool = True
    """Mirror half of the images. Switch it off where left and right matter."""
    group_by_length: bool = True
    """Make batches of captions of like length, so that little padding is computed. Answers to questions are always
    mixed. Switch it off where captions are few and short: those of one length are too much alike."""
    num_workers: int = 2
    """Processes that decode images beside the training process; 0 decodes within it."""
    max_bad_fraction: float = 0.05
    """A run stops when more than this share of what it met is bad: samples whose image, caption or question is missing
    or damaged, or shards that break off. Judged after 1000 samples or 50 shards."""
    cached_views: int = 0
    """Above 0: run the frozen image encoder once over so many augmented views of each image before training, keep
    their features on disk, and train on those. blip2 features makes them without training."""
    cached_dtype: Literal["bf16", "int8"] = "bf16"
    """How cached features are kept. int8 takes half the room and loses more; how much is measured and shown."""
    features: str | None = None
    """Folder of cached features, which runs, data sets and processes may share; null: features beside the run's
    folder."""

    @property
    def sources(self) -> dict[str, float | None]:
        """What there is to train on, with weights."""
        return {self.train: None} if isinstance(self.train, str) else self.train


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule (§3.4)."""

    learning_rate: dict[str, float | Literal["frozen"]] = field(
        default_factory=lambda: {"vision.*": "frozen", "language.*": "frozen", "*": 1e-4}
    )
    """Which parameters train at which peak rate: shell patterns of their names; the first that matches decides."""
    layer_decay: float = 1.0
    """Layer-wise decay of the rates of an image encoder that trains: of N blocks, the i-th learns at its rate times
    layer_decay ** (N + 1 - i), and what comes before the first as if i were 0. The paper: 0.9 to 1 (Tables 7-9)."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW."""
    weight_decay: float = 0.05
    """On matrices; never on biases, norms, the temperature or the queries."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    min_lr_rate: float = 0.1
    """Where the cosine ends, as a share of the peak. The paper's stage 2 ends at half its peak."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null: never."""

    def trains(self, part: str) -> bool:
        """Whether anything of a part (``vision``) has a rate, as far as the patterns tell."""
        for pattern, rate in self.learning_rate.items():
            begins = re.split(r"[*?[]", pattern)[0]
            if rate != "frozen" and (begins.startswith(f"{part}.") or f"{part}.".startswith(begins)):
                return True
            if pattern in (f"{part}.*", "*"):
                return False
        return False


@dataclass(frozen=True)
class TrainingConfig:
    """How long, with what precision, and what is kept."""

    max_steps: int = 250_000
    """Optimizer steps in all."""
    gradient_accumulation_steps: int = 1
    """Batches a process takes for one optimizer step."""
    precision: Precision | None = None
    """Of what trains: bf16 and fp16 keep fp32 weights and compute in half precision; null: bf16 on a GPU, fp32 on a
    CPU."""
    gradient_checkpointing: bool = False
    """Keep only what goes into each block of the Q-Former, of an image encoder that trains and of the LLM, and compute
    the rest again in the backward pass: about a third more time, and much less memory. The results are the same."""
    torch_compile: bool = False
    """Let torch.compile fuse what lies between the matrix products of the Q-Former's blocks and of a frozen image
    encoder. Pays on GPUs and in long runs: the first steps take minutes."""
    full_determinism: bool = False
    """Use only operations of PyTorch that give the same bits each time, so that a run on a GPU that was stopped and
    resumed equals one that was not, bit for bit. Slower; on a CPU it is so anyway."""
    shard_frozen: bool = False
    """Deal out the frozen LLM and image encoder to the processes of each machine, where one GPU cannot hold them: a
    block is whole only while it computes (FSDP2). What trains stays whole in each process."""
    ddp_timeout: int = 1800
    """Seconds that a process waits for the others before it gives up, because one of them died or hangs. Longer than
    the first process takes to index the data or to write a checkpoint."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """null: a GPU if there is one."""
    seed: int = 0
    """All randomness follows from it."""
    save_steps: int = 1000
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted."""
    eval_steps: int = 1000
    """Steps between measurements on data.validation."""
    metric_for_best_model: str | None = None
    """Metric whose best checkpoint is kept as best in the run's folder, whatever training.save_total_limit says:
    validation_loss or another that is measured on data.validation (of losses and perplexities the smallest is best), or
    one of evaluation, such as evaluation_CIDEr, evaluation_accuracy, evaluation_itm_IR@1. null: none."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Where metrics go beside metrics.jsonl."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What blip2 evaluate would measure, every so many steps while it trains. Results go to metrics.jsonl and the
    trackers as evaluation_..., and with predictions and a page of cases to evaluation/step-... in the run's folder."""

    task: Literal["captioning", "vqa", "retrieval"]
    """What to score: retrieval for stage representation, captioning or vqa for stage generation."""
    data: str
    """Held-out records: what data.train may say."""
    eval_steps: int = 1000
    """Steps between evaluations; there is one after the last step, too."""
    limit: int | None = None
    """Only so many records, the first ones; null: all."""
    prompt: str | None = None
    """Of captions, or of questions with {} in it; null: the model's own."""
    num_beams: int | None = None
    """Beam width; 1 is greedy; null: 5."""
    top_p: float | None = None
    """Nucleus sampling instead of beam search."""
    temperature: float | None = None
    """Of sampling; null: 1."""
    length_penalty: float | None = None
    """Below 0 favors short texts; null: 1, for answers -1."""
    max_new_tokens: int | None = None
    """Longest text in tokens; null: 30, for answers 10."""
    rerank_k: int = 128
    """Of retrieval: how many in each direction are re-ranked; 0: none."""
    fusion: Literal["itm", "itm+itc"] = "itm"
    """Of retrieval: what re-ranks them; itm+itc is LAVIS's."""
    rules: Literal["official", "lavis"] = "official"
    """Of comparing answers."""
    lemmatize: bool = False
    """Score answers in base forms as well, as LAVIS does for OK-VQA, for which it is always done. Needs spaCy."""


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    stage: Stage
    """representation: stage 1, the Q-Former with its three objectives. generation: stage 2, with a frozen LLM."""
    output: str
    """Folder of the run."""
    vision: VisionConfig
    data: DataConfig
    qformer: QFormerConfig = QFormerConfig()
    language: LanguageConfig | None = None
    objectives: ObjectivesConfig = ObjectivesConfig()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig | None = None
    start_from: str | list[str] | None = None
    """Run or checkpoint whose trained weights this one starts from: a stage 2 starts from a stage 1. Several are a
    list, of which the former wins where two have a weight: [STAGE_2, STAGE_1] starts a Q-Former that reads questions
    (Figure 7), whose text transformer only the latter has. null: from BERT; of a stage 2, Figure 5's comparison."""

    def __post_init__(self) -> None:
        if self.stage == "generation" and self.language is None:
            raise InputError("stage generation needs a frozen LLM: set language.name")
        if self.stage == "representation" and self.language is not None:
            raise InputError("stage representation has no LLM: leave out language, or set stage to generation")
        if self.stage == "representation" and not (self.objectives.itc or self.objectives.itm or self.objectives.itg):
            raise InputError("all objectives are switched off: give one of objectives.itc, .itm, .itg a weight")
        self._check_numbers()
        for name, part in (("vision", self.vision), ("language", self.language)):
            if part is not None and part.trust_remote_code not in (None, part.name):
                raise InputError(
                    f"{name}.trust_remote_code is {part.trust_remote_code}, expected {part.name}, which is {name}.name:"
                    " name the model whose code may run, or leave it out"
                )
        if self.start_from is not None and not all(self.starts or [""]):
            raise InputError(
                f"start_from is {self.start_from!r}, expected runs or checkpoints: name them, or set it to null"
            )
        if not self.data.sources:
            raise InputError("data.train names nothing to train on: name a source")
        self._check_evaluation()
        for name in ("prompt", "question_prompt"):
            if IMAGE_TOKEN in ((self.language and getattr(self.language, name)) or ""):
                raise InputError(f"language.{name} holds {IMAGE_TOKEN}: leave it out, the image comes first by itself")
        question_prompt = None if self.language is None else self.language.question_prompt
        if self.language is not None and question_prompt is not None and (
            QUESTION_PLACE not in question_prompt or self.language.asks
        ):  # fmt: skip
            raise InputError(
                f"language.question_prompt is {question_prompt!r} and language.prompt {self.language.prompt!r},"
                " expected {} in the first, where the question goes, and none in the second, which is for captions:"
                " correct them, or leave question_prompt out"
            )
        if self.training.shard_frozen and self.language is not None and self.language.quantization is not None:
            raise InputError(
                "a quantized LLM cannot be dealt out: leave out one of training.shard_frozen and language.quantization"
            )
        if self.qformer.use_qformer_text_input and (self.language is None or not self.language.asks):
            raise InputError(
                "qformer.use_qformer_text_input is for stage generation with questions: put {} into language.prompt"
                " where the"
                ' question goes, as in "Question: {} Answer:"'
            )
        if self.qformer.hidden_size % self.qformer.num_attention_heads:
            raise InputError(
                f"qformer.hidden_size {self.qformer.hidden_size} is not a multiple of qformer.num_attention_heads"
                f" {self.qformer.num_attention_heads}"
            )

    @property
    def starts(self) -> list[str]:
        """The runs or checkpoints that the run starts from; the first that has a weight gives it."""
        return [self.start_from] if isinstance(self.start_from, str) else self.start_from or []

    @property
    def begins_with_bert(self) -> bool:
        """Whether BERT's weights are read before what the run starts from. A stage 2 that reads no questions has none
        of them but those that a stage 1 has trained, and several checkpoints have to hold all of the Q-Former."""
        wanted = not self.starts or self.language is None or self.qformer.use_qformer_text_input
        return self.qformer.bert is not None and wanted and len(self.starts) < 2

    def _check_numbers(self) -> None:
        for name, (smallest, largest) in RANGES.items():
            *sections, key = name.split(".")
            section: Any = self
            for each in sections:
                section = None if section is None else getattr(section, each)  # a section may be left out
            if section is None:
                continue
            value = getattr(section, key)
            several = isinstance(value, dict | list | tuple)
            for number in (value.values() if isinstance(value, dict) else value) if several else [value]:
                if number is None and not several and not _may_be_null(type(section), key):
                    raise InputError(f"{name} is null, expected a number: give one, or leave the key out")
                if isinstance(number, bool):
                    raise InputError(f"{name} is {str(number).lower()}, expected a number")
                expected = outside(number, smallest, largest) if isinstance(number, float | int) else None
                if expected is not None:
                    raise InputError(f"{name} is {number}, expected {expected}")

    def _check_evaluation(self) -> None:
        task = None if self.evaluation is None else self.evaluation.task
        if task is not None and (task == "retrieval") != (self.stage == "representation"):
            fitting = "retrieval" if self.stage == "representation" else "captioning or vqa"
            raise InputError(f"evaluation.task {task} is not for stage {self.stage}: set it to {fitting}")
        if task is not None and self.training.shard_frozen:
            raise InputError(
                "training.shard_frozen needs all processes at the same work, which an evaluation is not: leave one out,"
                " and evaluate checkpoints with blip2 evaluate"
            )
        best = self.training.metric_for_best_model or ""
        needs = {"validation_": ("data.validation", self.data.validation), "evaluation_": ("evaluation", task)}
        for beginning, (key, value) in needs.items():
            if best.startswith(beginning) and value is None:
                raise InputError(
                    f"training.metric_for_best_model is {best}, which needs {key}: set it, or another"
                    " training.metric_for_best_model"
                )
        if best and not best.startswith(tuple(needs)):
            raise InputError(
                f"training.metric_for_best_model is {best}, expected a name that begins with {' or '.join(needs)}"
            )


@cache
def _may_be_null(section: type, key: str) -> bool:
    return NoneType in get_args(get_type_hints(section)[key])
