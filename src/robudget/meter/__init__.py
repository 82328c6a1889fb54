"""What a run costs: FLOPs counted (`flops`), energy measured or estimated (`energy`), dollars and carbon computed from
them (`prices`), all of it as one plain record (`record`). Only `flops` imports torch.
"""

from robudget.meter.energy import Energy, Meter, Part, Window
from robudget.meter.energy import open_meter as open

__all__ = ["Energy", "Meter", "Part", "Window", "open"]
