"""A network's figures on one distribution, or under noise of one radius."""

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from convexprune.files.texts import Json

_MOST = 2**28  # bytes that the samples of one row of a file may unpack to


@dataclass(frozen=True)
class Outcomes:
    """Of each sample whether the network is right, or what a metric says.

    Attributes:
        samples: How many.
        right: Whether each is a truth value.
        packed: Truth values at eight a byte, or numbers in float64.
    """

    samples: int
    right: bool
    packed: bytes

    @classmethod
    def of(cls, values: Tensor) -> "Outcomes":
        """Those in a vector of truth values, or of numbers."""
        array = values.cpu().numpy()
        if array.dtype == np.bool_:
            return cls(len(array), True, np.packbits(array).tobytes())
        return cls(len(array), False, array.astype("<f8").tobytes())

    def tensor(self) -> Tensor:
        """As a vector [samples], bool or float64."""
        if self.right:
            bits = np.unpackbits(np.frombuffer(self.packed, np.uint8), count=self.samples)
            return torch.from_numpy(bits.astype(np.bool_))
        return torch.from_numpy(np.frombuffer(self.packed, "<f8").astype(np.float64))

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        text = base64.b64encode(zlib.compress(self.packed, 9)).decode("ascii")
        return {"samples": self.samples, "right": self.right, "packed": text}

    @classmethod
    def from_dict(cls, data: Json) -> "Outcomes":
        """What ``to_dict`` described; ValueError is raised where it holds something else."""
        size = -(-data["samples"] // 8) if data["right"] else 8 * data["samples"]
        if not 0 <= size <= _MOST:
            raise ValueError(f"outcomes of {data['samples']} samples")
        packed = zlib.decompressobj().decompress(base64.b64decode(data["packed"], validate=True), size + 1)
        if len(packed) != size:
            raise ValueError(f"outcomes of {data['samples']} samples, in {len(packed)} bytes")
        return cls(data["samples"], data["right"], packed)


NOMINAL = "nominal"
"""The name of the data as they are."""

_FIGURES = (
    "samples",
    "score",
    "calibration_error",
    "agreement",
    "distance",
    "mistakes",
    "accuracy_on_mistakes",
    "confidence_on_mistakes",
)


def title_of(name: str, severity: int | None) -> str:
    """What a distribution is called in tables and errors: the name with the severity."""
    return name if severity is None else f"{name} {severity}"


@dataclass(frozen=True)
class DistributionRow:
    """A network's figures on one distribution; None where something that they need is not known.

    Attributes:
        name: "nominal", or that of the corruption.
        severity: 1 to 5; None of the nominal distribution.
        category: Of the corruption.
        samples: How many.
        score: The accuracy, or the mean of the metric.
        classes: The accuracy of each class, None where it has no sample.
        calibration_error: Σ_m (n_m/n)·|accuracy_m − confidence_m| over 15 bins of confidence (Guo et al. 2017).
        agreement: The part of the samples of which network and parent predict the same class.
        distance: The mean of ‖p − q‖₂, p and q the softmax outputs of network and parent.
        mistakes: How many samples the parent has wrong.
        accuracy_on_mistakes: The network's accuracy on these.
        confidence_on_mistakes: The mean probability of the network's own predictions there.
        outcomes: Whether it is right, or the metric, a sample.
    """

    name: str
    severity: int | None
    category: str
    samples: int
    score: float | None = None
    classes: tuple[float | None, ...] | None = None
    calibration_error: float | None = None
    agreement: float | None = None
    distance: float | None = None
    mistakes: int | None = None
    accuracy_on_mistakes: float | None = None
    confidence_on_mistakes: float | None = None
    outcomes: Outcomes | None = None

    @property
    def title(self) -> str:
        """The name with the severity."""
        return title_of(self.name, self.severity)

    @property
    def worst_class(self) -> int | None:
        """The class of the least accuracy, the first of several."""
        known = [(value, number) for number, value in enumerate(self.classes or ()) if value is not None]
        return min(known)[1] if known else None

    @property
    def worst_accuracy(self) -> float | None:
        """Of that class."""
        return min((value for value in self.classes or () if value is not None), default=None)

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        own = {"outcomes": None if self.outcomes is None else self.outcomes.to_dict()}
        return vars(self) | own | {"worst_class": self.worst_class, "worst_accuracy": self.worst_accuracy}

    @classmethod
    def from_dict(cls, data: Json) -> "DistributionRow":
        """What ``to_dict`` described."""
        own = {field.name: data[field.name] for field in fields(cls)}
        classes, outcomes = own["classes"], own["outcomes"]
        own["classes"] = None if classes is None else tuple(classes)
        own["outcomes"] = None if outcomes is None else Outcomes.from_dict(outcomes)
        return cls(**own)

    def records(self) -> Iterator[dict[str, object]]:
        """A record a figure: what it is of, its name and its value."""
        of: dict[str, object] = {"distribution": self.name, "severity": self.severity, "category": self.category}
        for name in _FIGURES:
            if (value := getattr(self, name)) is not None:
                yield of | {"radius": None, "class": None, "figure": name, "value": float(value)}
        for number, value in enumerate(self.classes or ()):
            if value is not None:
                yield of | {"radius": None, "class": number, "figure": "accuracy", "value": value}


@dataclass(frozen=True)
class NoiseRow:
    """How like its parent a network is on noisy inputs, and how good (Liebenwein et al. 2021, section 4).

    Attributes:
        radius: The most that an entry of an input is changed by, in the inputs as the network is given them.
        samples: Images times draws of noise.
        agreement: The part of these of which network and parent predict the same class.
        distance: The mean of ‖p − q‖₂, p and q their softmax outputs.
        score: The accuracy, or the mean of the metric; None without labels.
        outcomes: Whether it is right, or the metric, a sample; the draws of an image stand side by side.
        draws: Of noise for each image.
    """

    radius: float
    samples: int
    agreement: float
    distance: float
    score: float | None = None
    outcomes: Outcomes | None = None
    draws: int = 1

    @property
    def title(self) -> str:
        """What the noise is, in words."""
        return f"noise ≤ {self.radius:.3g}"

    def by_image(self) -> Tensor | None:
        """The mean outcome of each image over its draws, float64; None without labels."""
        return None if self.outcomes is None else self.outcomes.tensor().double().reshape(-1, self.draws).mean(1)

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return vars(self) | {"outcomes": None if self.outcomes is None else self.outcomes.to_dict()}

    @classmethod
    def from_dict(cls, data: Json) -> "NoiseRow":
        """What ``to_dict`` described."""
        outcomes = None if data["outcomes"] is None else Outcomes.from_dict(data["outcomes"])
        return cls(**{**data, "outcomes": outcomes})

    def records(self) -> Iterator[dict[str, object]]:
        """As of a ``DistributionRow``."""
        of: dict[str, object] = {"distribution": "noise", "severity": None, "category": "", "radius": self.radius}
        for name in ("samples", "score", "agreement", "distance"):
            if (value := getattr(self, name)) is not None:
                yield of | {"class": None, "figure": name, "value": float(value)}
