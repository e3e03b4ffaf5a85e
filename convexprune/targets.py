"""Targets: what a pruner is to reach. Each checks itself, says itself as plain data, and reads itself from text.

Nothing here imports torch, so that the command line can show its help at once.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar, TypeAlias

Size: TypeAlias = float | int | str
"""Of a sparsity: the part to be zero, a whole number of weights that stay, or a pattern such as "2:4"."""


class Target:
    """Base of the targets, which are frozen dataclasses whose first field is ``value``, a number or a table of these.

    A table maps layer names, or patterns of names, to numbers: an exact name counts first, then the first pattern that
    matches.
    """

    kind: ClassVar[str]
    value: object

    def check_entry(self, name: str, value: object) -> object:
        """The entry of a table, or the only value (name ""), as Python's own number.

        Raises:
            InvalidInput, InvalidTolerance: It is none that this target can have.
        """
        raise NotImplementedError

    def checked(self) -> "Target":
        """The same target with Python's own numbers, or another that this one stands for.

        Raises:
            InvalidInput, InvalidTolerance: A value or a word out of its range.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            words, found = field.metadata.get("words"), getattr(self, field.name)
            if words and found not in words:
                raise _invalid(f"{field.name}: expected {' or '.join(map(repr, words))}, found {found!r}")
        value = self.value
        if isinstance(value, Mapping):
            if not all(isinstance(name, str) for name in value):
                raise _invalid(f"{self.kind}: expected patterns of names ('features.*'), found {list(value)}")
            return dataclasses.replace(self, value={n: self.check_entry(n, v) for n, v in value.items()})  # type: ignore[type-var]
        return dataclasses.replace(self, value=self.check_entry("", value))  # type: ignore[type-var]

    @property
    def table(self) -> Mapping[str, object] | None:
        """The value, if it is a table of name patterns."""
        return self.value if isinstance(self.value, Mapping) else None

    def to_dict(self) -> dict[str, object]:
        """Plain data with the kind of target."""
        return {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    def __str__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        settings = {f.name: getattr(self, f.name) for f in fields[1:] if getattr(self, f.name) != f.default}
        values = self.table or {"": self.value}
        numbers = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
        texts = [f"{name}={number}" if name else number for name, number in numbers.items()]
        return " ".join([self.kind, *texts, *(f"{name}={value}" for name, value in settings.items())])

    def _where(self, name: str) -> str:
        return f"{self.kind} of {name}" if name else self.kind


def _words(*words: str) -> str:
    """A setting that is one of these, by default the first."""
    return dataclasses.field(default=words[0], metadata={"words": words})


@dataclass(frozen=True)
class Eps(Target):
    """An error allowed of each layer, relative to the size of its outputs: ‖σ(XU) − Y‖_F ≤ eps·‖Y‖_F.

    Attributes:
        value: eps ≥ 0: a number, one for each layer in the model's order, or a table.
    """

    value: float | Sequence[float] | Mapping[str, float] = 0.1
    kind: ClassVar[str] = "eps"

    def check_entry(self, name: str, value: object) -> object:
        """As ``Target.check_entry``."""
        if not name and isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_radius(f"eps of layer {number}", each) for number, each in enumerate(value, start=1))
        if name and value is None:
            raise _invalid(f"eps of {name}: found None; to leave a layer as trained give layers='!{name}'")
        return _radius(self._where(name), value)


@dataclass(frozen=True)
class NetworkEps(Target):
    """An error allowed of the network's outputs on the calibration data: ‖f̂(x) − f(x)‖_F ≤ eps·‖f(x)‖_F.

    Attributes:
        value: eps ≥ 0.
        guarantee: "measured": the error that the pruned network has on the calibration data, and on what is held out.
            "bound": a bound on it that follows from the layers' errors and norms, with which hardly anything can be
            pruned in deep networks.
        objective: "l1" gives all layers the same eps, "nonzeros" minimises the total of nonzeros over the layers'
            measured paths.
    """

    value: float
    guarantee: str = _words("measured", "bound")
    objective: str = _words("l1", "nonzeros")
    kind: ClassVar[str] = "network-eps"

    def check_entry(self, name: str, value: object) -> object:
        """As ``Target.check_entry``."""
        if name:
            raise _invalid(f"network-eps: expected one number for the whole network, found a table with {name!r}")
        return _radius("network-eps", value)


@dataclass(frozen=True)
class Sparsity(Target):
    """A part of the weights to be zero, or a pattern of zeros.

    Attributes:
        value: From 0 (as trained) to below 1, the part that is to be zero; a whole number ≥ 1, how many weights stay;
            "2:4", at most 2 of 4 consecutive inputs that are not zero, where a layer whose inputs are no multiple of 4
            is left as trained, and the report says so, unless it was named; or a table of these.
        scope: "layer": of each layer. "network": of all layers together, in a table of those of the same number.
    """

    value: Size | Mapping[str, Size]
    scope: str = _words("layer", "network")
    kind: ClassVar[str] = "sparsity"

    def check_entry(self, name: str, value: object) -> object:
        """As ``Target.check_entry``."""
        values = self.table.values() if self.table is not None else [value]
        if self.scope == "network" and all(isinstance(each, str) for each in values):
            raise _invalid(f"sparsity: a pattern such as {value!r} is each layer's own; leave scope out")
        return _size(self._where(name), value, "weights")


@dataclass(frozen=True)
class Neurons(Target):
    """Whole neurons, or filters, that go.

    Attributes:
        value: From 0 to below 1, the part that goes; a whole number ≥ 1, how many stay; or a table of these.
        scope: "layer": of each layer. "network": a part of all neurons of the network; where they are sampled, of all
            weights of the layers that have or take them.
    """

    value: float | int | Mapping[str, float | int]
    scope: str = _words("layer", "network")
    kind: ClassVar[str] = "neurons"

    def check_entry(self, name: str, value: object) -> object:
        """As ``Target.check_entry``."""
        if isinstance(value, str):
            raise _invalid(f"{self._where(name)}: expected the part of neurons that goes, or a count, found {value!r}")
        if self.scope == "network" and (name or (isinstance(value, Integral) and value)):
            raise _invalid(f"neurons: expected one part to share out over the network, found {self.value!r}")
        return _size(self._where(name), value, "neurons")


@dataclass(frozen=True)
class Guarantee(Target):
    """What a coreset is to prove: an error of at most eps with a probability of at least 1 − delta.

    Attributes:
        value: eps, from 1e-100 to 1e100, or a table of these; beyond, formulas for draws would leave float64.
        delta: From 1e-200 to below 1.
    """

    value: float | Mapping[str, float]
    delta: float = 0.05
    kind: ClassVar[str] = "guarantee"

    @property
    def eps(self) -> float:
        """The only value."""
        return float(self.value)  # type: ignore[arg-type]

    def check_entry(self, name: str, value: object) -> object:
        """As ``Target.check_entry``."""
        from convexprune.solvers.arrays import as_number
        from convexprune.solvers.errors import InvalidTolerance

        eps, delta = as_number(self._where(name), value), as_number("delta", self.delta)
        if not 1e-100 <= eps <= 1e100:
            raise InvalidTolerance(f"eps: expected a number > 0, from 1e-100 to 1e100, found {value}")
        if not 1e-200 <= delta < 1:
            raise InvalidTolerance(f"delta: expected a probability between 0 and 1, from 1e-200 on, found {delta}")
        return eps


TARGETS: dict[str, type[Target]] = {kind.kind: kind for kind in (Eps, NetworkEps, Sparsity, Neurons, Guarantee)}
"""Targets by kind; a new one is a class more, listed by whoever defines it."""


def as_target(target: object = None, eps: object = None, sparsity: object = None) -> Target:
    """The target given, or that ``eps`` or ``sparsity`` stand for; a text is read, and nothing is ``Eps(0.1)``.

    Raises:
        InvalidInput, InvalidTolerance: Several were given, or one that is no target.
    """
    given = {"target": target, "eps": eps, "sparsity": sparsity}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise _invalid(f"{' and '.join(names)}: each says how far to prune; give one of them")
    if eps is not None:
        return Eps(eps).checked()  # type: ignore[arg-type]
    if sparsity is not None:
        return Sparsity(sparsity).checked()  # type: ignore[arg-type]
    if isinstance(target, str):
        return read_target(target)
    if target is None:
        return Eps(0.1)
    if not isinstance(target, Target):
        raise _invalid(
            f"target: expected Eps, NetworkEps, Sparsity, Neurons, Guarantee, or a text such as 'sparsity 0.9'; found "
            f"{target!r}"
        )
    return target.checked()


def target_from_dict(data: Mapping[str, object]) -> Target:
    """A target from the plain data of ``Target.to_dict``.

    Raises:
        KeyError, TypeError, ValueError: They are none; InvalidInput and InvalidTolerance are such, too.
    """
    own = dict(data)
    kind, value = TARGETS[str(own.pop("kind"))], own.pop("value")
    return kind(tuple(value) if isinstance(value, list) else value, **own).checked()  # type: ignore[call-arg]


def read_target(text: str) -> Target:
    """A target from text: its kind, its value or PATTERN=value several times, and its settings.

    Examples: "eps 0.1", "eps fc*=0.05 0.1", "network-eps 0.05 objective=nonzeros", "sparsity 2:4",
    "sparsity 0.9 scope=network", "neurons 0.5", "guarantee 0.5 delta=0.01".

    Raises:
        InvalidInput, InvalidTolerance: It is none.
    """
    kind, *words = text.split()
    if kind not in TARGETS:
        raise _invalid(f"target: expected one of {', '.join(TARGETS)} and a value, found {text!r}")
    own = {field.name: field.default for field in dataclasses.fields(TARGETS[kind])[1:]}  # type: ignore[arg-type]
    settings: dict[str, object] = {}
    values = []
    for word in words:
        name, equals, given = word.partition("=")
        if equals and name in own:
            settings[name] = float(given) if isinstance(own[name], float) and _is_number(given) else given
        else:
            values.append(word)
    return TARGETS[kind](read_table(kind, values), **settings).checked()  # type: ignore[call-arg]


def read_table(name: str, words: Iterable[str]) -> object:
    """["0.1"] or ["features.*=0.05", "0.1"]: patterns in their order, then the plain value for the rest.

    Raises:
        InvalidInput: A value is no number and no pattern such as 2:4, or two are given for the same.
    """
    table: dict[str, object] = {}
    for word in words:
        pattern, equals, given = word.rpartition("=")
        pattern = pattern if equals else "*"
        if pattern in table:
            raise _invalid(f"{name}: a second value for {pattern!r}, {word!r}; give one for each pattern")
        if not (_is_number(given) or re.fullmatch(r"\d+:\d+", given)):
            raise _invalid(f"{name}: expected a number or PATTERN=number, found {word!r}")
        table[pattern] = given if ":" in given else int(given) if re.fullmatch(r"[1-9]\d*", given) else float(given)
    if not table:
        raise _invalid(f"{name}: expected a value, found none")
    rest = table.pop("*", None)
    return table | ({} if rest is None else {"*": rest}) if table else rest


def pattern_of(value: object) -> tuple[int, int] | None:
    """(n, m) of a pattern "n:m"; None of anything else."""
    found = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    return None if found is None else (int(found[1]), int(found[2]))


def _size(name: str, value: object, what: str) -> object:
    from convexprune.solvers.errors import InvalidTolerance

    if isinstance(value, str):
        pattern = pattern_of(value)
        if pattern is None:
            raise _invalid(f"{name}: expected a number, or a pattern such as '2:4', found {value!r}")
        if not 1 <= pattern[0] < pattern[1]:
            raise InvalidTolerance(f"{name}: expected n:m with 1 ≤ n < m, found {value!r}")
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        if isinstance(value, Integral) and int(value) != 0:
            if int(value) >= 1:
                return int(value)
        elif 0 <= (number := float(value)) < 1:
            return number
    raise InvalidTolerance(
        f"{name}: expected the part of {what} to be zero, 0 to below 1, or a whole number ≥ 1 of those that stay, "
        f"found {value!r}"
    )


def _radius(name: str, value: object) -> float:
    from convexprune.solvers.arrays import checked_radius

    return checked_radius(name, value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _invalid(message: str) -> Exception:
    from convexprune.solvers.errors import InvalidInput

    return InvalidInput(message)
