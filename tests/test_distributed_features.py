"""Two processes whose batches of features have different lengths learn what one process learns."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from blip2.backbones.features import FeatureFormat, cat_tokens
from blip2.backbones.vision import ImageEncoder
from blip2.config import ObjectivesConfig
from blip2.model.representation import Negatives, RepresentationBatch, RepresentationModel
from fixtures.tiny import QFORMER, randomize, texts

NEGATIVES = Negatives(torch.tensor([3, 0, 1, 2]), torch.tensor([2, 3, 0, 1]))
LENGTHS = (2, 3, 7, 1)  # the first process pads to 3 tokens, the second to 7


class Encoder(torch.nn.Linear):
    """Trains too, so that gradients return to the process that owns a record."""


def build() -> RepresentationModel:
    torch.manual_seed(0)
    linear = Encoder(6, 24)
    model = randomize(
        RepresentationModel(ImageEncoder(linear, linear, FeatureFormat(6, 9)), QFORMER, ObjectivesConfig())
    )
    model.temperature.data.fill_(0.3)
    model.vision.requires_grad_(True)
    return model.train()


def batch(rows: slice = slice(None)) -> RepresentationBatch:
    generator = torch.Generator().manual_seed(1)
    arrays = [torch.randn(1, 1, length, 6, generator=generator) for length in LENGTHS]
    ids, mask = texts(5, 7, 4, 9)
    return RepresentationBatch(cat_tokens(arrays[rows]), ids[rows], mask[rows], torch.arange(4)[rows])


def learn(rows: slice, labels: float):
    model = build()
    negatives = Negatives(*(each[rows] for each in NEGATIVES))
    losses = model(batch(rows), labels, negatives).losses
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timeout)
    found = learn(slice(2 * rank, 2 * rank + 2), batch().num_labels / 2)
    for tensors in found:
        for tensor in tensors.values():
            dist.all_reduce(tensor)
            tensor /= 2
    if rank == 0:
        torch.save(found, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return torch.load(folder / "results.pt")


def test_hard_negatives_of_another_process_may_be_longer(results):
    losses, gradients = learn(slice(None), float(batch().num_labels))
    torch.testing.assert_close(results[0], losses)
    assert results[1].keys() == gradients.keys() and "vision.network.weight" in gradients
    for key, gradient in gradients.items():
        assert gradient.isfinite().all()
        limit = 1e-6 if key.endswith("key.bias") else max(1e-5 * gradient.norm(), 1e-7)
        assert (results[1][key] - gradient).norm() <= limit, key
