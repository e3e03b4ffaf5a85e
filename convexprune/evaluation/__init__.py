"""What pruning costs beyond test accuracy: classes, calibration, corruptions, likeness to the parent, noise, features.

docs/evaluation.md says what each figure means, and where it comes from.
"""

from convexprune.evaluation.corruptions import CORRUPTIONS, Corruption, applicable, corrupted
from convexprune.evaluation.evaluate import evaluate, evaluate_series
from convexprune.evaluation.features import Features, informative_features
from convexprune.evaluation.noise import Noise
from convexprune.evaluation.results import Evaluation
from convexprune.evaluation.series import Series, compare, load_evaluation

__all__ = [
    "CORRUPTIONS",
    "Corruption",
    "Evaluation",
    "Features",
    "Noise",
    "Series",
    "applicable",
    "compare",
    "corrupted",
    "evaluate",
    "evaluate_series",
    "informative_features",
    "load_evaluation",
]
