"""One step; every rank writes what it really allocated, sent and computed."""

import json
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_oprd.data.batching import teacher_batches
from megatron_oprd.parallel.context import ParallelContext, parallel_run
from megatron_oprd.training.logprob_check import LogprobCheck
from megatron_oprd.training.plan import make_plan
from megatron_oprd.training.step import Distiller
from megatron_oprd.weights.export import Exporter
from tests.helpers.pairs import as_rollouts, config_of


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes that are saved for backward at once, each storage counted once."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__(self._pack, lambda handle: handle.tensor)
        self._others = {tensor.untyped_storage().data_ptr() for tensor in others}
        self._users: Counter[int] = Counter()
        self._bytes = 0
        self.peak = 0

    def _pack(self, tensor: Tensor) -> Any:
        class Handle:
            pass

        handle: Any = Handle()
        handle.tensor = tensor
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._others:
            if not self._users[key]:
                self._bytes += size
                self.peak = max(self.peak, self._bytes)
            self._users[key] += 1
            weakref.finalize(handle, self._release, key, size)
        return handle

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._bytes -= size


class Allocations(TorchDispatchMode):
    """The most bytes of storages that live at once, beside those that were there before."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in before}
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._live:
                self._live[key] = size
                self._bytes += size
                self.peak = max(self.peak, self._bytes)
                weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self._bytes -= self._live.pop(key)


class Messages(TorchDispatchMode):
    """Bytes that this rank sends on each process group, as a ring's ranks do."""

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        groups = context.groups
        # Of groups of the same ranks the later name counts.
        self._names = {
            group.group_name: name
            for name, group in (
                ("dp", groups.dp_cp),
                ("expert_dp", groups.expt_dp),
                ("cp", groups.cp),
                ("experts", groups.expt_tp),
                ("experts", groups.ep),
                ("tp", groups.tp),
                ("pp", groups.pp),
            )
        }
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d":
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
            group: Any = dist.ProcessGroup.unbox(boxed)
            n, name = group.size(), self._names.get(group.group_name, "other")
            sizes = [sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args]
            share = (n - 1) / n
            match func.__name__.split(".")[0].strip("_"):
                case "allreduce" | "allreduce_coalesced":
                    self.sent[name] += 2 * share * max(sizes)
                case "broadcast":
                    self.sent[name] += (n - 1) * max(sizes) if group.rank() == args[2] else 0
                case "send":
                    self.sent[name] += max(sizes)
                case "gather":
                    self.sent[name] += 0 if group.rank() == 0 else sizes[1]
                case "recv" | "barrier":
                    pass
                case _:  # a scatter or a gather: the whole is the larger of its two tensors
                    self.sent[name] += share * max(sizes)
        return func(*args, **(kwargs or {}))


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, pair, overrides, sequences: [count, prompt, response]}."""
    config = config_of(Path(case["pair"]), case["overrides"])
    with parallel_run(config.parallel, seed=config.seed) as context:
        plan = make_plan(config, world_size=dist.get_world_size())
        distiller = Distiller(plan, context)
        state = distiller.state
        count, prompt, response = case["sequences"]
        rollouts = as_rollouts([[5] * prompt] * count, [[6] * response] * count)
        (group,) = distiller.micro_batches(rollouts).groups
        student = [t for module in state.modules for t in module.parameters()]
        buffers = [
            buffer
            for chunk in state.chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        optimizers = [one.optimizer for one in state.optimizer.chained_optimizers]
        adam = [t for one in optimizers for states in one.state.values() for t in states.values()]
        main = [t for one in optimizers for options in one.param_groups for t in options["params"]]

        read = [m.input for m in group] + [m.input for m in teacher_batches(group)]
        token_ids = [t for one in read for t in (one.tokens, one.position_ids)]
        of_teacher = Allocations(
            [
                *(t for chunk in distiller.teachers[0].chunks for t in chunk.parameters()),
                *(t for chunk in distiller.teachers[0].chunks for t in chunk.buffers()),
                *token_ids,
            ]
        )
        with of_teacher:
            distiller.teacher_pass(group)
        targets = distiller.teachers[0].taps.targets
        if distiller.head is not None:
            targets += distiller.head.targets
        target_bytes = _bytes(targets)
        state.clear_gradients()
        known = [
            *student,
            *(t for module in state.modules for t in module.buffers()),
            *targets,
            *(buffer.grad_data for buffer in buffers),
            *adam,
            *main,
            *token_ids,
        ]
        del targets
        saved, allocated = SavedTensors(known), Allocations(known)
        with allocated, saved:
            # Not the last group: gloo's reduction takes memory that NCCL's does not.
            distiller.student_pass(group, is_last=False)
        del known

        check = LogprobCheck(distiller)
        held = [t for module in state.modules for t in (*module.parameters(), *module.buffers())]
        checked = Allocations([*held, check.is_meaningless])
        with checked:
            check.student_logprobs(rollouts)

        # Again, since a flop counter keeps tensors alive.
        messages = {name: Messages(context) for name in ("teacher", "student", "update", "sync")}
        flops = {name: FlopCounterMode(display=False) for name in ("teacher", "student")}
        with sdpa_kernel(SDPBackend.MATH):  # fused attention's are not counted
            with messages["teacher"], flops["teacher"]:
                distiller.teacher_pass(group)
            with messages["student"], flops["student"]:
                distiller.student_pass(group, is_last=True)
        with messages["update"]:
            distiller.update(loss_is_finite=True)
        exporter = Exporter(state.modules, plan.layout.student.table, context=context)
        with messages["sync"]:
            for _ in exporter.stream():
                pass
        parameters_of = {t.untyped_storage().data_ptr() for t in student}
        result = {
            "parameters": _bytes(student),
            "teacher": _bytes(
                tensor
                for chunk in distiller.teachers[0].chunks
                for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers())
                if not name.startswith("rotary_pos_emb")
            ),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "optimizer": _bytes(adam)
            + _bytes(t for t in main if t.untyped_storage().data_ptr() not in parameters_of),
            "targets": target_bytes,
            "saved": saved.peak,
            "allocated": allocated.peak,
            "checked": checked.peak,
            "taught": of_teacher.peak,
            "flops": {name: counter.get_total_flops() for name, counter in flops.items()},
            "sent": {name: one.sent for name, one in messages.items()},
        }
        (directory / f"{case['name']}_{context.rank}.json").write_text(json.dumps(result))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
