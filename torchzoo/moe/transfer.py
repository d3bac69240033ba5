"""Messages between ranks that are under way while the program goes on, and their bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from torchzoo.moe.placement import ExpertPlacement

Group = dist.ProcessGroup


@dataclass
class Traffic:
    """Bytes that a rank handed to other ranks and took from them, by collective.

    Attributes:
        sent: Bytes sent, by name of the collective.
        received: Bytes received, by name of the collective.
        calls: Calls, by name of the collective.
    """

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def add(
        self, what: str, sent: Iterable[Tensor], received: Iterable[Tensor], calls: int = 0
    ) -> None:
        """Count messages of a collective."""
        self.sent[what] += sum(tensor.nbytes for tensor in sent)
        self.received[what] += sum(tensor.nbytes for tensor in received)
        self.calls[what] += calls


@contextmanager
def lost_ranks_reported(what: str) -> Iterator[None]:
    """Say in words what an error of the communication library means."""
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        raise RuntimeError(
            f"{what}: rank {dist.get_rank()} can't reach the others, one of which has probably "
            f"ended or hangs; start the job again from its last checkpoint ({error})"
        ) from error


def group_rank(group: Group | None) -> tuple[int, int]:
    """This process's rank in a group and the group's size; None is the default group, if any."""
    if group is None and not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


class Transfer:
    """A sparse collective under way; its first round is sent when it is made.

    Rounds follow each other, as a rank hands on what it received. Ranks must make, advance and
    wait for their transfers in the same order.

    Args:
        what: Name of the collective.
        rows: Rows of the experts that this rank holds, by expert; they are overwritten.
        placement: Owners and holders.
        group: The ranks.
        traffic: Counts the bytes.
        upward: Whether rows go up the trees to be added, rather than down to be copied.
    """

    def __init__(
        self,
        what: str,
        rows: Tensor,
        placement: ExpertPlacement,
        group: Group | None,
        traffic: Traffic | None,
        *,
        upward: bool,
    ) -> None:
        self.what = what
        self.rows = rows
        self.group = group
        self.traffic = Traffic() if traffic is None else traffic
        self.upward = upward
        self.rank, _ = group_rank(group)
        held = placement.held(self.rank)
        self.index = {expert: row for row, expert in enumerate(held)}
        self.owned = [self.index[expert] for expert in placement.owned(self.rank)]
        rounds = placement.rounds
        self._rounds = iter(reversed(rounds) if upward else rounds)
        self._works: list[dist.Work] = []
        self._buffers: dict[int, Tensor] = {}
        self._incoming: dict[int, list[int]] = {}
        self._post(calls=1)

    def advance(self) -> bool:
        """Wait for the round under way and send the next; whether there is one."""
        with lost_ranks_reported(self.what):
            for work in self._works:
                work.wait()
        for peer in sorted(self._buffers):
            at = torch.tensor(self._incoming[peer], device=self.rows.device)
            into = self.rows.index_add_ if self.upward else self.rows.index_copy_
            into(0, at, self._buffers[peer])
        return self._post()

    def wait(self) -> Tensor:
        """The result: rows of the experts held, or, of a reduction, of those owned."""
        while self.advance():
            pass
        return self.rows[self.owned] if self.upward else self.rows

    def _post(self, calls: int = 0) -> bool:
        """Send a round: one message for each pair of ranks, its rows by expert."""
        transfers = next(self._rounds, None)
        outgoing, incoming = defaultdict(list), defaultdict(list)
        for expert, *ends in transfers or ():
            source, target = reversed(ends) if self.upward else ends
            if source == self.rank:
                outgoing[target].append(self.index[expert])
            elif target == self.rank:
                incoming[source].append(self.index[expert])
        rows, self._incoming = self.rows, incoming
        messages = {peer: rows[picked] for peer, picked in outgoing.items()}
        self._buffers = {p: rows.new_empty(len(at), *rows.shape[1:]) for p, at in incoming.items()}
        operations = [
            dist.P2POp(kind, tensor, group=self.group, group_peer=peer)
            for kind, tensors in ((dist.isend, messages), (dist.irecv, self._buffers))
            for peer, tensor in tensors.items()
        ]
        with lost_ranks_reported(self.what):
            self._works = dist.batch_isend_irecv(operations) if operations else []
        self._messages = messages  # kept until they have been sent
        self.traffic.add(self.what, messages.values(), self._buffers.values(), calls)
        return transfers is not None
