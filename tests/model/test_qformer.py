import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.model.attention import CrossAttention, SelfAttention
from blip2.model.image_memory import ImageMemory
from blip2.model.kernels.linear import NormalizedFeatures
from blip2.model.kernels.packing import PackedTokens
from blip2.model.qformer import QFormer, attention_mask, itc_itg_mask
from blip2.model.representation import RepresentationModel
from fixtures.tiny import QFORMER, no_encoder, randomize, texts

WIDTH = 24
NORM = randomize(nn.LayerNorm(WIDTH))
KINDS = ("unimodal", "causal", "bidirectional")


@pytest.fixture(scope="module")
def qformer() -> QFormer:
    return randomize(QFormer(QFORMER, WIDTH)).eval()


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# -- masks ---------------------------------------------------------------------------------------------------------


def draw(mask: torch.Tensor) -> list[str]:
    return ["".join("1" if allowed else "." for allowed in row) for row in mask.tolist()]


def parse_masks(drawn: str) -> dict[str, list[str]]:
    """Return the masks that are drawn in columns, by the title above each."""
    columns = zip(*(line.split() for line in drawn.strip().splitlines()), strict=True)
    return {title: list(rows) for title, *rows in columns}


# Two queries, then three text tokens.
FIGURE_2 = parse_masks("""
    unimodal  causal  bidirectional
    11...     11...   11111
    11...     11...   11111
    ..111     111..   11111
    ..111     1111.   11111
    ..111     11111   11111
""")
# The last token is padding.
PADDED = parse_masks("""
    unimodal  causal  bidirectional
    11...     11...   1111.
    11...     11...   1111.
    ..11.     111..   1111.
    ..11.     1111.   1111.
    ..11.     1111.   1111.
""")
TEXT_ALONE = parse_masks("""
    unimodal  causal  bidirectional
    11        1.      11
    11        11      11
""")
# Two queries, the text of ITC, the text of ITG.
BOTH = parse_masks("""
    whole     padded
    11......  11......
    11......  11......
    ..111...  ..11....
    ..111...  ..11....
    ..111...  ..11....
    11...1..  11...1..
    11...11.  11...11.
    11...111  11...11.
""")
TEXT = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_masks_of_figure_2(kind):
    mask = attention_mask(kind, 2, TEXT)
    assert draw(mask[0]) == FIGURE_2[kind]
    assert draw(mask[1]) == PADDED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_text_alone_and_of_queries_alone(kind):
    assert draw(attention_mask(kind, 0, TEXT[:1, :2])[0]) == TEXT_ALONE[kind]
    assert draw(attention_mask(kind, 2, TEXT[:1, :0])[0]) == ["11", "11"]


def test_the_mask_of_itc_and_itg_at_once():
    mask = itc_itg_mask(2, TEXT)
    assert draw(mask[0]) == BOTH["whole"]
    assert draw(mask[1]) == BOTH["padded"]


# -- size and parity -----------------------------------------------------------------------------------------------


def millions(module: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)


def test_parameter_counts_are_the_papers():
    """A BERT-base Q-Former for ViT-g. The paper says 188 M; the reference implementation has 186.7 M."""
    vision = no_encoder(257, 1408)
    with torch.device("meta"):
        model = RepresentationModel(vision, QFormerConfig(), ObjectivesConfig())
        queries_only = QFormer(QFormerConfig(), 1408, has_text=False)
    del model.vision
    assert millions(model) == 186.7
    assert millions(nn.ModuleList([queries_only, model.image_norm])) == 105.2


# Names of transformers' Blip2QFormerModel; a layer's number goes where {} is.
TRANSFORMERS = {
    "embedding_norm": "layernorm",
    "blocks.{}.self_attention.query": "encoder.layer.{}.attention.attention.query",
    "blocks.{}.self_attention.key": "encoder.layer.{}.attention.attention.key",
    "blocks.{}.self_attention.value": "encoder.layer.{}.attention.attention.value",
    "blocks.{}.self_attention.output": "encoder.layer.{}.attention.output.dense",
    "blocks.{}.self_attention.norm": "encoder.layer.{}.attention.output.LayerNorm",
    "blocks.{}.cross_attention.query": "encoder.layer.{}.crossattention.attention.query",
    "blocks.{}.cross_attention.key": "encoder.layer.{}.crossattention.attention.key",
    "blocks.{}.cross_attention.value": "encoder.layer.{}.crossattention.attention.value",
    "blocks.{}.cross_attention.output": "encoder.layer.{}.crossattention.output.dense",
    "blocks.{}.cross_attention.norm": "encoder.layer.{}.crossattention.output.LayerNorm",
    "blocks.{}.query_feed_forward.expand": "encoder.layer.{}.intermediate_query.dense",
    "blocks.{}.query_feed_forward.contract": "encoder.layer.{}.output_query.dense",
    "blocks.{}.query_feed_forward.norm": "encoder.layer.{}.output_query.LayerNorm",
    "blocks.{}.text_feed_forward.expand": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.text_feed_forward.contract": "encoder.layer.{}.output.dense",
    "blocks.{}.text_feed_forward.norm": "encoder.layer.{}.output.LayerNorm",
}


def peer(qformer: QFormer, has_text: bool) -> Blip2QFormerModel:
    """transformers' own Q-Former with the weights of ours."""
    ours, config = qformer.state_dict(), qformer.config
    model = Blip2QFormerModel._from_config(
        Blip2QFormerConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            encoder_hidden_size=WIDTH,
            use_qformer_text_input=has_text,
        ),
        attn_implementation="eager",  # the only one that gives attention maps
    )
    theirs = {
        f"{there.format(layer)}.{kind}": ours[f"{here.format(layer)}.{kind}"]
        for here, there in TRANSFORMERS.items()
        for layer in range(config.num_hidden_layers)
        for kind in ("weight", "bias")
        if f"{here.format(layer)}.{kind}" in ours and (has_text or "text_feed_forward" not in here)
    }
    model.load_state_dict(theirs)
    return model.eval()


def test_text_and_queries_agree_with_transformers(qformer, features):
    ids, mask = texts(6, 4, 2)
    ours = qformer(qformer.project_image(features, NORM), ids, attention_mask("bidirectional", 4, mask))
    text = qformer.word_embedding(ids) + qformer.position_embedding(torch.arange(6))
    out = peer(qformer, has_text=True)(
        query_embeds=torch.cat([qformer.queries.expand(3, -1, -1), text], dim=1),
        query_length=4,
        attention_mask=torch.cat([torch.ones(3, 4), mask], dim=1),
        encoder_hidden_states=NORM(features),
    ).last_hidden_state
    torch.testing.assert_close(ours.queries, out[:, :4], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.text[mask], out[:, 4:][mask], atol=1e-5, rtol=0)


def test_queries_alone_and_attention_maps_agree_with_transformers(qformer, features):
    memory = qformer.project_image(features, NORM)
    ours, maps = qformer(memory), qformer.attention_maps(memory)
    theirs = peer(qformer, has_text=False)(
        query_embeds=qformer.queries.expand(3, -1, -1), encoder_hidden_states=NORM(features), output_attentions=True
    )
    torch.testing.assert_close(ours.queries, theirs.last_hidden_state, atol=1e-5, rtol=0)
    assert ours.text.shape == (3, 0, 32)
    assert maps.shape == (3, 2, 4, 5)  # blocks 0 and 2 look at the image
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 2, 4))
    seen = [attention.mean(dim=1) for attention in theirs.cross_attentions]
    torch.testing.assert_close(maps, torch.stack(seen, dim=1), atol=1e-5, rtol=0)


def test_attention_maps_are_those_of_the_image_that_each_row_looks_at(qformer, features):
    memory = qformer.project_image(features, NORM)
    maps = qformer.attention_maps(memory)
    assert (maps[0] - maps[1]).abs().max() > 1e-2
    several = torch.tensor([2, 0, 0, 1])
    flipped = memory.select(torch.tensor([1, 0]))
    for changed, rows in (
        (flipped, [1, 0]),
        (memory.select(several), several.tolist()),
        (memory.repeat(2), [0, 1, 2, 0, 1, 2]),
        (flipped.repeat(2), [1, 0, 1, 0]),
        (memory.cat(flipped), [0, 1, 2, 1, 0]),
    ):
        assert len(changed) == len(rows)
        torch.testing.assert_close(qformer.attention_maps(changed), maps[rows], atol=1e-6, rtol=0)


def test_attention_maps_leave_no_hooks(qformer, features):
    memory = qformer.project_image(features, NORM)
    qformer.attention_maps(memory)
    assert not any(module._forward_pre_hooks for module in qformer.modules())


# -- who sees whom -------------------------------------------------------------------------------------------------


def run(qformer, features, ids, mask, kind):
    return qformer(qformer.project_image(features, NORM), ids, attention_mask(kind, QFORMER.num_query_tokens, mask))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_bidirectional_mask_shows_the_text_to_the_queries(qformer, features, kind):
    one, two = (run(qformer, features, *texts(5, 5, 5, seed=seed), kind).queries for seed in (0, 1))
    alone = qformer(qformer.project_image(features, NORM)).queries
    if kind == "bidirectional":
        assert (one - two).abs().amax(dim=(1, 2)).min() > 1e-2
    else:
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_unimodal_mask_hides_the_image_from_the_text(qformer, features, kind):
    ids, mask = texts(5, 5, 5)
    one, two = (run(qformer, images, ids, mask, kind).text for images in (features, -features))
    if kind == "unimodal":
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, qformer(None, ids, attention_mask(kind, 0, mask)).text)
    else:
        assert (one - two).abs().amax(dim=2).min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_causal_mask_hides_later_text(qformer, features, kind):
    ids, mask = texts(6, 6, 6)
    changed = ids.clone()
    changed[:, 3] = 4
    one, two = (run(qformer, features, i, mask, kind).text for i in (ids, changed))
    difference = (one - two).abs().amax(dim=(0, 2))
    assert difference[3:].min() > 1e-2
    assert difference[:3].max() < 1e-5 if kind == "causal" else difference[:3].min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(qformer, features, kind):
    lengths = (6, 4, 2)
    ids, mask = texts(*lengths)
    padded = run(qformer, features, ids.where(mask, 7), mask, kind)
    for row, length in enumerate(lengths):
        only = slice(row, row + 1)
        alone = run(qformer, features[only], ids[only, :length], mask[only, :length], kind)
        torch.testing.assert_close(padded.queries[only], alone.queries)
        torch.testing.assert_close(padded.text[only, :length], alone.text)


def test_padding_is_not_computed(qformer, features):
    ids, mask = texts(6, 4, 2)
    tokens = []
    for block in qformer.blocks:
        block.text_feed_forward.register_forward_hook(lambda module, inputs, output: tokens.append(len(inputs[0])))
    text = run(qformer, features, ids, mask, "causal").text
    assert tokens == [12] * len(qformer.blocks)
    assert text.shape[:2] == mask.shape and not text[~mask].any()


def test_one_pass_contrasts_and_generates(qformer, features):
    ids, mask = texts(6, 4, 2)
    begun = ids.clone()
    begun[:, 0] = qformer.decoder_start_token_id
    both = qformer(
        qformer.project_image(features, NORM),
        torch.cat([ids, begun], dim=1),
        itc_itg_mask(4, mask),
        torch.arange(6).repeat(2),
    )
    contrast, generate = run(qformer, features, ids, mask, "unimodal"), run(qformer, features, begun, mask, "causal")
    torch.testing.assert_close(both.queries, contrast.queries)
    torch.testing.assert_close(both.text[:, :6][mask], contrast.text[mask])
    torch.testing.assert_close(both.text[:, 6:][mask], generate.text[mask])


def test_text_begins_at_position_zero_after_the_queries(qformer, features):
    ids, mask = texts(5, 5, 5)
    memory, causal = qformer.project_image(features, NORM), attention_mask("causal", 4, mask)
    torch.testing.assert_close(qformer(memory, ids, causal).text, qformer(memory, ids, causal, torch.arange(5)).text)
    moved = qformer(memory, ids, causal, torch.arange(5) + 4).text
    assert (moved - qformer(memory, ids, causal).text).abs().max() > 1e-2


def test_decoder_start_is_the_last_id(qformer):
    assert qformer.decoder_start_token_id == 29


# -- image memory --------------------------------------------------------------------------------------------------


def keys_and_values(memory: ImageMemory) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and values of each layer, with a copy for each row."""

    def expand(part: torch.Tensor, images: torch.Tensor | int) -> torch.Tensor:
        return part.repeat(images, 1, 1, 1) if isinstance(images, int) else part[images]

    return [
        tuple(torch.cat([expand(kv[part], kv.row_to_image) for kv in layer]) for part in (0, 1))
        for layer in memory.layer_kv
    ]


def assert_same_memory(one: ImageMemory, two: ImageMemory) -> None:
    assert len(one) == len(two)
    torch.testing.assert_close(keys_and_values(one), keys_and_values(two))


def test_memories_are_made_from_each_image_alone(qformer, features):
    memory = qformer.project_image(features, NORM)
    assert len(memory) == 3
    assert len(memory.layer_kv) == 2
    order = torch.tensor([2, 0, 0, 1])
    assert_same_memory(memory.select(order), qformer.project_image(features[order], NORM))
    assert_same_memory(memory.select(order[:1]).repeat(3), qformer.project_image(features[[2, 2, 2]], NORM))
    assert all(
        kv.keys is mine.keys for (kv,), (mine,) in zip(memory.select(order).layer_kv, memory.layer_kv, strict=True)
    )
    assert_same_memory(qformer.project_image(features[:1], NORM).cat(qformer.project_image(features[1:], NORM)), memory)


def test_rows_that_share_an_image_see_what_they_would_see_alone(qformer, features):
    """Two rounds of the three images, then two rows that look at images drawn: as in ITM."""
    memory, drawn = qformer.project_image(features, NORM), torch.tensor([2, 0])
    ids, mask = texts(5, 3, 6, 2, 4, 6, 3, 5)
    shared = memory.repeat(2).cat(memory.select(drawn))
    whole = qformer(shared, ids, attention_mask("bidirectional", 4, mask)).queries
    for row, image in enumerate([0, 1, 2, 0, 1, 2, 2, 0]):
        one, length = slice(row, row + 1), int(mask[row].sum())
        alone = run(qformer, features[image : image + 1], ids[one, :length], mask[one, :length], "bidirectional")
        torch.testing.assert_close(whole[one], alone.queries)


def test_the_norm_of_the_features_is_folded_exactly(features):
    """Its gradient and those of the projections are those of normalizing first and projecting then."""
    torch.set_grad_enabled(True)
    attention, norm = randomize(CrossAttention(QFORMER, WIDTH)), randomize(nn.LayerNorm(WIDTH))
    plain = nn.functional.layer_norm(features, (WIDTH,))
    results = []
    for source in (NormalizedFeatures(plain, norm), NormalizedFeatures(norm(features), None)):
        keys, values, *_ = attention.project_image(source)
        attention.zero_grad()
        norm.zero_grad()
        (keys.cumsum(1).sin().sum() + values.cumsum(2).cos().sum()).backward()
        found = {name: p.grad.clone() for name, p in attention.named_parameters() if p.grad is not None}
        results.append((keys, values, found, norm.weight.grad.clone(), norm.bias.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_no_gradient_is_computed_for_frozen_features(features):
    """The inputs of a projection are a bias, features and a weight; frozen features get no gradient."""
    torch.set_grad_enabled(True)
    qformer, norm = QFormer(QFORMER, WIDTH), nn.LayerNorm(WIDTH)
    for given, asked in ((features, False), (features.clone().requires_grad_(), True)):
        node = qformer.project_image(given, norm).layer_kv[0][0].keys.grad_fn
        while node.name() != "AddmmBackward0":
            node = node.next_functions[0][0]
        bias, source, weight = (function is not None for function, _ in node.next_functions)
        assert (bias, source, weight) == (True, asked, True)


def test_checkpointing_changes_nothing_but_memory(features):
    torch.set_grad_enabled(True)
    qformer = randomize(QFormer(dataclasses.replace(QFORMER, dropout=0.3), WIDTH)).train()
    ids, mask = texts(6, 4, 2)
    results = []
    for qformer.gradient_checkpointing in (False, True):
        qformer.zero_grad()
        torch.manual_seed(5)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            out = run(qformer, features, ids, mask, "causal")
        out.queries.sin().sum().add(out.text[mask].cos().sum()).backward()
        gradients = {name: p.grad.clone() for name, p in qformer.named_parameters() if p.grad is not None}
        results.append((out, gradients, sum(kept)))
    (one, there, whole), (two, here, less) = results
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(there, here, rtol=0, atol=0)
    assert less < whole / 2


COMPILED = """
import torch
from torch import nn
from blip2.model.qformer import QFormer, attention_mask
from fixtures.tiny import QFORMER, randomize, texts

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # gradients of 50 differ by more than 1e-4 in fp32 now and then
features, norm = torch.randn(3, 5, 24), nn.LayerNorm(24)
plain, compiled = randomize(QFormer(QFORMER, 24)).train(), QFormer(QFORMER, 24).train()
compiled.load_state_dict(plain.state_dict())
compiled.compile_blocks()
graphs = []
for lengths in ((6, 4, 2), (5, 5, 5), (9, 8, 7), (3, 2, 1)):
    ids, mask = texts(*lengths)
    results = []
    for qformer in (plain, compiled):
        qformer.zero_grad()
        causal = attention_mask("causal", QFORMER.num_query_tokens, mask)
        out = qformer(qformer.project_image(features, norm), ids, causal)
        out.queries.sin().sum().add(out.text[mask].cos().sum()).backward()
        results.append((*out, {name: p.grad for name, p in qformer.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
assert 0 < graphs[0] == graphs[-1], graphs
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_blocks_give_the_same_and_no_length_compiles_them_again():
    """In a process of its own: the checks of shapes in these tests cannot be compiled."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_text_output_the_queries_are_the_same(qformer, features):
    ids, mask = texts(6, 4, 2)
    arguments = (qformer.project_image(features, NORM), ids, attention_mask("bidirectional", 4, mask))
    whole, queries = qformer(*arguments), qformer(*arguments, output_tokens=False)
    torch.testing.assert_close(queries.queries, whole.queries)
    assert queries.text.shape[1] == 0


@pytest.mark.parametrize("with_image", [True, False])
def test_the_last_block_writes_what_is_wanted_and_the_rest_is_zero(qformer, features, with_image):
    ids, mask = texts(6, 4, 2)
    wanted = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]]).bool()  # one is padding
    memory = qformer.project_image(features, NORM) if with_image else None
    arguments = (memory, ids, attention_mask("causal", 4 if with_image else 0, mask))
    written = []
    contract = qformer.blocks[-1].text_feed_forward.contract
    hook = contract.register_forward_hook(lambda module, inputs, _: written.append(len(inputs[0])))
    whole, chosen = qformer(*arguments), qformer(*arguments, output_tokens=wanted)
    hook.remove()
    torch.testing.assert_close(chosen.queries, whole.queries)
    torch.testing.assert_close(chosen.text, whole.text * (wanted & mask)[..., None])
    assert written == [12, 5]


# -- errors, precision, training -----------------------------------------------------------------------------------


def test_nothing_to_read(qformer):
    with pytest.raises(ValueError, match="image memory, text ids, or both"):
        qformer(None)


def test_text_for_a_qformer_without_text(features):
    qformer = QFormer(QFORMER, WIDTH, has_text=False)
    with pytest.raises(ValueError, match="without its text transformer"):
        qformer(qformer.project_image(features, NORM), texts(5, 5, 5)[0])


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_bfloat16_agrees_with_float32(masked):
    half = randomize(SelfAttention(QFORMER, 32)).bfloat16()
    full = SelfAttention(QFORMER, 32)
    full.load_state_dict(half.state_dict())
    real = texts(5, 3, 2)[1] if masked else torch.ones(3, 5, dtype=torch.bool)
    tokens, mask = PackedTokens.from_mask(3, 4, real), attention_mask("causal", 4, real)[:, None] if masked else None
    x = torch.randn(12 + int(real.sum()), 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = []
    with torch.enable_grad():
        for attention, source in ((half, x), (full, x.float())):
            out = tokens.cat(*attention(*tokens.split(source), mask, tokens, tokens))
            assert out.dtype == source.dtype
            out.float().square().cumsum(dim=0).sum().backward()
            gradients.append((out.float(), attention.query.weight.grad.float(), attention.value.weight.grad.float()))
    # Scores are rounded to 8 bits too, as autocast does it everywhere.
    for near, exact in zip(*gradients, strict=True):
        assert (near - exact).norm() < 0.05 * exact.norm()


def test_autocast_agrees_with_float32(qformer, features):
    ids, mask = texts(6, 4, 2)
    exact = run(qformer, features, ids, mask, "causal")
    with torch.autocast("cpu", torch.bfloat16):
        near = run(qformer, features, ids, mask, "causal")
    for a, b in ((near.queries, exact.queries), (near.text[mask], exact.text[mask])):
        assert (a - b).norm() < 0.05 * b.norm()


def test_the_first_block_projects_queries_once_for_all_rows_unless_dropout_makes_them_others(features):
    qformer = randomize(QFormer(dataclasses.replace(QFORMER, dropout=0.5), WIDTH))
    ids, mask = texts(6, 4, 2)
    seen = []
    qformer.blocks[0].self_attention.key.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])))
    for training in (False, True):
        run(qformer.train(training), features, ids, mask, "causal")
    assert seen == [4 + 12, 3 * 4 + 12]


def test_a_single_block_that_leaves_the_text_out(features):
    qformer = randomize(QFormer(dataclasses.replace(QFORMER, num_hidden_layers=1), WIDTH))
    ids, mask = texts(6, 4, 2)
    arguments = (qformer.project_image(features, NORM), ids, attention_mask("bidirectional", 4, mask))
    torch.testing.assert_close(qformer(*arguments, output_tokens=False).queries, qformer(*arguments).queries)


def test_dropout_acts_in_training_only(features):
    qformer = randomize(QFormer(dataclasses.replace(QFORMER, dropout=0.5), WIDTH))
    memory = qformer.project_image(features, NORM)
    assert not torch.equal(qformer(memory).queries, qformer(memory).queries)
    qformer.eval()
    assert torch.equal(qformer(memory).queries, qformer(memory).queries)
