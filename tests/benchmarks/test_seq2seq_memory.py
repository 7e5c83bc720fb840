from __future__ import annotations

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from trunkline.benchmarks.seq2seq_memory import ATTENTIONS, batch_of, kept_bytes, network_of
from trunkline.launchers.bench import main


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_tensors_without_values_count_as_those_with_some(attention: str) -> None:
    with FakeTensorMode():
        expected = kept_bytes(network_of("tiny", attention, 1, False), batch_of(2, 24, 16))
    assert kept_bytes(network_of("tiny", attention, 1, False), batch_of(2, 24, 16)) == expected


def test_each_attention_has_a_line_whole_and_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--preset tiny --layers 1 --batch-size 2 --source-length 16 --target-length 8 --steps 1"
    assert main(["seq2seq_memory", *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [name for name in ATTENTIONS for _ in range(2)]
    assert all(" GiB " in line and " s (" in line for line in lines[1:])
