from __future__ import annotations

import pytest

from trunkline.launchers.bench import main


def test_batch_norms_by_groups_are_timed_beside_torch_s(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--arch resnet_tiny --img-size 16 --micro-batch-size 8 --turns 2 --steps 1"
    assert main(["batch_norm", *small.split()]) == 0
    names = [line.split(" / ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["time, one group", "time, two groups", "time, four groups"]


@pytest.mark.parametrize("arch", ["resnet99", "swin_tiny"])
def test_a_network_without_batch_norms_is_refused(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["batch_norm", "--arch", arch])
    assert f"--arch: invalid choice: '{arch}'" in capsys.readouterr().err
