"""Models and training runs: :class:`ModelConfig` and :class:`Recipe`, two trees of frozen dataclasses.

Every field has a docstring, which is its ``--help``. A recipe is a YAML file with these fields; any of them can be
overridden on the command line (``--data.batch_size 32``). A key that is not a field is an error.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from blip2.errors import InputError

Precision = Literal["fp32", "bf16", "fp16"]
TextNormalization = Literal["none", "lavis"]
Stage = Literal["representation", "generation"]
ScoreName = Literal["itc", "itm", "itg", "lm", "pmi"]
Fusion = Literal["itm", "itm+itc", "itm+itc/temperature"]
"""Scores by which :attr:`EvaluationConfig.fusion` re-ranks candidates."""
TemperatureName = Literal["itc", "itm", "lm", "pmi", "answer"]
"""The names of the temperatures of :class:`CalibrationConfig`."""
CheckpointFormat = Literal["transformers", "vllm", "lavis", "blip2"]
QUESTION_PLACEHOLDER = "{}"
"""The part of a prompt that is replaced by the question."""
IMAGE_TOKEN = "<image>"
"""The image placeholder in prompts of transformers' BLIP-2 and of other programs."""
FEATURES, MODULE = "features", "module"
"""Values of ``vision.name`` that name no pretrained encoder: arrays of features, and a module given in Python."""
MAX_COUNT, MAX_STEPS = 10**6, 10**9
"""Upper bounds for numbers without a natural upper bound: above any practical value, and small enough not to
overflow."""


def bounded(default: Any, minimum: int | float, maximum: int | float, **metadata: Any) -> Any:
    """Return a dataclass field whose number, or each of whose numbers, must be in [minimum, maximum].

    Args:
        default: the default value of the field.
        minimum: the smallest number allowed.
        maximum: the largest number allowed.
        metadata: further metadata of the field, such as ``option``, which :mod:`blip2.options` reads.
    """
    return field(default=default, metadata={"range": (minimum, maximum), **metadata})


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder (§3.4). It is frozen unless optimizer.learning_rate trains it (§4.2-4.4)."""

    name: str
    """The image encoder, one of: a folder or hub name in transformers' format (CLIP, SigLIP, DINO, ViT, CNNs ...); a
    .pth file with an EVA-CLIP in LAVIS's format, such as eva_vit_g.pth; timm:NAME, which needs the extra blip2[timm];
    package:efficientnet-lite0, a CNN that is downloaded from PyPI; features, if the records have arrays of features in
    place of images (docs/any-modality.md); or module, a torch module given to blip2.train and blip2.load in Python."""
    layer: Literal["second-last", "last"] | None = None
    """The layer whose output is the image features. null: second-last for ViTs, as in the paper; last for all other
    networks."""
    image_size: int | None = bounded(None, 1, 8192)
    """Height and width in pixels to which images are resized. If the encoder was trained with another size, its
    position embeddings are interpolated. null: the encoder's own size."""
    num_attention_heads: int | None = bounded(None, 1, MAX_COUNT)
    """Number of attention heads of the image encoder. It must be set only for an EVA-CLIP in LAVIS's format whose width
    is not that of ViT-g, because such a file does not store the number. null: the number that the file stores."""
    position_encoding: Literal["auto", "sine2d", "none"] = "auto"
    """Position encoding that is added to the normalized image features before the key and value projections of the
    Q-Former's cross-attention. sine2d: fixed 2-D sine encoding, as in DETR. none: no encoding, as in published BLIP-2
    checkpoints. auto: sine2d if the encoder's features do not depend on positions (CNNs, Swin), which is tested with a
    shifted image; otherwise none."""
    dtype: Precision | None = None
    """Data type of the weights and the computation. null: bf16 if the encoder is frozen and runs on a CUDA GPU, else
    fp32."""
    hidden_size: int | None = bounded(None, 1, MAX_COUNT)
    """Width of the arrays of features; required if vision.name is features. null: the encoder's own width."""
    max_tokens: int | None = bounded(None, 1, MAX_COUNT)
    """Maximum number of tokens of an array of features; required if vision.name is features. Shorter arrays are allowed
    in the same batch. null: the encoder's own number of tokens."""
    drop_path_rate: float = bounded(0.0, 0, 0.99)
    """Stochastic depth during training: the probability that an image skips the last block. The probability of earlier
    blocks decreases linearly to 0 at the first block. The paper fine-tunes with 0."""
    trust_remote_code: str | None = None
    """Repeat the value of vision.name here to allow running the Python code that is stored with the encoder's weights
    (docs/security.md). null: no such code is run, and an encoder that needs its own code is refused. This key can only
    be set in a recipe of your own or on the command line; in the files of a checkpoint it is ignored."""

    @property
    def reads_features(self) -> bool:
        """Whether the records have arrays of features in place of images."""
        return self.name == FEATURES

    def check(self) -> None:
        """Check that the keys fit the kind of encoder that ``name`` is.

        Raises:
            InputError: a key is missing or has no effect.
        """
        sizes = {"hidden_size": self.hidden_size, "max_tokens": self.max_tokens}
        if not self.reads_features:
            unused = [name for name, value in sizes.items() if value is not None]
            if unused:
                raise InputError(
                    f"vision.{unused[0]} is {sizes[unused[0]]}, but vision.name is {self.name}, whose own sizes are"
                    f" used: leave out vision.{unused[0]}, or set vision.name to {FEATURES}"
                )
        elif missing := [name for name, value in sizes.items() if value is None]:
            raise InputError(
                f"vision.name is {FEATURES}, but vision.{missing[0]} is null: set vision.hidden_size to the width of"
                " the arrays, and vision.max_tokens to the length of the longest"
            )
        if self.name not in (FEATURES, MODULE):
            return
        without = ["layer", "num_attention_heads", "trust_remote_code"]
        without += ["image_size", "drop_path_rate"] if self.reads_features else ["drop_path_rate"]
        for name in without:
            if getattr(self, name):
                raise InputError(
                    f"vision.{name} is {getattr(self, name)}, but vision.name is {self.name}, for which it has no"
                    f" meaning: leave out vision.{name}"
                )
        if self.reads_features and self.position_encoding == "sine2d":
            raise InputError(
                "vision.position_encoding is sine2d, but arrays of features have no grid of rows and columns: leave out"
                " vision.position_encoding, and add positions to the arrays if their order matters"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) that train in an LLM or a Q-Former whose own weights stay frozen. They need the extra
    blip2[lora], and a learning rate for the pattern "language.*lora_*" or "qformer.*lora_*" in optimizer.learning_rate,
    before the pattern "language.*" or "qformer.*"."""

    r: int = bounded(16, 1, 8192)
    """Rank of the update matrices."""
    lora_alpha: int = bounded(32, 0, MAX_COUNT)
    """Numerator of the scaling: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = bounded(0.0, 0, 1)
    """Dropout probability of the adapters' inputs."""
    target_modules: list[str] | None = None
    """Suffixes of the names of the linear layers that get an adapter, such as q_proj. null: PEFT's default for the
    LLM; in the Q-Former query and value, PEFT's default for BERT."""


@dataclass(frozen=True)
class QFormerConfig:
    """The Querying Transformer (§3.1). The default sizes are BERT-base's, as in the paper."""

    bert: str | None = "google-bert/bert-base-uncased"
    """BERT that initializes the weights and provides the tokenizer: a folder, a hub name or package:minilm. null: the
    weights are random unless start_from loads them, and qformer.tokenizer must be set."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer of the Q-Former's text. null: the tokenizer of qformer.bert."""
    hidden_size: int = bounded(768, 1, MAX_COUNT)
    """D, the width of the hidden states."""
    num_hidden_layers: int = bounded(12, 1, 1000)
    """Number of transformer blocks."""
    num_attention_heads: int = bounded(12, 1, MAX_COUNT)
    """Number of attention heads of self-attention and cross-attention."""
    intermediate_size: int = bounded(3072, 1, MAX_COUNT)
    """Inner width of the feed-forward networks."""
    num_query_tokens: int = bounded(32, 1, MAX_COUNT)
    """Q, the number of learned queries."""
    window: int | None = bounded(None, 1, MAX_COUNT)
    """Number of feature tokens in a window, for long sequences (audio, signals, video) in stage generation with
    vision.name features: the Q-Former is applied to each window by itself, and the num_query_tokens outputs of all
    windows are concatenated for the LLM, as in SALMONN (docs/any-modality.md). null: the queries read the whole
    sequence at once."""
    stride: int | None = bounded(None, 1, MAX_COUNT)
    """Distance in tokens between the beginnings of successive windows, from 1 to qformer.window. null: qformer.window,
    so that windows do not overlap."""
    cross_attention_frequency: int = bounded(2, 1, MAX_COUNT)
    """The distance between blocks with cross-attention to the image features: with 2, every second block has
    cross-attention, starting with the first block."""
    image_text_hidden_size: int = bounded(256, 1, MAX_COUNT)
    """C, the width of the embeddings by which images and texts are compared (ITC)."""
    vocab_size: int = bounded(30523, 1, 2**31 - 1)
    """Number of tokens in the vocabulary, including the last one, [DEC]."""
    max_position_embeddings: int = bounded(512, 2, 2**31 - 1)
    """Number of position embeddings, which is the maximum length in tokens of a text that the Q-Former reads."""
    use_qformer_text_input: bool = False
    """Feed the question's tokens into the Q-Former together with the queries, so that the Q-Former extracts features
    that are relevant to the question (Figure 7). Only for stage generation with {} in language.prompt."""
    text_input: Literal["question", "prompt"] = "question"
    """The text that the Q-Former reads with use_qformer_text_input. question: the question alone. prompt: the same text
    as the LLM, that is, the whole prompt with the question in it, as in InstructBLIP."""
    dropout: float = bounded(0.1, 0, 1)
    """Dropout probability of hidden states and attention weights."""
    layer_norm_eps: float = bounded(1e-12, 0, 1)
    """Epsilon of the LayerNorms. The default is that of BERT."""
    image_norm_eps: float = bounded(1e-5, 0, 1)
    """Epsilon of the LayerNorm of the image features. The default is that of LAVIS; transformers' checkpoints use
    1e-6."""
    lora: LoraConfig | None = None
    """Adapters that train in the Q-Former. null: none."""

    def check_windows(self, stage: Stage, vision: VisionConfig) -> None:
        """Check that ``window`` and ``stride`` fit each other, the stage and the image encoder.

        Raises:
            InputError: they do not.
        """
        if self.window is None:
            if self.stride is not None:
                raise InputError(
                    f"qformer.stride is {self.stride}, but qformer.window is null, so that there are no windows: set"
                    " qformer.window, or leave out qformer.stride"
                )
            return
        if self.stride is not None and self.stride > self.window:
            raise InputError(
                f"qformer.stride is {self.stride}, expected 1 to {self.window}, the value of qformer.window, so that no"
                " token lies between two windows: make qformer.stride smaller, or qformer.window larger"
            )
        if not vision.reads_features:
            raise InputError(
                f"qformer.window is {self.window}, but vision.name is {vision.name}, and windows are for sequences of"
                f" features: leave out qformer.window, or set vision.name to {FEATURES}"
            )
        if stage == "representation":
            raise InputError(
                f"qformer.window is {self.window}, but in stage representation a text belongs to one set of queries,"
                " not to several windows: leave out qformer.window here, and set it in stage generation"
            )

    def count_windows(self, num_tokens: int) -> int:
        """Return the number of windows of a sequence of features; 1 without ``window``.

        Windows begin at the tokens 0, ``stride``, 2 * ``stride`` ... The first one that reaches the end of the sequence
        is the last, and may be shorter than ``window``. Every token is in a window.

        Args:
            num_tokens: P, the length of the sequence.
        """
        if self.window is None:
            return 1
        return 1 + math.ceil(max(num_tokens - self.window, 0) / self.window_stride)

    @property
    def window_stride(self) -> int:
        """``stride`` with its default. There must be windows."""
        assert self.window is not None
        return self.stride or self.window


@dataclass(frozen=True)
class LanguageConfig:
    """The frozen LLM (§3.3). Only for stage generation."""

    name: str
    """Folder or hub name of a decoder-only or encoder-decoder LLM in transformers' format, or
    package:smollm2-135m-instruct."""
    dtype: Precision | None = None
    """Data type of the weights and the computation. null: bf16 if the LLM's own weights are frozen and it runs on a
    CUDA GPU, else fp32. The paper uses fp16 for OPT and bf16 for FlanT5."""
    prompt: str = ""
    """Text between the soft visual prompt and the caption, such as "a photo of" (§4.2). The tokens of the prompt have
    no loss. In an encoder-decoder LLM, the encoder reads the prompt; without a prompt, each caption is split at random
    into a prefix for the encoder and the rest for the decoder (§3.3). If the prompt contains {}, {} is replaced by the
    question of a record, and the LLM learns to generate the answer. The paper's prompts are "Question: {} Answer:" for
    OPT and "Question: {} Short answer:" for FlanT5 (§4.1)."""
    question_prompt: str | None = None
    """Prompt with {} for records that have a question, to train captioning and question answering in the same run;
    records without a question use language.prompt. null: language.prompt is used for all records."""
    projection_init: Literal["random", "least_squares"] = "random"
    """Initialization of the projection to the LLM if no checkpoint contains the projection. least_squares: the linear
    map from the Q-Former's output Z to the LLM's token embeddings of the captions, fitted on several hundred images of
    the first table in data.train (docs/queries.md)."""
    stop_string: str | None = None
    """Text of the token that ends a caption. null: the tokenizer's end-of-text token. The paper's OPT models use a
    newline."""
    bos_token: str | None = None
    """Text of the token that begins each text of a decoder-only LLM, after the soft visual prompt. null: the token that
    the tokenizer puts first, if any. LAVIS's InstructBLIP with Vicuna uses </s>."""
    activation: str | None = None
    """Activation function in the feed-forward networks of the LLM; the paper's FlanT5 models used gelu. null: the LLM's
    own."""
    lora: LoraConfig | None = None
    """Adapters that train in the LLM. null: none."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Quantize the LLM's weight matrices with bitsandbytes (4bit is NF4), which needs the extra blip2[quantization].
    language.dtype is then the data type of the computation. null: no quantization."""
    trust_remote_code: str | None = None
    """Repeat the value of language.name here to allow running the Python code that is stored with the LLM's weights
    (docs/security.md). null: no such code is run, and an LLM that needs its own code is refused. This key can only be
    set in a recipe of your own or on the command line; in the files of a checkpoint it is ignored."""

    @property
    def prompt_has_question(self) -> bool:
        """Whether the prompt contains {}, so that every record needs a question."""
        return QUESTION_PLACEHOLDER in self.prompt

    @property
    def question_template(self) -> str | None:
        """The prompt for records with a question; None if the model is trained on captions only."""
        return self.prompt if self.prompt_has_question else self.question_prompt


@dataclass(frozen=True)
class CalibrationConfig:
    """Temperatures with which the probabilities of a model agree with how often it is right. blip2 calibrate fits them
    to held-out data (docs/calibration.md). A temperature above 1 makes the model less certain."""

    itc: float | None = bounded(None, 1e-3, 1e3)
    """Temperature of the probabilities of candidates that are ranked by ITC, in addition to the temperature that was
    learned in training. null: not calibrated."""
    itm: float | None = bounded(None, 1e-3, 1e3)
    """Temperature of the probability that an image and a text match (ITM). null: not calibrated."""
    lm: float | None = bounded(None, 1e-3, 1e3)
    """Temperature of the probabilities of candidates that are ranked by their log-likelihood under the LLM. null: not
    calibrated."""
    pmi: float | None = bounded(None, 1e-3, 1e3)
    """Temperature of the probabilities of candidates that are ranked by pmi. null: not calibrated."""
    answer: float | None = bounded(None, 1e-3, 1e3)
    """Temperature of the confidence of generated answers. null: not calibrated."""


@dataclass(frozen=True)
class ModelConfig:
    """The config of a model: its sizes, the names of its frozen parts, and how its texts are prepared.

    A checkpoint can be used with its weights, its tokenizer and this config, whether blip2, transformers or LAVIS
    trained it. :attr:`Recipe.model` is the config of the model that a recipe trains.
    """

    stage: Stage
    """representation: stage 1, a Q-Former that compares images and texts. generation: stage 2, with a frozen LLM."""
    vision: VisionConfig
    qformer: QFormerConfig = QFormerConfig()
    language: LanguageConfig | None = None
    """The LLM of stage generation. null in stage representation, which has no LLM."""
    text_normalization: TextNormalization = "none"
    """Normalization of captions and questions before tokenization; the value of data.text_normalization in a recipe."""
    max_length: int = bounded(32, 2, MAX_COUNT)
    """Maximum length in tokens of a caption in training; the value of data.max_length in a recipe. Texts that
    :meth:`blip2.RepresentationPipeline.match` and similar methods compare with images may have twice this length."""
    calibration: CalibrationConfig | None = None
    """Temperatures that blip2 calibrate has fitted. null: the model is not calibrated."""

    def __post_init__(self) -> None:
        if self.stage == "generation" and self.language is None:
            raise InputError("stage generation needs an LLM, but language is null: set language.name")
        if self.stage == "representation" and self.language is not None:
            raise InputError(
                "language is set, but stage representation has no LLM: leave out language, or set stage to generation"
            )
        check_ranges(self)
        self.vision.check()
        self.qformer.check_windows(self.stage, self.vision)
        for name, part in (("vision", self.vision), ("language", self.language)):
            if part is not None and part.trust_remote_code not in (None, part.name):
                raise InputError(
                    f"{name}.trust_remote_code is {part.trust_remote_code}, expected {part.name}, the value of"
                    f" {name}.name: repeat that value to run the model's code, or leave out {name}.trust_remote_code"
                )
        self._check_prompts()
        if self.qformer.hidden_size % self.qformer.num_attention_heads:
            raise InputError(
                f"qformer.hidden_size {self.qformer.hidden_size} is not a multiple of qformer.num_attention_heads"
                f" {self.qformer.num_attention_heads}: change one of the two"
            )

    def _check_prompts(self) -> None:
        for name in ("prompt", "question_prompt"):
            if IMAGE_TOKEN in ((self.language and getattr(self.language, name)) or ""):
                raise InputError(
                    f"language.{name} contains {IMAGE_TOKEN}: remove {IMAGE_TOKEN}, because the image is always placed"
                    " first"
                )
        question_prompt = None if self.language is None else self.language.question_prompt
        if self.language is not None and question_prompt is not None and (
            QUESTION_PLACEHOLDER not in question_prompt or self.language.prompt_has_question
        ):  # fmt: skip
            raise InputError(
                f"language.question_prompt is {question_prompt!r} and language.prompt {self.language.prompt!r},"
                " expected {} in language.question_prompt, which is for questions, and no {} in language.prompt, which"
                " is for captions: correct the prompts, or leave out language.question_prompt"
            )
        if self.qformer.text_input == "prompt" and not self.qformer.use_qformer_text_input:
            raise InputError(
                "qformer.text_input is prompt, but qformer.use_qformer_text_input is false, so that the Q-Former reads"
                " no text: set use_qformer_text_input to true, or leave out text_input"
            )
        if self.qformer.use_qformer_text_input and not (self.language and self.language.prompt_has_question):
            raise InputError(
                "qformer.use_qformer_text_input is true, which needs an LLM with questions: put {} into language.prompt"
                ' in the place of the question, as in "Question: {} Answer:"'
            )


@dataclass(frozen=True)
class ObjectivesConfig:
    """Weights of the losses (§3.2). A loss with weight 0 is switched off, as in Table 6. itc, itm and itg are losses of
    stage representation."""

    itc: float = bounded(1.0, 0, MAX_COUNT)
    """Weight of image-text contrastive learning."""
    itm: float = bounded(1.0, 0, MAX_COUNT)
    """Weight of image-text matching with hard negatives."""
    itg: float = bounded(1.0, 0, MAX_COUNT)
    """Weight of image-grounded text generation."""
    label_smoothing: float = bounded(0.1, 0, 1)
    """Label smoothing of ITC and ITG."""
    query_diversity: float = bounded(0.0, 0, MAX_COUNT)
    """Weight of the mean squared cosine similarity between the output queries of an image, in both stages. This loss is
    not in the paper; without it, the output queries of small runs collapse into one vector (docs/queries.md)."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss by the loss's name. ``lm``, the loss of stage generation, always has weight 1."""
        return {"lm": 1.0, **{name: value for name, value in vars(self).items() if name != "label_smoothing"}}

    @property
    def stage1(self) -> dict[str, float]:
        """The weights of ITC, ITM and ITG by name. In stage representation, at least one of them must be above 0.

        ``query_diversity`` is left out, because it trains nothing useful without another loss.
        """
        return {name: weight for name, weight in self.weights.items() if name not in ("lm", "query_diversity")}

    def weight(self, loss: str) -> float:
        """Return the weight of a loss.

        Raises:
            ValueError: the loss has no weight. This is an error in the code of the model, not in a recipe.
        """
        weights = self.weights
        if loss not in weights:
            raise ValueError(
                f"the model returns a loss named {loss}, which has no weight: add a field {loss} to ObjectivesConfig in"
                " blip2/config.py"
            )
        return weights[loss]


@dataclass(frozen=True)
class DataConfig:
    """The image-text pairs, and how they are batched."""

    train: str | dict[str, float | None] = field(metadata={"range": (0, 1e15)})
    """Training data, one of: JSONL, CSV, TSV or Parquet file(s); a folder of images with a metadata.jsonl or with a
    .txt file for each image; WebDataset shards (.tar); a folder written by Dataset.save_to_disk of the library
    datasets; hub:NAME; or NAME:SPLIT:FOLDER for a data set of the paper in its publisher's files (docs/data.md). File
    names may be globs, contain ranges such as {000..127}, or be addresses that fsspec opens (s3://, gs://, hf:// ...).
    A mapping from several of these sources to weights is a mixture: each step draws one source with a probability
    proportional to its weight. A weight of null is the number of records of the source; a stream needs a number."""
    temperature: float = bounded(1.0, 0.1, MAX_COUNT)
    """Sources of a mixture are sampled in proportion to weight ** (1 / temperature). Values above 1 increase the share
    of small sources."""
    validation: str | None = None
    """Held-out pairs, in any format of data.train except a stream. The losses are measured on them every
    training.eval_steps steps. null: no measurement."""
    allow_overlap: bool = False
    """Allow data.validation and evaluation.data to contain images of data.train. false: a shared image is an error, as
    far as it can be detected (docs/data.md)."""
    split: str = "train"
    """Split that is read from a hub:NAME, or from a folder of several splits that was written by save_to_disk of the
    library datasets. It applies to data.train and data.validation."""
    image_column: str | None = None
    """Column with the image: a path (not a URL), a Hugging Face image, or bytes; or, for vision.name features, with
    the array of features: a path such as clip.npy or clips.npz#KEY, the bytes of such a file, or lists of numbers.
    null: the first column that exists of image, jpg, jpeg, png, webp, image_path, file_name, filename, img and path;
    for vision.name features, of features, npy, npz and safetensors."""
    caption_column: str | None = None
    """Column with the text: a caption; a list of captions, of which one is sampled at each step; or the answers to a
    question, of which one is sampled in proportion to how often it was given. null: the first of caption, captions,
    text, txt, texts, sentence and sentences that the row has, or of answers and answer if it has a question."""
    question_column: str | None = None
    """Column with the question, without which no row of the source is used. null: the column named question, if there
    is one."""
    group_column: str | None = None
    """Column by which the records of a table of captions are grouped: records with equal values are put into the same
    batch, so that near duplicates become each other's hard negatives (§3.2, ITM). A record whose cell is empty belongs
    to no group. data.group_by_length then has no effect. null: records are not grouped."""
    group_share: float = bounded(1.0, 0, 1)
    """Fraction of the groups of data.group_column that are kept together in an epoch; each epoch draws these groups
    again. The records of the other groups are shuffled."""
    streaming: bool | None = None
    """Read the data as a stream instead of a table: only the order of shards and the records within a window of 50
    batches are shuffled, and nothing is counted or cached on disk. null: true for WebDataset shards and URLs, else
    false."""
    batch_size: int = bounded(64, 1, MAX_COUNT)
    """Number of pairs in a batch of one process."""
    max_length: int = bounded(32, 2, MAX_COUNT)
    """Maximum length of a caption in tokens. Longer captions are truncated; metrics.jsonl counts them
    under "truncated"."""
    text_normalization: TextNormalization = "none"
    """Normalization of captions and questions before tokenization, in training and in inference. lavis: as in LAVIS,
    texts are put into lower case, the characters .!"()*#:;~ are removed, and only the first 50 words are kept.
    Published checkpoints use lavis. Answers and prompts are never normalized."""
    min_crop_scale: float = bounded(0.5, 0.01, 1)
    """Minimum area of a random crop as a fraction of the image (§3.4)."""
    horizontal_flip: bool = True
    """Mirror each image with probability 0.5. Use false if texts mention left and right."""
    group_by_length: bool = True
    """Put captions of similar length into the same batch to save padding. This has no effect on records with questions
    or in groups (data.group_column). Use false for small data sets of short captions: otherwise a batch contains
    captions of a single length, and few different ones."""
    num_workers: int = bounded(2, 0, 4096)
    """Number of subprocesses that decode images. 0: images are decoded in the training process."""
    max_bad_fraction: float = bounded(0.05, 0, 1)
    """Stop the run if more than this fraction of the data is bad, that is, samples whose image, caption or question is
    missing or damaged, or truncated shards. The fraction is checked after the first 1000 samples or 50 shards."""
    cached_views: int = bounded(0, 0, MAX_COUNT)
    """Number of augmented views of each image that the frozen image encoder encodes before training. Their features are
    stored on disk, and training reads the features instead of images; blip2 features stores them without training. 0:
    images are encoded during training."""
    cached_dtype: Literal["bf16", "int8"] = "bf16"
    """Data type of the cached features. int8 takes half the space of bf16 and is less precise; the error of int8 is
    measured and shown."""
    features: str | None = None
    """Folder of the cached features, which several runs, data sets and processes may share. null: a folder named
    "features" in the parent folder of the run."""

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
    """Mapping from patterns of parameter names, such as "qformer.*", to peak learning rates. The first pattern that
    matches the name of a parameter determines its rate. "frozen": the parameter does not train."""
    layer_decay: float = bounded(1.0, 0.01, 1)
    """Layer-wise decay of the learning rate in a ViT that trains: the rate of block i (1 to N) is multiplied by
    layer_decay ** (N + 1 - i). Parameters before the first block have i = 0, parameters after the last block i = N. The
    paper uses 0.9 to 1 (Tables 7-9). 1: no decay."""
    betas: tuple[float, float] = bounded((0.9, 0.98), 0, 0.999999)
    """AdamW's beta1 and beta2."""
    weight_decay: float = bounded(0.05, 0, MAX_COUNT)
    """Weight decay of weight matrices. Biases, norms, the ITC temperature and the queries have no weight decay."""
    warmup_steps: int = bounded(2000, 0, MAX_STEPS)
    """Number of steps of linear warm-up."""
    min_lr_rate: float = bounded(0.1, 0, 1)
    """Final learning rate of the cosine schedule as a fraction of the peak rate. The paper's stage 2 ends at 0.5."""
    max_grad_norm: float | None = bounded(1.0, 1e-6, 1e38)
    """Maximum norm of the gradient of all parameters together; a larger gradient is scaled down to this norm. null: no
    clipping."""

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
    """Precision of the computation in the parts that train, whose weights are always in fp32. null: bf16 on a CUDA GPU,
    fp32 on other devices."""
    gradient_checkpointing: bool = False
    """Store only the inputs of each block of the Q-Former, of an image encoder that trains and of the LLM, and
    recompute the other activations in the backward pass. Training takes about a third more time and much less memory;
    the results are the same."""
    torch_compile: bool = False
    """Compile the Q-Former's blocks and a frozen image encoder with torch.compile. The first steps then take minutes,
    so compilation pays off only in long runs on GPUs."""
    full_determinism: bool = False
    """Use only deterministic operations of PyTorch, so that on a GPU a resumed run equals an uninterrupted run bit for
    bit. Training is slower. Runs on a CPU are always deterministic."""
    shard_frozen: bool = False
    """Shard the frozen LLM and image encoder across the processes of each machine (FSDP2), for models that do not fit
    into the memory of one GPU. The trained part is replicated."""
    ddp_timeout: int = bounded(1800, 1, 365 * 24 * 3600)
    """Seconds for which a process waits for the other processes before the run fails. The first process must be able to
    index the data, or to write a checkpoint, in this time."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Device to train on. null: a GPU if there is one, else the CPU."""
    seed: int = bounded(0, 0, 2**32 - 1)
    """Seed of all random numbers of the run."""
    save_steps: int = bounded(1000, 1, MAX_STEPS)
    """Number of steps between checkpoints."""
    save_total_limit: int = bounded(2, 1, MAX_STEPS)
    """Number of checkpoints to keep; older checkpoints are deleted."""
    eval_steps: int = bounded(1000, 1, MAX_STEPS)
    """Number of steps between measurements on data.validation."""
    metric_for_best_model: str | None = None
    """Metric that selects the best checkpoint, a copy of which is kept in the folder best of the run: validation_loss
    or another metric of data.validation, or a metric of evaluation, such as evaluation_CIDEr, evaluation_accuracy or
    evaluation_itm_IR@1. For losses, perplexities and calibration errors, lower is better. null: no best checkpoint is
    kept."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Experiment trackers to which the metrics are sent. The metrics are always written to metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options of text generation. A field that is null has the default of the task."""

    num_beams: int | None = bounded(None, 1, MAX_COUNT)
    """Number of beams; 1 is greedy decoding. Sampling has no beams. null: 5, or no beam search if top_k, top_p or min_p
    is set."""
    top_k: int | None = bounded(None, 1, MAX_COUNT)
    """Sampling instead of beam search: each token is sampled from this number of most likely tokens. null: all tokens,
    or beam search if top_p and min_p are not set either."""
    top_p: float | None = bounded(None, 1e-6, 1)
    """Nucleus sampling instead of beam search: each token is sampled from the smallest set of tokens with at least this
    total probability. null: beam search, unless top_k or min_p is set."""
    min_p: float | None = bounded(None, 0, 1)
    """Sampling instead of beam search: each token is sampled from the tokens whose probability is at least this share
    of that of the most likely token. null: all tokens, or beam search if top_k and top_p are not set either."""
    temperature: float | None = bounded(None, 1e-6, MAX_COUNT)
    """Temperature of sampling, by which the logits are divided; it needs top_k, top_p or min_p. null: 1."""
    length_penalty: float | None = bounded(None, -10, 10)
    """Length penalty of beam search: the score of a text is its log-probability / length ** length_penalty, so values
    below 0 favor short texts. null: 1 for captions, -1 for answers."""
    max_new_tokens: int | None = bounded(None, 1, MAX_COUNT)
    """Maximum length of a generated text in tokens. null: 30 for captions, 10 for answers."""
    repetition_penalty: float | None = bounded(None, 1e-6, MAX_COUNT)
    """Values above 1 make tokens that were already generated less likely; tokens of the prompt do not count. null: 1,
    no penalty."""
    no_repeat_ngram_size: int | None = bounded(None, 0, MAX_COUNT)
    """Number n of tokens: no n consecutive tokens are generated twice. 0: no such limit. null: 0."""
    stop_strings: list[str] | None = None
    """Texts that end the generation; the returned text ends before them. null: none."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.do_sample and self.temperature not in (None, 1):
            raise InputError(
                f"temperature is {self.temperature}, but nothing is sampled: also set top_p, top_k or min_p (top_p 1"
                " samples from all tokens), or leave out temperature"
            )
        check_stop_strings(self.stop_strings)

    @property
    def do_sample(self) -> bool:
        """Whether tokens are sampled: ``top_k``, ``top_p`` or ``min_p`` is set."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)

    def check_beams(self) -> None:
        """Check that only one of beam search and sampling is set.

        Raises:
            InputError: both are set.
        """
        if self.do_sample and self.num_beams is not None and self.num_beams > 1:
            used = next(name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None)
            raise InputError(
                f"num_beams is {self.num_beams} and {used} is {getattr(self, used)}, but sampling has no beams: leave"
                " out one of them"
            )


@dataclass(frozen=True)
class EvaluationConfig(DecodingOptions):
    """Evaluation during training, as by blip2 evaluate. The metrics are written to metrics.jsonl and the trackers under
    names that begin with evaluation_, and together with predictions and an HTML report to the folder
    evaluation/step-... of the run."""

    task: Literal["captioning", "vqa", "retrieval"]
    """Task to evaluate: retrieval for stage representation, captioning or vqa for stage generation."""
    data: str
    """Held-out records, in any format of data.train."""
    eval_steps: int = bounded(1000, 1, MAX_STEPS, option=None)
    """Number of steps between evaluations. The last step is always evaluated."""
    limit: int | None = bounded(None, 1, 10**12)
    """Maximum number of records: only the first records are evaluated. null: all."""
    prompt: str | None = None
    """Captioning: text that each caption continues. VQA: prompt with {} in the place of the question. null: the prompt
    of the model."""
    rerank_k: int = bounded(128, 0, 10**12)
    """Retrieval: number of candidates of each image, and of each text, that are re-ranked by ITM (§4.4). 0: no
    re-ranking."""
    fusion: Fusion = "itm"
    """Retrieval: score by which candidates are re-ranked. itm: ITM score. itm+itc: ITM logit of a match plus ITC
    similarity, as in LAVIS. itm+itc/temperature: ITM log-odds plus ITC similarity divided by its temperature, because
    ITM learns to tell a match from texts that ITC finds similar (hard negatives), and not from all texts."""
    rules: Literal["official", "lavis"] = "official"
    """VQA: rules for comparing answers. official: the rules of the benchmarks' current scripts. lavis: LAVIS's older
    rules, which always normalize predictions; the numbers in the paper were computed with them."""
    lemmatize: bool = False
    """VQA: also compute the accuracy of lemmatized answers, as LAVIS does for OK-VQA; for OK-VQA it is always computed.
    Needs spaCy."""
    control: bool = False
    """Also score the same records with the images shuffled and with blank images, and report how far the scores with
    the true images are above them (docs/evaluation.md)."""
    rank_by: Literal["lm", "pmi"] | None = None
    """VQA: also answer by ranking candidates by this score (docs/scoring.md). The candidates are the answers in
    answer_list or, without it, those in the column choices of each record. null: answers are only generated."""
    answer_list: str | None = None
    """VQA: file with the candidate answers that rank_by ranks, the same for all questions, one per line or as a JSON
    list. null: each record has its own choices."""
    calibration: bool = False
    """VQA: also report how well the confidence of the generated answers agrees with their accuracy, and the accuracy of
    the most certain answers (docs/calibration.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_beams()
        if self.task != "vqa" and (self.rank_by is not None or self.answer_list is not None or self.calibration):
            used = next(name for name in ("rank_by", "answer_list", "calibration") if getattr(self, name))
            raise InputError(f"{used} is set, but the task is {self.task}: leave out {used}, or set the task to vqa")
        if self.answer_list is not None and self.rank_by is None:
            raise InputError(
                f"answer_list is {self.answer_list}, but rank_by is null, so that nothing ranks these answers: set"
                " rank_by to lm or pmi, or leave out answer_list"
            )
        if self.calibration and self.prompt is not None:
            raise InputError(
                f"calibration is on and prompt is {self.prompt!r}, but the confidence of an answer is known for the"
                " model's own prompt only: leave out one of them"
            )


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
    """The LLM of stage generation. null: no LLM, as in stage representation."""
    objectives: ObjectivesConfig = ObjectivesConfig()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig | None = None
    """Evaluation during training. null: none."""
    start_from: str | list[str] | None = None
    """Run or checkpoint whose trained weights initialize this run, such as a stage-1 run for a stage-2 run. With a
    list, each weight is taken from the first checkpoint that contains it: [STAGE_2, STAGE_1] initializes a Q-Former
    that reads questions (Figure 7), because only the stage-1 checkpoint contains the text transformer. null: the
    Q-Former is initialized by qformer.bert; in stage generation, this is the run without stage 1 in Figure 5."""

    def __post_init__(self) -> None:
        if self.stage == "representation" and not any(self.objectives.stage1.values()):
            names = ", ".join(f"objectives.{name}" for name in self.objectives.stage1)
            raise InputError(f"all objectives are switched off: give one of {names} a weight above 0")
        check_ranges(self)
        _ = self.model  # checks the model
        if self.start_from is not None and not all(self.start_checkpoints or [""]):
            raise InputError(
                f"start_from is {self.start_from!r}, expected names of runs or checkpoints: correct it, or set"
                " start_from to null"
            )
        if not self.data.sources:
            raise InputError("data.train is empty, expected at least one source: name the training data")
        names = [("output", self.output), ("vision.name", self.vision.name), ("data.validation", self.data.validation)]
        for key, name in [*names, *(("data.train", source) for source in self.data.sources)]:
            if name is not None:
                check_not_blank(key, name)
        if self.data.cached_views and self.vision.name in (FEATURES, MODULE):
            raise InputError(
                f"data.cached_views is {self.data.cached_views}, but vision.name is {self.vision.name}:"
                + (" features are read as they are, and" if self.vision.reads_features else " its features")
                + " cannot be cached: set data.cached_views to 0"
            )
        self._check_evaluation()
        if self.training.shard_frozen and self.language is not None and self.language.quantization is not None:
            raise InputError(
                "training.shard_frozen and language.quantization are both set, but a quantized LLM cannot be sharded:"
                " leave out one of the two"
            )

    @property
    def model(self) -> ModelConfig:
        """The config of the model that the recipe trains. Parts that train are in fp32 if the recipe sets no dtype."""
        vision, language, data = self.vision, self.language, self.data
        if self.optimizer.trains("vision"):
            vision = replace(vision, dtype=vision.dtype or "fp32")
        if language is not None and language.lora is None and self.optimizer.trains("language"):
            language = replace(language, dtype=language.dtype or "fp32")
        return ModelConfig(self.stage, vision, self.qformer, language, data.text_normalization, data.max_length)

    @property
    def start_checkpoints(self) -> list[str]:
        """The runs or checkpoints of ``start_from``, as a list."""
        return [self.start_from] if isinstance(self.start_from, str) else self.start_from or []

    @property
    def starts_from_bert(self) -> bool:
        """Whether BERT's weights are loaded before those of ``start_from``.

        With ``start_from``, BERT is not loaded for a Q-Former of stage generation that reads no questions, because a
        stage-1 checkpoint contains all weights of that Q-Former; nor if ``start_from`` lists several checkpoints, which
        must contain the whole Q-Former.
        """
        needs_bert = not self.start_checkpoints or self.language is None or self.qformer.use_qformer_text_input
        return self.qformer.bert is not None and needs_bert and len(self.start_checkpoints) < 2

    def _check_evaluation(self) -> None:
        task = None if self.evaluation is None else self.evaluation.task
        if task is not None and (task == "retrieval") != (self.stage == "representation"):
            tasks = "retrieval" if self.stage == "representation" else "captioning or vqa"
            raise InputError(
                f"evaluation.task is {task}, which a model of stage {self.stage} cannot do: set evaluation.task to"
                f" {tasks}"
            )
        if task is not None and self.training.shard_frozen:
            raise InputError(
                "training.shard_frozen and evaluation are both set, but they cannot be combined, because an evaluation"
                " gives the processes different amounts of work: leave out one of the two, and evaluate checkpoints"
                " with blip2 evaluate"
            )
        best = self.training.metric_for_best_model or ""
        needs = {"validation_": ("data.validation", self.data.validation), "evaluation_": ("evaluation", task)}
        for prefix, (key, value) in needs.items():
            if best.startswith(prefix) and value is None:
                raise InputError(
                    f"training.metric_for_best_model is {best}, which needs {key}: set {key}, or choose another"
                    " training.metric_for_best_model"
                )
        if best and not best.startswith(tuple(needs)):
            raise InputError(
                f"training.metric_for_best_model is {best}, expected a name that begins with {' or '.join(needs)}:"
                " correct it, for example to validation_loss"
            )


def check_stop_strings(stop_strings: object) -> None:
    """Check that stop strings are a list of non-empty strings, or None.

    Raises:
        InputError: they are something else.
    """
    if stop_strings is None:
        return
    if not isinstance(stop_strings, list | tuple) or not all(isinstance(each, str) and each for each in stop_strings):
        raise InputError(
            f"stop_strings is {stop_strings!r}, expected a list of non-empty strings: correct it or leave it out"
        )


def check_ranges(section: Any, prefix: str = "") -> None:
    """Check the numbers of a dataclass, and of the dataclasses in its fields, against their ranges.

    Args:
        section: an instance of a dataclass, in which :func:`bounded` defines the ranges.
        prefix: text before the name of a field in the error message, such as ``vision.``.

    Raises:
        InputError: a number is outside its range, or a field with a range is null or a boolean.
    """
    for each in fields(section):
        name, value = f"{prefix}{each.name}", getattr(section, each.name)
        if is_dataclass(value):
            check_ranges(value, f"{name}.")
        elif "range" in each.metadata:
            several = isinstance(value, dict | list | tuple)
            for number in (value.values() if isinstance(value, dict) else value) if several else [value]:
                if number is None and not several and not _is_optional(type(section), each.name):
                    raise InputError(f"{name} is null, expected a number: give a number, or leave the key out")
                if isinstance(number, bool):
                    raise InputError(f"{name} is {str(number).lower()}, expected a number: give a number")
                expected = None if several or number is None else _expected_type(type(section), each.name, number)
                if expected is not None:
                    raise InputError(f"{name} is {number!r}, expected {expected}: give {expected}")
                expected = out_of_range(number, *each.metadata["range"]) if isinstance(number, float | int) else None
                if expected is not None:
                    raise InputError(f"{name} is {number}, expected {expected}")


def out_of_range(number: int | float, minimum: int | float, maximum: int | float) -> str | None:
    """Return the range that is expected of a number, such as ``at least 1``; None if the number is inside the range."""
    if minimum <= number <= maximum:
        return None
    if number < minimum and maximum >= 1000:
        return f"at least {minimum}"
    return f"at most {maximum}" if number > maximum >= 1000 else f"{minimum} to {maximum}"


def check_not_blank(key: str, name: str) -> None:
    """Check that the name of a file, folder or model is not blank, which would mean the current folder.

    Raises:
        InputError: it is blank; `key` is its name in the message.
    """
    if not name.strip():
        raise InputError(f"{key} is {name!r}, which would be the current folder: give a name, or . for that folder")


def _expected_type(section: type, key: str, value: object) -> str | None:
    """Return what is expected of a number of another type, such as ``a whole number``; None if the type is right."""
    kinds = _types(section, key)
    if kinds == {int}:
        return None if isinstance(value, Integral) else "a whole number"
    return "a number" if kinds == {float} and not isinstance(value, Real) else None


@cache
def _types(section: type, key: str) -> set[Any]:
    """Return the types that a field accepts, without None."""
    hint = get_type_hints(section)[key]
    return set(get_args(hint) or (hint,)) - {NoneType}


@cache
def _is_optional(section: type, key: str) -> bool:
    return NoneType in get_args(get_type_hints(section)[key])
