"""Evaluation of networks beyond their accuracy on clean images."""

from convexprune.evaluation.corruptions import CORRUPTIONS, Corruption, applicable, corrupted
from convexprune.evaluation.features import Features, informative_features

__all__ = ["CORRUPTIONS", "Corruption", "Features", "applicable", "corrupted", "informative_features"]
