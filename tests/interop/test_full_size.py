"""The published checkpoints' names and shapes, built without memory from their published sizes, fit with nothing left.

Each is told twice: as transformers' own class has it, and as this project's model of those sizes.
"""

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from blip2.backbones.language import LanguageModel
from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.backbones.vision_loaders import wrap_transformers
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.interop import lavis, transformers
from blip2.interop.checkpoint import Checkpoint
from blip2.interop.key_map import rename_keys
from blip2.interop.weights import Weights
from blip2.model.generation import GenerationModel
from blip2.model.representation import RepresentationModel

OPT = OPTConfig(
    vocab_size=50304,
    hidden_size=2560,
    ffn_dim=10240,
    num_hidden_layers=32,
    num_attention_heads=32,
    word_embed_proj_dim=2560,
    max_position_embeddings=2048,
    eos_token_id=50118,
)
FLAN_T5 = T5Config(
    decoder_start_token_id=0,
    vocab_size=32128,
    d_model=2048,
    d_kv=64,
    d_ff=5120,
    num_layers=24,
    num_heads=32,
    feed_forward_proj="gated-gelu",
    dense_act_fn="gelu",
    tie_word_embeddings=False,
)
FLAN_T5_XXL = T5Config(**{**FLAN_T5.to_dict(), "d_model": 4096, "d_ff": 10240, "num_heads": 64})
VICUNA = {"vocab_size": 32001, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
VICUNA_7B = LlamaConfig(**VICUNA)
VICUNA_13B = LlamaConfig(
    **VICUNA, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
INSTRUCT = {
    "instructblip-vicuna-7b": (VICUNA_7B, 6.74e9),
    "instructblip-vicuna-13b": (VICUNA_13B, 13.02e9),
    "instructblip-flan-t5-xl": (FLAN_T5, 2.78e9),
    "instructblip-flan-t5-xxl": (FLAN_T5_XXL, 11.0e9),
}
PUBLISHED = {
    "blip2-opt-2.7b": (Blip2ForConditionalGeneration, OPT),
    "blip2-flan-t5-xl": (Blip2ForConditionalGeneration, FLAN_T5),
    "blip2-itm-vit-g": (Blip2ForImageTextRetrieval, None),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request):
    kind, llm = PUBLISHED[request.param]
    qformer = Blip2QFormerConfig(vocab_size=30523, use_qformer_text_input=llm is None)
    config = Blip2Config(vision_config=Blip2VisionConfig(), qformer_config=qformer, text_config=llm)
    with torch.device("meta"):
        return kind(config)


@pytest.fixture
def no_memory(monkeypatch):
    """Lets models be made on the meta device."""

    def probe(self, network, encode, preprocessing, layer="", blocks=()):  # which would need memory
        super(ImageEncoder, self).__init__()
        self.network, self.input_format, self.num_tokens, self.hidden_size = network, preprocessing, 257, 1408

    monkeypatch.setattr(ImageEncoder, "__init__", probe)
    monkeypatch.setattr(LanguageModel, "embedding_scale", lambda self: 1.0)
    monkeypatch.setattr(GenerationModel, "initialize_projection", lambda self: None)


@pytest.fixture
def ours(published, no_memory):
    """This project's model of the same sizes."""
    config = published.config
    with torch.device("meta"):
        vision = wrap_transformers(Blip2VisionModel(config.vision_config), Preprocessing(224))
        if isinstance(published, Blip2ForImageTextRetrieval):
            return RepresentationModel(vision, QFormerConfig(), ObjectivesConfig())
        return GenerationModel(vision, QFormerConfig(), LanguageModel(published.language_model))


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_names_and_shapes(published, ours):
    theirs = published.state_dict()
    renamed = rename_keys(theirs, transformers.KEY_MAP, "theirs")
    found = {renamed[name]: shape for name, shape in shapes(theirs).items()}
    expected = shapes(ours.state_dict())
    assert not [name for name in expected if "post_layernorm" in name]
    new = set(expected) - set(found)
    assert {name.split(".")[0] for name in new} <= {"language_head", "temperature"}  # which transformers drops
    assert found == {name: shape for name, shape in expected.items() if name not in new}
    back = rename_keys(found, transformers.KEY_MAP, "ours", inverse=True)
    assert {back[name]: shape for name, shape in found.items()} == shapes(theirs)


def test_the_q_former_has_the_paper_s_size(ours):
    """188M in stage 1 (§3.1), without the image encoder."""
    if isinstance(ours, RepresentationModel):
        trained = sum(p.numel() for name, p in ours.named_parameters() if not name.startswith("vision."))
        assert trained == pytest.approx(188e6, rel=0.01)


def test_for_lavis(published, ours):
    """Nothing is left over on the way to LAVIS's names and back."""
    state = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("language.")}
    eva = {k for k in state if k.startswith("vision.")}
    config = lavis.ModelConfig("representation", lavis.VisionConfig(""))
    is_t5 = "t5" in type(getattr(ours, "language", ours)).__name__.lower()
    for name in [name for name in eva if name.endswith("qkv.bias")]:
        state[name] = torch.zeros(state[name].shape)  # to see that keys have none needs numbers
    made = lavis.to_state_dict(Checkpoint("ours", "blip2", "", config, Weights(state)), "t5" if is_t5 else "opt")
    assert len([name for name in made if name.startswith("visual_encoder.")]) == 511
    lavis.merge_qkv_bias(made)
    made = {k: t for k, t in made.items() if "decoder" not in k and "position_ids" not in k}
    table = lavis.QFORMER_KEYS + lavis.OPT_KEYS + lavis.EVA_KEYS
    assert shapes(Weights(made).rename_keys(table, "theirs")) == shapes(state)


@pytest.mark.parametrize("name", INSTRUCT)
def test_instructblip(name, no_memory):
    """InstructBLIP of transformers, this project's model of its sizes, and LAVIS's names of what it trained."""
    llm, parameters = INSTRUCT[name]
    config = InstructBlipConfig(text_config=llm, qformer_config=InstructBlipQFormerConfig(vocab_size=30523))
    with torch.device("meta"):
        published = InstructBlipForConditionalGeneration(config)
        vision = wrap_transformers(Blip2VisionModel(Blip2VisionConfig()), Preprocessing(224))
        model = GenerationModel(
            vision, QFormerConfig(use_qformer_text_input=True), LanguageModel(published.language_model)
        )
    assert sum(p.numel() for p in published.language_model.parameters()) == pytest.approx(parameters, rel=0.01)
    theirs = published.state_dict()
    renamed = rename_keys(theirs, transformers.INSTRUCT_KEY_MAP, "theirs")
    found = {renamed[name]: shape for name, shape in shapes(theirs).items()}
    assert found == shapes(model.state_dict())
    back = rename_keys(found, transformers.INSTRUCT_KEY_MAP, "ours", inverse=True)
    assert {back[name]: shape for name, shape in found.items()} == shapes(theirs)

    state = {key: t for key, t in model.state_dict().items() if not key.startswith(("language.", "vision."))}
    kind = "llama" if "vicuna" in name else "t5"
    checkpoint = Checkpoint(
        "ours", "blip2", "", lavis.ModelConfig("representation", lavis.VisionConfig("")), Weights(state)
    )
    made = lavis.to_state_dict(checkpoint, kind)
    # Those of blip2_vicuna_instruct and blip2_t5_instruct: 12 blocks with two feed-forwards, 6 with cross-attention.
    assert {key.split(".")[0] for key in made} == {
        "query_tokens",
        "ln_vision",
        "Qformer",
        "llm_proj" if kind == "llama" else "t5_proj",
    }
    assert len(made) == 1 + 2 + 2 + (1 + 2 + 2) + 12 * (10 + 2 * 6) + 6 * 10
    again = {key: t for key, t in made.items() if "position_ids" not in key}
    assert shapes(Weights(again).rename_keys(lavis.QFORMER_KEYS + lavis.LANGUAGE_KEYS[kind], "x")) == shapes(state)
