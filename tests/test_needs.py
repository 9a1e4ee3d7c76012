"""The arithmetic of many devices, against counting by hand and against rings that are played through."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from models import create_model
from training.needs import BYTES, Machine, count, dominated, main, step, traffic


def ring(parts: list[list[torch.Tensor]], first: int, reduce: bool) -> int:
    """N - 1 rounds in which device i hands one of its N pieces to device i + 1, which adds it up or keeps it; bytes one device sends."""
    devices, sent = len(parts), 0
    for turn in range(devices - 1):
        handed = [((i + first - turn) % devices, parts[i][(i + first - turn) % devices].clone()) for i in range(devices)]
        for i, (piece, tensor) in enumerate(handed):
            target = parts[(i + 1) % devices]
            target[piece] = target[piece] + tensor if reduce else tensor
        sent += handed[0][1].numel() * handed[0][1].element_size()
    return sent


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_traffic_is_what_rings_send(devices: int) -> None:
    gradients = torch.randn(devices, 64)
    parts = [list(each.chunk(devices)) for each in gradients]
    scattered = ring(parts, first=0, reduce=True)
    for i in range(devices):  # each device has the sum of one piece
        torch.testing.assert_close(parts[i][(i + 1) % devices], gradients.sum(0).chunk(devices)[(i + 1) % devices])
    spread = ring(parts, first=1, reduce=False)
    for each in parts:
        torch.testing.assert_close(torch.cat(each), gradients.sum(0))
    assert traffic(64, devices, sharded=False) == scattered + spread, "an all-reduce scatters sums, then spreads them"
    assert traffic(64, devices, sharded=True) == scattered + 2 * spread


def test_operations_and_activations_are_counted_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 12)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x.flatten(1))))

    counted = count(Two(), (3, 2, 2))
    assert counted.parameters == 12 * 32 + 32 + 32 * 12 + 12
    assert counted.operations == (2 + 3) * 2 * 12 * 32, "the first needs no gradient of its input"
    assert counted.activations == 4 * (12 + 32), "the input, and what ReLU gave, once"


def test_a_dit_is_counted_like_the_published_one() -> None:
    with torch.device("meta"):
        model = create_model("dit", "XL", image_size=32, in_channels=4, patch_size=2, num_classes=1000, long_skips=False)
    assert count(model, (4, 32, 32)).operations == pytest.approx(3 * 2 * 118.6e9, rel=0.02)  # arXiv 2212.09748: 118.6 G multiply-adds


def test_more_devices_hold_less_and_at_some_number_the_network_decides(tiny_dit: Callable) -> None:
    counted, machine = count(tiny_dit(), (3, 16, 16)), Machine()
    steps = [step(counted, machine, devices) for devices in (1, 8)]
    assert steps[0]["sharded_bytes"] == steps[0]["whole_bytes"] and steps[0]["whole_s"] == 0
    assert steps[0]["sharded_bytes"] == pytest.approx(8 * steps[1]["sharded_bytes"])
    assert steps[1]["whole_bytes"] > sum(BYTES.values()) * counted.parameters
    for sharded in (False, True):
        devices = dominated(counted, machine, sharded)
        now, before = (step(counted, machine, each) for each in (devices, devices // 2))
        key = "sharded_s" if sharded else "whole_s"
        assert now[key] > now["compute_s"] and (devices == 2 or before[key] <= before["compute_s"])


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture) -> None:
    main([])
    page = Path("training/configs/README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
    main(["--batch_size", "2048"])
    assert "from 64 devices on; sharded, from 32." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"), [("--network_gb_s inf", "must be finite"), ("--devices 8,x", "must be whole numbers from 1 on")]
)
def test_figures_that_cannot_be_are_told(flags: str, told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(flags.split())
    assert end.value.code == 2
    assert told in capsys.readouterr().err
