"""Carbon intensity of electricity by country, US state and cloud region, from CodeCarbon's tables. Offline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

from robudget.errors import unknown

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


def find(region: str) -> Grid:
    """The grid of `region`: a country (`FRA`, `France`), a US state (`usa/california`, `california`) or a cloud region
    (`gcp/europe-west9`, `europe-west9`), whatever the case. Raises InputError with the nearest name."""
    by_name = _by_name()
    if region.lower() not in by_name:
        raise unknown("region", region, (name for grid in grids() for name in grid.names))
    return by_name[region.lower()]


@lru_cache(maxsize=1)
def grids() -> tuple[Grid, ...]:
    """All of them: countries, then US states, then cloud regions."""
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
