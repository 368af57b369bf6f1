"""Many processes that train one model: the only package that talks to ``torch.distributed``."""
