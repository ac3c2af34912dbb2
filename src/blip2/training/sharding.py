"""Reducing GPU memory: gradient checkpointing, and sharding the frozen parts with FSDP2.

With FSDP2, each process of a machine stores a share of the frozen weights; a block is complete only while it computes.
"""

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


def enable_gradient_checkpointing(model: RepresentationModel | GenerationModel) -> list[str]:
    """Recompute the activations of each block in the backward pass, in all parts through which gradients pass.

    These parts are the Q-Former, an image encoder that trains, and the LLM.

    Returns:
        Messages about parts that are not stacks of blocks and therefore still store all activations.
    """
    model.qformer.gradient_checkpointing = True
    parts: dict[str, Freezable] = {} if model.vision.is_frozen else {"image encoder": model.vision}
    if isinstance(model, GenerationModel):
        parts["LLM"] = model.language
    unsupported = [name for name, part in parts.items() if not part.gradient_checkpointing_enable()]
    return [
        f"training.gradient_checkpointing has no effect on the {name}, which is not a stack of equal blocks"
        for name in unsupported
    ]


def ignore_frozen_in_ddp(model: nn.Module) -> None:
    """Make DDP ignore the parameters and buffers that do not train, because they are equal in all processes."""
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]
    for part, module in model.named_children():
        if isinstance(module, Freezable) and (module.is_frozen or module.adapter_key):
            names += [f"{part}.{name}" for name, _ in module.named_buffers(remove_duplicate=False)]
    # The documentation of DDP names this function, in spite of its underscore.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # pyright: ignore[reportPrivateUsage]


def move_trainable(model: nn.Module, device: torch.device) -> None:
    """Move the parameters that train, and the parts that are never frozen, to the device."""
    for module in model.children():
        if not isinstance(module, Freezable):
            module.to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)


def shard_frozen(model: nn.Module, methods: dict[str, str], device: torch.device) -> int:
    """Shard the frozen weights of the blocks of some parts, and move the rest of the model to the device.

    Blocks are moved one by one, so that the device holds at most one complete block at any time. Weights outside the
    blocks (embeddings, the output matrix) are replicated, because they are small and used in several places. Each
    machine holds all weights, so that no weights are sent between machines.

    Args:
        model: the model.
        methods: for each part to shard, by name, the name of the method that the model calls on it.
        device: device of this process.

    Returns:
        The number of sharded weights.

    Raises:
        InputError: no part has frozen blocks, or machines have different numbers of processes.
    """
    mesh, sharded = _machine_mesh(device), 0
    for name, method in methods.items():
        part: Any = model.get_submodule(name)
        inside = {p for block in part.blocks for p in block.parameters() if not p.requires_grad}
        if not inside:
            continue
        sharded += sum(parameter.numel() for parameter in inside)
        outside = set(part.parameters()) - inside
        for block in part.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=outside)
        # A root above the blocks lets FSDP prefetch the next block while one computes.
        fully_shard(part, mesh=mesh, ignored_params=outside)
        register_fsdp_forward_method(part, method)
    if not sharded:
        raise InputError(
            "training.shard_frozen is true, but there are no frozen blocks to shard, because all blocks train, cached"
            " features replace the image encoder, or the networks are not stacks of blocks: set training.shard_frozen"
            " to false"
        )
    model.to(device)
    return sharded


def _machine_mesh(device: torch.device) -> DeviceMesh:
    world_size = dist.get_world_size()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % local_world_size:
        raise InputError(
            f"training.shard_frozen needs the same number of processes on each machine, but this machine has"
            f" {local_world_size} of {world_size}: start the same number on every machine"
        )
    shape = (world_size // local_world_size, local_world_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("machine", "process"))["process"]
