"""Prune trained networks by convex optimisation, with a certificate for every layer."""
