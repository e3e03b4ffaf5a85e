"""The bridge to ``torch.nn.utils.prune``, whose masks are buffers multiplied in by a forward hook."""

from torch import Tensor, nn
from torch.nn.utils import prune

from convexprune.errors import UnsupportedModule
from convexprune.masks.keeping import kept_masks
from convexprune.masks.parametrizing import put_on_, take_off_
from convexprune.masks.sites import Site, masked, parameter_order


def to_torch_prune_(model: nn.Module) -> None:
    """Hand the masks over to ``torch.nn.utils.prune``: ``weight_orig``, ``weight_mask`` and a forward hook.

    Raises:
        UnsupportedModule, InvalidInput: As in ``make_permanent_``.
    """
    for site, mask in masked(model):
        take_off_(site)
        hook = prune.CustomFromMask.apply(site.module, site.name, mask.mask)  # type: ignore[no-untyped-call]
        vars(hook).update(order=mask.order)


def from_torch_prune_(model: nn.Module) -> dict[str, Tensor]:
    """Take over all masks of ``torch.nn.utils.prune``, those of biases too; the Parameter objects stay.

    A mask that came from ``to_torch_prune_`` remembers the order of the parameters; otherwise they stay in that which
    ``torch.nn.utils.prune`` has made of it.

    Returns:
        As in ``keep_masks_``.

    Raises:
        UnsupportedModule: A mask holds other values than 0 and 1, or belongs to a recurrent layer, whose weights cannot
            be parametrized; or as in ``kept_masks``. The model is unchanged.
        InvalidInput: The model is no module.
    """
    masked(model)  # refuses before anything is changed
    found = [
        (Site(path, module, hook._tensor_name), number)
        for path, module in model.named_modules()
        for number, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    for site, _ in found:
        _check(site)
    orders = {site.module: parameter_order(site.module) for site, _ in found}
    for site, number in found:
        _take_over_(site, number, orders[site.module])
    return kept_masks(model)


def _check(site: Site) -> None:
    mask = site.module.get_buffer(f"{site.name}_mask")
    if isinstance(site.module, nn.RNNBase):
        raise UnsupportedModule(f"{site.key} belongs to a recurrent layer: make it permanent with prune.remove")
    if not ((mask == 0) | (mask == 1)).all():
        found = f"{site.key}_mask holds other values than 0 and 1"
        raise UnsupportedModule(f"{found}: make it permanent first, with prune.remove")


def _take_over_(site: Site, number: int, order: tuple[str, ...]) -> None:
    module, name = site.module, site.name
    hook = module._forward_pre_hooks.pop(number)
    original, mask = module.get_parameter(f"{name}_orig"), module.get_buffer(f"{name}_mask")
    for attribute in (name, f"{name}_orig", f"{name}_mask"):
        delattr(module, attribute)
    module.register_parameter(name, original)
    put_on_(site, mask != 0, vars(hook).get("order", order))
