"""Operations by the names that ``convexprune.network.graph.operation_of`` gives them, by what they do to an error."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _each_rank(*kinds: str) -> frozenset[str]:
    return frozenset(f"{kind}{axes}d" for kind in kinds for axes in (1, 2, 3))


SAME = _names("clone contiguous detach double float identity")
DROPOUTS = _names("alphadropout dropout dropout1d dropout2d dropout3d featurealphadropout")
MOVES = _each_rank("circularpad", "constantpad", "reflectionpad", "replicationpad", "zeropad") | _names(
    "channelshuffle chunk expand flatten flip getitem moveaxis movedim narrow pad permute pixelshuffle pixelunshuffle "
    "ravel repeat reshape roll select split squeeze swapaxes swapdims t tile transpose unbind unflatten unsqueeze view"
)
MEANS = _names("mean sum") | _each_rank("avgpool", "adaptiveavgpool")
MAX_POOLS = _each_rank("maxpool", "adaptivemaxpool")
CLAMPS = _names("clamp clampmin clip")
SUMS = _names("add iadd isub sub subtract")
CONCATENATIONS = _names("cat concat concatenate dstack hstack stack vstack")
LENGTHS = _names("device dim dtype ndim numel shape size")
