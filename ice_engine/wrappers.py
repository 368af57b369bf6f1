"""The model inside of what wraps it."""

import torch


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside of torch.compile, DistributedDataParallel and DataParallel.

    Its parameters have the names that users gave them.
    """
    wrappers = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        else:
            return model
