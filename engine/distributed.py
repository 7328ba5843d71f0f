"""Several processes as one run, on torch's own engines: who they are, what they exchange, and who of them is missing.

Every rank holds the same data and takes a contiguous share of every global batch; sample ids stay those of the global
batch, so masks and dropout do not depend on the number of ranks. The loss of a rank is its share of the global loss,
and gradients are added up over the ranks:

* LoRA: ``DistributedDataParallel``, whose buckets are reduced while the backward goes on, in the last micro-batch of a
  step only.
* a trunk that is sharded (``sharding.py``): FSDP2.
* contrastive losses: embeddings are gathered with gradient (backward: a reduce-scatter to their owners), and a rank
  scores its own queries against all candidates: [B / ranks, N] logits, in the chunks of ``info_nce``.

Processes are made by a launcher: ``torchrun``, or ``srun``, whose variables are read too.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from bivec.engine.errors import ConfigError, RunError, first_line

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PORT = 29500  # of the store, where SLURM starts the processes; the job's number is added
BEAT_SECONDS = 2.0  # every so often a rank says that it is alive
MISSED_BEATS = 5  # after which it counts as lost
STORE_LOST = "rank 0, which holds the store"


@dataclass(frozen=True)
class World:
    """The processes of a run. With one of them nothing is exchanged."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def shares(self, count: int) -> list[int]:
        """How many of ``count`` things each rank takes: contiguous parts, the first ones larger by one at most."""
        return [count // self.size + (rank < count % self.size) for rank in range(self.size)]

    def share(self, count: int) -> range:
        """Which of ``count`` things this rank takes.

        Raises:
            ConfigError: there are fewer than ranks.
        """
        if count < self.size:
            raise ConfigError(f"a batch of {count} cannot be shared by {self.size} processes; give a larger batch_size")
        shares = self.shares(count)
        start = sum(shares[: self.rank])
        return range(start, start + shares[self.rank])

    def sums(self, *numbers: float) -> list[float]:
        """Sums over the ranks, in float64."""
        return self._reduced(numbers, "SUM")

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self._reduced((number,), "MAX")[0])

    def _reduced(self, numbers: Sequence[float], operation: str) -> list[float]:
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: no GPU has to stop for it
        torch.distributed.all_reduce(values, getattr(torch.distributed.ReduceOp, operation))
        reduced: list[float] = values.tolist()
        return reduced

    def from_main(self, value: Any) -> Any:
        """What rank 0 has, a small object, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.sums(0.0)

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, with gradient; half-precision ones travel in fp32, in which their gradients add up.

        Args:
            rows: [counts[rank], D].
            counts: rows of every rank.

        Returns:
            [sum(counts), D], in the order of the ranks.
        """
        if self.size == 1:
            return rows
        from torch.distributed._functional_collectives import all_gather_single_autograd

        gather: Callable[..., Tensor] = all_gather_single_autograd  # WORLD may be None, by its types
        most = max(counts)
        padded = nn.functional.pad(rows if rows.itemsize >= 4 else rows.float(), (0, 0, 0, most - len(rows)))
        gathered = gather(padded, 0, torch.distributed.group.WORLD).view(self.size, most, -1)
        return torch.cat([gathered[rank, :count] for rank, count in enumerate(counts)]).to(rows.dtype)


ALONE = World()


def launched(environment: Mapping[str, str] | None = None) -> World:
    """What the launcher says of this process: torchrun's variables, else those of a step that ``srun`` started.

    Raises:
        ConfigError: some of a launcher's variables, but not all, or no numbers.
    """
    given = os.environ if environment is None else environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # SLURM sets most of its variables in the shell of a batch script too, where there is no step and only one process
    slurm = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    if "RANK" not in given and "WORLD_SIZE" not in given:
        if "SLURM_STEP_NUM_TASKS" not in given:
            return ALONE
        names = slurm
    missing = [name for name in names[:3] if name not in given]
    if missing:
        raise ConfigError(
            f"the environment has some variables of a launcher, but not {', '.join(missing)}; start the processes with "
            "torchrun or srun"
        )
    size = given[names[1]]
    if names[3] not in given and given.get("MASTER_ADDR", "localhost") not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(f"{names[3]} is not set: how many of the {size} processes are on this machine?")
    local_size = given.get(names[3], size).partition("(")[0].partition(",")[0]  # SLURM: "8(x2)", "8,7"
    try:
        world = World(int(given[names[0]]), int(size), int(given[names[2]]), int(local_size))
    except ValueError as error:
        values = ", ".join(f"{name}={given.get(name)}" for name in names)
        raise ConfigError(f"the variables of the launcher are not numbers: {values}") from error
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"{names[0]} is {world.rank}, expected 0 … {world.size - 1} ({names[1]} is {world.size})")
    return world


def _address(given: Mapping[str, str], world: World) -> tuple[str, int]:
    """Where rank 0 keeps the store."""
    if "MASTER_ADDR" not in given and world.size > world.local_size:
        raise ConfigError(
            "MASTER_ADDR is not set: give it the name of rank 0's machine, before srun: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    port = given.get("MASTER_PORT", PORT + int(given.get("SLURM_JOB_ID", 0)) % 10_000)
    return given.get("MASTER_ADDR", "127.0.0.1"), int(port)


def check_timeout(seconds: float) -> None:
    """Raises ConfigError unless it is a number of seconds that pass."""
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--timeout {seconds:g}: expected a number of seconds")


@contextmanager
def only_main_prints(world: World) -> Iterator[None]:
    """Of several processes rank 0 alone writes to standard output."""
    with ExitStack() as stack:
        if not world.is_main:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
        yield


@contextmanager
def process_group(
    world: World, device_type: str, timeout_seconds: float = 600.0, *, of_one: bool = False
) -> Iterator[None]:
    """Connects the processes for the ``with`` block: gloo, beside it nccl for tensors on a GPU.

    An error that one rank alone has cuts the others off in their next exchange. Then, or when a rank has not come to
    an exchange within the timeout, they end with an error that names it.

    Args:
        world: of :func:`launched`.
        device_type: "cpu" or "cuda".
        timeout_seconds: of every exchange; the slowest rank's step, evaluation and checkpoint must fit in.
        of_one: a single process makes a group too, which sharding needs.

    Raises:
        ConfigError: a timeout that is no number of seconds.
        RunError: a rank is lost, or the processes do not find each other.
    """
    check_timeout(timeout_seconds)
    if world.size == 1 and not of_one:
        yield
        return
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_seconds)
    backend = "gloo" if device_type == "cpu" else f"cpu:gloo,{device_type}:nccl"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
            _last_exchange()
        finally:
            dist.destroy_process_group()
        return
    address, port = _address(os.environ, world)
    try:
        if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:  # torchrun keeps a store for its workers
            store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
        else:
            store = dist.TCPStore(address, port, world.size, is_master=world.is_main, timeout=timeout)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"rank {world.rank} of {world.size} did not meet the others at {address}:{port}: {first_line(error)}"
        ) from error
    pulse = _Pulse(dist.PrefixStore("bivec", store.clone() if hasattr(store, "clone") else store), world)
    try:
        yield
    except RuntimeError as error:
        lost = pulse.lost()
        if not lost:
            raise
        raise RunError(
            f"lost {lost}: killed, stuck, or stopped by an error that is printed there; rank {world.rank} ends too "
            f"({first_line(error)})"
        ) from error
    else:
        pulse.stop(timeout_seconds)  # before rank 0, which holds the store, may be gone
        _last_exchange()  # rank 0 may have files to write
        dist.destroy_process_group()
    finally:
        pulse.stop()


def _last_exchange() -> None:
    """Waits for all ranks, and for gloo's own threads to let go of what they exchanged.

    They live as long as anything holds the group (a device mesh does, for ever). One that drops the last reference to
    a tensor asks for the interpreter; where that is ending by then, the thread is ended within C++ that allows no
    unwinding, and the process aborts ("terminate called without an active exception"): seen on busy machines.
    """
    flag = torch.zeros(1)
    torch.distributed.all_reduce(flag)
    deadline = time.monotonic() + BEAT_SECONDS * MISSED_BEATS
    while flag._use_count() > 1 and time.monotonic() < deadline:  # type: ignore[attr-defined]  # noqa: SLF001 - of torch._C
        time.sleep(0.001)


class _Pulse:
    """Says every two seconds that this rank is alive, and finds out who has stopped saying so."""

    def __init__(self, store: torch.distributed.Store, world: World):
        self.store, self.world = store, world
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        self.store.add(f"alive/{self.world.rank}", 1)

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store is gone with the process that held it
            while not self._stopped.wait(BEAT_SECONDS):
                self._beat()

    def stop(self, patience: float = BEAT_SECONDS) -> None:
        """Ends the beat; a thread that a dying interpreter meets in torch's C++ aborts it, so it is waited for."""
        self._stopped.set()
        self._thread.join(timeout=patience)

    def lost(self) -> str:
        """Names of the ranks whose beat has stopped, of rank 0 if the store does not answer; "" = none has."""
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._silent()), daemon=True)
        asking.start()
        asking.join(timeout=BEAT_SECONDS * (MISSED_BEATS + 2))  # a store whose process hangs never answers
        return found[0] if found else STORE_LOST

    def _silent(self) -> str:
        everyone = range(self.world.size)
        try:
            before = [self.store.add(f"alive/{rank}", 0) for rank in everyone]
            deadline = time.monotonic() + BEAT_SECONDS * MISSED_BEATS
            silent = set(everyone) - {self.world.rank}
            while silent and time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 4)
                silent = {rank for rank in silent if self.store.add(f"alive/{rank}", 0) == before[rank]}
        except RuntimeError:
            return STORE_LOST
        return ", ".join(f"rank {rank}" for rank in sorted(silent))


def data_parallel(model: nn.Module, world: World) -> nn.Module:
    """The model with its trainable parameters' gradients averaged over the ranks while the backward goes on.

    The weights must be the same on all ranks: they come from the same files and seeds, and are not sent around.
    """
    if world.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)


def sync_gradients(model: nn.Module, last: bool) -> None:
    """To be called before every forward with a graph: only the last one of a step exchanges gradients.

    A sharded model exchanges them in all: else every rank would hold those of all weights.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = last


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded (then every rank must ask for it), else the tensor itself."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor


def is_sharded_tensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether FSDP2 has spread the tensor over the ranks."""
    return hasattr(tensor, "full_tensor")


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, sharded as ``like`` is; the tensor itself where that is not."""
    if not is_sharded_tensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has the model: every rank must then run it equally often, since weights are fetched from all."""
    return hasattr(model, "set_requires_gradient_sync")
