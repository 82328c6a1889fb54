"""Money and carbon: pure functions of energy, time and a `Prices` record. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from robudget.config import load_yaml
from robudget.errors import InputError, unknown
from robudget.meter.grid import find
from robudget.threat import parse_number


@dataclass(frozen=True)
class Prices:
    """What energy and time cost. The defaults are the paper's (arXiv 2312.13131).

    `pue`: power usage effectiveness of the data centre; `usd_per_kwh` and `gco2e_per_kwh` of the grid; `pue_in_co2`:
    whether carbon counts the data centre's overhead too (the paper's does not); `usd_per_gpu_hour`: rent of hardware,
    None = none is paid; `synthetic_wh_per_image`: energy of generating one synthetic image, by the user, None = not
    counted. `source` says where the figures are from.
    """

    name: str = "paper"
    source: str = "arXiv 2312.13131: electricity $0.12/kWh, PUE 1.58, 566.3 gCO2e/kWh (US, Google Cloud)"
    pue: float = 1.58
    usd_per_kwh: float = 0.12
    gco2e_per_kwh: float = 566.3
    pue_in_co2: bool = False
    usd_per_gpu_hour: float | None = None
    synthetic_wh_per_image: float | None = None

    def __post_init__(self) -> None:
        for key, (low, high, unit) in _PLAUSIBLE.items():
            value = getattr(self, key)
            if value is None and key in _OPTIONAL:
                continue
            number = parse_number(value)
            if not low <= number <= high:
                raise InputError(f"prices: {key} = {value} (allowed: {low:g} to {high:g} {unit})")
            object.__setattr__(self, key, number)
        if not isinstance(self.pue_in_co2, bool):
            raise InputError(f"prices: pue_in_co2 = {self.pue_in_co2!r} (allowed: true, false)")

    @classmethod
    def load(cls, source: str | Path) -> Prices:
        """`paper`; a region of CodeCarbon's tables (`FRA`, `california`, `europe-west9`: its carbon intensity, carbon
        with PUE, else the paper's figures); or a YAML file with fields of `Prices`, over those of its `region` if it
        names one. Raises InputError, with the nearest name."""
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            return cls() if str(source).lower() == "paper" else cls.of_region(str(source))
        try:
            data = load_yaml(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read prices {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in (*known, "region"):
                raise unknown(f"key in {path}", key, [*known, "region"])
        region = data.pop("region", None)
        base = cls() if region is None else cls.of_region(str(region))
        about = {"name": path.stem, "source": str(path) if region is None else f"{path}; {base.source}"}
        return replace(base, **(about | data))

    @classmethod
    def of_region(cls, region: str) -> Prices:
        try:
            grid = find(region)
        except InputError as error:
            raise InputError(f"{error}; or 'paper', or a .yaml file") from None
        source = f"carbon: {grid.source}; electricity $0.12/kWh and PUE 1.58: arXiv 2312.13131"
        return cls(name=grid.name, source=source, gco2e_per_kwh=grid.gco2e_per_kwh, pue_in_co2=True)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_OPTIONAL = ("usd_per_gpu_hour", "synthetic_wh_per_image")
_PLAUSIBLE = {
    "pue": (1.0, 5.0, "(facility ÷ IT energy)"),
    "usd_per_kwh": (0.0, 5.0, "$/kWh"),
    "gco2e_per_kwh": (0.0, 2000.0, "gCO2e/kWh"),
    "usd_per_gpu_hour": (0.0, 1000.0, "$/hour"),
    "synthetic_wh_per_image": (0.0, 1e4, "Wh/image"),
}
PAPER = Prices()


@dataclass(frozen=True)
class Bill:
    """`cost_usd` = energy × PUE × price. Rent and synthetic data are lines of their own, never in `cost_usd`; NaN where
    unknown, None where nobody asked (no rent is paid; no synthetic data, or its energy not counted)."""

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
    """What `kwh` at the plug and `seconds` of `gpus` rented GPUs cost; `synthetic_images` generated for it (None: some,
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
