"""Frozen LLMs, decoder-only and encoder-decoder, behind one small class (paper §3.3, Figure 3).

Both kinds take a soft visual prompt before the embeddings of the text. They differ in where the text goes: a
decoder-only LLM reads prompt and caption as one sequence, an encoder-decoder reads the prompt (or the prefix of the
caption) in its encoder and writes the rest in its decoder.

Legend: B batch, I pictures, Q queries, T text tokens, U target tokens, L width of the LLM, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.activations import ACT2FN

from blip2.backbones.checks import check_gradient, find_way
from blip2.backbones.frozen import Freezable
from blip2.backbones.pretrained import read_config, read_model
from blip2.decoding.kv_cache import Prompts, beside_embeddings, blank_token, forward, text_config
from blip2.decoding.search import Decoding, Way
from blip2.errors import InputError
from blip2.model.kernels.linear import use_linear
from blip2.model.losses import IGNORED

POSITIONS = ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len", "n_ctx")
"""Names that configurations have for the number of positions."""


class LanguageModel(Freezable):
    """A pretrained LLM.

    Args:
        network: a ``...ForCausalLM`` or an encoder-decoder ``...ForConditionalGeneration`` of transformers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        use_linear(network)
        self.is_encoder_decoder: bool = bool(self.network.config.is_encoder_decoder)
        # What generation does is said by Decoding alone, not by defaults that came with the weights.
        start = start_token(self.network) if self.is_encoder_decoder else None
        self.network.generation_config = GenerationConfig(decoder_start_token_id=start)
        self._attention: str = self.network.config._attn_implementation
        self._way: Way | None = None
        self.freeze()
        embedding: Any = self.network.get_input_embeddings()
        self.width: int = embedding.weight.shape[1]
        self.vocabulary: int = embedding.weight.shape[0]
        self._ends_in_head = self._finds_head()
        names = set(getattr(network, "_no_split_modules", None) or ())  # transformers' word for them
        self.blocks = tuple(module for module in network.modules() if type(module).__name__ in names)

    def train(self, mode: bool = True) -> LanguageModel:
        """Adapters train in an LLM that stays in eval(), as one without them does."""
        super().train(mode)
        if self.adapters:
            self.network.eval()
            for name, module in self.named_modules():
                if self.adapters in name:
                    module.train(mode and not self.is_frozen)
        return self

    def own_precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, enabled=False) if self.adapters else super().own_precision(device)

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T L"]:
        return self.network.get_input_embeddings()(ids)

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """Root mean square of the token embeddings as the LLM sees them (some models scale them inside)."""
        step = max(self.vocabulary // 4096, 1)
        ids = torch.arange(0, self.vocabulary, step, device=self.network.device)
        return float(self.embed(ids[None]).float().square().mean().sqrt())

    def states(
        self,
        visual: Float[Tensor, "B Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        labels: Int[Tensor, "B U"],
    ) -> tuple[Float[Tensor, "M S"], Int[Tensor, "M"]]:
        """What :meth:`head` makes logits of, and the labels, at the M positions that carry a label and no others.

        Args:
            visual: the soft visual prompt, put before the text.
            ids, mask: the text, padded on the right: all of it for a decoder-only LLM, the encoder's part for an
                encoder-decoder.
            labels: for a decoder-only LLM one for each id (U = T), saying the id itself where it is to be predicted;
                for an encoder-decoder the decoder's targets. Other places hold -100.
        """
        inputs, seen = self._inputs(visual, ids, mask)
        counted = labels != IGNORED
        columns = counted.any(dim=0).nonzero().squeeze(1)
        arguments: dict[str, Any] = {"inputs_embeds": inputs, "attention_mask": seen}
        wanted = None
        if self.is_encoder_decoder:
            arguments["decoder_input_ids"] = self._decoder_input(labels)
        else:
            # The token at column t is predicted one position before it.
            wanted = visual.shape[1] + columns - 1
            counted, labels = counted[:, columns], labels[:, columns]
        with self.own_precision(inputs.device), self._without_head():
            arguments |= beside_embeddings(self.network, visual.shape[1], ids, inputs)
            states = forward(self.network, wanted, **arguments)
        return states[counted], labels[counted]

    def _decoder_input(self, labels: Int[Tensor, "B U"]) -> Int[Tensor, "B U"]:
        """What a decoder reads to write `labels`: its start token, then all of them but the last."""
        start = torch.full_like(labels[:, :1], self.network.generation_config.decoder_start_token_id)
        return torch.cat(
            [start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, blank_token(self.network))], dim=1
        )

    def head(self, states: Float[Tensor, "M S"]) -> Float[Tensor, "M V"]:
        """The logits of states."""
        with self.own_precision(states.device):
            return self._head(states)

    @property
    def _head(self) -> Any:
        """The output matrix; the identity where what an LLM does to its logits afterwards leaves no other way."""
        return self.network.get_output_embeddings() if self._ends_in_head else nn.Identity()

    @contextmanager
    def _without_head(self) -> Iterator[None]:
        """Have the network put out what its output matrix would read."""
        if not self._ends_in_head:
            yield
            return
        matrix = self.network.get_output_embeddings()
        matrix.forward = nn.Identity().forward
        try:
            yield
        finally:
            del matrix.forward

    @torch.no_grad()
    def _finds_head(self) -> bool:
        """Whether logits are what the output matrix puts out and nothing else: what it reads is handed on, and seen."""
        matrix: Any = self.network.get_output_embeddings()
        if not isinstance(matrix, nn.Linear) or matrix.weight.is_meta:
            return False
        ids = torch.zeros(1, 1, dtype=torch.long, device=matrix.weight.device)
        decoder = {"decoder_input_ids": ids} if self.is_encoder_decoder else {}
        read: list[Tensor] = []
        setattr(matrix, "forward", lambda states: read.append(states) or states)  # noqa: B010
        try:
            logits = self.network(input_ids=ids, use_cache=False, **decoder).logits
        except Exception:  # something is added that is as wide as the vocabulary
            return False
        finally:
            del matrix.forward
        return len(read) == 1 and logits.shape == read[0].shape and torch.equal(logits, read[0].to(logits.dtype))

    @torch.no_grad()
    def generate(
        self,
        visual: Float[Tensor, "I Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        decoding: Decoding,
        end: int,
        copies: int = 1,
        image_of: Int[Tensor, "B"] | None = None,
        dice: Float[Tensor, "N longest"] | None = None,
    ) -> Int[Tensor, "N U"]:
        """Write the continuation of each prompt.

        Args:
            visual: soft visual prompts.
            ids, mask: texts of the prompts, padded on either side. T may be 0.
            decoding: how.
            end: id of the token that ends a text; it also pads the result.
            copies: how many texts for each prompt; N = B * copies.
            image_of: the row of `visual` that each prompt begins with; None: one each (I = B). A decoder-only LLM reads
                a visual prompt once, however many prompts begin with it.
            dice: numbers in [0, 1) that decide what is sampled; None: PyTorch's own random numbers.

        Returns:
            New tokens only, the copies of a prompt beside each other.
        """
        prompts = self.prompts(visual, ids, mask, image_of)
        with self.own_precision(prompts.text.device):
            return self.way(self.network, prompts, decoding, self.ends(end), copies, dice)

    def prompts(
        self,
        visual: Float[Tensor, "I Q L"],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        image_of: Int[Tensor, "B"] | None = None,
    ) -> Prompts:
        """Prompts as the LLM reads them; see :meth:`generate`."""
        order = (~mask).long().argsort(dim=1, stable=True)  # padding goes to the right
        text = self.embed(ids.gather(1, order))
        self._choose_attention(text)
        if image_of is None:
            image_of = torch.arange(len(ids), device=ids.device)
        return Prompts(visual.to(text.dtype), text, ids.gather(1, order), mask.gather(1, order), image_of)

    @property
    def way(self) -> Way:
        """How it writes: the fastest way that predicts what training predicts (:mod:`blip2.backbones.checks`)."""
        if self._way is None:
            with self._trying():
                self._way = find_way(self.network, self._teach)
        return self._way

    def check(self, trains: bool = False) -> None:
        """Run the LLM for a few tokens, in every way in which it is used.

        Args:
            trains: see that a gradient reaches the visual prompt, too.

        Raises:
            InputError: it cannot be used; the message says why.
        """
        _ = self.way
        if trains:
            with self._trying():
                check_gradient(self.network, self._teach)

    def _teach(self, visual: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.states(visual, ids, mask, labels)[0])

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """Without dropout, and leaving PyTorch's random numbers as they are."""
        device = self.network.device
        training = [module for module in self.network.modules() if module.training]
        self.network.eval()
        self._choose_attention(self.embed(torch.zeros(1, 1, dtype=torch.long, device=device)))
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), self.own_precision(device):
                yield
        finally:
            for module in training:
                module.training = True

    @property
    def positions(self) -> int | None:
        """Tokens that it has positions for, the visual prompt included; None: no limit that it knows of."""
        config = text_config(self.network.config)
        found = (getattr(config, name, None) for name in POSITIONS)
        return next((each for each in found if isinstance(each, int) and each > 0), None)

    def ends(self, end: int) -> list[int]:
        """Tokens that end a text. Some chat models have several; where `end` is one of them, so are the others."""
        own = getattr(text_config(self.network.config), "eos_token_id", None)
        return [end, *(other for other in own if other != end)] if isinstance(own, list) and end in own else [end]

    def _inputs(
        self, visual: Float[Tensor, "B Q L"], ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B Q+T L"], Int[Tensor, "B Q+T"]]:
        text = self.embed(ids)
        self._choose_attention(text)
        seen = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1).long()
        return torch.cat([visual.to(text.dtype), text], dim=1), seen

    def _choose_attention(self, text: Tensor) -> None:
        if self._attention == "sdpa":
            # The backward of the CPU's fused kernel is slow in bfloat16, as in the Q-Former.
            slow = text.device.type == "cpu" and text.dtype == torch.bfloat16
            fitting = "eager" if slow else "sdpa"
            if self.network.config._attn_implementation != fitting:
                self.network.set_attn_implementation(fitting)


def load_language_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    activation: str | None = None,
    quantization: Literal["4bit", "8bit"] | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load any ``AutoModelForCausalLM`` or ``AutoModelForSeq2SeqLM``, frozen.

    Args:
        name: a folder or hub name in transformers' format.
        dtype: of the weights and of the computation. The paper used float16 for OPT, bfloat16 for FlanT5.
        activation: of its feed-forwards, in place of its own.
        quantization: bits a number of its matrices, but for embeddings and the output matrix.
        device: where it is to run, if it is quantized; it cannot be moved afterwards.
        trust_remote_code: whether Python code that lies beside its weights may run.

    Raises:
        InputError: there is no such model, it is not a language model, or bitsandbytes is needed and is not installed.
    """
    if quantization is None:
        return LanguageModel(read_network(name, dtype, activation, trust_remote_code=trust_remote_code))
    if find_spec("bitsandbytes") is None:
        raise InputError(
            f"language.quantization {quantization} needs bitsandbytes: pip install 'blip2[quantization]', or set it to"
            " null"
        )
    bits = {"load_in_4bit": True} if quantization == "4bit" else {"load_in_8bit": True}
    settings = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    place = {"": torch.device("cpu") if device is None else device}
    how = {"quantization_config": settings, "device_map": place}
    network = read_network(name, dtype, activation, how, trust_remote_code)
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # after a pass without gradients it would never pass one on
    return LanguageModel(network)


def read_network(
    name: str,
    dtype: torch.dtype | str,
    activation: str | None = None,
    how: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The network of :func:`load_language_model` alone; `dtype` may be ``auto``, that of its files; `how` else it is
    loaded goes to transformers."""
    config = read_config(name, "language model", trust_remote_code)
    set_activation(text_config(config), activation)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    known = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in known:
        auto = AutoModelForImageTextToText
    network = read_model(
        auto, name, "language model", dtype, config=config, how=how, trust_remote_code=trust_remote_code
    )[0]
    if network.config.is_encoder_decoder and getattr(network.config, "decoder_start_token_id", None) is None:
        network.config.decoder_start_token_id = start_token(network)
    return text_tower(network)


def text_tower(network: Any) -> Any:
    """The LLM inside one that reads images by itself (Gemma 3, Llama 4, Mistral 3 ...), which shares its weights.

    An LLM that is nothing else, and one whose text part transformers does not have as an LLM of its own (Qwen-VL), is
    returned as it is.
    """
    whole = network.config
    config = text_config(whole)
    if config is whole or whole.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return network
    with torch.device("meta"):
        alone: Any = AutoModelForCausalLM.from_config(config)
    tower, head = network.get_decoder(), network.get_output_embeddings()
    if type(tower) is not type(alone.base_model) or head is None:
        return network
    setattr(alone, alone.base_model_prefix, tower)
    alone.set_output_embeddings(head)
    if any(tensor.is_meta for tensor in (*alone.parameters(), *alone.buffers())):
        return network
    ends = getattr(whole, "eos_token_id", None)
    if ends is not None:  # the whole model's configuration knows the end of a turn, too
        config.eos_token_id = ends
    return alone.eval()


def start_token(network: Any) -> int:
    """Return the token that a decoder's text begins with.

    Raises:
        InputError: neither configuration of the LLM says it.
    """
    config, generation = network.config, network.generation_config
    decoder = config.get_text_config(decoder=True)
    found = [getattr(each, "decoder_start_token_id", None) for each in (generation, config, decoder)]
    found += [getattr(each, "bos_token_id", None) for each in (generation, config, decoder)]
    start = next((each for each in found if isinstance(each, int)), None)
    if start is None:
        raise InputError(
            f"the LLM, a {type(network).__name__}, does not say which token its texts begin with: add"
            " decoder_start_token_id to its config.json or generation_config.json"
        )
    return start


def activation_of(config: Any) -> str | None:
    """Return the activation of an LLM's feed-forwards; None where its configuration does not say it."""
    key = _activation_key(config)
    return None if key is None else getattr(config, key)


def _activation_key(config: Any) -> str | None:
    return next((key for key in ("dense_act_fn", "hidden_act", "activation_function") if hasattr(config, key)), None)


def set_activation(config: Any, activation: str | None) -> None:
    """Have the feed-forwards of an LLM use another activation than its own; None leaves it as it is.

    Raises:
        InputError: transformers has no such activation, or the LLM does not say which it has.
    """
    if activation is None:
        return
    if activation not in ACT2FN:
        raise InputError(f"language.activation is {activation!r}, expected one that transformers has, such as gelu")
    key = _activation_key(config)
    if key is None:
        raise InputError(f"an LLM of type {config.model_type} has no activation to set: leave out language.activation")
    setattr(config, key, activation)
