"""The robust accuracy of a recipe before it is trained, and what each choice buys. Imports no torch."""

from robudget.prediction.effects import Effect, Effects, effects
from robudget.prediction.paper_predictor import PaperGBR
from robudget.prediction.predictor import Prediction, Predictor, predict

__all__ = ["Effect", "Effects", "PaperGBR", "Prediction", "Predictor", "effects", "predict"]
