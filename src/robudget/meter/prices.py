"""Money and carbon: pure functions of energy, time and a `Prices` record, with the carbon intensities of the world's
grids. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from robudget.config import Number, Record, is_yaml, load_yaml, read_file
from robudget.errors import InputError, unknown


class Prices(Record):
    """What energy and time cost. The defaults are the paper's (arXiv 2312.13131).

    `pue`: power usage effectiveness of the data centre; `usd_per_kwh` and `gco2e_per_kwh` of the grid; `pue_in_co2`:
    whether carbon counts the data centre's overhead too (the paper's does not); `usd_per_gpu_hour`: rent of hardware,
    None = none is paid; `synthetic_wh_per_image`: energy of generating one synthetic image, by the user, None = not
    counted. `source` says where the figures are from.
    """

    prefix: ClassVar[str] = "prices: "
    name: str = "paper"
    source: str = "arXiv 2312.13131: electricity $0.12/kWh, PUE 1.58, 566.3 gCO2e/kWh (US, Google Cloud)"
    pue: Number = Field(1.58, ge=1, le=5, description="1 to 5 (facility ÷ IT energy)")
    usd_per_kwh: Number = Field(0.12, ge=0, le=5, description="0 to 5 $/kWh")
    gco2e_per_kwh: Number = Field(566.3, ge=0, le=2000, description="0 to 2000 gCO2e/kWh")
    pue_in_co2: bool = Field(False, description="true, false")
    usd_per_gpu_hour: Number | None = Field(None, ge=0, le=1000, description="0 to 1000 $/hour")
    synthetic_wh_per_image: Number | None = Field(None, ge=0, le=10_000, description="0 to 10000 Wh/image")

    @classmethod
    def load(cls, source: str | Path) -> Prices:
        """`paper`; a region of CodeCarbon's tables (`FRA`, `california`, `europe-west9`: its carbon intensity, carbon
        with PUE, else the paper's figures); or a YAML file with fields of `Prices`, over those of its `region` if it
        names one. Raises InputError, with the nearest name."""
        if not is_yaml(source):
            return cls() if str(source).lower() == "paper" else cls.of_region(str(source))
        path = Path(source)
        data = load_yaml(read_file("prices", path), str(path))
        known = [*cls.model_fields, "region"]
        for key in data:
            if key not in known:
                raise unknown(f"key in {path}", key, known)
        region = data.pop("region", None)
        base = cls() if region is None else cls.of_region(str(region))
        about = {"name": path.stem, "source": str(path) if region is None else f"{path}; {base.source}"}
        return cls(**(base.to_dict() | about | data))

    @classmethod
    def of_region(cls, region: str) -> Prices:
        try:
            grid = find_grid(region)
        except InputError as error:
            raise InputError(f"{error}; or 'paper', or a .yaml file") from None
        source = f"carbon: {grid.source}; electricity $0.12/kWh and PUE 1.58: arXiv 2312.13131"
        return cls(name=grid.name, source=source, gco2e_per_kwh=grid.gco2e_per_kwh, pue_in_co2=True)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()


PAPER = Prices()


@dataclass(frozen=True)
class Bill:
    """`cost_usd` = energy × PUE × price. Rent and synthetic data are lines of their own, never in `cost_usd`; NaN where
    unknown, None where there is none to pay (no rent; no synthetic data, or its energy not counted)."""

    kwh: float
    cost_usd: float
    co2_kg: float
    rent_usd: float | None
    synthetic_kwh: float | None
    synthetic: str
    prices: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bill(
    kwh: float, seconds: float, prices: Prices = PAPER, *, gpus: int = 0, synthetic_images: int | None = 0
) -> Bill:
    """What `kwh` and `seconds` of `gpus` rented GPUs cost; `synthetic_images` generated for it (None: some,
    nobody knows how many)."""
    rent = None
    if prices.usd_per_gpu_hour is not None:
        rent = gpus * seconds / 3600 * prices.usd_per_gpu_hour
    per_image = prices.synthetic_wh_per_image
    synthetic_kwh = None if per_image is None or not synthetic_images else synthetic_images * per_image / 1e3
    return Bill(
        kwh=kwh,
        cost_usd=kwh * prices.pue * prices.usd_per_kwh,
        co2_kg=kwh * (prices.pue if prices.pue_in_co2 else 1.0) * prices.gco2e_per_kwh / 1e3,
        rent_usd=rent,
        synthetic_kwh=synthetic_kwh,
        synthetic=(
            "none"
            if synthetic_images == 0
            else "not counted"
            if synthetic_kwh is None
            else f"{synthetic_images} images × {per_image:g} Wh, the user's figure"
        ),
        prices=prices.name,
    )


# -- carbon intensity of electricity by country, US state and cloud region: CodeCarbon's tables, offline ---------------

_KG_PER_LB = 0.45359237


@dataclass(frozen=True)
class Grid:
    """`names` are what it may be asked for by, the first one is its own; `year` is None where the table has none."""

    names: tuple[str, ...]
    gco2e_per_kwh: float
    year: int | None
    source: str

    @property
    def name(self) -> str:
        return self.names[0]


def find_grid(region: str) -> Grid:
    """The grid of `region`: a country (`FRA`, `France`), a US state (`usa/california`, `california`) or a cloud region
    (`gcp/europe-west9`, `europe-west9`), whatever the case. Raises InputError with the nearest name."""
    by_name = _by_name()
    if region.lower() not in by_name:
        raise unknown("region", region, (name for grid in grids() for name in grid.names))
    return by_name[region.lower()]


@lru_cache(maxsize=1)
def grids() -> tuple[Grid, ...]:
    """Every grid of CodeCarbon's tables: countries, then US states, then cloud regions."""
    from codecarbon.input import DataSource

    data = DataSource()  # type: ignore[no-untyped-call]
    version = metadata.version("codecarbon")
    table = []
    for code, entry in data.get_global_energy_mix_data().items():
        source = f"{entry['country_name']} {entry['year']}, yearly mean of generation (CodeCarbon {version})"
        names = (code, entry["country_name"])
        table.append(Grid(names, float(entry["carbon_intensity"]), int(entry["year"]), source))
    states = data.get_country_emissions_data("usa")
    about = states.get("_source", {})
    for state, entry in states.items():
        if state.startswith("_") or "regionCode" not in entry:
            continue
        grams = entry["emissions"] * _KG_PER_LB  # lbs/MWh = g/kWh × 2.2
        source = f"{state.title()}, {about.get('name', 'EPA eGRID')} (CodeCarbon {version})"
        table.append(Grid((f"usa/{state}", state), grams, about.get("year"), source))
    for row in data.get_cloud_emissions_data().to_dict("records"):
        source = f"{row['providerName']} {row['region']}, {row['source']} (CodeCarbon {version})"
        table.append(Grid((f"{row['provider']}/{row['region']}", row["region"]), float(row["impact"]), None, source))
    return tuple(table)


@lru_cache(maxsize=1)
def _by_name() -> dict[str, Grid]:
    # Georgia is a country and a state: the first one, the country, has the bare name.
    return {name.lower(): grid for grid in reversed(grids()) for name in reversed(grid.names)}
