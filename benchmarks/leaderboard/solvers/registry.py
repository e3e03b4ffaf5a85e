"""Everything in the registry: the library's own solvers, and those that installed packages add by entry point."""

from benchmark_utils import Registered

from convexprune.solvers import available


class Solver(Registered):
    """A registered solver by name, with its own default options."""

    name = "convexprune"
    parameters = {"method": list(available()), "time_limit": [10.0]}  # noqa: RUF012 - benchopt's way
