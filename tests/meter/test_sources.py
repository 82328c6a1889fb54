"""RAPL from files, NVML from a stand-in, and what is used where neither is there."""

import math
import sys
import types
from pathlib import Path

import pytest

from robudget.meter import cpu, gpu
from robudget.meter.cpu import (
    MemorySource,
    NoRapl,
    ProcessShare,
    RaplSource,
    machine_seconds,
    open_counters,
    process_seconds,
)
from robudget.meter.energy import Meter


def zone(root: Path, name: str, label: str, microjoules: int | None, span: int = 65_532_610_987) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    if microjoules is not None:
        (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_packages_only_and_each_once(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000_000)
    zone(tmp_path, "intel-rapl:0:0", "dram", 1_000_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 9_000_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000_000)
    zone(tmp_path, "intel-rapl:3", "package-1-die-1", 7_000_000_100)  # shows package 1's counter again
    counters = open_counters(tmp_path)
    assert [counter.name for counter in counters] == ["package-0", "package-1"]
    assert counters[0].patience_seconds == pytest.approx(65.5, rel=0.01)


def test_a_rapl_source_reads_joules(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000_000)
    alone = ProcessShare(process=lambda: 1.0, machine=lambda: 1.0)
    source = RaplSource(open_counters(tmp_path), alone, poll=False)
    (package / "energy_uj").write_text("5072000000\n")
    reading = source.read()
    assert reading.raw == {"rapl_package-0_joules": pytest.approx(72)}
    (package / "energy_uj").unlink()  # the permission is withdrawn, the driver unloaded
    reading = source.read()
    assert math.isnan(reading.joules)
    assert reading.notes == ("package-0: the counter could not be read",)


def test_the_poller_reads_by_itself_and_stops(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000_000)
    source = RaplSource(open_counters(tmp_path), ProcessShare())
    assert source._poller is not None
    thread = source._poller._thread
    assert thread.is_alive()
    assert thread.daemon
    source.close()
    assert not thread.is_alive()


def test_without_rapl_or_permission_the_cpu_is_estimated(tmp_path: Path) -> None:
    with pytest.raises(NoRapl, match="no RAPL"):
        open_counters(tmp_path / "nothing")  # a container without /sys
    zone(tmp_path, "intel-rapl:0", "package-0", None)
    with pytest.raises(NoRapl, match="may not be read"):
        open_counters(tmp_path)
    source = cpu.open_source(ProcessShare(), powercap=tmp_path)
    assert source.how == "estimated"
    assert "may not be read" in source.method


def test_watts_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(name: str, virtual: bool, sockets: int, threads: int) -> cpu.CpuPower:
        monkeypatch.setattr(cpu, "identity", lambda: (name, virtual, sockets))
        monkeypatch.setattr(cpu.os, "cpu_count", lambda: threads)
        return cpu.cpu_power.__wrapped__()

    # Our table knows how many threads the part has, so a slice of it in a virtual machine is billed as a slice.
    assert on("AMD EPYC 7763 64-Core Processor", True, 1, 2).watts_per_thread == pytest.approx(280 / 128)
    # CodeCarbon's table knows the TDP; the machine has all of its threads unless it is virtual.
    assert on("Intel(R) Xeon(R) Gold 6226R CPU @ 2.90GHz", False, 2, 64).watts_per_thread == pytest.approx(150 * 2 / 64)
    virtual = on("Intel(R) Xeon(R) Gold 6226R CPU @ 2.90GHz", True, 1, 4)
    assert virtual.watts_per_thread == 4
    assert "virtual machine" in virtual.method
    assert on("A CPU of the future", False, 1, 8).watts_per_thread == 4


def test_shares_of_a_machine() -> None:
    times = {"mine": 0.0, "busy": 0.0}
    share = ProcessShare(process=lambda: times["mine"], machine=lambda: times["busy"])
    times.update(mine=3.0, busy=12.0)
    assert share.of(100.0) == pytest.approx(25)
    assert math.isnan(share.of(math.nan))
    times.update(mine=6.0, busy=12.0)  # ticks lag behind this process's own clock: never more than everything
    assert share.of(120.0) == pytest.approx(25 + 20)
    times.update(mine=6.0, busy=30.0)
    assert share.of(200.0) <= 45 + 80


def test_windows_beside_busy_others_add_up_to_at_most_the_window_around_them() -> None:
    """On two cores, alone and then beside two others: its share of a stretch falls faster than the stretch grows."""
    times = {"now": 0.0, "mine": 0.0, "busy": 0.0}
    share = ProcessShare(process=lambda: times["mine"], machine=lambda: times["busy"])
    meter = Meter([MemorySource(10.0, share, lambda: times["now"])], clock=lambda: times["now"])
    parts = []
    with meter.window("whole") as whole:
        for own, busy in ((0.1, 0.1), (0.0, 0.2), (0.1, 0.1), (0.0, 0.2), (0.1, 0.1)):
            with meter.window("part") as part:
                times.update(now=times["now"] + 0.1, mine=times["mine"] + own, busy=times["busy"] + busy)
            parts.append(part.energy.kwh)
    assert min(parts) >= 0
    assert 0 < sum(parts) <= whole.energy.kwh * (1 + 1e-12)
    assert whole.energy.kwh <= 10.0 * times["now"] / 3.6e6


def test_the_real_clocks_move() -> None:
    before = process_seconds(), machine_seconds()
    sum(range(3_000_000))
    assert process_seconds() > before[0]
    assert machine_seconds() >= before[1]
    assert cpu.memory_watts() > 0


# -- NVML, by a stand-in for pynvml -----------------------------------------------------------------------------------


class FakeNvml(types.ModuleType):
    """What the hardware can tell is in `values` (the driver's units); what it can't raises, as the driver does."""

    class NVMLError(Exception):
        pass

    def __init__(self, **values: object) -> None:
        super().__init__("pynvml")
        self.values = values

    def nvmlInit(self) -> None:  # noqa: N802
        self._tell("init")

    def _tell(self, key: str) -> object:
        if self.values.get(key) is None:
            raise self.NVMLError("GPU is lost")
        return self.values[key]

    def __getattr__(self, name: str) -> object:
        keys = {
            "nvmlDeviceGetTotalEnergyConsumption": "millijoules",
            "nvmlDeviceGetPowerUsage": "milliwatts",
            "nvmlDeviceGetEnforcedPowerLimit": "limit",
            "nvmlDeviceGetUtilizationRates": "utilisation",
            "nvmlDeviceGetComputeRunningProcesses": "processes",
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetMigMode": "mig",
            "nvmlDeviceGetMemoryInfo": "memory",
            "nvmlSystemGetDriverVersion": "driver",
        }
        if name not in keys:
            raise AttributeError(name)
        return lambda *_: self._tell(keys[name])


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch):
    import torch

    properties = types.SimpleNamespace(uuid="0123")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")

    def install(**values: object) -> FakeNvml:
        module = FakeNvml(init=True, handle="h", **values)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return install


def test_the_energy_counter_comes_first(nvml) -> None:
    module = nvml(millijoules=1_000_000, milliwatts=250_000, processes=[1])
    source = gpu.open_source("cuda:0")
    assert (source.how, source.method) == ("measured", "NVML energy counter of the whole GPU")
    module.values["millijoules"] = 1_500_000
    module.values["processes"] = [1, 2]
    reading = source.read()
    assert reading.joules == pytest.approx(500)
    assert reading.shared is True
    module.values["millijoules"] = module.values["processes"] = None  # it fell off the bus
    reading = source.read()
    assert math.isnan(reading.joules)
    assert reading.shared is None
    source.close()


def test_power_is_integrated_where_there_is_no_counter(nvml) -> None:
    nvml(milliwatts=250_000, processes=[])
    source = gpu.open_source("cuda:0")
    source.close()  # no thread: the test takes the samples
    assert source.method == "NVML power integrated"
    assert source.read().raw["power_samples"] >= 2
    assert source.read().joules >= 0


@pytest.mark.parametrize("reading", ["millijoules", "milliwatts"])
def test_a_slice_is_billed_its_share_of_the_gpu(nvml, monkeypatch: pytest.MonkeyPatch, reading: str) -> None:
    import torch

    slice_of = types.SimpleNamespace(uuid="0123", total_memory=10 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: slice_of)
    whole = types.SimpleNamespace(total=80 << 30)
    module = nvml(mig=(1, 1), memory=whole, processes=[1], **{reading: 1_000_000})
    source = gpu.open_source("cuda:0")
    assert source.how == "estimated"
    assert "of the whole GPU" in source.method
    assert "× 0.125, this slice's share of its memory (MIG)" in source.method
    module.values[reading] = 1_800_000
    reading_now = source.read()
    if reading == "millijoules":
        assert reading_now.joules == pytest.approx(100)
        assert reading_now.raw == {"nvml_joules": pytest.approx(800)}
    else:
        assert reading_now.joules == pytest.approx(reading_now.raw["integrated_joules"] / 8)
    source.close()


def test_the_drivers_version(nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(driver="570.1")
    assert gpu.driver_version() == "570.1"
    nvml()
    assert gpu.driver_version() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.driver_version() is None


def test_utilisation_times_the_limit(nvml) -> None:
    nvml(utilisation=types.SimpleNamespace(gpu=50), limit=300_000, processes=[])
    source = gpu.open_source("cuda:0")
    source.close()
    assert (source.how, source.method) == ("estimated", "utilisation × 300 W integrated")


def test_board_power_by_name_and_by_the_user(nvml) -> None:
    nvml()
    table = gpu.open_source("cuda:0")
    assert table.how == "estimated"
    assert "TDP 400 W of NVIDIA A100-SXM4-80GB" in table.method
    assert "NVML tells neither" in table.method
    user = gpu.open_source("cuda:0", 310.0)
    assert "the user's 310 W" in user.method


def test_a_gpu_nobody_knows_is_unknown(nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Accelerator")
    source = gpu.open_source("cuda:0")
    assert math.isnan(source.read().joules)
    assert "no power of 'Some Accelerator' is known" in source.method
    assert "NVML is not installed" in source.method
