"""What a run will need of memory, told before it begins.

The largest micro-batch goes forward and backward through the model with tensors that have shapes
and types but no values, and what they would take is counted. So does what evaluation does at once.
Both are counted as on a CPU; a GPU's attention, which is not in float32 where its products are not,
and a compiled block take a little less.
"""

import os
import weakref
from contextlib import contextmanager, suppress
from typing import NamedTuple

from lib import lora, parallel, policy
from lib.device import MOST_FREE, autocast
from lib.hf_weights import held_in, hold, hold_frozen
from lib.sampling import Cache, sample

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from model import Rows, Transformer, pack_rows

PROCESS = 0.45e9  # bytes that Python and its libraries take, or a GPU's context
TINY = 10**7  # parameters of a model that fits anywhere
CPU = torch.device("cpu")


class Live(TorchDispatchMode):
    """Bytes of all tensors made under it: `now`, and `peak`, the most there were at once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor):
                self.note(x.untyped_storage())
        return result

    def note(self, storage):
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


class Need(NamedTuple):
    """Bytes that one process needs at most, in training and in evaluation."""

    program: float  # Python and its libraries, or a GPU's context; free parts of a CPU's heap
    weights: float  # its share
    state: float  # of gradients and of AdamW's two moments
    gathered: float  # FSDP: what it holds at once of the others' weights and gradients
    micro_batch: float  # all else that lives in a step
    evaluation: float  # all

    def training(self):
        return self.program + self.weights + self.state + self.gathered + self.micro_batch


class Plan(NamedTuple):
    """What a need depends on beside the model's sizes."""

    dtype: str = "float32"  # of products
    base_dtype: str = "float32"
    rank: int = 0  # of adapters
    checkpointing: bool = False
    shards: int = 1  # FSDP's processes
    max_new_tokens: int = 256
    device: str = "cuda"


def need(sizes, rows, prompts, plan):
    """Need of a run. sizes: ModelConfig. rows: the largest micro-batch. prompts: token ids of those
    that are answered in evaluation."""
    with weightless() as (live, fake):
        weights = sum(p.numel() * p.element_size() for p in build(sizes, plan).parameters())
        # FSDP gathers weights in the products' type, and autocast makes no copies of them
        model = build(sizes, plan._replace(base_dtype=plan.dtype) if plan.shards > 1 else plan)
        learning = sum(p.numel() for p in filter(trained, model.parameters()))
        rows = Rows(*map(fake, rows))
        for _ in range(2):  # the second time all gradients are there already
            before, live.peak = live.now, 0
            with autocast(CPU, plan.dtype):
                logps = model(rows)
            logps.sum().backward()
            del logps
        micro_batch = live.peak - before
    gathered = 0
    if plan.shards > 1:
        gathered = gathered_bytes(model, bytes_of(plan.dtype))
    program = PROCESS + (MOST_FREE if plan.device == "cpu" else 0)
    return Need(
        program,
        weights / plan.shards,
        12 * learning / plan.shards,
        gathered,
        micro_batch,
        program + evaluation(sizes, prompts, plan),
    )


def gathered_bytes(model, size):
    """What FSDP holds at once beside the shares, if a gathered number has `size` bytes.

    Of weights: embedding, norm and head all the time, and a block while the next one comes. Of
    gradients, before they are summed: the same without the next block; and one block's in float32,
    in which it is sent.
    """
    block = list(model.blocks[0].parameters())
    block, learns = (sum(p.numel() for p in part) for part in (block, filter(trained, block)))
    root = [p for p in model.parameters() if all(p is not q for q in model.blocks.parameters())]
    root, root_learns = (sum(p.numel() for p in part) for part in (root, filter(trained, root)))
    return size * (root + 2 * block + root_learns + learns) + 4 * learns


def trained(weight):
    return weight.requires_grad


def evaluation(sizes, prompts, plan):
    """Bytes for one model, and for answering prompts or reading answers."""
    most = plan.max_new_tokens
    with weightless() as (live, fake), torch.no_grad(), autocast(CPU, plan.dtype):
        model = build(sizes, plan._replace(base_dtype=plan.dtype))
        live.peak = live.now  # weights are read in pieces
        batch = [prompts[i] for i in next(policy.sample_batches(model, prompts, most))]
        rows, caches = pack_rows([(x, [[]]) for x in batch]), []
        columns = rows.sequences.shape[1] + most
        caches = [Cache(columns) for _ in model.blocks]
        tokens, position, sequences, slot = map(fake, rows[:4])
        hidden = model.hidden(tokens, position, [sequences], slot, caches=caches)
        hidden = hidden[sequences[:, 0]]
        sample(model.head(hidden).float(), 1.0, 1.0, fake(torch.zeros(len(batch))))
        del caches, hidden
        n, answer = max(1, policy.SLOTS_AT_ONCE // columns), list(range(most))
        rows = pack_rows([([i, *range(columns - most - 1)], [answer]) for i in range(n)])
        model(Rows(*map(fake, rows)))
    return live.peak


def build(sizes, plan):
    model = hold(Transformer(sizes), getattr(torch, plan.base_dtype))
    if plan.rank:
        lora.add(model, plan.rank, 1.0, 0)
        hold_frozen(model, getattr(torch, plan.dtype))
    model.checkpointing = plan.checkpointing
    return model


@contextmanager
def weightless():
    """`with weightless() as (live, fake):` tensors have no values; fake(x) is x without its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes half a second

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Live() as live:
        yield live, lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x


def bytes_of(dtype):
    return getattr(torch, dtype).itemsize


def there_is(device):
    """Bytes of the device, or None."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(OSError, ValueError, AttributeError):
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as f:
            whole = min(whole, int(f.read()))  # a container's
        return whole
    return None


def sentence(n, processes):
    """What a Need says, in one line."""
    parts = {
        "weights": n.weights,
        "gradients and AdamW": n.state,
        "gathered weights and gradients": n.gathered,
        "the largest micro-batch": n.micro_batch,
    }
    told = " + ".join(f"{size / 1e9:.1f} {name}" for name, size in parts.items() if size)
    each = " a process" if processes > 1 else ""
    return (
        f"memory, GB{each}: {told} + {n.program / 1e9:.1f} the program = {n.training() / 1e9:.1f}; "
        f"evaluation {n.evaluation / 1e9:.1f}"
    )


def tell(model, config, rows, prompts):
    """Print what the run will need, and a warning where the device has less. See `need`."""
    if sum(p.numel() for p in model.parameters()) < TINY:
        return
    plan = Plan(
        config.dtype,
        held_in(model),
        model.adapters["rank"] if model.adapters else 0,
        config.checkpointing,
        parallel.size() if config.fsdp else 1,
        config.max_new_tokens,
        torch.device(config.device).type,
    )
    n, device = need(model.config, rows, prompts, plan), torch.device(config.device)
    print(sentence(n, parallel.size()))
    here = 1 if device.type == "cuda" else parallel.size()  # processes that share the memory
    most, has = here * max(n.training(), n.evaluation), there_is(device)
    if has and most > has:
        print(
            f"warning: that is {most / 1e9:.1f} GB, and {device} has {has / 1e9:.1f}; a smaller "
            "--micro_batch_size, --checkpointing, --lora_rank or more devices with --fsdp need less"
        )
