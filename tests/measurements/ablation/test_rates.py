"""The rates of a device: measured once, kept by its name, and measured again where the table is of no use."""

from __future__ import annotations

import json

import pytest
import torch

from harness.measurements.ablation.rates import Rates, kept_rates, measure_rates, rates_of

SHAPE = (64, 96)


class Measured:
    """Counts how often rates are measured."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Rates:
        self.times += 1
        return Rates(8e14, 3.2e12, 2e13 + self.times)


def test_the_rates_of_a_device_are_measured_once(tmp_path) -> None:
    measure = Measured()
    first = kept_rates("NVIDIA H200 (x)", torch.bfloat16, SHAPE, measure, tmp_path)
    assert kept_rates("NVIDIA H200 (x)", torch.bfloat16, SHAPE, measure, tmp_path) == first
    assert measure.times == 1 and first.decomposition_weight == 250
    assert [path.name for path in tmp_path.iterdir()] == ["NVIDIA-H200-x-.json"]
    for other in (("NVIDIA L4", torch.bfloat16, SHAPE), ("NVIDIA H200 (x)", torch.float32, SHAPE),
                  ("NVIDIA H200 (x)", torch.bfloat16, (1, 2))):
        assert kept_rates(*other, measure, tmp_path) != first
    assert measure.times == 4
    assert kept_rates("NVIDIA H200 (x)", torch.bfloat16, SHAPE, measure, tmp_path) == first


@pytest.mark.parametrize("content", ["", "[]", "{\"torch", '{"KEY": {"product": 1}}', '{"KEY": 3}',
                                     '{"KEY": {"product": 1, "decomposition": 0, "edit": 1}}',
                                     '{"KEY": {"product": 1, "decomposition": "x", "edit": 1}}'])
def test_a_table_of_no_use_costs_a_measurement_and_is_replaced(content: str, tmp_path) -> None:
    key = f"torch {torch.__version__}, bfloat16, 64x96"
    (tmp_path / "d.json").write_text(content.replace("KEY", key))
    measure = Measured()
    found = [kept_rates("d", torch.bfloat16, SHAPE, measure, tmp_path) for _ in range(2)]
    assert found[0] == found[1] and measure.times == 1
    assert key in json.loads((tmp_path / "d.json").read_text())


def test_where_nothing_can_be_written_the_rates_are_measured(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    measure = Measured()
    for _ in range(2):
        kept_rates("d", torch.bfloat16, SHAPE, measure, tmp_path / "file")
    assert measure.times == 2 and "cannot keep the rates" in caplog.text


def test_those_of_a_cpu_are_measured_each_time_and_leave_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for found in (rates_of(torch.device("cpu"), torch.float32, SHAPE), measure_rates(torch.device("cpu"),
                                                                                     torch.bfloat16, (40, 1024))):
        assert min(found.product, found.decomposition, found.edit, found.decomposition_weight) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cuda")
    first = rates_of(device, torch.bfloat16, (1024, 2048))
    assert rates_of(device, torch.bfloat16, (1024, 2048)) == first
    assert first.decomposition_weight > 20
