"""What a run costs: FLOPs counted, energy measured or estimated, dollars and carbon. Only `flops` imports torch."""
