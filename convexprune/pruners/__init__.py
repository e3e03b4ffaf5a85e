"""Pruners: what is asked of layers, and the methods that answer."""
