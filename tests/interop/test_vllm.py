"""What vLLM's loader of BLIP-2 expects of a folder.

Its loader is strict: a weight that its model does not have is an error. These are its modules: an image encoder with a
joint qkv, a Q-Former without text, the projection, and an LLM that vLLM has itself.
"""

import json
import re

import pytest
from transformers import AutoTokenizer, Blip2Processor

from blip2.convert import convert
from blip2.errors import InputError
from blip2.interop.weights import open_folder
from fixtures.checkpoints import QUERIES, save_transformers, share_qformer

LINEAR = r"\.(weight|bias)"
MODULES = (
    r"query_tokens",
    r"vision_model\.embeddings\.(class_embedding|position_embedding|patch_embedding\.(weight|bias))",
    rf"vision_model\.encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.(qkv|projection)|mlp\.fc[12]){LINEAR}",
    rf"vision_model\.post_layernorm{LINEAR}",
    rf"qformer\.layernorm{LINEAR}",
    rf"qformer\.encoder\.layer\.\d+\.attention\.(attention\.(query|key|value)|output\.(dense|LayerNorm)){LINEAR}",
    rf"qformer\.encoder\.layer\.\d*[02468]\.crossattention\.(attention\.(query|key|value)|output\.(dense|LayerNorm)){LINEAR}",
    rf"qformer\.encoder\.layer\.\d+\.(intermediate_query\.dense|output_query\.(dense|LayerNorm)){LINEAR}",
    rf"language_projection{LINEAR}",
    r"language_model\.(model|lm_head)\..+",
)


@pytest.mark.parametrize("flavor", ["opt", "llama"])
def test_exactly_its_weights(parts, tmp_path, flavor):
    model = save_transformers(tmp_path / "there", flavor, parts.bert)
    convert(tmp_path / "there", tmp_path / "served", "vllm")
    check(tmp_path / "served", set(open_folder(tmp_path / "there")), model.config.qformer_config.num_hidden_layers)


def test_a_run_of_ours(runs, tmp_path):
    convert(runs["llama"], tmp_path / "served", "vllm")
    check(tmp_path / "served", None, 2)


def check(folder, expected, layers):
    names = set(open_folder(folder))
    unknown = [name for name in names if not any(re.fullmatch(module, name) for module in MODULES)]
    assert not unknown
    assert expected is None or names == expected
    for i in range(layers):  # nothing that it has is missing
        assert f"qformer.encoder.layer.{i}.output_query.dense.weight" in names
        assert (f"qformer.encoder.layer.{i}.crossattention.attention.key.weight" in names) == (i % 2 == 0)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Blip2ForConditionalGeneration"]
    assert config["qformer_config"]["use_qformer_text_input"] is False
    vision = config["vision_config"]
    assert isinstance(vision["image_size"], int) and isinstance(vision["patch_size"], int)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab()["<image>"] == config["image_token_index"] < config["text_config"]["vocab_size"]
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["num_query_tokens"] == config["num_query_tokens"] == QUERIES
    processor = Blip2Processor.from_pretrained(folder)
    ids = processor.tokenizer("<image>" * QUERIES, add_special_tokens=False)["input_ids"]
    assert ids == [config["image_token_index"]] * QUERIES
    assert "vllm serve" in (folder / "README.md").read_text()


def test_the_heads_of_stage_1_are_left_out(parts, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    judge = save_transformers(first, None, parts.bert)
    writer = save_transformers(second, "opt", parts.bert)
    share_qformer(writer, judge, second)
    convert(second, tmp_path / "both", "transformers", stage1=first)
    convert(tmp_path / "both", tmp_path / "served", "vllm")
    check(tmp_path / "served", set(open_folder(second)), 3)


def test_what_it_does_not_serve(parts, runs, tmp_path):
    save_transformers(tmp_path / "t5", "t5", parts.bert)
    with pytest.raises(InputError, match="has an LLM of type t5, an encoder-decoder; vLLM serves"):
        convert(tmp_path / "t5", tmp_path / "out", "vllm")
    with pytest.raises(
        InputError, match="is a stage-1 model, which generates no text for vLLM to serve: give a stage-2 model"
    ):
        convert(runs["stage1"], tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()
