"""Masks that last: the zeros of a pruned network stay zeros while the rest is trained on.

A masked weight is original ∘ mask, by ``torch.nn.utils.parametrize``. The optimiser holds the original, which is the
same Parameter as before; what the mask leaves out gets no gradient, and what momentum or weight decay make of it is
not seen. A mask costs one byte a weight, and a forward one copy of the weight.
"""

from convexprune.masks.masking import (
    Mask,
    from_torch_prune_,
    keep_masks_,
    kept_masks,
    load_masked_state_dict_,
    make_permanent_,
    to_torch_prune_,
)

__all__ = [
    "Mask",
    "from_torch_prune_",
    "keep_masks_",
    "kept_masks",
    "load_masked_state_dict_",
    "make_permanent_",
    "to_torch_prune_",
]
