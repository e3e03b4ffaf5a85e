"""Solvers that other packages bring; each is imported only when it is used."""
