"""Scripts of benchmarks/claims, which compute the paper's numbers."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGE1, STAGE2 = "pretrain-stage1-vit-g", "pretrain-stage2-vit-g-opt-2.7b"


@pytest.fixture(scope="module")
def cost():
    return runpy.run_path(str(ROOT / "benchmarks" / "claims" / "cost.py"))


@pytest.fixture(scope="module")
def counted(cost):
    """Parameters of the two models, and the operations of the second."""
    models = {name: cost["build"](name) for name in (STAGE1, STAGE2)}
    parameters = {name: cost["count_parameters"](name, model) for name, model in models.items()}
    return parameters, cost["count_operations"](STAGE2, models[STAGE2])


def test_parameters_of_stage_1(counted):
    """§3.1: the Q-Former contains 188M parameters."""
    found = counted[0][STAGE1]
    assert found["trainable"] == pytest.approx(188e6, rel=0.01)
    image, width, inner, vocabulary, contrastive = 1408, 768, 3072, 30_523, 256
    square, norm = width * width + width, 2 * width
    feed_forwards = 12 * (2 * width * inner + inner + width + norm)
    expected = {
        "image encoder": 985_949_440,
        "self-attention": 12 * (4 * square + norm),
        "cross-attention": 6 * (2 * square + 2 * (image * width + width) + norm),
        "feed-forwards of the queries": feed_forwards,
        "feed-forwards of the text": feed_forwards,
        "text embeddings": (vocabulary + 512) * width,
        "queries, norms of the inputs": 32 * width + norm + 2 * image,
        "heads of ITC, ITM and ITG": (
            2 * (width * contrastive + contrastive) + 1  # ITC and its temperature
            + 2 * width + 2  # ITM
            + square + norm + vocabulary  # ITG
        ),
    }  # fmt: skip
    assert found["parts"] == expected
    assert found["trainable"] == sum(expected.values()) - expected["image encoder"] == 186_705_470
    assert found["nominal_total"] is None


def test_parameters_of_stage_2(counted):
    """Table 2, third row: 107M trainable, 3.8B in total."""
    found = counted[0][STAGE2]
    assert sum(found["parts"].values()) == found["total"]
    assert round(found["trainable"] / 1e6) == 107
    assert found["parts"]["LLM"] == 2_651_596_800  # 2.65B of the nominal 2.7B
    assert round(found["nominal_total"] / 1e9, 1) == 3.8 == found["paper_total"] / 1e9
    text = counted[0][STAGE1]["parts"]
    removed = sum(text[part] for part in text if "text" in part or "heads" in part)
    assert found["trainable"] == counted[0][STAGE1]["trainable"] - removed + 768 * 2560 + 2560


def test_operations_of_stage_2(counted):
    found = counted[1]
    assert sum(part["share"] for part in found.values()) == pytest.approx(1)
    tokens, width, inner, layers = 257, 1408, 6144, 39
    block = 2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens**2 * width
    patches = 2 * 256 * 3 * 14 * 14 * width
    assert found["image encoder"]["forward"] == layers * block + patches
    assert found["image encoder"]["backward"] == 0  # frozen, and nothing before it trains
    assert found["projection"]["forward"] == 2 * 32 * 768 * 2560
    assert found["projection"]["backward"] == 2 * found["projection"]["forward"]
    # A frozen LLM gets gradients of its inputs, but none of its weights; the image features get none.
    assert found["LLM"]["backward"] == pytest.approx(found["LLM"]["forward"], rel=0.01)
    assert 1 < found["Q-Former"]["backward"] / found["Q-Former"]["forward"] < 2


def test_flan_t5_has_an_output_matrix_of_its_own(cost):
    """Its files have one besides the token embeddings, but transformers ties the two of a network without files."""
    network, _ = cost["language_model"]("google/flan-t5-xl")
    assert network.lm_head.weight is not network.shared.weight
    assert sum(weight.numel() for weight in network.parameters()) == 2_783_959_040 + 32_128 * 2048


def test_the_page_has_the_numbers(cost, counted, capsys):
    rows = [{"recipe": name, **found} for name, found in counted[0].items()]
    cost["print_parameters"](rows)
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    printed = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| (stage 1|ViT)", line)]
    assert len(printed) == 2
    for line in printed:
        assert line in page
