"""What a run costs: FLOPs counted (`flops`), energy measured or estimated (`energy`), dollars and carbon computed from
them (`cost`), all of it as one plain record (`record`), and all of it again before the run (`forecast`).

Only `flops`, `calibration` and `forecast` import torch.
"""

from robudget.meter.energy import Energy, Meter, Part, Window
from robudget.meter.energy import open_meter as open

__all__ = ["Energy", "Meter", "Part", "Window", "open"]
