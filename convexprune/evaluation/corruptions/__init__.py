"""Corrupted images as in CIFAR-10-C, by name and severity."""

from convexprune.evaluation.corruptions.applied import CORRUPTIONS, Corruption, applicable, corrupted

__all__ = ["CORRUPTIONS", "Corruption", "applicable", "corrupted"]
