"""Runs megatron-core on a machine without CUDA.

megatron-core takes its optimizer from packages of CUDA kernels if they are installed, whether there
is a device or not: `hide_kernel_packages` hides them.

megatron-core 0.16 to 0.19 names CUDA literally (``torch.cuda.current_device()``, ``device="cuda"``,
CUDA generators and streams). `enter` maps those names to the CPU, once, for the whole process;
`megatron_oprd.parallel.context` calls it if there is no CUDA.
"""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_active: "_CudaNamesOnCpu | None" = None
# Methods of tensors that name a CUDA device by themselves or by a positional argument.
_NAMING_CUDA = {torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.type, torch.Tensor.to}


def hide_kernel_packages() -> None:
    """Makes the import of packages of CUDA kernels fail if there is no CUDA device."""
    if not torch.cuda.is_available():
        for name in ("transformer_engine", "apex", "amp_C"):
            # None makes an import statement raise ImportError.
            sys.modules[name] = None  # type: ignore[assignment]


class _CudaNamesOnCpu(TorchFunctionMode):
    """Redirects torch calls that name a CUDA device to the CPU."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Called for every operation, so what most of them need comes first.
        if func in _NAMING_CUDA:
            if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
                return args[0]
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                # The distributed optimizer compares this string with 'torch.cuda.*Tensor'.
                return func(*args).replace("torch.", "torch.cuda.", 1)
            if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
                args = (args[0], _CPU, *args[2:])
        if not kwargs:
            return func(*args)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _Stream:
    """Stands in for a CUDA stream: work on the CPU is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing is pending."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing is pending."""

    def wait_event(self, event: Any) -> None:
        """Nothing is pending."""

    def record_event(self, event: Any = None) -> "_Event":
        """Returns an event that has already happened."""
        return event or _Event()


class _Event(_Stream):
    """Stands in for a CUDA event that has already happened."""

    def record(self, stream: Any = None) -> None:
        """Nothing is pending."""

    def wait(self, stream: Any = None) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Whether the event has happened: always."""
        return True


@contextlib.contextmanager
def _in_stream(stream: Any) -> Iterator[None]:
    yield


def _peak_bytes(device: Any = None) -> int:
    """The process's peak resident set in bytes; cannot be reset."""
    # Linux reports KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _spare_groups_of_one() -> None:
    """Takes the distributed optimizer's collectives over a single rank for what they are: nothing.

    NCCL leaves such buffers in place. gloo copies them: for gradients and parameters of 115 M
    parameters 0.8 s of a step.
    """
    from megatron.core.distributed import param_and_grad_buffer

    buffers: Any = param_and_grad_buffer
    manager = buffers._coalescing_manager

    def coalescing_manager(group: Any, *args: Any, **kwargs: Any) -> Any:
        if group.size() == 1:
            return contextlib.nullcontext(_Event())
        return manager(group, *args, **kwargs)

    def in_place(collective: Callable) -> Callable:
        def run(output: torch.Tensor, source: torch.Tensor, **kwargs: Any) -> Any:
            if kwargs["group"].size() > 1:
                return collective(output, source, **kwargs)
            assert output.data_ptr() == source.data_ptr(), "a shard of one is the whole buffer"
            return _Event()

        return run

    buffers._coalescing_manager = coalescing_manager
    buffers.dist_all_gather_func = in_place(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = in_place(buffers.dist_reduce_scatter_func)


def _mend_mixture_of_experts() -> None:
    """Makes the all-to-all token dispatcher, which is made for GPUs, run over gloo."""
    import torch.distributed as dist
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # The router has a small compiled function. Compiling it needs a C++ compiler and takes seconds.
    torch.compiler.set_stance("force_eager")

    # megatron-core 0.16 compares this with None but does not define it without Transformer Engine.
    moe_utils.te_general_gemm = None

    # Split sizes are arrays if copied from a GPU, otherwise tensors, which gloo does not accept.
    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host

    # NCCL gathers tensors of different sizes, gloo does not. The dispatcher needs it within the
    # expert-tensor-parallel group.
    all_gather = dist.all_gather

    def all_gather_of_any_sizes(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(one.shape == tensor_list[0].shape for one in tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        assert not async_op
        for rank, one in enumerate(tensor_list):
            if rank == dist.get_rank(group):
                one.copy_(tensor)
            dist.broadcast(one, group=group, group_src=rank)
        return None

    dist.all_gather = all_gather_of_any_sizes


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Does nothing: CPU work is synchronous, and its peak memory cannot be reset."""


@contextlib.contextmanager
def left() -> Iterator[None]:
    """Runs code that names no CUDA device without the redirection, which costs time per call."""
    if _active is None:
        yield
        return
    _active.__exit__(None, None, None)
    try:
        yield
    finally:
        _active.__enter__()


def enter() -> None:
    """Lets megatron-core run on the CPU for the rest of the process. A second call does nothing.

    Call it before megatron-core builds anything. CUDA's generator becomes the CPU's, streams and
    events become stand-ins, ``torch.cuda.max_memory_allocated`` returns the process's peak resident
    set.
    """
    global _active
    if _active is not None:
        return
    import megatron.core.tensor_parallel.random as mcore_random
    from megatron.core.pipeline_parallel import p2p_communication

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = _nothing
    cuda.synchronize = _nothing
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.stream = _in_stream
    cuda.current_stream = lambda device=None: _Stream()
    cuda.default_stream = lambda device=None: _Stream()
    cuda.is_current_stream_capturing = lambda: False
    cuda.max_memory_allocated = _peak_bytes
    cuda.reset_peak_memory_stats = _nothing

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    mcore_random._get_cuda_rng_state = get_rng_state
    mcore_random._set_cuda_rng_state = set_rng_state

    # gloo reads a tensor's memory until the send is done. Megatron's interleaved schedule frees a
    # stage's output right after starting to send it, which is safe with CUDA's allocator only.
    p2p_ops = p2p_communication._p2p_ops

    def p2p_ops_on_copies(**kwargs: Any) -> Any:
        for name in ("tensor_send_prev", "tensor_send_next"):
            if kwargs[name] is not None:
                kwargs[name] = kwargs[name].detach().clone()
        return p2p_ops(**kwargs)

    p2p_communication._p2p_ops = p2p_ops_on_copies
    _spare_groups_of_one()
    _mend_mixture_of_experts()

    _active = _CudaNamesOnCpu()
    # Never left: the process stays on the CPU.
    _active.__enter__()
