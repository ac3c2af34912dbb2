"""What saves a GPU's memory: activations are computed again in the backward pass, and what is frozen is dealt out to
the processes of a machine (FSDP2), so that each block is whole only while it computes."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from blip2.backbones.frozen import Freezable
from blip2.errors import InputError
from blip2.model.generation import GenerationModel
from blip2.model.representation import RepresentationModel


def checkpoint_activations(model: RepresentationModel | GenerationModel) -> list[str]:
    """Keep only the inputs of each block for the backward pass, in all parts through which gradients pass: the
    Q-Former, an image encoder that trains, and the LLM.

    Returns:
        What there is to say: parts that have no blocks, and keep everything.
    """
    model.qformer.checkpointing = True
    parts: dict[str, Freezable] = {} if model.vision.is_frozen else {"image encoder": model.vision}
    if isinstance(model, GenerationModel):
        parts["LLM"] = model.language
    bare = [name for name, part in parts.items() if not part.recompute_blocks()]
    return [f"training.gradient_checkpointing: the {name} is no stack of equal blocks and keeps all" for name in bare]


def leave_frozen(model: nn.Module) -> None:
    """Have DDP leave alone what does not train: it is the same in all processes, and does not travel."""
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]
    for part, module in model.named_children():
        if isinstance(module, Freezable) and (module.is_frozen or module.adapters):
            names += [f"{part}.{name}" for name, _ in module.named_buffers(remove_duplicate=False)]
    # The way that PyTorch's documentation of DDP names, in spite of its underscore.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # pyright: ignore[reportPrivateUsage]


def place_trained(model: nn.Module, device: torch.device) -> None:
    """Move to the device what trains, and every part that is never frozen."""
    for module in model.children():
        if not isinstance(module, Freezable):
            module.to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)


def shard_frozen(model: nn.Module, parts: dict[str, str], device: torch.device) -> int:
    """Deal out the frozen weights of the blocks of some parts, and move the rest of all to the device.

    Blocks come to the device one by one, so that at no time more than one of them is there as a whole. What lies
    outside them (embeddings, the output matrix) stays whole: it is little, and is read from several places. Weights are
    dealt out within a machine, so that they never travel between machines.

    Args:
        parts: names of parts, each with the method by which it is used.

    Returns:
        How many weights were dealt out.

    Raises:
        InputError: no part has blocks that are frozen, or machines have different numbers of processes.
    """
    mesh, sharded = _within_machine(device), 0
    for name, method in parts.items():
        part: Any = model.get_submodule(name)
        inside = {p for block in part.blocks for p in block.parameters() if not p.requires_grad}
        if not inside:
            continue
        sharded += sum(parameter.numel() for parameter in inside)
        outside = set(part.parameters()) - inside
        for block in part.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=outside)
        # One root above the blocks lets the next one come while another computes.
        fully_shard(part, mesh=mesh, ignored_params=outside)
        register_fsdp_forward_method(part, method)
    if not sharded:
        raise InputError(
            "training.shard_frozen finds no frozen blocks to deal out: they all train, or are read from the cache, or"
            " the network is no stack of blocks; set it to false"
        )
    model.to(device)
    return sharded


def _within_machine(device: torch.device) -> DeviceMesh:
    processes = dist.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes % here:
        raise InputError(
            f"training.shard_frozen needs the same number of processes on each machine, but there are {processes} and"
            f" {here} of them here"
        )
    return init_device_mesh(device.type, (processes // here, here), mesh_dim_names=("machine", "process"))["process"]
