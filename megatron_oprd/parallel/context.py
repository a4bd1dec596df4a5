"""Process groups, this rank's place in the model-parallel layout, and seeds."""

import copy
import dataclasses
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_oprd.config.schema import ParallelConfig
from megatron_oprd.errors import UserError
from megatron_oprd.parallel import cpu
from megatron_oprd.parallel.layout import ParallelLayout

_CONTROL_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This rank's place in the run.

    A data-parallel replica has one copy of everything except the experts of a mixture of experts.
    Experts have groups of their own over the same ranks of a stage: expert-tensor-parallel x
    expert-parallel consecutive ranks have one copy of each expert, whether they are a part of a
    replica or several replicas. So replicas have to do everything that runs or moves experts
    together, in the same order.
    """

    device: torch.device
    groups: ProcessGroupCollection  # megatron-core's
    # Gloo group of all ranks for objects, in which a rank may wait as long as a rollout takes.
    control: dist.ProcessGroup
    # Whether layers are Transformer Engine's.
    transformer_engine: bool

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank of its data-parallel replica."""
        return self.tp_rank == self.cp_rank == self.pp_rank == 0

    @property
    def tp_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.groups.tp.rank()

    @property
    def tp_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self.groups.tp.size()

    @property
    def pp_rank(self) -> int:
        """Rank in the pipeline-parallel group."""
        return self.groups.pp.rank()

    @property
    def pp_size(self) -> int:
        """The number of pipeline ranks."""
        return self.groups.pp.size()

    @property
    def place(self) -> ParallelLayout:
        """This rank's share of the parameters of its layers."""
        groups = self.groups
        return ParallelLayout(
            tensor_model_parallel_size=self.tp_size,
            pipeline_model_parallel_size=self.pp_size,
            context_parallel_size=self.cp_size,
            expert_model_parallel_size=groups.ep.size(),
            expert_tensor_parallel_size=groups.expt_tp.size(),
            tp_rank=self.tp_rank,
            etp_rank=groups.expt_tp.rank(),
            ep_rank=groups.ep.rank(),
        )

    def with_expert_sizes(self, parallel: ParallelConfig) -> "ParallelContext":
        """This place for a model whose parallel layout differs only in the experts' sizes.

        Every rank has to call with the same ``parallel``; creates process groups if the sizes
        differ.
        """
        etp, ep = parallel.expert_tensor_size, parallel.expert_model_parallel_size
        if (etp, ep) == (self.groups.expt_tp.size(), self.groups.ep.size()):
            return self
        ranks = parallel_state.RankGenerator(
            tp=etp,
            ep=ep,
            dp=dist.get_world_size() // (etp * ep * self.pp_size),
            pp=self.pp_size,
            cp=1,
            order="tp-cp-ep-dp-pp",  # as initialize_model_parallel's
        )
        timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
        groups = copy.copy(self.groups)
        for name, kinds in (
            ("ep", "ep"),
            ("expt_tp", "tp"),
            ("tp_ep", "tp-ep"),
            ("tp_ep_pp", "tp-ep-pp"),
            ("expt_dp", "dp"),
        ):
            own, _ = dist.new_subgroups_by_enumeration(ranks.get_ranks(kinds), timeout=timeout)
            setattr(groups, name, own)
        return dataclasses.replace(self, groups=groups)

    @property
    def cp_rank(self) -> int:
        """Rank in the context-parallel group."""
        return self.groups.cp.rank()

    @property
    def cp_size(self) -> int:
        """Size of the context-parallel group."""
        return self.groups.cp.size()

    @property
    def dp_rank(self) -> int:
        """This replica's index."""
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        """The number of data-parallel replicas."""
        return self.groups.dp.size()


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """The number of replicas (of everything but experts) that ``world_size`` ranks make.

    Raises:
        UserError: The model-parallel sizes do not divide the number of ranks.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, size = parallel.context_parallel_size, parallel.replica_size
    if world_size % size:
        shared = f" x parallel.context_parallel_size = {cp}" if cp > 1 else ""
        raise UserError(
            f"{world_size} processes do not divide into model-parallel groups of "
            f"parallel.tensor_model_parallel_size = {tp} x "
            f"parallel.pipeline_model_parallel_size = {pp}{shared}; start a multiple of "
            f"{size} (torchrun --nproc-per-node)"
        )
    etp, ep = parallel.expert_tensor_size, parallel.expert_model_parallel_size
    if world_size % (etp * ep * pp):
        raise UserError(
            f"{world_size} processes do not divide into groups that share the experts, of "
            f"parallel.expert_tensor_parallel_size = {etp} x parallel.expert_model_parallel_size = "
            f"{ep} x parallel.pipeline_model_parallel_size = {pp}; start a multiple of "
            f"{etp * ep * pp} (torchrun --nproc-per-node)"
        )
    return world_size // size


def fewest_ranks(parallel: ParallelConfig) -> int:
    """The smallest number of ranks that the model-parallel sizes divide."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    of_experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    return math.lcm(tp * parallel.context_parallel_size, of_experts) * pp


def _allow_all_files() -> None:
    """Raises the limit of open files to what the user may have."""
    # Each process group has sockets to its ranks; shells often allow 1024 files, of 20,000 or more.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def parallel_run(parallel: ParallelConfig, *, seed: int) -> Iterator[ParallelContext]:
    """Joins the process group, lays out and seeds the ranks, and leaves cleanly at the end.

    Without torchrun the process is a world of one.
    """
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),  # any free port
    ):
        os.environ.setdefault(name, value)
    _allow_all_files()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend, transformer_engine = "nccl", _has_transformer_engine()
    else:
        cpu.enter()
        backend, transformer_engine = "gloo", False
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    dist.init_process_group(backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    # As in Megatron: pipeline stages have different seeds. Tensor-parallel ranks have the same
    # seed, from which Megatron derives another one for each rank.
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed + 100 * pp_rank)
    model_parallel_cuda_manual_seed(seed + 100 * pp_rank)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        yield ParallelContext(
            device=torch.device(torch.cuda.current_device()),
            groups=groups,
            control=dist.new_group(timeout=_CONTROL_TIMEOUT, backend="gloo"),
            transformer_engine=transformer_engine,
        )
        # If a rank leaves while another still communicates with it, the other one fails.
        dist.barrier()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _has_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE
