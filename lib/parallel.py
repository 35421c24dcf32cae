"""Many devices, one process each. torchrun starts and numbers them; a plain `python train.py` is
number 0 of 1.

Every process takes its share of a step's pairs. With DDP each device has a whole model. With FSDP2
(--fsdp) it has a share of all weights, gradients and optimizer states, and gathers the weights of a
block when that block's turn comes. Either way AdamW sees the gradients that one process would see,
up to rounding. Process 0 writes the files and talks.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

# what is frozen is read from where it came
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def join():
    """Meet the other processes if torchrun started this one; all but the first fall silent."""
    if not dist.is_torchelastic_launched():
        return
    how = dict(timeout=timedelta(hours=1))  # process 0 may write many gigabytes
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        how |= dict(backend="cuda:nccl,cpu:gloo", device_id=device)
    dist.init_process_group(**how)
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  to the process's end


def leave():
    """Part from the other processes; all but the first end here."""
    if not dist.is_initialized():
        return
    first = not rank()
    dist.barrier()  # nobody hangs up on a process that is still sending
    dist.destroy_process_group()
    if not first:
        end()


def end():
    """End a process that torchrun started, its work done: a library's thread that outlives Python's
    own end would abort it."""
    if dist.is_torchelastic_launched():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(0)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def wrap(model, device, fsdp, dtype="float32"):
    """The model as this process trains it: with its forward, and gradients that are exchanged.

    dtype: that of its matrix products. FSDP gathers weights in it, so that no process holds a copy
    of what it gathered in another type; they are stored, and gradients are summed, in float32.
    """
    if not dist.is_initialized():
        return model
    if not fsdp:
        return DDP(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (size(),))
    types = MixedPrecisionPolicy()
    if dtype == "bfloat16":  # inputs stay as they are: positions' cosines are float32
        types = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=types)
    return model


def bare(model):
    return model.module if isinstance(model, DDP) else model


def sync_on_last(model, batches):
    """The step's micro-batches. With DDP processes exchange gradients after the last one: once a
    step. With FSDP after each: until then a process would hold the whole model's gradients."""
    for i, batch in enumerate(batches):
        if isinstance(model, DDP):
            model.require_backward_grad_sync = i + 1 == len(batches)
        yield batch


def backward(loss):
    """Add the loss's gradients to those of the step. DDP and FSDP average gradients over processes,
    and a step's loss is the sum of all processes' losses."""
    with torch.autocast(loss.device.type, enabled=False):  # it has the types of the forward pass
        (loss * size()).backward()


def clear_gradients(model, optimizer):
    """DDP's gradients keep their memory: new ones would lie beside the buckets that it sends."""
    optimizer.zero_grad(set_to_none=not isinstance(model, DDP))


def clip_gradients(model, most):
    """The norm of the whole model's gradients, before they are clipped to `most`."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather(loss, columns, n):
    """The whole step's loss, and the columns of its n pairs, (k, n), on the CPU.

    loss: this process's. columns (k, B): of its pairs, which are every size-th one. All go to the
    others and to the CPU in one piece, so that the device is waited for once.
    """
    whole = columns.new_zeros(len(columns), n)
    whole[:, rank() :: size()] = columns
    numbers = total(torch.cat((loss[None], whole.flatten()))).cpu()
    return numbers[0].item(), numbers[1:].view_as(whole)


def end_inference(model):
    """To be called after forward passes without a backward one: FSDP's root would keep the weights
    that it gathered for them, and train on with these."""
    if isinstance(model, FSDPModule):
        model.reshard()


def progress(items, title, **about):
    """items, with a bar if they take more than a second; without one where title is None."""
    return tqdm(items, title, disable=title is None or rank() > 0, leave=False, delay=1, **about)


def total(x):
    """x summed over processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def any_process(facts, device):
    """Whether each fact holds in any process: every process does what follows, or none."""
    if not dist.is_initialized():
        return map(bool, facts)
    told = torch.tensor([float(bool(fact)) for fact in facts], device=device)
    return (total(told) > 0).tolist()


def model_state(model):
    """{name: whole weight that learns, on the CPU} in process 0, {} elsewhere; all must call."""
    return without_frozen(get_model_state_dict(model, options=WHOLE), model)


def without_frozen(weights, model):
    """WHOLE leaves a frozen embedding out, but not the head that is tied to it."""
    named = bare(model).named_parameters(remove_duplicate=False)
    frozen = {name for name, weight in named if not weight.requires_grad}
    return {name: weight for name, weight in weights.items() if name not in frozen}


def training_state(model, optimizer):
    """The same, and AdamW's state by the same names, whatever the number of processes."""
    weights, moments = get_state_dict(model, optimizer, options=WHOLE)
    return without_frozen(weights, model), moments


def load_training_state(model, optimizer, weights, moments):
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
    )
