"""The closed-form start of the projection from Z to the LLM."""

from dataclasses import replace

import pytest
import torch

from blip2.backbones.language import load_language_model
from blip2.backbones.vision_loaders import load_image_encoder
from blip2.errors import InputError
from blip2.model.generation import GenerationBatch, GenerationModel
from blip2.model.losses import IGNORE_INDEX
from blip2.pipelines import load
from blip2.training.projection import RIDGE, fit_projection
from blip2.training.trainer import train
from fixtures.tiny import QFORMER, randomize


@pytest.fixture(params=["llama", "t5"])
def model(parts, request):
    torch.manual_seed(0)
    language = load_language_model(getattr(parts, request.param))
    made = GenerationModel(load_image_encoder(parts.vision), QFORMER, language)
    randomize(made.qformer)
    return made


def batches(model, count: int, seed: int = 0) -> list[GenerationBatch]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        images = torch.randn(8, model.vision.num_tokens, model.vision.hidden_size, generator=generator)
        labels = torch.randint(5, 200, (8, 6), generator=generator)
        labels[::2, 4:] = IGNORE_INDEX
        ids = labels.clamp(min=0)
        out.append(GenerationBatch(images, ids, labels != IGNORE_INDEX, labels))
    return out


@torch.no_grad()
def test_it_is_the_ridge_regression_of_the_aligned_tokens(model):
    data = batches(model, 6)
    explained = fit_projection(model, data)
    z = torch.cat([model.query_outputs(batch.images) for batch in data]).double()
    tokens = []
    for batch in data:
        for row in batch.labels:
            said = row[row != IGNORE_INDEX][:-1].tolist()
            tokens.append([said[q * len(said) // QFORMER.num_query_tokens] for q in range(QFORMER.num_query_tokens)])
    targets = model.language.embed(torch.tensor(tokens)).double().flatten(0, 1)
    x = z.flatten(0, 1)
    x_mean, y_mean = x.mean(dim=0), targets.mean(dim=0)
    centered = x - x_mean
    penalty = RIDGE * centered.square().mean(dim=0).mean() * len(x)
    weight = torch.linalg.solve(
        centered.T @ centered + penalty * torch.eye(x.shape[1]), centered.T @ (targets - y_mean)
    )
    expected = centered @ weight + y_mean
    found = model.projection(z.flatten(0, 1).float()).double()
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), atol=1e-4, rtol=1e-3)
    residual = (targets - expected).square().sum() / (targets - y_mean).square().sum()
    assert 0 < explained <= 1 - float(residual) + 1e-6


@torch.no_grad()
def test_its_output_has_the_spread_of_the_token_embeddings(model):
    data = batches(model, 6)
    fit_projection(model, data)
    out = torch.cat([model.visual_prompt(batch.images) for batch in data])
    assert float(out.square().mean().sqrt()) == pytest.approx(model.language.embedding_scale(), rel=0.1)


def test_a_run_starts_with_it_and_resumes_without_fitting_again(parts, tmp_path):
    def recipe(output, steps, **changes):
        language = {"name": parts.llama, "projection_init": "least_squares"}
        training = {"max_steps": steps, "save_steps": 1, "device": "cpu", "precision": "fp32"}
        return parts.recipe(output, stage="generation", language=language, training=training, **changes)

    rates = {"projection.*": "frozen", "vision.*": "frozen", "language.*": "frozen", "*": 1e-3}
    train(recipe(tmp_path / "run", 1, optimizer={"learning_rate": rates}))
    first = load(tmp_path / "run", device="cpu").model.projection.weight
    random = recipe(tmp_path / "random", 1, optimizer={"learning_rate": rates})
    assert random.language is not None
    train(replace(random, language=replace(random.language, projection_init="random")))
    assert not torch.equal(first, load(tmp_path / "random", device="cpu").model.projection.weight)
    train(recipe(tmp_path / "run", 2, optimizer={"learning_rate": rates}), resume=True)
    assert torch.equal(first, load(tmp_path / "run", device="cpu").model.projection.weight)
    # A stage 2 that starts from a stage 2 keeps the projection that was learned.
    train(recipe(tmp_path / "next", 1, optimizer={"learning_rate": rates}, start_from=str(tmp_path / "run")))
    assert torch.equal(first, load(tmp_path / "next", device="cpu").model.projection.weight)


def test_a_stream_has_nothing_to_fit_to(parts, tmp_path):
    language = {"name": parts.llama, "projection_init": "least_squares"}
    with pytest.raises(InputError, match=r"needs a table in data\.train"):
        train(parts.recipe(tmp_path / "run", stage="generation", language=language, data={"streaming": True}))
