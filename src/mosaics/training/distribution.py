"""Several processes as one run: who this one is, what they agree on, and how a model is sharded over them.

``torchrun`` starts the processes. Each holds a shard of every parameter, gradient and moment (FSDP2), and reads its
own rows of every batch. What must be done once (preparing data, writing metrics, choosing a checkpoint) the first
process does; the others wait and hear what came of it, an error too.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mosaics.memories import Memory

# How long a collective waits for a process that hangs; one that ends is noticed at once.
TIMEOUT = timedelta(minutes=10)


class Told(ValueError):
    """What went wrong, on a process that need not say it because another one does."""

    rank = ""  # see `mosaics.cli.main`


class Group:
    """The processes of a run; by default this one alone.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None):
        self.rank, self.size, self._store, self._rounds, self._complete = rank, size, store, 0, True

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.sum(here)[0])

    def first(self, function: Callable[[], Any]) -> Any:
        """What the first process gets from `function`; the others wait for it, however long it takes.

        Raises:
            ValueError, OSError: as `function` does; `Told` on the other processes.
        """
        return self._agree(function if self.rank == 0 else None)[0]

    def each(self, function: Callable[[], Any]) -> list[Any]:
        """What every process gets from `function` (plain data), in the order of ranks.

        Raises:
            ValueError, OSError: `function` does on any process; `Told` on all but the first.
        """
        return self._agree(function)

    def _agree(self, function: Callable[[], Any] | None) -> list[Any]:
        if self.size == 1:
            return [function()]
        failure = None
        try:
            answer = {"result": function() if function else None}
        except (ValueError, OSError) as error:
            failure = error
            about = [error.errno, error.strerror, error.filename] if isinstance(error, OSError) else [str(error)]
            answer = {"failure": about if about[0] else [str(error)]}
        # Through the store, not by a collective: those give up on a process that takes long.
        self._rounds += 1
        name = f"{self._rounds}/{{}}".format
        self._store.set(name(self.rank), json.dumps(answer, default=str))
        if self.rank == 0:
            answers = [self._read(name(rank)) for rank in range(self.size)]
            self._store.set(name("all"), json.dumps(answers))
            for old in (*map(name, range(self.size)), f"{self._rounds - 1}/all"):  # which all have read by now
                self._store.delete_key(old)
        else:
            answers = self._read(name("all"))
        for about in (answer["failure"] for answer in answers if "failure" in answer):
            if self.rank:
                raise Told(about[-1]) from failure
            raise failure or (OSError(*about) if len(about) > 1 else ValueError(*about))
        return [answer["result"] for answer in answers]

    def _read(self, name: str) -> Any:
        pause = 0.005
        while not self._store.check([name]):
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        return json.loads(self._store.get(name))

    def leave(self) -> None:
        """Say that this process needs no answer any more; the first one, which may hold the store, waits for that."""
        end = time.monotonic() + 5
        with contextlib.suppress(RuntimeError):
            gone = self._store.add("gone", 1)
            while self.rank == 0 and self._complete and gone < self.size and time.monotonic() < end:
                time.sleep(0.01)
                gone = self._store.add("gone", 0)

    def lost(self) -> BaseException:
        """The error to raise when another process has gone; the first process to notice says it."""
        self._complete = False
        text = (
            "another process of this run has ended or can't be reached, so this one ends too; the same command goes "
            "on from the newest checkpoint"
        )
        try:
            said = self._store.add("lost", 1) > 1
        except RuntimeError:  # the store has gone as well
            said = False
        return Told(text) if said else ConnectionError(text)


@contextmanager
def processes(device: torch.device) -> Iterator[Group]:
    """The group of processes that torchrun started, connected; without torchrun this process alone.

    Only the first process prints. gloo connects processors, NCCL connects GPUs.

    Raises:
        ConnectionError: another process ended, or did not answer a collective for `TIMEOUT`.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or os.environ["WORLD_SIZE"] == "1":
        yield Group()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("collectives", store),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if cuda else None,
    )
    group = Group(rank, size, dist.PrefixStore("agreements", store))
    try:
        with contextlib.ExitStack() as quiet:
            if rank:
                quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
            yield group
    except Told:
        time.sleep(2)  # torchrun ends them all when one has ended: first comes the one that says why
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise group.lost() from error
        raise
    except (ValueError, OSError) as error:
        error.rank = rank
        raise
    finally:
        group.leave()
        dist.destroy_process_group()


@contextmanager
def pretended(size: int) -> Iterator[Group]:
    """The first of so many processes that are not there, to see how a model would be sharded."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=size)
    try:
        yield Group(0, size)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, group: Group, device: torch.device, dtype: torch.dtype) -> list[tuple[str, int]]:
    """Shard a model on the meta device over the processes, in place; the shards get storage, not values.

    Every block is a unit that is gathered before it is used, and what lies outside the blocks is another. Gradients
    are summed over the processes (not averaged), in float32. Memories whose parameters are all matrices of linear
    maps, and the classifier, are gathered in `dtype`, to which autocast would round them anyway; all else in float32.

    Args:
        model: a `MosaicForCausalLM` on the meta device.
        group: the processes.
        device: where the shards go; `meta` leaves them without storage.
        dtype: of the matrix products.

    Returns:
        The units, the whole model as the last: name (as in `named_modules`) and bytes when gathered.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu" if device.type == "meta" else device.type, (group.size,))
    rounded: set[nn.Module] = set()
    if dtype != torch.float32:
        rounded = {memory for memory in model.model.stack.memories() if _is_linear(memory)}
        if model.lm_head.weight is not model.model.embed_tokens.weight:
            rounded.add(model.lm_head)
    units, seen = [], set()
    for name, module in reversed(list(model.named_modules())):  # inner ones first
        if module in rounded or module in set(model.model.stack.blocks) or module is model:
            kind = dtype if module in rounded else torch.float32
            policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
            own = {f"{name}.{inner}".strip("."): p.numel() for inner, p in module.named_parameters()}
            units.append((name, sum(own[inner] for inner in own.keys() - seen) * kind.itemsize))
            seen |= own.keys()
            fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    if device.type != "meta":
        model.to_empty(device=device)
    return units


def _is_linear(memory: Memory) -> bool:
    linear = {p for m in memory.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return linear == set(memory.parameters())


def spread(model: nn.Module, source: nn.Module | None) -> None:
    """Fill a sharded model with the values of the whole model that the first process has, tensor by tensor."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if source is not None else {}, options=options)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
