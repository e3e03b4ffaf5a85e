"""Net-Trim: the least ℓ1 norm of each layer's weights within an error (Aghasi et al. 2017, 2020).

Parallel mode: every layer's program is built from the original network's inputs to it, so layers are independent.
Cascade: from what the network pruned so far computes, with the original network's outputs as targets.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from convexprune.options import Options
from convexprune.pruners.budget import Keep
from convexprune.pruners.network_eps import by_bound, by_measured_errors
from convexprune.pruners.neurons import prune_neurons, ranked_by_paths
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.sizes import layer_eps
from convexprune.pruners.solving import Solving
from convexprune.pruners.tolerance import Within
from convexprune.runs.answer import Answer, Goal, answered, refitted, set_solver, solve_limits
from convexprune.runs.problem import Problem, StoppingRule
from convexprune.runs.run import Run
from convexprune.solvers.certificate import Status
from convexprune.solvers.methods import smallest_eps
from convexprune.targets import Eps, NetworkEps, Neurons, Sparsity, Target


@dataclass(frozen=True)
class KeepByPath(Keep):
    """The support of the ℓ1 program at the least eps that leaves at most ``count`` weights, fitted again."""

    kind: ClassVar[str] = "keep-by-path"

    def solve_group(self, problem: Problem, options: Options, watch: StoppingRule) -> Answer:
        """A search along eps, then a refit."""
        path = Within(0.1).program(problem, options)  # in cascade from an eps at which the trained weights are feasible
        free = problem.stored.shape[1] if problem.biased else 0  # the bias is never a zero
        limits = solve_limits(options, watch)
        del limits["time_limit"]  # the watch stops the search
        point = smallest_eps(
            path,
            problem.portion(self.count) + free,
            set_solver(problem, options),  # type: ignore[arg-type]
            callback=watch.show,
            stop=watch,
            **limits,  # type: ignore[arg-type]
        )
        program = self.program(problem, options)
        cut = point.solution.status is Status.STOPPED  # within a point, before any had few enough: of no use
        # The largest entries: a bias that happens to be 0 leaves room for one weight more in a count.
        weights = program.penalty.prox(problem.W if cut else point.solution.weights, 1.0)
        found = refitted(program, replace(point.solution, weights=weights), watch)
        ended = "" if point.solution.status is Status.SOLVED else f", whose solve ended {point.solution.status}"
        note = f"support of eps {point.eps / (problem.size or 1.0):.4g}{ended}"
        note = "ended early: the support is that of the largest trained weights" if cut else note
        return answered(program, replace(found, status=watch.ended or Status.NO_BOUND), problem, [note])

    def __str__(self) -> str:
        return f"path to {self.count:,}"


@register_pruner("net-trim")
@dataclass(frozen=True)
class NetTrim(Solving):
    """Net-Trim: the least ℓ1 norm within an error, certified; of a sparsity its supports, fitted again."""

    targets: ClassVar[tuple[type[Target], ...]] = (Eps, NetworkEps, Sparsity, Neurons)

    def budget(self, count: int) -> Goal:
        """The support of the least eps that leaves so many weights."""
        return KeepByPath(count)

    def refuses(self, target: Target, options: Options) -> str | None:
        """As in the base; and a pattern, which no eps leads to."""
        if isinstance(target, Neurons) and options.refit:
            return "weights that take the neurons that stay are fitted again anyway: leave refit out"
        return super().refuses(target, options)

    def reach(self, run: Run, target: Target) -> None:
        """Solve and write what the kind of target asks for."""
        if isinstance(target, Eps):
            run.prune({name: Within(eps) for name, eps in layer_eps(target, run).items()})
        elif isinstance(target, NetworkEps):
            (by_bound if target.guarantee == "bound" else by_measured_errors)(run, target)
        elif isinstance(target, Neurons):
            prune_neurons(run, target, ranked_by_paths(run))
        else:
            super().reach(run, target)
