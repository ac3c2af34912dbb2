"""Frozen LLMs, decoder-only and encoder-decoder, behind one interface (paper §3.3, Figure 3).

Both kinds read a soft visual prompt before the embeddings of the text. A decoder-only LLM reads prompt and caption as
one sequence; an encoder-decoder reads the prompt, or the prefix of the caption, in its encoder and generates the rest
of the text in its decoder.

Shapes: B batch, I images, N generated sequences, Q queries, T text tokens, U target tokens, M positions with a label, L
width of the LLM, S width of the input of :meth:`LanguageModel.lm_head`, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    StoppingCriteria,
)
from transformers.activations import ACT2FN

from blip2.backbones.checks import check_gradient, scores_continuations, select_generate_fn
from blip2.backbones.frozen import Freezable
from blip2.backbones.pretrained import load_config, load_model
from blip2.decoding.kv_cache import (
    IncrementalDecoder,
    PromptBatch,
    UncachedDecoder,
    forward_without_cache,
    get_pad_token_id,
    per_layer_inputs,
    text_config,
)
from blip2.decoding.search import PAD, Decoding, GenerateFn, cached_decoder_class, sample_steps
from blip2.decoding.search import generate as generate_with_cache
from blip2.errors import InputError
from blip2.model.kernels.linear import convert_linears
from blip2.model.losses import IGNORE_INDEX, MAX_LOGITS_PER_CHUNK

POSITION_KEYS = (
    "max_position_embeddings",
    "max_target_positions",
    "max_decoder_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
)
"""Names under which configurations of transformers store the maximum number of positions."""
VISUAL_PADDING = -math.inf
"""Every value of a token of a visual prompt that is padding, which the LLM does not see. It is not NaN, because a model
whose training diverges writes NaN, which must reach the loss."""
_REPLACING = threading.Lock()
"""Held while the ``forward`` of a module is replaced or restored."""


class LanguageModel(Freezable):
    """A pretrained LLM.

    Args:
        network: a ``...ForCausalLM`` or an encoder-decoder ``...ForConditionalGeneration`` of transformers.

    Raises:
        InputError: the LLM has no token embeddings, or is an encoder-decoder without a ``decoder_start_token_id``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        convert_linears(network)
        for module in network.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # a layer of bitsandbytes
                # After a pass without gradients, this kernel does not propagate gradients in later passes.
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
        self.is_encoder_decoder: bool = bool(self.network.config.is_encoder_decoder)
        # The options in Decoding determine how text is generated, not the generation_config.json of the LLM.
        start = get_decoder_start_token_id(self.network) if self.is_encoder_decoder else None
        self.network.generation_config = GenerationConfig(decoder_start_token_id=start)
        self._attn_implementation: str = self.network.config._attn_implementation
        self._generate_fn: GenerateFn | None = None
        self._shares_prompts: bool | None = None
        self.freeze()
        try:
            embedding: Any = self.network.get_input_embeddings()
        except NotImplementedError as error:
            raise InputError(
                f"the LLM, a {type(network).__name__}, has no token embeddings: set language.name to another LLM"
            ) from error
        self.hidden_size: int = embedding.weight.shape[1]
        self.vocab_size: int = embedding.weight.shape[0]
        self._has_plain_lm_head = self._detect_plain_lm_head()
        block_classes = set(getattr(network, "_no_split_modules", None) or ())
        self.blocks = tuple(module for module in network.modules() if type(module).__name__ in block_classes)

    def train(self, mode: bool = True) -> LanguageModel:
        """Set the training mode. An LLM with adapters stays in eval() except for the adapters."""
        super().train(mode)
        if self.adapter_key:
            self.network.eval()
            for name, module in self.named_modules():
                if self.adapter_key in name:
                    module.train(mode and not self.is_frozen)
        return self

    def autocast_context(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, enabled=False) if self.adapter_key else super().autocast_context(device)

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T L"]:
        """Return the embeddings of tokens.

        Raises:
            InputError: the LLM has no embedding for a token.
        """
        self._check_tokens(ids)
        return self.network.get_input_embeddings()(ids).to(ids.device)  # the layer may be on another device

    def _check_tokens(self, ids: Int[Tensor, "B T"]) -> None:
        """Check that the LLM has an embedding for each token; on a GPU, a wrong index would end the process.

        Some tokenizers have more special tokens than their LLM has embeddings, such as that of Gemma 3 1B.

        Raises:
            InputError: the LLM has no embedding for a token.
        """
        highest = int(ids.max()) if ids.numel() else 0
        if highest >= self.vocab_size:
            raise InputError(
                f"a text contains the special token {highest} of the tokenizer, but the LLM has embeddings only of the"
                f" tokens 0 to {self.vocab_size - 1}: leave this token out of the text"
            )

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """Return the root mean square of the token embeddings, measured on up to 8,192 tokens.

        If the LLM multiplies its embeddings by a scale, the scale is included.
        """
        step = max(self.vocab_size // 4096, 1)
        ids = torch.arange(0, self.vocab_size, step, device=self.network.device)
        return float(self.embed(ids[None]).float().square().mean().sqrt())

    def hidden_states(
        self,
        visual: Float[Tensor, "B Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        labels: Int[Tensor, "B U"],
    ) -> tuple[Float[Tensor, "M S"], Int[Tensor, "M"]]:
        """Run the LLM, and return the inputs of :meth:`lm_head` and the labels at the M positions that have a label.

        Args:
            visual: the soft visual prompt, which comes before the text. Tokens of :data:`VISUAL_PADDING` are left out.
            ids: token ids, padded on the right: the whole text for a decoder-only LLM, the text that the encoder reads
                for an encoder-decoder.
            mask: True for text tokens, False for padding.
            labels: token ids to predict: a copy of `ids` for a decoder-only LLM (U = T), the targets of the decoder for
                an encoder-decoder. -100 at positions without a label.
        """
        text_embeds = self.embed(ids)
        self._select_attn_implementation(text_embeds)
        visual, is_padding = _trim_padding(visual.to(text_embeds.dtype))
        if is_padding is not None:
            text_embeds, ids, mask, order = self._pack(visual, is_padding, text_embeds, ids, mask)
            if not self.is_encoder_decoder:
                labels = F.pad(labels, (visual.shape[1], 0), value=IGNORE_INDEX).gather(1, order)
            visual = visual[:, :0]
        inputs_embeds = torch.cat([visual, text_embeds], dim=1)
        attention_mask = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1).long()
        has_label = labels != IGNORE_INDEX
        columns = has_label.any(dim=0).nonzero().squeeze(1)
        kwargs: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        logits_to_keep = None
        if self.is_encoder_decoder:
            self._check_tokens(labels)
            kwargs["decoder_input_ids"] = self._shift_right(labels)
        else:
            # The token in column t is predicted in column t - 1.
            logits_to_keep = visual.shape[1] + columns - 1
            has_label, labels = has_label[:, columns], labels[:, columns]
        with self.autocast_context(inputs_embeds.device), self._without_lm_head():
            kwargs |= per_layer_inputs(self.network, visual.shape[1], ids, inputs_embeds)
            hidden_states = forward_without_cache(self.network, logits_to_keep, **kwargs)
        return hidden_states[has_label], labels[has_label]

    def _shift_right(self, labels: Int[Tensor, "B U"]) -> Int[Tensor, "B U"]:
        """Return the decoder's input for `labels`: the decoder's start token, then all labels but the last."""
        start = torch.full_like(labels[:, :1], self.network.generation_config.decoder_start_token_id)
        previous = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, get_pad_token_id(self.network))
        return torch.cat([start, previous], dim=1)

    def lm_head(self, hidden_states: Float[Tensor, "M S"]) -> Float[Tensor, "M V"]:
        """Compute logits from the first output of :meth:`hidden_states`."""
        with self.autocast_context(hidden_states.device):
            return self._lm_head(hidden_states).to(hidden_states.device)

    @property
    def _lm_head(self) -> Any:
        """The output layer; or the identity, if :meth:`hidden_states` returns logits (see :meth:`_without_lm_head`)."""
        return self.network.get_output_embeddings() if self._has_plain_lm_head else nn.Identity()

    @contextmanager
    def _without_lm_head(self) -> Iterator[None]:
        """Bypass the output layer within a context, so that the network returns the input of that layer.

        An LLM that processes the output of its output layer further is not changed: it returns logits.
        """
        if not self._has_plain_lm_head:
            yield
            return
        with _replaced_forward(self.network.get_output_embeddings(), nn.Identity().forward):
            yield

    @torch.no_grad()
    def _detect_plain_lm_head(self) -> bool:
        """Return whether logits are the unchanged output of the output layer, by running the LLM without that layer."""
        layer: Any = self.network.get_output_embeddings()
        if not isinstance(layer, nn.Linear) or layer.weight.is_meta:
            return False
        # Token 0 is often the padding token, whose embedding may be zero, and then so would all logits be.
        ids = torch.full((1, 1), self.vocab_size // 2, device=layer.weight.device)
        decoder_inputs = {"decoder_input_ids": ids} if self.is_encoder_decoder else {}
        inputs: list[Tensor] = []
        try:
            with _replaced_forward(layer, lambda hidden_states: inputs.append(hidden_states) or hidden_states):
                logits = self.network(input_ids=ids, use_cache=False, **decoder_inputs).logits
        except Exception:  # for example because a bias is added to the logits
            return False
        return len(inputs) == 1 and logits.shape == inputs[0].shape and torch.equal(logits, inputs[0].to(logits))

    @torch.no_grad()
    def generate(
        self,
        visual: Float[Tensor, "I Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        decoding: Decoding,
        eos_token_id: int,
        num_return_sequences: int = 1,
        image_index: Int[Tensor, "B"] | None = None,
        uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
        stopping_criteria: StoppingCriteria | None = None,
    ) -> Int[Tensor, "N U"]:
        """Generate continuations of prompts.

        Args:
            visual: soft visual prompts. Tokens of :data:`VISUAL_PADDING` are left out.
            ids: token ids of the texts of the prompts, padded on either side. T may be 0.
            mask: True for text tokens, False for padding.
            decoding: how to generate.
            eos_token_id: token that ends a sequence; it also pads the result.
            num_return_sequences: number of sequences per prompt; N = B * num_return_sequences.
            image_index: the row of `visual` with which each prompt begins, in [0, I). None: prompt i begins with row i
                (I = B). A decoder-only LLM computes each visual prompt once, even if several prompts begin with it.
            uniforms: random numbers in [0, 1) for sampling (see :func:`blip2.decoding.search.sample_top_p`). None:
                the numbers are drawn from PyTorch's generator.
            stopping_criteria: says which sequences end, besides those with an end token; see
                :func:`blip2.decoding.text.make_stopping_criteria`. None: no others.

        Returns:
            Token ids of the new tokens, without the prompts. The sequences of a prompt are in consecutive rows.
        """
        prompts = self.prepare_prompts(visual, ids, mask, image_index)
        with self.autocast_context(prompts.text_embeds.device):
            return self.generate_fn(
                self.network, prompts, decoding, self.eos_token_ids(eos_token_id), num_return_sequences, uniforms,
                stopping_criteria,
            )  # fmt: skip

    @torch.no_grad()
    def stream(
        self,
        prompt: PromptBatch,
        decoding: Decoding,
        eos_token_id: int,
        stopping_criteria: StoppingCriteria | None = None,
        read: Callable[[PromptBatch], IncrementalDecoder] | None = None,
    ) -> Iterator[list[int]]:
        """Generate the continuation of one prompt token by token.

        Args:
            prompt: a batch of one prompt.
            decoding: how to generate, without beam search.
            eos_token_id: token that ends the sequence.
            stopping_criteria: see :meth:`generate`.
            read: makes a decoder that has read the prompt. None: a new decoder, with a key-value cache if the LLM
                supports one (:attr:`has_kv_cache`).

        Yields:
            The token ids of all new tokens so far, after each token.
        """
        device = prompt.text_embeds.device
        decoder_class = cached_decoder_class(self.network) if self.has_kv_cache else UncachedDecoder
        with self.autocast_context(device):
            decoder = decoder_class(self.network, prompt) if read is None else read(prompt)
        eos = torch.tensor(self.eos_token_ids(eos_token_id), device=device)
        steps = sample_steps(decoder, decoding, eos, stopping_criteria=stopping_criteria)
        while True:
            with self.autocast_context(device):  # not around `yield`, which runs the caller's code
                sequences = next(steps, None)
            if sequences is None:
                return
            yield [token for token in sequences[0].tolist() if token != PAD]

    @property
    def has_kv_cache(self) -> bool:
        """Whether text is generated with the key-value cache of :mod:`blip2.decoding.kv_cache`."""
        return self.generate_fn is generate_with_cache

    def prepare_prompts(
        self,
        visual: Float[Tensor, "I Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        image_index: Int[Tensor, "B"] | None = None,
    ) -> PromptBatch:
        """Embed prompts and move their padding to the right; see :meth:`generate` for the arguments.

        If visual prompts differ in length, they become a part of the texts.
        """
        order = (~mask).long().argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        text_embeds = self.embed(ids)
        self._select_attn_implementation(text_embeds)
        if image_index is None:
            image_index = torch.arange(len(ids), device=ids.device)
        visual, is_padding = _trim_padding(visual.to(text_embeds.dtype))
        if is_padding is not None:
            visual, is_padding = visual[image_index], is_padding[image_index]
            text_embeds, ids, mask, _ = self._pack(visual, is_padding, text_embeds, ids, mask)
            visual, image_index = visual[:, :0], torch.arange(len(ids), device=ids.device)
        return PromptBatch(visual, text_embeds, ids, mask, image_index)

    @property
    def generate_fn(self) -> GenerateFn:
        """The fastest function for text generation whose predictions equal those of the LLM in training.

        It is determined at the first access; see :mod:`blip2.backbones.checks`.
        """
        if self._generate_fn is None:
            with self._checking():
                self._generate_fn = select_generate_fn(self.network, self._training_forward)
        return self._generate_fn

    @property
    def shares_prompts(self) -> bool:
        """Whether :meth:`continuation_log_probs` gives the predictions of the LLM in training.

        It is determined at the first access; see :mod:`blip2.backbones.checks`.
        """
        if self._shares_prompts is None:
            self._shares_prompts = self.generate_fn is generate_with_cache
            if self._shares_prompts:
                with self._checking():
                    self._shares_prompts = scores_continuations(self.network, self._training_forward)
        return self._shares_prompts

    @torch.no_grad()
    def continuation_log_probs(
        self,
        visual: Float[Tensor, "I Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        image_index: Int[Tensor, "B"],
        labels: Int[Tensor, "N U"],
        prompt_index: Int[Tensor, "N"],
        batch_size: int,
    ) -> Float[Tensor, "N"]:
        """Return the log-probability of texts that continue prompts. Each prompt is computed once for all its texts.

        Args:
            visual: soft visual prompts. Tokens of :data:`VISUAL_PADDING` are left out.
            ids: token ids of the texts of the prompts, padded on either side. T may be 0.
            mask: True for text tokens, False for padding.
            image_index: the row of `visual` with which each prompt begins, in [0, I).
            labels: token ids of the continuations, padded on the right with -100. Each has at least one token.
            prompt_index: the prompt that each continuation follows, in [0, B).
            batch_size: number of continuations per pass of the LLM.
        """
        self._check_tokens(labels)
        prompts = self.prepare_prompts(visual, ids, mask, image_index)
        has_label = labels != IGNORE_INDEX
        tokens, lengths = labels.masked_fill(~has_label, get_pad_token_id(self.network)), has_label.sum(dim=1)
        device = prompts.text_embeds.device
        with self.autocast_context(device), self._without_lm_head():
            decoder = cached_decoder_class(self.network)(self.network, prompts)
        # The first token follows the prompt, which all its continuations share.
        first = self._logits(decoder.logits).log_softmax(dim=-1)[prompt_index, tokens[:, 0]]
        later = first.new_zeros(tokens.shape)
        for rows in lengths.argsort(stable=True).split(batch_size):
            longest = int(lengths[rows].max())
            if longest == 1:
                continue
            with self.autocast_context(device), self._without_lm_head():
                previous = tokens[rows, : longest - 1]
                states = decoder.extend(previous, has_label[rows, : longest - 1], prompt_index[rows])
            predicted = has_label[rows, 1:longest]
            states, targets = states[predicted], tokens[rows, 1:longest][predicted]
            parts = zip(*(each.split(self._logits_per_chunk) for each in (states, targets)), strict=True)
            log_probs = [self._logits(part).log_softmax(dim=-1).gather(1, target[:, None]) for part, target in parts]
            filled = later.new_zeros(predicted.shape).masked_scatter(predicted, torch.cat(log_probs))
            later[rows, 1:longest] = filled
        return first + later.sum(dim=1)

    @property
    def _logits_per_chunk(self) -> int:
        """The number of positions whose logits are computed at a time."""
        return max(1, MAX_LOGITS_PER_CHUNK // self.vocab_size)

    def _logits(self, hidden_states: Float[Tensor, "M S"]) -> Float[Tensor, "M V"]:
        """Return logits in float32, from hidden states of any precision."""
        if self._has_plain_lm_head:
            hidden_states = hidden_states.to(self.network.get_output_embeddings().weight.dtype)
        return self.lm_head(hidden_states).float()

    def check(self, backward: bool = False) -> None:
        """Run the LLM on a few tokens in every way in which it is used.

        Args:
            backward: whether to check that a gradient reaches the visual prompt.

        Raises:
            InputError: the LLM cannot be used; the message has the reason.
        """
        _ = self.generate_fn
        if backward:
            with self._checking():
                check_gradient(self.network, self._training_forward)

    def _training_forward(self, visual: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return self.lm_head(self.hidden_states(visual, ids, mask, labels)[0])

    @contextmanager
    def _checking(self) -> Iterator[None]:
        """Disable dropout within a context, and restore training mode and PyTorch's random state at its end."""
        device = self.network.device
        training = [module for module in self.network.modules() if module.training]
        self.network.eval()
        self._select_attn_implementation(self.embed(torch.zeros(1, 1, dtype=torch.long, device=device)))
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), self.autocast_context(device):
                yield
        finally:
            for module in training:
                module.training = True

    @property
    def max_position_embeddings(self) -> int | None:
        """Maximum number of tokens, including the visual prompt; None if the configuration states no limit."""
        config = text_config(self.network.config)
        values = (getattr(config, key, None) for key in POSITION_KEYS)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    def eos_token_ids(self, eos_token_id: int) -> list[int]:
        """Return `eos_token_id`, and all end tokens of the configuration if `eos_token_id` is one of them."""
        own = getattr(text_config(self.network.config), "eos_token_id", None)
        if not isinstance(own, list) or eos_token_id not in own:
            return [eos_token_id]
        return [eos_token_id, *(other for other in own if other != eos_token_id)]

    def _pack(
        self,
        visual: Float[Tensor, "B Q L"],
        is_padding: Bool[Tensor, "B Q"],
        text_embeds: Float[Tensor, "B T L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B S L"], Int[Tensor, "B S"], Bool[Tensor, "B S"], Int[Tensor, "B S"]]:
        """Concatenate visual prompts of different lengths and texts, with all padding on the right.

        No position between a visual prompt and its text is left empty, since not all LLMs compute positions from the
        attention mask.

        Returns:
            The embeddings; the token ids, with padding tokens in the place of the visual prompts; the mask, True for
            tokens; and the column of [visual; text] from which each column is.
        """
        embeds = torch.cat([visual.masked_fill(is_padding[..., None], 0), text_embeds], dim=1)
        ids = torch.cat([ids.new_full(is_padding.shape, get_pad_token_id(self.network)), ids], dim=1)
        mask = torch.cat([~is_padding, mask], dim=1)
        order = (~mask).long().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
        return embeds, ids.gather(1, order), mask.gather(1, order), order

    def _select_attn_implementation(self, text_embeds: Tensor) -> None:
        if self._attn_implementation == "sdpa":
            # The backward pass of the fused CPU kernel is slow in bfloat16.
            is_slow = text_embeds.device.type == "cpu" and text_embeds.dtype == torch.bfloat16
            implementation = "eager" if is_slow else "sdpa"
            if self.network.config._attn_implementation != implementation:
                self.network.set_attn_implementation(implementation)


class _ThreadForward:
    """Stands in the place of a module's ``forward``, and calls another function in the threads that replaced it."""

    def __init__(self, module: nn.Module) -> None:
        self.own = vars(module).get("forward")
        self._forward = module.forward
        self.replacements: dict[int, Callable[..., Any]] = {}
        """The function of each thread, by the thread's identifier."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacements.get(threading.get_ident(), self._forward)(*args, **kwargs)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the ``forward`` of a module within a context, for this thread alone: others may be generating with it.

    The module may have a ``forward`` of accelerate (``device_map``). Contexts of a thread must not be nested.
    """
    thread = threading.get_ident()
    with _REPLACING:
        current = vars(module).get("forward")
        shared = current if isinstance(current, _ThreadForward) else _ThreadForward(module)
        shared.replacements[thread] = forward
        vars(module)["forward"] = shared
    try:
        yield
    finally:
        with _REPLACING:
            del shared.replacements[thread]
            if not shared.replacements:
                del vars(module)["forward"]
                if shared.own is not None:
                    vars(module)["forward"] = shared.own


def _trim_padding(visual: Float[Tensor, "I _ L"]) -> tuple[Float[Tensor, "I Q L"], Bool[Tensor, "I Q"] | None]:
    """Cut off the columns in which all visual prompts are padding, and return True for padding in the others.

    The second result is None if no padding is left.
    """
    is_padding = (visual == VISUAL_PADDING).all(dim=2)
    if not is_padding.any():
        return visual, None
    length = int((~is_padding).sum(dim=1).max())
    visual, is_padding = visual[:, :length], is_padding[:, :length]
    return visual, is_padding if bool(is_padding.any()) else None


def load_language_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    activation: str | None = None,
    load_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a pretrained LLM, frozen: any ``AutoModelForCausalLM`` or ``AutoModelForSeq2SeqLM`` of transformers.

    Args:
        name: a folder or hub name in transformers' format.
        dtype: data type of the weights and of the computation. The paper uses float16 for OPT, bfloat16 for FlanT5.
        activation: transformers' name of the activation of the feed-forwards. None: the LLM's own activation.
        load_kwargs: further arguments of ``from_pretrained``. Without a ``device_map`` the LLM is loaded on the CPU.
        trust_remote_code: whether Python code from the model's folder may run.

    Raises:
        InputError: there is no such model, or it is not a language model.
    """
    return LanguageModel(load_network(name, dtype, activation, load_kwargs, trust_remote_code))


def load_network(
    name: str,
    dtype: torch.dtype | str,
    activation: str | None = None,
    load_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load the network of an LLM; see :func:`load_language_model` for the arguments that are not listed here.

    Args:
        dtype: data type of the weights, or ``auto`` for the data type in the files.
        load_kwargs: further arguments of ``from_pretrained``.
    """
    config = load_config(name, "language model", trust_remote_code)
    set_activation(text_config(config), activation)
    auto_class: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in mapping:
        auto_class = AutoModelForImageTextToText
    network = load_model(
        auto_class,
        name,
        "language model",
        dtype,
        config=config,
        load_kwargs=load_kwargs,
        trust_remote_code=trust_remote_code,
    )[0]
    if network.config.is_encoder_decoder and getattr(network.config, "decoder_start_token_id", None) is None:
        network.config.decoder_start_token_id = get_decoder_start_token_id(network)
    return extract_text_model(network)


def extract_text_model(network: Any) -> Any:
    """Return the LLM of a model that has an image encoder of its own (Gemma 3, Llama 4, Mistral 3 ...).

    The LLM shares the weights of the model. A model without an image encoder is returned unchanged, and so is a model
    whose LLM has no class of its own in transformers (Qwen-VL).
    """
    full_config = network.config
    config = text_config(full_config)
    if config is full_config or full_config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return network
    with torch.device("meta"):
        llm: Any = AutoModelForCausalLM.from_config(config)
    decoder, lm_head = network.get_decoder(), network.get_output_embeddings()
    if type(decoder) is not type(llm.base_model) or lm_head is None:
        return network
    setattr(llm, llm.base_model_prefix, decoder)
    llm.set_output_embeddings(lm_head)
    if any(tensor.is_meta for tensor in (*llm.parameters(), *llm.buffers())):
        return network
    eos_token_id = getattr(full_config, "eos_token_id", None)
    if eos_token_id is not None:  # unlike the text configuration, it has the end-of-turn token
        config.eos_token_id = eos_token_id
    return llm.eval()


def get_decoder_start_token_id(network: Any) -> int:
    """Return the id of the token with which the input of an encoder-decoder's decoder begins.

    Raises:
        InputError: no configuration of the LLM contains the id.
    """
    configs = (network.generation_config, network.config, network.config.get_text_config(decoder=True))
    for key in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            if isinstance(token := getattr(config, key, None), int):
                return token
    raise InputError(
        f"the LLM, a {type(network).__name__}, does not say which token its texts begin with: add"
        " decoder_start_token_id to its config.json or generation_config.json"
    )


def activation_name(config: Any) -> str | None:
    """Return the name of the activation of an LLM's feed-forwards, or None if the configuration does not contain it."""
    key = _activation_key(config)
    return None if key is None else getattr(config, key)


def _activation_key(config: Any) -> str | None:
    return next((key for key in ("dense_act_fn", "hidden_act", "activation_function") if hasattr(config, key)), None)


def set_activation(config: Any, activation: str | None) -> None:
    """Replace the activation of an LLM's feed-forwards in the configuration of the LLM.

    Args:
        config: the configuration, changed in place.
        activation: transformers' name of the new activation. None: nothing is changed.

    Raises:
        InputError: transformers has no such activation, or the configuration does not contain an activation.
    """
    if activation is None:
        return
    if activation not in ACT2FN:
        raise InputError(
            f"language.activation is {activation!r}, expected the name of an activation in transformers, such as gelu"
        )
    key = _activation_key(config)
    if key is None:
        raise InputError(
            f"the configuration of an LLM of type {config.model_type} contains no activation that could be replaced:"
            " leave out language.activation"
        )
    setattr(config, key, activation)
