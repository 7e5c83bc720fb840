"""What ranks must have in common, compared before anything depends on it.

    store = meet(launch, record, timeout_s)      nobody missing, nobody twice, one number of ranks, one code
    agree({"training.seed": 42, ...})            on all ranks: nothing, or the same ConfigError on all of them
    tell(error)                                  by a rank that has to end: the others, which wait for it, end too

Ranks that differ in a seed or a learning rate train, and what they train is rubbish: nothing else says so. Each rank
compares its record with rank 0's; rank 0 collects what they found and tells it to all. The words pass through the
key-value store at which process groups are made, so that no collective has to work yet, and a rank that does not come
is named.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.machine.log import LOG
from trunkline.engine.ranks.launch import Launch, read_launch
from trunkline.engine.ranks.start_facts import digest

_SHOWN = 6  # differences of one rank
_ENDS = "rank 0 ends"  # in place of a digest
_LONG_S = 30.0  # after which a person wants to know for whom a start waits
_GRACE_S = 10.0  # for the others to hear why this rank ends


class DisagreementError(ConfigError):
    """The ranks differ, one of them cannot start, or they do not find each other. All of them have heard of it."""


class _Meeting:
    """The ranks at their store. The parts of a round have keys that begin with its number."""

    rounds = itertools.count()  # never used twice in a process, so nothing of an earlier meeting is taken for an answer

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        self.store, self.rank, self.timeout_s = dist.PrefixStore("agreement", store), rank, timeout_s
        self.others = range(1, world_size)
        self.listeners = len(self.others)
        self.over = False

    def compare(self, record: Mapping[str, Any]) -> None:
        """Raise DisagreementError on all ranks if the record of one differs from rank 0's."""
        mine = {key: json.dumps(value, sort_keys=True, default=str) for key, value in record.items()}
        text = json.dumps(mine, sort_keys=True)
        base = str(next(self.rounds))
        try:
            verdict = self._collect(base, text) if self.rank == 0 else self._compare(base, mine, text)
        except dist.DistError as error:
            raise DisagreementError(
                f"rank 0 has ended during the start, so this one stops: {_first_line(error)}"
            ) from error
        if verdict:
            self._leave(base)
            raise DisagreementError(verdict)

    def _collect(self, base: str, text: str) -> str:
        self.store.set(f"{base}/record", text)
        self.store.set(f"{base}/digest", digest(text.encode()))
        said = self._words(base)
        verdict = ""
        if lines := [f"  rank {rank}: {line}" for rank, word in said.items() for line in word.splitlines()]:
            verdict = "\n".join(
                [
                    "the ranks do not start as one run, so nothing is trained:",
                    *lines,
                    "  Start all ranks with the same command, files and code",
                ]
            )
        self.store.set(f"{base}/verdict", verdict)
        return verdict

    def _words(self, base: str) -> dict[int, str]:
        """What the other ranks found, by rank: empty if nothing. Once one found something, little time is left."""
        words: dict[int, str] = {}
        began, said = time.monotonic(), False
        deadline = began + self.timeout_s
        for pause in _pauses():
            for rank in self.others:
                if rank not in words and self.store.check([f"{base}/{rank}"]):
                    words[rank] = self.store.get(f"{base}/{rank}").decode()
                    if words[rank]:
                        deadline = min(deadline, time.monotonic() + 2.0)
            if len(words) == len(self.others):
                return words
            if not said and time.monotonic() > began + _LONG_S:
                said = True
                late = ", ".join(str(rank) for rank in self.others if rank not in words)
                LOG.info(f"waiting for rank {late[:80]}, for at most {self.timeout_s:g} s")
            if time.monotonic() > deadline:
                if any(words.values()):
                    return words
                self.listeners = len(words)
                absent = f"has not come within {self.timeout_s:g} s: it was not started, hangs, or cannot reach rank 0"
                return {rank: absent for rank in self.others if rank not in words}
            time.sleep(pause)
        raise AssertionError

    def _compare(self, base: str, mine: dict[str, str], text: str) -> str:
        self._await(f"{base}/digest", "rank 0 has not come")
        differences: list[str] = []
        if self.store.get(f"{base}/digest").decode() not in (digest(text.encode()), _ENDS):
            differences = _differences(json.loads(self.store.get(f"{base}/record")), mine)
        self.store.set(f"{base}/{self.rank}", "\n".join(differences))
        self._await(f"{base}/verdict", "rank 0 does not answer")
        verdict = self.store.get(f"{base}/verdict").decode()
        return verdict or "\n".join(f"rank {self.rank}: {line}" for line in differences)  # a store of another run

    def _await(self, key: str, otherwise: str) -> None:
        deadline = time.monotonic() + self.timeout_s + _GRACE_S  # rank 0, which names who is missing, comes first
        for pause in _pauses():
            if self.store.check([key]):
                return
            if time.monotonic() > deadline:
                raise DisagreementError(
                    f"{otherwise} within {self.timeout_s:g} s of this rank's start: it hangs or has ended"
                )
            time.sleep(pause)

    def tell(self, problem: str) -> None:
        """Say in the next round that this rank ends."""
        self.over = True
        base = str(next(self.rounds))
        if self.rank == 0:
            self.store.set(f"{base}/verdict", f"rank 0 cannot start: {problem}")
            self.store.set(f"{base}/digest", _ENDS)
        else:
            self.store.set(f"{base}/{self.rank}", f"cannot start: {problem}")
        self._leave(base)

    def _leave(self, base: str) -> None:
        """Rank 0 may hold the store, so it leaves last."""
        heard = self.store.add(f"{base}/heard", 0 if self.rank == 0 else 1)
        deadline = time.monotonic() + _GRACE_S
        while self.rank == 0 and heard < self.listeners and time.monotonic() < deadline:
            time.sleep(0.05)
            heard = self.store.add(f"{base}/heard", 0)


_meeting: _Meeting | None = None
_groups = itertools.count()


def meet(launch: Launch, record: Mapping[str, Any], timeout_s: float) -> dist.Store:
    """Wait for the other ranks and compare the record with theirs. Returns the store for process groups.

    Raises:
        ConfigError: the ranks differ, one is missing, or there are two of one; the address of rank 0 is wrong.
    """
    global _meeting
    store = _connect(launch, timeout_s)  # rank 0 may hold it, so it stays while the process does: others may need it
    _meeting = _Meeting(store, launch.rank, launch.world_size, timeout_s)
    me = f"process {os.getpid()} on {socket.gethostname()}"
    first = _meeting.store.compare_set(f"rank/{launch.rank}", "", me).decode()
    if first != me:
        raise DisagreementError(
            f"RANK={launch.rank}: {first} is rank {launch.rank} already, and so is {me}: give each process a RANK of "
            "its own, or start with torchrun, deepspeed, srun or mpirun, which do"
        )
    _meeting.compare(record)
    return dist.PrefixStore(f"group-{next(_groups)}", store)  # a store remembers the addresses of a group that is gone


def agree(record: Mapping[str, Any], last: bool = False) -> None:
    """Raise DisagreementError on all ranks unless all of them have this record. Called on all ranks.

    Args:
        record: values that JSON can hold, by the names that a person knows them by.
        last: nothing of the start is compared after this; a rank that ends is none of the others' concern here.
    """
    meeting = _present()
    if meeting is not None:
        meeting.compare(record)
        meeting.over = last


def tell(error: Exception) -> None:
    """Let the ranks that wait for this one at its start know why it ends, in a few seconds; else do nothing. Telling
    it twice tells it once."""
    if isinstance(error, DisagreementError):
        return
    global _meeting
    with contextlib.suppress(TrunklineError, dist.DistError):
        _meeting = _present()
        if _meeting is None and not dist.is_initialized() and (launch := read_launch()).world_size > 1:
            _meeting = _Meeting(_connect(launch, _GRACE_S), launch.rank, launch.world_size, _GRACE_S)
        if _meeting is not None and not _meeting.over:
            _meeting.tell(str(error) or type(error).__name__)


def _present() -> _Meeting | None:
    global _meeting
    if _meeting is None and dist.is_initialized() and dist.get_world_size() > 1:  # a group that somebody else has made
        store = dist.distributed_c10d._get_default_store()
        _meeting = _Meeting(store, dist.get_rank(), dist.get_world_size(), 1800.0)
    return _meeting


def _connect(launch: Launch, timeout_s: float) -> dist.Store:
    """The store that rank 0 holds, or torchrun's, which keeps what an attempt before this one put into it."""
    holds_it = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience_s = min(timeout_s, 60.0) if holds_it else timeout_s
    made: list[dist.Store | dist.DistError] = []

    def make() -> None:
        try:
            store = dist.TCPStore(
                launch.address, launch.port, launch.world_size, is_master=holds_it, wait_for_workers=False,
                multi_tenant=True, timeout=datetime.timedelta(seconds=patience_s),
            )  # fmt: skip
            store.set_timeout(datetime.timedelta(seconds=timeout_s))
            made.append(store)
        except dist.DistError as error:
            made.append(error)

    # in a thread, because it waits for ever where another program listens at the port, and hears no signal
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(patience_s + _GRACE_S)
    store = made[0] if made else dist.DistError(f"no answer within {patience_s:g} s")
    if isinstance(store, dist.Store):
        return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    where = f"MASTER_ADDR and MASTER_PORT ({launch.address}:{launch.port})"
    raise DisagreementError(
        f"{where}: rank {launch.rank} {'cannot wait' if holds_it else 'does not reach rank 0'} there: "
        f"{_first_line(store)}; rank 0 has to run on that machine, and no other program or run may have the port: "
        "give the launcher another one, --master_port"
    )


def _differences(theirs: dict[str, str], mine: dict[str, str]) -> list[str]:
    keys = [*theirs, *(key for key in mine if key not in theirs)]
    lines = [
        f"{key} is {_shown(mine.get(key))}, but {_shown(theirs.get(key))} on rank 0"
        for key in keys if theirs.get(key) != mine.get(key)
    ]  # fmt: skip
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]


def _shown(text: str | None) -> str:
    return "not there" if text is None else text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _pauses() -> Iterator[float]:
    """Short at first, half a second in the long run."""
    return itertools.chain(itertools.repeat(0.005, 40), itertools.repeat(0.05, 100), itertools.repeat(0.5))
