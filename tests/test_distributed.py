"""Two processes with half a batch each learn what one process with the whole batch learns."""

from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from blip2 import distributed
from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.config import ObjectivesConfig
from blip2.distributed import all_gather, all_gather_padded, gather_rows, rank_consistent_uniforms
from blip2.errors import InputError
from blip2.model.representation import Negatives, RepresentationBatch, RepresentationModel
from fixtures.tiny import QFORMER, randomize, texts

LENGTHS = (5, 7, 4, 9, 5, 10)  # the first process pads to 7, the second to 10
NEGATIVES = Negatives(torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([5, 3, 1, 0, 2, 4]))
LOCAL = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))  # among the pairs of one process
ODD_ONE_OUT = (0, 0, 0, 0, 0, 5)
# Which objectives are on, and whether the image encoder is trained.
CASES = {
    "itc": ({"itc"}, False),
    "itm": ({"itm"}, False),
    "itg": ({"itg"}, False),
    "all": ({"itc", "itm", "itg"}, False),
    "all with the image encoder": ({"itc", "itm", "itg"}, True),
}


def build(objectives: set[str], trains_encoder: bool) -> RepresentationModel:
    linear = nn.Linear(48, 24)

    def encode(pixels: Tensor) -> Tensor:
        return linear(F.unfold(pixels, 4, stride=4).mT)  # [B, 4, 24]

    enabled = ObjectivesConfig(**{name: float(name in objectives) for name in ("itc", "itm", "itg")})
    model = randomize(RepresentationModel(ImageEncoder(linear, encode, Preprocessing(8)), QFORMER, enabled))
    model.temperature.data.fill_(0.3)
    model.vision.requires_grad_(trains_encoder)
    return model.train()


def whole_batch() -> RepresentationBatch:
    """Pair 4 says what pair 0 says and shows what pair 1 shows, and belongs to the other process."""
    ids, mask = texts(*LENGTHS)
    ids[4] = ids[0]
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return RepresentationBatch(images, ids, mask, torch.tensor([0, 1, 2, 3, 1, 5]))


def take(batch: RepresentationBatch, pairs: Sequence[int]) -> RepresentationBatch:
    return RepresentationBatch(*(getattr(batch, field.name)[list(pairs)] for field in fields(batch)))


def half(rank: int, order: Sequence[int] = range(6)) -> tuple[RepresentationBatch, Negatives]:
    whole, rows = take(whole_batch(), order), slice(3 * rank, 3 * rank + 3)
    longest = int(whole.mask[rows].sum(dim=1).max())
    batch = RepresentationBatch(
        whole.images[rows], whole.ids[rows, :longest], whole.mask[rows, :longest], whole.image_ids[rows]
    )
    return batch, Negatives(NEGATIVES.image_for_text[rows], NEGATIVES.text_for_image[rows])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def averages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over both processes."""
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        dist.all_reduce(tensor)
    return {name: tensor / 2 for name, tensor in tensors.items()}


# -- what a process does -------------------------------------------------------------------------------------------


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    batch, negatives = half(rank)
    num_labels = whole_batch().num_labels / 2
    results = {}
    for name, case in CASES.items():
        model = build(*case)
        losses = model(batch, num_labels, negatives).losses
        sum(losses.values()).backward()
        results[name] = averages(losses), averages(gradients(model))

    # DDP averages by itself.
    for name in ("all", "all with the image encoder"):
        model = DistributedDataParallel(build(*CASES[name]))
        losses = model(batch, num_labels, negatives).losses
        sum(losses.values()).backward()
        results[f"{name}, DDP"] = averages(losses), gradients(model)

    # Drawing leaves no choice here: the last pair is the only negative of all others, which are all the same.
    model = build({"itm"}, False)
    results["drawn"] = averages(model(half(rank, ODD_ONE_OUT)[0]).losses)

    results["gathered"] = all_gather(torch.full((2, 1), rank)), all_gather_padded(torch.full((1, 2 + rank), rank), 9)
    results["process"] = distributed.rank(), distributed.world_size()
    results["of rank 0"] = distributed.all_gather_objects((distributed.on_rank_0(distributed.rank), refusal()))
    results["chances"] = all_gather(rank_consistent_uniforms(7, 2, 3).T).T
    both: list = [None, None]
    dist.all_gather_object(both, fetch_and_learn(rank))
    results["fetched"] = both
    if rank == 0:
        # Only this process evaluates: it would wait for the other forever if it gathered anything.
        results["evaluation"] = build({"itc", "itm", "itg"}, False).eval()(batch, negatives=LOCAL).losses
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def refusal() -> str:
    """What a process is told of an error on rank 0."""

    def refuse() -> None:
        raise InputError(f"refused by rank {distributed.rank()}")

    with pytest.raises(InputError) as error:
        distributed.on_rank_0(refuse)
    return str(error.value)


def fetch_and_learn(rank: int) -> tuple[Tensor, Tensor, list[int]]:
    """What a process fetches of rows 0 to 5, the gradients of its own rows, and how many rows it sends each."""
    own = (3 * rank + torch.arange(3.0))[:, None].repeat(1, 2).requires_grad_()
    sent = []
    exchange = dist.all_to_all_single

    def note(out: Tensor, tensor: Tensor, coming: list[int], going: list[int]) -> None:
        sent.append(going)
        exchange(out, tensor, coming, going)

    dist.all_to_all_single = note
    try:
        rows = gather_rows(own, torch.tensor([[4, 0, 4, 2], [0, 5, 1, 0]][rank]))
        (rows * torch.tensor([1.0, 10, 100, 1000])[:, None]).sum().backward()
    finally:
        dist.all_to_all_single = exchange
    return rows.detach()[:, 0], own.grad[:, 0], sent[0]


# -- what comes of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", [*CASES, "all, DDP", "all with the image encoder, DDP"])
def test_two_processes_learn_what_one_learns(results, name):
    model, batch = build(*CASES[name.removesuffix(", DDP")]), whole_batch()
    losses = model(batch, float(batch.num_labels), NEGATIVES).losses
    sum(losses.values()).backward()
    their_losses, their_gradients = results[name]
    torch.testing.assert_close(their_losses, {k: v.detach() for k, v in losses.items()})
    ours = gradients(model)
    assert their_gradients.keys() == ours.keys()
    assert ("vision.network.weight" in ours) == ("encoder" in name)
    for key, gradient in ours.items():
        # A softmax does not change when all of its scores are shifted: the gradient of a key's bias is rounding.
        limit = 1e-6 if key.endswith("key.bias") else max(1e-5 * gradient.norm(), 1e-7)
        assert (their_gradients[key] - gradient).norm() <= limit, key


def test_negatives_are_drawn_from_both_processes(results):
    negatives = Negatives(*2 * (torch.tensor([5, 5, 5, 5, 5, 0]),))
    expected = build({"itm"}, False)(take(whole_batch(), ODD_ONE_OUT), negatives=negatives).losses
    torch.testing.assert_close(results["drawn"], {"itm": expected["itm"].detach()})


def test_evaluation_keeps_to_its_own_process(results):
    expected = build({"itc", "itm", "itg"}, False)(half(0)[0], negatives=LOCAL).losses
    torch.testing.assert_close(results["evaluation"], expected)


def test_gathering_keeps_the_order_of_processes(results):
    rows, padded = results["gathered"]
    assert rows.flatten().tolist() == [0, 0, 1, 1]
    assert padded.tolist() == [[0, 0, 9], [1, 1, 1]]
    assert results["process"] == (0, 2)


def test_chances_of_two_processes_are_those_of_one(results):
    assert torch.equal(results["chances"], rank_consistent_uniforms(7, 2, 6))
    assert len(results["chances"].unique()) == 12


def test_only_what_was_drawn_travels_and_its_gradient_comes_home(results):
    (rows0, gradient0, sent0), (rows1, gradient1, sent1) = results["fetched"]
    assert rows0.tolist() == [4, 0, 4, 2]
    assert rows1.tolist() == [0, 5, 1, 0]
    assert sent0 == [2, 3]  # to itself rows 0 and 2, to the other rows 0, 1 and 0
    assert sent1 == [2, 1]
    assert gradient0.tolist() == [10 + 1 + 1000, 100, 1000]
    assert gradient1.tolist() == [0, 1 + 100, 10]


def test_what_rank_0_does_is_known_to_all(results):
    assert results["of rank 0"] == [(0, "refused by rank 0")] * 2


def test_one_process_gathers_nothing():
    tensor = torch.ones(2, 3)
    assert all_gather(tensor) is tensor
    assert all_gather_padded(tensor, 0) is tensor
    assert gather_rows(torch.arange(4), torch.tensor([2, 0, 2])).tolist() == [2, 0, 2]
    assert (distributed.on_rank_0(distributed.rank), refusal()) == (0, "refused by rank 0")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
