"""Evaluation of networks beyond their accuracy on clean images."""

from convexprune.evaluation.corruptions import CORRUPTIONS, Corruption, applicable, corrupted

__all__ = ["CORRUPTIONS", "Corruption", "applicable", "corrupted"]
