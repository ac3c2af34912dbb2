"""Models and training runs: :class:`ModelConfig` and :class:`Recipe`, two trees of frozen dataclasses.

Every field has a docstring, which is its ``--help``. A recipe is a YAML file with these fields; any of them can be
overridden on the command line (``--data.batch_size 32``). A key that is not a field is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from blip2.errors import InputError

Precision = Literal["fp32", "bf16", "fp16"]
TextNormalization = Literal["none", "lavis"]
Stage = Literal["representation", "generation"]
QUESTION_PLACEHOLDER = "{}"
"""The part of a prompt that is replaced by the question."""
IMAGE_TOKEN = "<image>"
"""The image placeholder in prompts of transformers' BLIP-2 and of other programs."""
MAX_COUNT, MAX_STEPS = 10**6, 10**9
"""Upper bounds of numbers that have no natural one: beyond any practical use, and small enough not to overflow."""


def bounded(default: Any, minimum: int | float, maximum: int | float, **metadata: Any) -> Any:
    """Return a dataclass field with a default whose number, or each of whose numbers, is in [minimum, maximum].

    Args:
        default: the default.
        minimum: the smallest number.
        maximum: the largest number.
        metadata: more metadata of the field, such as those of :mod:`blip2.options`.
    """
    return field(default=default, metadata={"range": (minimum, maximum), **metadata})


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder (§3.4). It is frozen unless optimizer.learning_rate trains it (§4.2-4.4)."""

    name: str
    """Folder or hub name in transformers' format (CLIP, SigLIP, DINO, ViT, EVA-g, CNNs ...), timm:NAME with the extra
    blip2[timm], or package:efficientnet-lite0."""
    layer: Literal["second-last", "last"] | None = None
    """The layer whose output is the image features. null: second-last for transformers, as in the paper; last for
    CNNs."""
    image_size: int | None = bounded(None, 1, 8192)
    """Height and width of the input images in pixels. Position embeddings are interpolated. null: the encoder's own."""
    num_attention_heads: int | None = bounded(None, 1, MAX_COUNT)
    """Number of attention heads, for an image encoder whose file does not store it: an EVA-CLIP in LAVIS's format whose
    width is not ViT-g's. null: read from the file."""
    position_encoding: Literal["auto", "sine2d", "none"] = "auto"
    """Fixed 2-D sine encoding that is added to the normalized image features before the Q-Former's key and value
    projections, as DETR does for a CNN. auto: sine2d if the encoder's tokens carry no position (CNNs, Swin), which is
    tested by shifting an image; none for ViTs with position embeddings. Published BLIP-2 checkpoints use none."""
    dtype: Precision | None = None
    """Data type of the weights and the computation. null: fp32 if the encoder trains or runs on a CPU, else bf16."""
    drop_path_rate: float = bounded(0.0, 0, 0.99)
    """Stochastic depth during training: probability of skipping the last block for an image. It decreases linearly to 0
    at the first block. The paper fine-tunes with 0."""
    trust_remote_code: str | None = None
    """Repeat the encoder's name here to run the Python code that is stored with its weights (docs/security.md). null:
    no code is run, and an encoder that needs it is refused. Only a recipe of your own or a command-line option can set
    it; in a checkpoint's files it is ignored."""


@dataclass(frozen=True)
class QFormerConfig:
    """The Querying Transformer (§3.1). The default sizes are BERT-base's, as in the paper."""

    bert: str | None = "google-bert/bert-base-uncased"
    """BERT that initializes the weights and provides the tokenizer: folder, hub name or package:minilm. null: random
    weights, to be loaded from a checkpoint; tokenizer must then be set."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer of the Q-Former's text. null: BERT's."""
    hidden_size: int = bounded(768, 1, MAX_COUNT)
    """D, the width of the hidden states."""
    num_hidden_layers: int = bounded(12, 1, 1000)
    """Number of blocks."""
    num_attention_heads: int = bounded(12, 1, MAX_COUNT)
    """Number of attention heads."""
    intermediate_size: int = bounded(3072, 1, MAX_COUNT)
    """Inner width of the feed-forward networks."""
    num_query_tokens: int = bounded(32, 1, MAX_COUNT)
    """Q, the number of learned queries."""
    cross_attention_frequency: int = bounded(2, 1, MAX_COUNT)
    """Every n-th block has cross-attention to the image features, starting with the first block."""
    image_text_hidden_size: int = bounded(256, 1, MAX_COUNT)
    """C, the width of the embeddings in which images and texts are compared (ITC)."""
    vocab_size: int = bounded(30523, 1, 2**31 - 1)
    """Number of tokens in the vocabulary, including [DEC], which is the last."""
    max_position_embeddings: int = bounded(512, 2, 2**31 - 1)
    """Maximum length of a text in tokens."""
    use_qformer_text_input: bool = False
    """Feed the question's tokens into the Q-Former together with the queries, so that it extracts features that are
    relevant to the question (Figure 7). Only for stage generation."""
    dropout: float = bounded(0.1, 0, 1)
    """Dropout probability of hidden states and attention weights."""
    layer_norm_eps: float = bounded(1e-12, 0, 1)
    """Epsilon of the LayerNorms. The default is BERT's."""
    image_norm_eps: float = bounded(1e-5, 0, 1)
    """Epsilon of the LayerNorm of the image features. The default is LAVIS's; transformers' checkpoints have 1e-6."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) that train in an LLM whose own weights stay frozen. They need the extra blip2[lora], and
    a pattern "language.*lora_*" in optimizer.learning_rate, before "language.*"."""

    r: int = bounded(16, 1, 8192)
    """Rank of the update matrices."""
    lora_alpha: int = bounded(32, 0, MAX_COUNT)
    """Scaling: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = bounded(0.0, 0, 1)
    """Dropout probability of the adapters' inputs."""
    target_modules: list[str] | None = None
    """Suffixes of the names of the linear layers that get an adapter (q_proj). null: PEFT's default for the LLM."""


@dataclass(frozen=True)
class LanguageConfig:
    """The frozen LLM (§3.3). Only for stage generation."""

    name: str
    """Folder or hub name of a decoder-only or encoder-decoder LLM in transformers' format, or
    package:smollm2-135m-instruct."""
    dtype: Precision | None = None
    """Data type of the weights and the computation. null: fp32 if the LLM trains or runs on a CPU, else bf16. The paper
    uses fp16 for OPT and bf16 for FlanT5."""
    prompt: str = ""
    """Text between the soft visual prompt and the caption ("a photo of", §4.2); it has no loss. The encoder of an
    encoder-decoder LLM reads it; if it is empty, captions are split at random into a prefix for the encoder and the
    rest for the decoder (§3.3). With {}, it is the prompt of questions: {} is replaced by a record's question, and the
    answer is generated: "Question: {} Answer:" for OPT, "Question: {} Short answer:" for FlanT5 (§4.1)."""
    question_prompt: str | None = None
    """Prompt with {} for records that have a question, to train captioning and question answering in the same run;
    records without a question use prompt. null: prompt is used for all records."""
    projection_init: Literal["random", "least_squares"] = "random"
    """Initialization of the projection to the LLM if no checkpoint provides it. least_squares: the linear map from Z to
    the LLM's token embeddings of the captions, fitted on several hundred images of the first table in data.train
    (docs/queries.md)."""
    stop_string: str | None = None
    """Text of the token that ends a caption. null: the tokenizer's end-of-text token. The paper's OPT models use a
    newline."""
    activation: str | None = None
    """Activation function that replaces the LLM's own in its feed-forward networks. The paper's FlanT5 models ran with
    gelu."""
    lora: LoraConfig | None = None
    """Adapters that train in the LLM. null: none."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Quantize the weight matrices with bitsandbytes (4bit is NF4); needs the extra blip2[quantization]. dtype is then
    the type of the computation. null: no quantization."""
    trust_remote_code: str | None = None
    """Repeat the LLM's name here to run the Python code that is stored with its weights (docs/security.md). null: no
    code is run, and an LLM that needs it is refused. Only a recipe of your own or a command-line option can set it; in
    a checkpoint's files it is ignored."""

    @property
    def prompt_has_question(self) -> bool:
        """Whether the prompt contains a question, so that every record needs one."""
        return QUESTION_PLACEHOLDER in self.prompt

    @property
    def question_template(self) -> str | None:
        """The prompt of records with a question; None if the model is trained on captions alone."""
        return self.prompt if self.prompt_has_question else self.question_prompt


@dataclass(frozen=True)
class ModelConfig:
    """A model: its sizes, the names of its frozen parts, and how its texts are prepared.

    It is all that using a checkpoint needs besides the weights, whichever program trained them. A recipe has the one of
    its model as :attr:`Recipe.model`.
    """

    stage: Stage
    """representation: stage 1, a Q-Former that compares images and texts. generation: stage 2, with a frozen LLM."""
    vision: VisionConfig
    qformer: QFormerConfig = QFormerConfig()
    language: LanguageConfig | None = None
    """The frozen LLM. null: none, in stage representation."""
    text_normalization: TextNormalization = "none"
    """Normalization of captions and questions before tokenization, as data.text_normalization of a recipe."""
    max_length: int = bounded(32, 2, MAX_COUNT)
    """Maximum length of a caption in tokens in training, as data.max_length of a recipe. Texts that are compared with
    images may have twice this length."""

    def __post_init__(self) -> None:
        if self.stage == "generation" and self.language is None:
            raise InputError("stage generation needs a frozen LLM: set language.name")
        if self.stage == "representation" and self.language is not None:
            raise InputError("stage representation has no LLM: leave out language, or set stage to generation")
        check_ranges(self)
        for name, part in (("vision", self.vision), ("language", self.language)):
            if part is not None and part.trust_remote_code not in (None, part.name):
                raise InputError(
                    f"{name}.trust_remote_code is {part.trust_remote_code}, expected {part.name}, which is {name}.name:"
                    " name the model whose code may run, or leave it out"
                )
        self._check_prompts()
        if self.qformer.hidden_size % self.qformer.num_attention_heads:
            raise InputError(
                f"qformer.hidden_size {self.qformer.hidden_size} is not a multiple of qformer.num_attention_heads"
                f" {self.qformer.num_attention_heads}"
            )

    def _check_prompts(self) -> None:
        for name in ("prompt", "question_prompt"):
            if IMAGE_TOKEN in ((self.language and getattr(self.language, name)) or ""):
                raise InputError(f"language.{name} contains {IMAGE_TOKEN}: leave it out, the image always comes first")
        question_prompt = None if self.language is None else self.language.question_prompt
        if self.language is not None and question_prompt is not None and (
            QUESTION_PLACEHOLDER not in question_prompt or self.language.prompt_has_question
        ):  # fmt: skip
            raise InputError(
                f"language.question_prompt is {question_prompt!r} and language.prompt {self.language.prompt!r},"
                " expected {} in the first, which is for questions, and none in the second, which is for captions:"
                " correct them, or leave question_prompt out"
            )
        if self.qformer.use_qformer_text_input and not (self.language and self.language.prompt_has_question):
            raise InputError(
                "qformer.use_qformer_text_input is for stage generation with questions: put {} into language.prompt"
                ' where the question goes, as in "Question: {} Answer:"'
            )


@dataclass(frozen=True)
class ObjectivesConfig:
    """Weights of the losses of stage representation (§3.2). 0 switches a loss off, as in Table 6."""

    itc: float = bounded(1.0, 0, MAX_COUNT)
    """Weight of image-text contrastive learning."""
    itm: float = bounded(1.0, 0, MAX_COUNT)
    """Weight of image-text matching with hard negatives."""
    itg: float = bounded(1.0, 0, MAX_COUNT)
    """Weight of image-grounded text generation."""
    label_smoothing: float = bounded(0.1, 0, 1)
    """Label smoothing of ITC and ITG, between 0 and 1."""
    query_diversity: float = bounded(0.0, 0, MAX_COUNT)
    """Weight of the mean squared cosine similarity between the output queries of an image, in both stages. It is not in
    the paper; without it, the queries of small runs collapse into one vector (docs/queries.md)."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss by its name. ``lm``, the loss of stage generation, always has the weight 1."""
        return {"lm": 1.0, **{name: value for name, value in vars(self).items() if name != "label_smoothing"}}

    @property
    def stage1(self) -> dict[str, float]:
        """The weights of the objectives of stage representation, at least one of which must be switched on.

        ``query_diversity`` is not among them: without another loss it trains nothing useful.
        """
        return {name: weight for name, weight in self.weights.items() if name not in ("lm", "query_diversity")}

    def weight(self, loss: str) -> float:
        """Return the weight of a loss.

        Raises:
            ValueError: the loss has no weight. This is an error in the code of the model, not in a recipe.
        """
        if loss not in self.weights:
            raise ValueError(
                f"the model returns a loss named {loss}, which has no weight: add a field {loss} to ObjectivesConfig in"
                " blip2/config.py"
            )
        return self.weights[loss]


@dataclass(frozen=True)
class DataConfig:
    """The image-text pairs, and how they are batched."""

    train: str | dict[str, float | None] = field(metadata={"range": (0, 1e15)})
    """Training data: JSONL, CSV, TSV or Parquet file(s), a folder of images with a .txt file for each or with a
    metadata.jsonl, WebDataset shards (.tar; globs and {000..127} are allowed), a folder of datasets' save_to_disk,
    hub:NAME, or a data set of the paper in its publisher's files as NAME:SPLIT:FOLDER (docs/data.md). Files can be at
    any address that fsspec opens (s3://, gs://, hf:// ...). A mapping of several of these to weights is a mixture: a
    step's source is sampled in proportion to the weights. A weight of null: the source's number of records, which is
    not known for a stream."""
    temperature: float = bounded(1.0, 0.1, MAX_COUNT)
    """Sources of a mixture are sampled in proportion to weight ** (1 / temperature). Values above 1 increase the share
    of small sources."""
    validation: str | None = None
    """Held-out pairs of the same kind on which the losses are measured."""
    allow_overlap: bool = False
    """Allow data.validation and evaluation.data to contain images of data.train. false: it is an error where it can be
    detected (docs/data.md)."""
    split: str = "train"
    """Split of a hub:NAME to train on."""
    image_column: str | None = None
    """Column with the image (a path, a Hugging Face image without a URL, or bytes). null: found by its usual names."""
    caption_column: str | None = None
    """Column with a caption, with a list of captions, of which one is sampled at each step, or with the answers to a
    question, which are sampled as often as they were given. null: found by its usual names."""
    question_column: str | None = None
    """Column with the question. null: the column question, if there is one."""
    group_column: str | None = None
    """Column of a table; records with equal values are put into the same batch, so that near duplicates become each
    other's hard negatives (§3.2, ITM). It switches grouping by length off. null: records are shuffled."""
    group_share: float = bounded(1.0, 0, 1)
    """Fraction of the groups that are kept together in an epoch, resampled every epoch. The records of the other groups
    are shuffled."""
    streaming: bool | None = None
    """Read the data in order, without counting or copying it. null: true for WebDataset shards and for URLs."""
    batch_size: int = bounded(64, 1, MAX_COUNT)
    """Number of pairs in a batch of one process."""
    max_length: int = bounded(32, 2, MAX_COUNT)
    """Maximum length of a caption in tokens. Longer captions are truncated, and counted."""
    text_normalization: TextNormalization = "none"
    """Normalization of captions and questions before tokenization, in training and in inference. lavis: lower case,
    without .!"()*#:;~ and at most 50 words, as in LAVIS; it is the default of published checkpoints. Answers and
    prompts are not changed."""
    min_crop_scale: float = bounded(0.5, 0.01, 1)
    """Minimum area of a random crop as a fraction of the image (§3.4)."""
    horizontal_flip: bool = True
    """Mirror images with a probability of one half. Switch it off if left and right matter."""
    group_by_length: bool = True
    """Batch captions of similar length to save padding. Answers to questions are always shuffled. Switch it off for few
    and short captions: those of equal length are too similar to each other."""
    num_workers: int = bounded(2, 0, 4096)
    """Number of subprocesses that decode images. 0: images are decoded in the training process."""
    max_bad_fraction: float = bounded(0.05, 0, 1)
    """Stop the run if more than this fraction of the data is bad: samples whose image, caption or question is missing
    or damaged, or truncated shards. Checked after the first 1000 samples or 50 shards."""
    cached_views: int = bounded(0, 0, MAX_COUNT)
    """If above 0, run the frozen image encoder on this number of augmented views of each image before training, store
    the features on disk and train on them. blip2 features makes them without training."""
    cached_dtype: Literal["bf16", "int8"] = "bf16"
    """Data type of the cached features. int8 needs half the space and is less precise; the error is measured and
    shown."""
    features: str | None = None
    """Folder of the cached features; runs, data sets and processes can share it. null: the folder features next to the
    run's folder."""

    @property
    def sources(self) -> dict[str, float | None]:
        """The sources of the training data with their weights."""
        return {self.train: None} if isinstance(self.train, str) else self.train


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule (§3.4)."""

    learning_rate: dict[str, float | Literal["frozen"]] = field(
        default_factory=lambda: {"vision.*": "frozen", "language.*": "frozen", "*": 1e-4}, metadata={"range": (0, 1e38)}
    )
    """Peak learning rate of each parameter, by shell patterns of parameter names; the first pattern that matches
    decides. "frozen": the parameter does not train."""
    layer_decay: float = bounded(1.0, 0.01, 1)
    """Layer-wise decay of the learning rate of an image encoder that trains: the rate of block i of N is multiplied by
    layer_decay ** (N + 1 - i); i is 0 for everything before the first block. The paper uses 0.9 to 1 (Tables 7-9)."""
    betas: tuple[float, float] = bounded((0.9, 0.98), 0, 0.999999)
    """AdamW's beta1 and beta2."""
    weight_decay: float = bounded(0.05, 0, MAX_COUNT)
    """Weight decay of matrices. Biases, norms, the temperature and the queries have none."""
    warmup_steps: int = bounded(2000, 0, MAX_STEPS)
    """Number of steps of linear warm-up."""
    min_lr_rate: float = bounded(0.1, 0, 1)
    """Final learning rate of the cosine schedule as a fraction of the peak. The paper's stage 2 ends at half its
    peak."""
    max_grad_norm: float | None = bounded(1.0, 1e-6, 1e38)
    """Maximum norm of the gradients, to which they are clipped. null: no clipping."""

    def trains(self, part: str) -> bool:
        """Return whether any parameter of a part (``vision``) trains, as far as the patterns alone can tell."""
        for pattern, rate in self.learning_rate.items():
            prefix = re.split(r"[*?[]", pattern)[0]
            if rate != "frozen" and (prefix.startswith(f"{part}.") or f"{part}.".startswith(prefix)):
                return True
            if pattern in (f"{part}.*", "*"):
                return False
        return False


@dataclass(frozen=True)
class TrainingConfig:
    """Length, precision, checkpoints and logging of the run."""

    max_steps: int = bounded(250_000, 1, MAX_STEPS)
    """Total number of optimizer steps."""
    gradient_accumulation_steps: int = bounded(1, 1, MAX_COUNT)
    """Number of batches of each process in one optimizer step."""
    precision: Precision | None = None
    """Precision of the trained part. bf16 and fp16 keep fp32 weights and compute in half precision. null: bf16 on a
    GPU, fp32 on a CPU."""
    gradient_checkpointing: bool = False
    """Store only the inputs of each block of the Q-Former, of an image encoder that trains and of the LLM, and
    recompute the rest in the backward pass. It takes about a third more time and much less memory; the results are the
    same."""
    torch_compile: bool = False
    """Compile the Q-Former's blocks and a frozen image encoder with torch.compile. It pays off on GPUs and in long
    runs: the first steps take minutes."""
    full_determinism: bool = False
    """Use only deterministic operations of PyTorch, so that on a GPU a resumed run equals an uninterrupted one bit for
    bit. It is slower. Runs on a CPU always are deterministic."""
    shard_frozen: bool = False
    """Shard the frozen LLM and image encoder across the processes of each machine (FSDP2), if they do not fit into one
    GPU's memory. The trained part is replicated."""
    ddp_timeout: int = bounded(1800, 1, 365 * 24 * 3600)
    """Seconds to wait for the other processes before the run fails. It must be longer than the first process takes to
    index the data or to write a checkpoint."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Device to train on. null: a GPU if there is one, else the CPU."""
    seed: int = bounded(0, 0, 2**32 - 1)
    """Seed of all randomness."""
    save_steps: int = bounded(1000, 1, MAX_STEPS)
    """Number of steps between checkpoints."""
    save_total_limit: int = bounded(2, 1, MAX_STEPS)
    """Number of checkpoints to keep; older ones are deleted."""
    eval_steps: int = bounded(1000, 1, MAX_STEPS)
    """Number of steps between measurements on data.validation."""
    metric_for_best_model: str | None = None
    """Metric of the best checkpoint, which is kept as best in the run's folder, regardless of save_total_limit:
    validation_loss or another metric of data.validation (for losses and perplexities, lower is better), or a metric of
    evaluation, such as evaluation_CIDEr, evaluation_accuracy or evaluation_itm_IR@1. null: no best checkpoint."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Experiment trackers that get the metrics in addition to metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options of text generation. Those that are null have the default of the task."""

    num_beams: int | None = bounded(None, 1, MAX_COUNT)
    """Beam width; 1 is greedy decoding. null: 5."""
    top_p: float | None = bounded(None, 1e-6, 1)
    """Use nucleus sampling with this probability mass instead of beam search. null: beam search."""
    temperature: float | None = bounded(None, 1e-6, MAX_COUNT)
    """Sampling temperature. null: 1."""
    length_penalty: float | None = bounded(None, -1000, 1000)
    """Length penalty of beam search; values below 0 favor short texts. null: 1, for answers -1."""
    max_new_tokens: int | None = bounded(None, 1, MAX_COUNT)
    """Maximum length of a generated text in tokens. null: 30, for answers 10."""


@dataclass(frozen=True)
class EvaluationConfig(DecodingOptions):
    """Evaluation during training, as blip2 evaluate does it. Results go to metrics.jsonl and the trackers as
    evaluation_..., and with predictions and an HTML report to evaluation/step-... in the run's folder."""

    task: Literal["captioning", "vqa", "retrieval"]
    """Task to evaluate: retrieval for stage representation, captioning or vqa for stage generation."""
    data: str
    """Held-out records, in any format of data.train."""
    eval_steps: int = bounded(1000, 1, MAX_STEPS, option=None)
    """Number of steps between evaluations. The last step is always evaluated."""
    limit: int | None = bounded(None, 1, 10**12)
    """Maximum number of records; the first ones are used. null: all."""
    prompt: str | None = None
    """Prompt of captions, or of questions if it contains {}. null: the model's own."""
    rerank_k: int = bounded(128, 0, 10**12)
    """Retrieval: number of candidates in each direction that are re-ranked. 0: no re-ranking."""
    fusion: Literal["itm", "itm+itc"] = "itm"
    """Retrieval: score by which candidates are re-ranked. LAVIS uses itm+itc."""
    rules: Literal["official", "lavis"] = "official"
    """VQA: rules for comparing answers."""
    lemmatize: bool = False
    """VQA: also score lemmatized answers, as LAVIS does for OK-VQA, for which it is always done. Needs spaCy."""


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
    """The frozen LLM. null: none, in stage representation."""
    objectives: ObjectivesConfig = ObjectivesConfig()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig | None = None
    """Evaluation during training. null: none."""
    start_from: str | list[str] | None = None
    """Run or checkpoint whose trained weights initialize this run: a stage 2 starts from a stage 1. In a list of
    several, the first that has a weight provides it: [STAGE_2, STAGE_1] initializes a Q-Former that reads questions
    (Figure 7), whose text transformer is in the latter only. null: start from BERT; for a stage 2, this is the
    comparison of Figure 5."""

    def __post_init__(self) -> None:
        if self.stage == "representation" and not any(self.objectives.stage1.values()):
            names = ", ".join(f"objectives.{name}" for name in self.objectives.stage1)
            raise InputError(f"all objectives are switched off: give one of {names} a weight above 0")
        check_ranges(self)
        _ = self.model  # checks the model
        if self.start_from is not None and not all(self.start_checkpoints or [""]):
            raise InputError(
                f"start_from is {self.start_from!r}, expected runs or checkpoints: name them, or set it to null"
            )
        if not self.data.sources:
            raise InputError("data.train has no source, expected at least one: name a source")
        self._check_evaluation()
        if self.training.shard_frozen and self.language is not None and self.language.quantization is not None:
            raise InputError(
                "a quantized LLM cannot be sharded: leave out one of training.shard_frozen and language.quantization"
            )

    @property
    def model(self) -> ModelConfig:
        """The config of the model that the recipe trains. Parts that train are in fp32 if no dtype is given."""
        vision, language, data = self.vision, self.language, self.data
        if self.optimizer.trains("vision"):
            vision = replace(vision, dtype=vision.dtype or "fp32")
        if language is not None and language.lora is None and self.optimizer.trains("language"):
            language = replace(language, dtype=language.dtype or "fp32")
        return ModelConfig(self.stage, vision, self.qformer, language, data.text_normalization, data.max_length)

    @property
    def start_checkpoints(self) -> list[str]:
        """The runs or checkpoints of ``start_from``; the first that has a weight provides it."""
        return [self.start_from] if isinstance(self.start_from, str) else self.start_from or []

    @property
    def starts_from_bert(self) -> bool:
        """Whether BERT's weights are loaded before those of ``start_from``.

        The Q-Former of a stage 2 that reads no questions uses only weights that a stage 1 has trained, and several
        checkpoints must provide the whole Q-Former.
        """
        needs_bert = not self.start_checkpoints or self.language is None or self.qformer.use_qformer_text_input
        return self.qformer.bert is not None and needs_bert and len(self.start_checkpoints) < 2

    def _check_evaluation(self) -> None:
        task = None if self.evaluation is None else self.evaluation.task
        if task is not None and (task == "retrieval") != (self.stage == "representation"):
            tasks = "retrieval" if self.stage == "representation" else "captioning or vqa"
            raise InputError(f"evaluation.task {task} is not for stage {self.stage}: set it to {tasks}")
        if task is not None and self.training.shard_frozen:
            raise InputError(
                "training.shard_frozen needs the same work in all processes, which an evaluation does not give them:"
                " leave one of them out, and evaluate checkpoints with blip2 evaluate"
            )
        best = self.training.metric_for_best_model or ""
        needs = {"validation_": ("data.validation", self.data.validation), "evaluation_": ("evaluation", task)}
        for prefix, (key, value) in needs.items():
            if best.startswith(prefix) and value is None:
                raise InputError(
                    f"training.metric_for_best_model is {best}, which needs {key}: set it, or another"
                    " training.metric_for_best_model"
                )
        if best and not best.startswith(tuple(needs)):
            raise InputError(
                f"training.metric_for_best_model is {best}, expected a name that begins with {' or '.join(needs)}"
            )


def check_ranges(section: Any, prefix: str = "") -> None:
    """Refuse numbers of a dataclass, and of the dataclasses in it, that are outside their :func:`bounded` ranges.

    Raises:
        InputError: the message names the field, after `prefix`.
    """
    for each in fields(section):
        name, value = f"{prefix}{each.name}", getattr(section, each.name)
        if is_dataclass(value):
            check_ranges(value, f"{name}.")
        elif "range" in each.metadata:
            several = isinstance(value, dict | list | tuple)
            for number in (value.values() if isinstance(value, dict) else value) if several else [value]:
                if number is None and not several and not _is_optional(type(section), each.name):
                    raise InputError(f"{name} is null, expected a number: give one, or leave the key out")
                if isinstance(number, bool):
                    raise InputError(f"{name} is {str(number).lower()}, expected a number")
                expected = out_of_range(number, *each.metadata["range"]) if isinstance(number, float | int) else None
                if expected is not None:
                    raise InputError(f"{name} is {number}, expected {expected}")


def out_of_range(number: int | float, minimum: int | float, maximum: int | float) -> str | None:
    """Return what is expected of a number that is outside its range or NaN; None if it is inside."""
    if minimum <= number <= maximum:
        return None
    if number < minimum and maximum >= 1000:
        return f"at least {minimum}"
    return f"at most {maximum}" if number > maximum >= 1000 else f"{minimum} to {maximum}"


@cache
def _is_optional(section: type, key: str) -> bool:
    return NoneType in get_args(get_type_hints(section)[key])
