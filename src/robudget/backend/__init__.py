"""How the machine computes: precision, BatchNorm folding, memory and batch sizes, for training and attacks alike."""
