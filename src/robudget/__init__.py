"""robudget: how much adversarial robustness a unit of compute buys, and what the next point would cost."""

__version__ = "0.1.0"
