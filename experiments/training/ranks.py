"""The ranks of one run: processes that hold the same weights and share the work on every batch.

`Ranks` is one process, which needs nobody; `JoinedRanks` are the processes that torchrun started,
joined by gloo for what lies on the CPU and NCCL for what lies on GPUs. Rank 0 leads: it alone
writes into the run directory. A rank waits for the others `launch.timeout_s` at most.

A rank that fails leaves a word in torchrun's store, so that the leader can name the cause where it
itself has seen no more than a broken connection.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from experiments.data import Part
from experiments.errors import UserError

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 600.0
# How long the leader waits for another rank's word before it gives its own account.
_WORD_S = 1.5
# How often, and for how long each time, a rank looks for the torchrun that started it, seconds.
_ATTEMPTS = 4
_CONNECT_S = 10.0


def backends() -> dict[str, bool]:
    """What ranks can talk through, and whether this torch was built with it."""
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}


def store_answers(host: str, port: int, limit_s: float = 20.0) -> bool:
    """Whether a store of torch listens at an address; something else may keep this waiting."""
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=False, timeout=timedelta(seconds=limit_s)
        )
        store.set("answers", "1")
    except RuntimeError:
        return False
    return True


class ToldByLeaderError(UserError):
    """A mistake of the user that the leader has told already."""


class LostRankError(RuntimeError):
    """Another rank ended, or was silent for too long; the message says which and why."""


class Ranks:
    """One process that trains alone.

    Attributes:
        rank: which one this is, from 0.
        world_size: how many there are.
        local_rank: which one on this machine.
        joined: whether there is a process group, if only of one.
    """

    joined = False
    rank = 0
    world_size = 1
    local_rank = 0

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes the run directory."""
        return self.rank == 0

    @property
    def part(self) -> Part:
        """What of every batch this rank works on."""
        return Part(self.rank, self.world_size)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The module to call in training, whose backward pass averages gradients over ranks."""
        return model

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, through which a backward pass goes."""
        return tensor

    def rows(self, values: Tensor) -> Tensor:
        """What each rank has.

        Args:
            values: (k,), on the CPU.

        Returns:
            (world size, k).
        """
        return values[None]

    def objects(self, value: T) -> list[T]:
        """What each rank has, by rank."""
        return [value]

    def from_leader(self, make: Callable[[], T]) -> T:
        """Let the leader make something, and have every rank return it.

        Raises:
            UserError: what the leader's call raised, on every rank.
        """
        return make()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let the leader go through first, so that the others find what it has cached."""
        yield

    def barrier(self) -> None:
        """Wait for all ranks."""

    def copy_from(self, rank: int, tensors: list[Tensor]) -> None:
        """Replace tensors, which are contiguous, by those of a rank."""

    def copy_from_leader(self, tensors: list[Tensor]) -> None:
        """Replace tensors by the leader's."""
        self.copy_from(0, tensors)

    def account(self, error: Exception) -> str | None:
        """Say in one line what ended the run; None where `error` says it itself.

        Args:
            error: what this rank saw.
        """
        return None

    def tells(self, error: UserError) -> bool:
        """Whether it is this rank's part to tell a mistake that all ranks may have met."""
        return True


ALONE = Ranks()


class JoinedRanks(Ranks):
    """A process of the default process group; use `join_ranks`.

    Args:
        store: torchrun's, which outlives a rank.
        timeout_s: how long a collective waits, seconds.
        local_rank: which one on this machine.
    """

    def __init__(self, store: Store, *, timeout_s: float, local_rank: int):
        self.joined = True
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = local_rank
        self._store = store
        self._timeout_s = timeout_s

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap a model by DistributedDataParallel.

        Every rank keeps the statistics of BatchNorm of its own part; those of the leader are
        evaluated and saved (`copy_from_leader`).
        """
        device = next(model.parameters()).device
        return DistributedDataParallel(
            model,
            device_ids=None if device.type == "cpu" else [device.index],
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, through which a backward pass goes."""
        total: Tensor = _Sum.apply(tensor)
        return total

    def rows(self, values: Tensor) -> Tensor:
        """What each rank has: (k,) on the CPU becomes (world size, k)."""
        rows = values.new_empty(self.world_size, *values.shape)
        dist.all_gather(list(rows.unbind()), values)
        return rows

    def objects(self, value: T) -> list[T]:
        """What each rank has, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_leader(self, make: Callable[[], T]) -> T:
        """Let the leader make something, and have every rank return it."""
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.leads:
            try:
                answer[0] = make()
            except UserError as error:
                failure, answer[1] = error, str(error)
        dist.broadcast_object_list(answer, src=0)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise ToldByLeaderError(answer[1])
        made: T = answer[0]
        return made

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let the leader go through first."""
        if not self.leads:
            self.barrier()
        yield
        if self.leads:
            self.barrier()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def copy_from(self, rank: int, tensors: list[Tensor]) -> None:
        """Replace tensors by those of a rank."""
        for tensor in tensors:
            dist.broadcast(tensor, src=rank)

    def account(self, error: Exception) -> str | None:
        """Say what ended the run: the first rank's word that has one, or who is missing."""
        own = " ".join(f"{type(error).__name__}: {error}".split())
        lost = _lost_touch(error)
        try:
            self._store.set(f"ended/{self.rank}", "1")
            if not lost:
                self._store.compare_set("cause", "", json.dumps([self.rank, own]))
            return self._gathered_account(own, lost)
        except RuntimeError:  # the store is gone too
            return None

    def tells(self, error: UserError) -> bool:
        """Whether it is this rank's part: of those that met the same, the first."""
        if isinstance(error, ToldByLeaderError):
            return False
        try:
            return bool(self._store.add(f"told/{error}", 1) == 1)
        except RuntimeError:
            return True

    def _gathered_account(self, own: str, lost: bool) -> str | None:
        deadline = time.monotonic() + _WORD_S
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        while True:
            if self._store.check(["cause"]):
                rank, message = json.loads(self._store.get("cause"))
                return None if rank == self.rank else f"rank {rank}: {message}"
            silent = [rank for rank in others if not self._store.check([f"ended/{rank}"])]
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not silent:
            return None
        who = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        if "imed out" in own or "imeout" in own:
            return (
                f"{who} did not answer within launch.timeout_s={self._timeout_s:g} s: hung, or "
                "slower than that; the same command goes on from the last checkpoint"
            )
        return (
            f"{who} ended without a word: killed, or out of memory; the same command goes on from "
            "the last checkpoint"
        )


@contextmanager
def join_ranks(*, use_gpu: bool, timeout_s: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started; one that was started otherwise trains alone.

    Args:
        use_gpu: whether each rank trains on a GPU of its own.
        timeout_s: how long a rank waits for the others, seconds.

    Raises:
        UserError: there are fewer GPUs than ranks on this machine.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if use_gpu:
        if torch.cuda.device_count() <= local_rank:
            raise UserError(
                f"{os.environ['LOCAL_WORLD_SIZE']} ranks, but torch sees "
                f"{torch.cuda.device_count()} GPUs: start as many ranks as there are GPUs, or use "
                "train.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    _check_agent()
    limit = timedelta(seconds=timeout_s)
    store, rank, world_size = next(iter(rendezvous("env://", timeout=limit)))
    store = _store_of_this_start(store, rank, world_size, timeout_s)
    store.set_timeout(limit)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    yield JoinedRanks(store, timeout_s=timeout_s, local_rank=local_rank)
    # not after an error, when the others may be gone
    dist.destroy_process_group()


def _check_agent() -> None:
    """Check that torchrun still listens, so that its orphans do not wait for it.

    Raises:
        LostRankError: it does not.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    for attempt in range(_ATTEMPTS):
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
            return
        except OSError:
            time.sleep(attempt)
    raise LostRankError(f"the torchrun that started this rank is gone from {host}:{port}")


def _store_of_this_start(store: Store, rank: int, world_size: int, limit_s: float) -> Store:
    """A part of the store that no earlier start of the ranks has written to.

    torchrun keeps one store over all restarts, and with it the addresses of ranks that are gone;
    machines may even count their restarts differently. So every rank makes up a name, which the
    leader answers with the name of this start until all have heard it.

    Raises:
        TimeoutError: a rank has not come in time.
    """
    deadline = time.monotonic() + limit_s
    if rank != 0:
        name = uuid.uuid4().hex
        store.set(f"here/{rank}", name)
        while not store.check([f"start/{name}"]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank 0 has not come within launch.timeout_s={limit_s:g} s")
            time.sleep(0.02)
        start = store.get(f"start/{name}").decode()
        store.set(f"heard/{start}/{rank}", "1")
        return PrefixStore(start, store)
    start, missing = uuid.uuid4().hex, list(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]):
                store.set(f"start/{store.get(f'here/{other}').decode()}", start)
        missing = [other for other in missing if not store.check([f"heard/{start}/{other}"])]
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {missing} have not come within {limit_s:g} s")
        time.sleep(0.02)
    return PrefixStore(start, store)


class _Sum(torch.autograd.Function):
    """The sum over the ranks; what each of them adds has the gradient of all of them."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _lost_touch(error: Exception) -> bool:
    """Whether an error is no more than the end of another rank, seen from here."""
    text = str(error).lower()
    signs = ("gloo", "connection closed", "connection reset", "broken pipe", "pair closure")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)
