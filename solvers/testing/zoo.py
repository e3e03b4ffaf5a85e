"""The problem zoo: small layer programs, built to be awkward, each small enough for a general conic solver.

>>> from convexprune.solvers.testing import zoo
>>> [member.name for member in zoo.members("groups")]  # doctest: +SKIP
>>> program = zoo.program("relu-ball badly_scaled")
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.testing import layers
from convexprune.solvers.testing.layers import FITS, SETS

KINDS = ("plain", "eps", "awkward", "degenerate", "known", "neurons", "groups", "gram", "low precision")
"""The kinds of convex feasible members."""


@dataclass(frozen=True)
class Member:
    """One program of the zoo."""

    name: str  # the fit first, then what is special
    build: Callable[[], LayerProgram]  # makes the program anew
    optimum: float | None = None  # the optimal value where it is known in closed form; of a budget, of the best support
    kind: str = "plain"  # one of KINDS, "infeasible" or "budget"

    @property
    def reference(self) -> float | None:
        """The optimum, or the value of a solution with a certified gap below 1e-7 that was computed once and stored."""
        return _references().get(self.name) if self.optimum is None else self.optimum


def members(*kinds: str) -> tuple[Member, ...]:
    """All feasible convex members, or those of these kinds.

    Raises:
        InvalidInput: A kind that is not in ``KINDS``.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInput(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    return tuple(member for member in feasible() if not kinds or member.kind in kinds)


def representative() -> tuple[Member, ...]:
    """A few for slow solvers: each fit, each penalty, each kind of input once."""
    special = (
        *("relu-ball free_bias", "net-trim weighted", "ball backwards", "squared-loss orthonormal L1"),
        *("squared-loss eps 1.5, U = 0", "relu-ball neurons", "relu-ball rows", "squared-loss columns"),
        *("ball blocks", "gram ball", "relu-ball float16"),
    )
    return tuple(member(name) for name in (*(f"{fit} plain 20x8x5" for fit in FITS), *special))


def member(name: str) -> Member:
    """The member of this name, of any kind.

    Raises:
        InvalidInput: There is none.
    """
    if name not in _by_name():
        raise InvalidInput(f"the zoo has no member {name!r}; `members()`, `infeasible()` and `budgets()` list them")
    return _by_name()[name]


@cache
def program(name: str) -> LayerProgram:
    """The program of the member of this name, built once."""
    return member(name).build()


@cache
def feasible() -> tuple[Member, ...]:
    """Convex programs that have a solution."""
    return (*_general(), *_with_known_optimum(), *_special())


@cache
def infeasible() -> tuple[Member, ...]:
    """Programs that no weights satisfy."""
    return tuple(Member(name, build, kind="infeasible") for name, build in layers.INFEASIBLE.items())


@cache
def budgets() -> tuple[Member, ...]:
    """Exact budgets with a loss; ``optimum`` is that of the best support."""
    recipes = {f"orthonormal {name}": partial(layers.orthonormal_budget, name) for name in layers.BUDGETS}
    recipes |= {"all supports tried": layers.small_budget}  # type: ignore[dict-item]
    recipes |= {f"{fit} planted": partial(layers.planted_budget, fit) for fit in ("squared-loss", "relu-loss")}
    return tuple(_known(name, recipe, "budget") for name, recipe in recipes.items())


@cache
def _by_name() -> dict[str, Member]:
    return {member.name: member for member in (*feasible(), *infeasible(), *budgets())}


def _known(name: str, recipe: Callable[[], layers.Known], kind: str) -> Member:
    return Member(name, lambda: recipe()[0], recipe()[1], kind)


def _general() -> Iterator[Member]:
    """What every fit has."""
    for fit in FITS:
        for seed, P, N, M in ((1, 20, 8, 5), (2, 500, 20, 10), (3, 200, 40, 12), (4, 60, 30, 40)):
            yield Member(f"{fit} plain {P}x{N}x{M}", partial(_plain, fit, (seed, P, N, M), 0.1))
        for eps in (1e-4, 0.5, 0.98):
            yield Member(f"{fit} eps {eps:g}", partial(_plain, fit, (5, 80, 12, 8), eps), kind="eps")
        for name in layers.AWKWARD:
            kind = "degenerate" if name == "one_sample" else "awkward"
            yield Member(f"{fit} {name}", partial(layers.awkward, fit, name), kind=kind)


def _plain(fit: str, shape: tuple[int, int, int, int], eps: float) -> LayerProgram:
    return layers.program_of(*layers.layer(*shape), fit, eps)


def _with_known_optimum() -> Iterator[Member]:
    for fit in FITS:
        yield _known(f"{fit} eps 1.5, U = 0", partial(layers.zero, fit), "degenerate")
        yield _known(f"{fit} one_column", partial(layers.one_column, fit), "degenerate")
        yield _known(f"{fit} backwards", partial(layers.backwards, fit), "known")
        if fit not in ("ball", "squared-loss"):
            yield _known(f"{fit} all inactive, U = 0", partial(layers.all_inactive, fit), "degenerate")
    for fit in SETS:
        yield _known(f"{fit} exact", partial(layers.exact, fit), "degenerate")
        yield _known(f"{fit} neurons one_column", partial(layers.one_column_a_neuron, fit), "neurons")
    for kind in layers.ORTHONORMAL:
        yield _known(f"squared-loss orthonormal {kind}", partial(layers.orthonormal, kind), "known")
    for fit in ("relu-ball", "net-trim-loss"):
        yield _known(f"{fit} backwards rows", partial(layers.backwards, fit, layers.GROUPS["rows"]), "known")


_GROUPED = {
    "rows": FITS,
    "columns": ("relu-ball", "squared-loss"),
    "blocks": ("ball", "net-trim", "relu-loss"),
    "weighted rows": ("relu-ball", "squared-loss"),
    "weighted columns": ("ball",),
    "weighted blocks": ("net-trim-loss", "relu-ball"),
}


def _special() -> Iterator[Member]:
    """What only some fits have."""
    yield Member("net-trim raised ceiling", layers.raised_ceiling, kind="awkward")
    for fit in SETS:
        yield Member(f"{fit} neurons", partial(layers.neurons, fit), kind="neurons")
        yield Member(f"{fit} neurons, one eps 0", partial(layers.neurons, fit, 1), kind="neurons")
    for groups, fits in _GROUPED.items():
        for fit in fits:
            yield Member(f"{fit} {groups}", partial(layers.groups, fit, groups), kind="groups")
    for inputs in ("ball", "ball a neuron", "squared-loss", "rows"):
        yield Member(f"gram {inputs}", partial(layers.grams, inputs), kind="gram")
    yield Member("gram ball, float32", partial(layers.grams, "ball", torch.float32), kind="gram")
    for fit, dtype in (("relu-ball", torch.float16), ("ball", torch.bfloat16), ("net-trim-loss", torch.float16)):
        name = f"{fit} {str(dtype).removeprefix('torch.')}"
        yield Member(name, partial(layers.rounded, fit, dtype), kind="low precision")


@cache
def _references() -> dict[str, float]:
    """Optimal values of members without a closed form, by name.

    Each is the value of a solution with a certified gap and a violation below 1e-7 (3e-5 for the three badly scaled
    sets), by an interior point method where that got there, else by "admm" in float64.
    """
    found: dict[str, float] = {}
    for line in _OF_EVERY_FIT.strip().splitlines():
        name, *values = line.rsplit(maxsplit=len(FITS))
        found |= {f"{fit} {name.strip()}": float(value) for fit, value in zip(FITS, values, strict=True)}
    for entry in _OF_SOME_FITS.split(";"):
        name, value = entry.split(":")
        found[name.strip()] = float(value)
    return found


# Columns: relu-ball, net-trim, ball, relu-loss, net-trim-loss, squared-loss.
_OF_EVERY_FIT = """
plain 20x8x5       14.98053       15.2570821    18.4452583     10.4295016      11.6242931      16.8813309
plain 500x20x10    36.0781483     40.0368428    41.1473344     20.0145924      28.3842845      30.7750132
plain 200x40x12    76.275694      81.7931031    98.8271098     22.9272253      28.6340186      67.6035485
plain 60x30x40     152.353504     160.417326    275.21759      64.7103547      79.206681       179.417073
eps 0.0001         30.3691974     30.3692907    31.0811602     30.0203596      30.02917        31.031426
eps 0.5            4.21391344     4.56565262    5.90206781     5.4486548       5.4486548       6.35607167
eps 0.98           0.134782611    0.134782611   0.153274532    3.42588497      3.42588497      3.88885276
free_bias          40.3856067     44.5207289    67.101774      23.6036584      29.7505141      55.2323784
dead_inputs        34.0719723     36.7166758    47.2683991     20.1391031      24.4152711      37.9548551
duplicate_columns  39.088123      44.4138628    49.9063586     17.420968       21.8361963      25.7753048
badly_scaled       20886.9369     27850.3789    31153.1714     5.57867292e-05  7.60840292e-05  0.000109217917
some_inactive      19.0281102     19.6899311    30.1884035     16.9497974      17.4903418      24.6923678
all_active         27.4604495     27.4604495    27.4604495     25.2944347      25.2944347      25.2944347
weighted           38.7091328     45.1319268    54.2206826     20.9321461      22.542282       28.1618883
wide               46.8316079     48.9956784    77.4620192     28.4968285      32.0125689      53.3943876
large_units        16278.8654     18668.505     28544.0801     9809.49603      10497.5177      21532.2102
small_units        0.00162788654  0.0018668505  0.00285440801  0.000980949603  0.00104975177   0.00215322102
low_rank           24.3198968     26.9824478    27.074903      23.0940829      23.8555098      24.8233794
nearly_collinear   10.7446798     11.0222937    19.3885326     10.0051428      11.0637551      19.2849971
tall               0.969559905    1.29844004    2.62871698     0.41242477      0.489198943     2.48549843
one_sample         2.34491995     2.34491995    2.34491995     2.40627749      2.40627749      2.40627749
rows               19.7849995     20.7510667    30.6075015     16.4772787      18.4216869      27.4510391
"""
_OF_SOME_FITS = """
net-trim raised ceiling: 47.8822083; relu-ball neurons: 25.0729505; relu-ball neurons, one eps 0: 25.1532589;
net-trim neurons: 25.2568233; net-trim neurons, one eps 0: 25.3371317; ball neurons: 25.262987;
ball neurons, one eps 0: 25.3432954; relu-ball columns: 14.7707919; squared-loss columns: 19.4631808;
ball blocks: 35.3796144; net-trim blocks: 25.3127732; relu-loss blocks: 19.3373987;
relu-ball weighted rows: 25.9755198; squared-loss weighted rows: 18.5792395; ball weighted columns: 32.511438;
net-trim-loss weighted blocks: 8.68103273; relu-ball weighted blocks: 12.4212103; gram ball: 28.5585135;
gram ball a neuron: 29.4944284; gram squared-loss: 26.5922486; gram rows: 19.6440476; gram ball, float32: 28.5585261;
relu-ball float16: 35.7757244; ball bfloat16: 51.9956922; net-trim-loss float16: 27.2857231
"""
