"""State that any layout writes and any other reads: places, proofs, and what is refused."""

from __future__ import annotations

import itertools
import json
import pickle
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.distributed import run_distributed_test
from trunkline.engine.errors import CheckpointError
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.state.sharded_files import ShardedFiles, add_digests, digest, file_names
from trunkline.engine.state.sharded_state import Fragment, capture, restore

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class Alone:
    """A model that one rank holds whole."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def fragments(self) -> list[Fragment]:
        return [Fragment(n, tuple(p.shape), p, 0, 0, p.numel()) for n, p in self.module.named_parameters()]


class Flat:
    """Rank `rank` of `world_size`: all parameters end to end, filled up, cut into equal parts, as ZeRO does."""

    def __init__(self, module: nn.Module, rank: int, world_size: int, momentum: bool = False) -> None:
        self.module = module
        whole = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
        part = -(-len(whole) // world_size)
        whole = nn.functional.pad(whole, (0, part * world_size - len(whole)))
        self.mine = nn.Parameter(whole[rank * part : (rank + 1) * part].clone())
        self.first, self.stop = rank * part, (rank + 1) * part
        sgd = torch.optim.SGD([self.mine], lr=0.1, momentum=0.9) if momentum else None
        self.optimizer = sgd or torch.optim.AdamW([self.mine])

    def fragments(self) -> list[Fragment]:
        found, begin = [], 0
        for name, p in self.module.named_parameters():
            first, stop = max(begin, self.first), min(begin + p.numel(), self.stop)
            if first < stop:
                found.append(Fragment(name, tuple(p.shape), self.mine, first - self.first, first - begin, stop - first))
            begin += p.numel()
        return found


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def step_once(backend: Alone | Flat, scale: float) -> None:
    for group in backend.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.sin(scale * torch.arange(p.numel(), dtype=torch.float32)).view(p.shape)
    backend.optimizer.step()


def write(folder: Path, backends: list[Alone | Flat]) -> dict[str, int]:
    folder.mkdir(exist_ok=True)
    return add_digests([capture(b).write(folder, rank, len(backends)) for rank, b in enumerate(backends)])


def read(files: ShardedFiles, fragment: Fragment, key: str) -> torch.Tensor:
    return files.elements(fragment.name, key, fragment.start, fragment.start + fragment.length)


@given(writers=st.integers(1, 9), readers=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_what_any_number_of_ranks_wrote_any_number_reads(
    tmp_path_factory: pytest.TempPathFactory, writers: int, readers: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    source = Alone(network(1), torch.optim.AdamW(network(1).parameters()))
    source.optimizer = torch.optim.AdamW(source.module.parameters())
    step_once(source, 1.0)
    parts: list[Alone | Flat] = [Flat(source.module, rank, writers) for rank in range(writers)]
    for part in parts:
        step_once(part, 2.0)
    write(folder, parts)
    written = torch.cat([part.mine.detach() for part in parts if isinstance(part, Flat)])
    moments = torch.cat([part.optimizer.state[part.mine]["exp_avg"] for part in parts if isinstance(part, Flat)])
    files = ShardedFiles(folder)
    for rank in range(readers):
        reader = Flat(network(2), rank, readers)
        begin = 0
        places = {}
        for name, p in reader.module.named_parameters():
            places[name] = begin
            begin += p.numel()
        for fragment in reader.fragments():
            first = places[fragment.name] + fragment.start
            assert torch.equal(read(files, fragment, "value"), written[first : first + fragment.length])
            assert torch.equal(read(files, fragment, "exp_avg"), moments[first : first + fragment.length])


def test_parameters_state_scalars_and_buffers_come_back_and_training_goes_on_alike(tmp_path: Path) -> None:
    def trained(seed: int) -> Alone:
        model = network(seed)
        return Alone(model, torch.optim.AdamW(model.parameters(), lr=0.1))

    source, target = trained(1), trained(2)
    for _ in range(3):
        source.module(torch.randn(8, 5))  # moves the batch norm's buffers
        step_once(source, 0.3)
    digests = write(tmp_path, [source])
    restore(target, tmp_path, digests, ALONE)
    for _ in range(2):
        step_once(source, 0.7)
        step_once(target, 0.7)
    for one, two in zip(source.module.state_dict().values(), target.module.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_parameter_in_another_memory_format_comes_back(tmp_path: Path) -> None:
    def convolution() -> Alone:
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        assert not model.weight.is_contiguous()
        return Alone(model, torch.optim.SGD(model.parameters(), lr=0.1))

    source, target = convolution(), convolution()
    restore(target, tmp_path, write(tmp_path, [source]), ALONE)
    assert torch.equal(source.module.weight, target.module.weight)
    assert not target.module.weight.is_contiguous()


def test_a_scalar_parameter_keeps_its_moments(tmp_path: Path) -> None:
    def scalar(value: float) -> Alone:
        model = nn.Module()
        model.scale = nn.Parameter(torch.tensor(value))
        return Alone(model, torch.optim.AdamW(model.parameters()))

    source, target = scalar(1.0), scalar(2.0)
    step_once(source, 1.0)
    next(iter(source.optimizer.state.values()))["exp_avg"].fill_(0.25)
    restore(target, tmp_path, write(tmp_path, [source]), ALONE)
    assert ShardedFiles(tmp_path).keys["scale"] == ["value", "exp_avg", "exp_avg_sq"]
    assert next(iter(target.optimizer.state.values()))["exp_avg"] == 0.25


@given(cut=st.integers(0, 100), seed=st.integers(0, 1000))
def test_a_digest_is_the_sum_of_its_parts_and_sees_exchange_and_change(cut: int, seed: int) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    whole = digest(values, 5)
    assert (digest(values[:cut], 5) + digest(values[cut:], 5 + cut)) % 2**64 == whole
    exchanged = values.clone()
    exchanged[[3, 50]] = values[[50, 3]]
    assert digest(exchanged, 5) != whole
    values[cut % 100] = torch.nextafter(values[cut % 100], torch.tensor(9.0))
    assert digest(values, 5) != whole


def test_a_digest_is_the_sum_of_the_mixed_places_and_bits() -> None:
    def splitmix64(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    values = [1.0, -2.5, 0.0]
    bits = [struct.unpack("<i", struct.pack("<f", value))[0] for value in values]
    places = range(7, 10)
    mixed = [splitmix64((b + i * 0x9E3779B97F4A7C15) % 2**64) for b, i in zip(bits, places, strict=True)]
    assert digest(torch.tensor(values), 7) == sum(mixed) % 2**64


def broken(folder: Path) -> Iterator[tuple[Callable[[], None], str]]:
    tensors, index = (folder / name for name in file_names(0, 1))

    def reindex(change: Callable[[dict], None]) -> None:
        whole = json.loads(index.read_text())
        change(whole["fragments"])
        index.write_text(json.dumps(whole))

    yield lambda: reindex(lambda f: f["0.weight"].update(shape=[7, 6])), "0.weight has shape .7, 6., but this model's"
    yield lambda: reindex(lambda f: f.pop("2.bias")), "lacks the parameter 2.bias"
    yield lambda: reindex(lambda f: f.update({"9.bias": f["2.bias"]})), "holds 9.bias, which this model does not have"
    yield lambda: reindex(lambda f: f["0.weight"].update(stop=30)), "lacks elements from 30 on of 0.weight:value"
    yield (
        lambda: reindex(lambda f: f["0.weight"].update(keys=["value", "imagined"])),
        "0.weight:imagined cannot be read",
    )
    yield lambda: index.rename(folder / file_names(1, 2)[1]), "expected rank-00000-of-N.json"
    yield lambda: index.write_text("{"), "cannot be read"
    yield tensors.unlink, "cannot be read"


@pytest.mark.fault("state of another shape or model")
@pytest.mark.parametrize("case", range(8))
def test_files_that_do_not_fit_are_named(tmp_path: Path, case: int) -> None:
    source = Alone(network(1), torch.optim.SGD(network(1).parameters(), lr=0.1))
    digests = write(tmp_path, [source])
    harm, message = list(broken(tmp_path))[case]
    harm()
    with pytest.raises(CheckpointError, match=message):
        restore(source, tmp_path, digests, ALONE)


def test_elements_in_the_wrong_place_are_noticed(tmp_path: Path) -> None:
    source = Alone(network(1), torch.optim.SGD(network(1).parameters(), lr=0.1))
    digests = write(tmp_path, [source])

    class Overlapping(Alone):
        """An adapter that believes two parameters to lie one element too close."""

        def fragments(self) -> list[Fragment]:
            sizes = {name: p.numel() for name, p in self.module.named_parameters()}
            self.flat = nn.Parameter(torch.zeros(sum(sizes.values())))
            begins = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
            begins["2.bias"] -= 1
            shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
            return [Fragment(n, shapes[n], self.flat, begins[n], 0, sizes[n]) for n in sizes]

    target = Overlapping(network(2), torch.optim.SGD(network(2).parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"2\.weight, value: after loading, its elements are not those"):
        restore(target, tmp_path, digests, ALONE)


def anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


def load_and_watch_memory(rank: int, world_size: int, folder: Path) -> tuple[int, int]:
    """Peak of the memory taken while loading, and what was in use for good afterwards."""
    model = nn.ParameterDict({str(i): nn.Parameter(torch.ones(1024, 2048)) for i in range(8)})  # 8 MiB each
    target = Alone(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    digests = json.loads((folder / "digests").read_text())
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    restore(target, folder, digests, ALONE)
    done.set()
    watcher.join()
    return peak - before, anonymous_memory() - before


@pytest.mark.distributed
def test_loading_needs_no_more_than_a_few_times_the_largest_parameter_beside_the_state(tmp_path: Path) -> None:
    model = nn.ParameterDict({str(i): nn.Parameter(torch.ones(1024, 2048)) for i in range(8)})
    parts = [Flat(model, rank, 3, momentum=True) for rank in range(3)]
    for part in parts:
        step_once(part, 1.0)
    (tmp_path / "digests").write_text(json.dumps(write(tmp_path, list(parts))))
    [(peak, kept)] = run_distributed_test(load_and_watch_memory, 1, tmp_path)
    largest = 1024 * 2048 * 4
    assert kept > 7 * largest  # the momentum of eight parameters
    assert peak - kept < 4 * largest, f"{(peak - kept) / largest:.1f} times the largest parameter"


@pytest.mark.fault("hostile pickle in place of a file")
def test_a_hostile_pickle_is_never_opened(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
            return open, (str(tmp_path / "ran"), "w")

    source = Alone(network(1), torch.optim.SGD(network(1).parameters(), lr=0.1))
    digests = write(tmp_path, [source])
    (tmp_path / file_names(0, 1)[0]).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore(source, tmp_path, digests, ALONE)
    assert not (tmp_path / "ran").exists()


def test_optimizer_state_that_cannot_be_split_is_refused_by_name(tmp_path: Path) -> None:
    model = network(1)
    backend = Alone(model, torch.optim.Adafactor(model.parameters()))
    step_once(backend, 1.0)
    with pytest.raises(CheckpointError, match=r"Adafactor keeps row_var .* cannot be split over ranks; use AdamW"):
        capture(backend)
