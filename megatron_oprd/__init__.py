"""On-policy representation distillation (OPRD, arXiv:2606.06021) on Megatron-Core."""

import importlib.util
import warnings

__version__ = "0.1.0"

# Has to come before the first import of megatron-core.
if any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex", "amp_C")):
    from megatron_oprd.parallel import cpu

    cpu.hide_kernel_packages()

# Warnings of megatron-core (and of torch about it) at every start, which no user can act on.
for _message in (
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"`torch.distributed.\w+` is deprecated",
    "MimoModelConfig is experimental",
    "Transformer Engine and Apex are not installed",
):
    warnings.filterwarnings("ignore", message=_message)
