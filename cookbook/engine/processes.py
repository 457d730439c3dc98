"""The processes that train together, one a device: who they are, and how they agree.

`torchrun` starts them; each runs the same program and asks for the same things in the same order. Two kinds
of exchange are kept apart. What the host decides (has anyone failed, how large may a micro-batch be) goes
through sockets, and comes first; only when every process has come to the same point are tensors reduced
on the devices. So a process that fails or falls behind is waited for, or found to be gone, by the host, and
no device waits for a partner that never comes.

A process alone has the same verbs, which then do nothing; torch.distributed is not even imported.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cookbook.errors import ConfigError, CookbookError, TrainingError, describe

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")

PATIENCE = datetime.timedelta(hours=12)
"""How long a process waits for one that is alive but elsewhere: the first may be evaluating for hours.
One that has died is noticed at once, because its sockets close."""

_LOOPBACK = "127.0.0.1"
_BUCKET_ELEMENTS = 2**25
_LAST_WORDS = "cookbook/last_words"
_LEAVING = "cookbook/leaving"


class World:
    """The processes of a run, as one thread of each of them sees it.

    Every process calls the same methods in the same order. A method that needs all of them raises
    TrainingError where one is gone.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        host: ProcessGroup | None = None,
        device: ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device_group = device
        """For tensors, and for what shards weights over the processes."""
        self.host_group = host
        """For what the hosts tell one another."""
        self.is_broken = False
        """Whether a process is gone, or this one takes part in nothing more."""

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == 0

    def duplicate(self) -> World:
        """The same processes, for another thread: what two threads exchange is kept apart."""
        if self.is_alone:
            return self
        with self._reaching_all():
            return World(self.rank, self.size, _host_group(), _device_group())

    # -- agreement of the hosts -------------------------------------------------------------

    def all_gather_object(self, value: T) -> list[T]:
        """Everyone's value, by rank."""
        if self.is_alone:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self._reaching_all():
            dist.all_gather_object(found, value, group=self.host_group)
        return found

    def broadcast(self, value: T) -> T:
        """The main process's value. What the others bring is ignored."""
        if self.is_alone:
            return value
        import torch.distributed as dist

        box: list[Any] = [value if self.is_main else None]
        with self._reaching_all():
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        found: T = box[0]
        return found

    def all_reduce_min(self, *numbers: int) -> tuple[int, ...]:
        """The smallest that anyone brings, number by number. The cheapest way to agree."""
        if self.is_alone:
            return numbers
        import torch
        import torch.distributed as dist

        smallest = torch.tensor(numbers, dtype=torch.int64)
        with self._reaching_all():
            dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.host_group)
        return tuple(smallest.tolist())

    def all_reduce_max(self, *numbers: int) -> tuple[int, ...]:
        return tuple(-number for number in self.all_reduce_min(*(-number for number in numbers)))

    def barrier(self) -> None:
        self.all_reduce_min(0)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Where the body fails on one process, it fails on all: with its error, or one that names it."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.is_alone or self.is_broken:
                raise
            error = raised
        if self.is_alone:
            return
        (is_well,) = self.all_reduce_min(error is None)
        if not is_well:
            self._raise_first_of(self.all_gather_object(None if error is None else describe(error)), error)

    def _raise_first_of(self, failures: Sequence[str | None], own: Exception | None) -> None:
        global _others_tell
        if own is not None:
            raise own
        _others_tell = True
        rank = next(rank for rank, failure in enumerate(failures) if failure is not None)
        raise TrainingError(f"Process {rank} of {self.size} failed: {failures[rank]}")

    def on_rank0(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main process, which alone does it; its failure is everyone's."""
        with self.failing_together():
            result = work() if self.is_main else None
        return self.broadcast(result)  # type: ignore[return-value]

    @contextlib.contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """The body runs on one process of a machine, then on the others, which find cached what it left."""
        if local_rank() == 0:
            with self.failing_together():
                yield
            return
        with self.failing_together():
            pass
        yield

    @contextlib.contextmanager
    def one_after_another(self) -> Iterator[None]:
        """The body runs on one process of a machine at a time, in the order of their ranks."""
        place, num_here = local_rank(), local_size()
        most_here = max(self.all_gather_object(num_here))
        for turn in range(most_here):
            with self.failing_together():
                if turn == place:
                    yield
                    # A generator is resumed once: the other turns are only waited for.

    # -- sums on the devices ----------------------------------------------------------------

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes: bit for bit the same on every one."""
        if self.is_alone:
            return
        import torch
        import torch.distributed as dist
        from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

        with self._reaching_all(), torch.no_grad():
            for bucket in _buckets(tensors):
                flat = _flatten_dense_tensors(bucket)
                dist.all_reduce(flat, group=self.device_group)
                for tensor, total in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                    tensor.copy_(total)

    def abort(self, error: Exception) -> TrainingError:
        """After a failure that leaves the others waiting for this process: it takes part in nothing more.

        Gives what is to be raised, which says who failed first.
        """
        self.is_broken = True
        if not _is_loss(error):
            leave_last_words(error)
            return TrainingError(str(error))
        return TrainingError(_why_unreachable(self.size))

    # -- failures ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reaching_all(self) -> Iterator[None]:
        """Turns the failure of an exchange into an error that says who is gone."""
        if self.is_broken:
            raise TrainingError("The processes of this run have lost each other.")
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self.is_broken = True
            raise TrainingError(_why_unreachable(self.size)) from error


def _is_loss(error: Exception) -> bool:
    """Whether it tells of another process rather than of this one."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))


ALONE = World()

_current: World | None = None
_store: Store | None = None
_joining = threading.Lock()


def is_one_of_many() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} and _world_size() > 1


def _world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def local_rank() -> int:
    """The place of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if is_one_of_many() else 0


def local_size() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_one_of_many() else 1


def current() -> World:
    """The processes that this one was started with; it joins them when first asked.

    This one belongs to the thread of the program. An engine has a `duplicate` of them.
    """
    global _current
    with _joining:
        if _current is None:
            _current = _join() if is_one_of_many() else ALONE
        return _current


def _join() -> World:
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), _world_size()
    if not os.environ.keys() >= {"LOCAL_RANK", "LOCAL_WORLD_SIZE"}:
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={size} are set, but not LOCAL_RANK and LOCAL_WORLD_SIZE, which say "
            f"which device of a machine is whose. Start with torchrun, which sets all of them."
        )
    if not dist.is_initialized():
        if _are_all_here():
            _keep_to_loopback()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_meeting_point(), rank=rank, world_size=size)
        atexit.register(_part)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end_unless_telling)
    return World(rank, size, _host_group(), _device_group())


def _meeting_point() -> Store:
    """A few values that every process can read and write, before they have joined and while one is gone."""
    global _store
    if _store is None:
        from torch.distributed import rendezvous

        try:
            if _are_all_here() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                _store = _store_on_loopback()
            else:
                _store, _, _ = next(rendezvous("env://"))
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error} Start them with torchrun."
            ) from error
    return _store


def _are_all_here() -> bool:
    """Whether all processes of the run are on this machine."""
    return local_size() == _world_size()


def _keep_to_loopback() -> None:
    """Has gloo and NCCL listen where no other machine reaches them, unless the user has said where."""
    names = {name for _, name in socket.if_nameindex()}
    for name in ("lo", "lo0"):
        if name in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _store_on_loopback() -> Store:
    """The store of `rendezvous("env://")`, which would listen on every interface."""
    from torch.distributed import TCPStore
    from torch.distributed.constants import default_pg_timeout

    port, is_server = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    listener = None
    if is_server:
        with socket.socket() as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((_LOOPBACK, port))
            listener = bound.detach()
    return TCPStore(
        _LOOPBACK,
        port,
        _world_size(),
        is_server,
        default_pg_timeout,
        multi_tenant=True,
        master_listen_fd=listener,
    )


_has_lost_others = False
_has_left = False
_others_tell = False
"""Whether the user hears from another process what happened."""
_is_first: bool | None = None
"""Whether this process was the first to fail; None before it fails."""


def _end_unless_telling(number: int, frame: object) -> None:
    """A launcher ends those that outlive a process. One that is about to say what happened says it first."""
    if not _has_lost_others:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _part() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The processes of this run. The last words of one that fails are left for the others to find."""
    world = current()
    try:
        yield world
    except Exception as error:
        if not world.is_alone:
            leave_last_words(error)
        raise
    world.barrier()


def leave_last_words(error: BaseException) -> bool:
    """Says why this process is about to go. Whether it is the first to say so: the others are not heard.

    That is decided once, by the first failure: the process that keeps the words may be gone when it is
    asked again.
    """
    global _is_first
    if _is_first is None:
        words = f"process {os.environ['RANK']} ({socket.gethostname()}) failed: {describe(error)}"
        try:
            _is_first = _meeting_point().compare_set(_LAST_WORDS, "", words).decode() == words
        except (RuntimeError, CookbookError):  # who keeps the words is gone already
            _is_first = not _others_tell
    with contextlib.suppress(RuntimeError, CookbookError):  # likewise
        _let_others_leave(_meeting_point())
    return _is_first


def _let_others_leave(store: Store) -> None:
    """Where no launcher does, the main process keeps the words: it stays while others leave theirs."""
    global _has_left
    if not _has_left:
        _has_left = True
        store.add(_LEAVING, 1)
    if os.environ["RANK"] == "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        deadline = time.monotonic() + 2
        while store.add(_LEAVING, 0) < _world_size() and time.monotonic() < deadline:
            time.sleep(0.02)


def speaks_for_all(error: BaseException) -> bool:
    """Whether this process shall tell the user of a failure, so that it is told once."""
    return not is_one_of_many() or leave_last_words(error)


def _why_unreachable(size: int) -> str:
    global _has_lost_others, _others_tell
    _has_lost_others = True
    reason = "one was killed, or its machine or the network is gone"
    with contextlib.suppress(RuntimeError, CookbookError):
        if _meeting_point().check([_LAST_WORDS]):
            reason = _meeting_point().get(_LAST_WORDS).decode()
            _others_tell = True
    return (
        f"The {size} processes of this run have lost each other: {reason}. Run the same command again to "
        f"resume from the last checkpoint."
    )


def _host_group() -> ProcessGroup:
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _device_group() -> ProcessGroup | None:
    """None is the group that every process was born into."""
    import torch.distributed as dist

    return dist.new_group()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parts of so many elements, each of one dtype, in order."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and (held + tensor.numel() > _BUCKET_ELEMENTS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
