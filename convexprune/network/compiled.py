"""Models that torch.compile made, run and traced as the modules that they were made of.

The compiler would trace the hooks that look into a forward, with a warning for each thing that it cannot trace, and
compile anew for every layer that is looked at.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, with the same parameters; any other model itself."""
    # Not imported, which takes seconds: where it is not, nothing was compiled.
    made = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    while made is not None and isinstance(model, made):
        model = model.get_submodule("_orig_mod")
    return model


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, compiled modules and functions are run, and may be traced by torch.fx, as what they were made of."""
    with ExitStack() as stack:
        if dynamo := sys.modules.get("torch._dynamo"):
            stack.enter_context(dynamo.config.patch(error_on_nested_fx_trace=False))
            if set_stance := getattr(torch.compiler, "set_stance", None):
                stack.enter_context(set_stance("force_eager"))
            else:  # before torch 2.6
                stack.enter_context(dynamo.config.patch(disable=True))
        yield
