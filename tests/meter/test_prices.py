"""Money and carbon: the paper's figures, regions, files, and refusals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robudget.errors import InputError
from robudget.meter import devices
from robudget.meter.prices import Prices, bill, find_grid


def test_the_papers_prices() -> None:
    paper = bill(10.0, 3600.0)
    assert paper.prices == "paper"
    assert paper.cost_usd == pytest.approx(10 * 1.58 * 0.12)
    assert paper.co2_kg == pytest.approx(5.663)  # without PUE, as the paper has it
    assert paper.rent_usd is None
    assert paper.synthetic == "none"


def test_rent_and_synthetic_data_are_lines_of_their_own() -> None:
    prices = Prices(usd_per_gpu_hour=2.0, synthetic_wh_per_image=0.5)
    made = bill(1.0, 1800.0, prices, gpus=4, synthetic_images=1_000_000)
    assert made.cost_usd == bill(1.0, 1800.0).cost_usd
    assert made.rent_usd == pytest.approx(4.0)
    assert made.synthetic_kwh == pytest.approx(500)
    assert bill(1.0, 1.0, synthetic_images=10).synthetic == "not counted"


def test_unknown_energy_stays_unknown() -> None:
    assert math.isnan(bill(math.nan, 1.0).cost_usd)
    assert math.isnan(bill(math.nan, 1.0).co2_kg)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_bills_add_up(a: float, b: float) -> None:
    both = bill(a + b, 0.0)
    assert both.cost_usd == pytest.approx(bill(a, 0.0).cost_usd + bill(b, 0.0).cost_usd)
    assert both.co2_kg == pytest.approx(bill(a, 0.0).co2_kg + bill(b, 0.0).co2_kg)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pue": 0.9}, "pue = 0.9 \\(allowed: 1 to 5"),
        ({"usd_per_kwh": -0.1}, "usd_per_kwh = -0.1"),
        ({"gco2e_per_kwh": 5e5}, "gco2e_per_kwh = 500000.0 \\(allowed: 0 to 2000"),
        ({"usd_per_gpu_hour": -1}, "usd_per_gpu_hour"),
        ({"usd_per_kwh": "cheap"}, "not a number"),
        ({"pue_in_co2": "maybe"}, "pue_in_co2"),
    ],
)
def test_absurd_prices_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Prices(**fields)


def test_regions_by_country_state_and_cloud() -> None:
    france = Prices.load("FRA")
    assert france == Prices.load("france")
    assert 20 < france.gco2e_per_kwh < 120
    assert france.pue_in_co2
    assert "2" in france.source
    assert "CodeCarbon" in france.source
    assert bill(1.0, 0.0, france).co2_kg == pytest.approx(france.gco2e_per_kwh * 1.58 / 1e3)
    assert Prices.load("europe-west9").name == "gcp/europe-west9"
    assert Prices.load("georgia").name == "GEO"  # the country; the state is usa/georgia
    assert find_grid("usa/california").year is not None
    assert Prices.load("PAPER") == Prices()


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown region 'Frnace'; did you mean 'France'"):
        Prices.load("Frnace")
    with pytest.raises(InputError, match="unknown device 'v10'; did you mean 'v100'"):
        devices.find("v10")


def test_a_price_file(tmp_path) -> None:
    path = tmp_path / "eu.yaml"
    path.write_text("region: DEU\nusd_per_kwh: 0.25\npue: 1.2\n")
    prices = Prices.load(path)
    assert (prices.name, prices.usd_per_kwh, prices.pue) == ("eu", 0.25, 1.2)
    assert prices.gco2e_per_kwh == Prices.load("DEU").gco2e_per_kwh
    path.write_text("usd_per_kw: 0.25\n")
    with pytest.raises(InputError, match="did you mean 'usd_per_kwh'"):
        Prices.load(path)
    with pytest.raises(InputError, match="cannot read prices"):
        Prices.load(tmp_path / "none.yaml")


def test_the_device_table_is_complete() -> None:
    table = devices.devices()
    assert {"v100", "a100", "h100", "h200", "b200"} <= table.keys()
    assert sum(device.kind == "cpu" for device in table.values()) >= 5
    for device in table.values():
        assert device.source
        assert 10 < device.watts < 1500
        assert device.peak.keys() == device.attainable.keys()
        assert (device.threads > 0) == (device.kind == "cpu")
        for precision, (low, likely, high) in device.attainable.items():
            assert 0 < low < likely < high < 1
            assert device.flops_per_second(precision)[1] == pytest.approx(likely * device.peak[precision])
    assert devices.find("V100").precision("auto") == "float32"
    assert devices.find("a100").precision("auto") == "bfloat16"
    assert devices.find("a100").precision("float32") == "float32"
    assert devices.gpu_watts("NVIDIA GeForce RTX 2080 Ti") == 250
    assert devices.gpu_watts("Voodoo 2") is None
