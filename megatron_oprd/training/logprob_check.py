"""Compares the rollout engine's log-probabilities with the trainer's, on the sampled tokens."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.data.batching import MicroBatch
from megatron_oprd.distill.head import ResponseLogprobs, head_weight
from megatron_oprd.distill.output_space import VocabularyShard
from megatron_oprd.models.logits import LogitForm
from megatron_oprd.models.schedule import run_schedule
from megatron_oprd.models.student import whole_model
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.training.batches import make_response_micro_batches, micro_batch_multiple
from megatron_oprd.training.step import Distiller

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LogprobDifference:
    """The engine's log-probabilities against the trainer's, in nats per response token.

    log r = trainer's - engine's, both of the raw distribution, before temperature, top-k and top-p.
    The two estimates of KL(engine || trainer) are unbiased only if tokens are sampled without these
    three; otherwise they measure the same difference on tokens from a sharper or flatter
    distribution.
    """

    diff_mean: float  # mean of abs(log r)
    diff_max: float  # maximum of abs(log r)
    kl: float  # mean of -log r (Schulman's k1)
    k3_kl: float  # mean of r - 1 - log r (Schulman's k3): never negative, less variance

    @classmethod
    def of(cls, of_engine: Tensor, of_trainer: Tensor) -> "LogprobDifference":
        """The difference between the log-probabilities of the same tokens, [tokens] each."""
        # fp64 and expm1: log r is close to 0, where r - 1 - log r cancels almost entirely.
        log_ratio = of_trainer.double() - of_engine.double()
        return cls(
            diff_mean=float(log_ratio.abs().mean()),
            diff_max=float(log_ratio.abs().max()),
            kl=float(-log_ratio.mean()),
            k3_kl=float((log_ratio.expm1() - log_ratio).mean()),
        )


def _difference(rollouts: Sequence[Rollout], of_trainer: Sequence[Tensor]) -> LogprobDifference:
    """The difference on the tokens of rollouts; ``of_trainer`` has each one's [t]."""
    of_engine: list[float] = []
    of_student: list[Tensor] = []
    for rollout, values in zip(rollouts, of_trainer, strict=True):
        assert rollout.logprobs is not None, "an engine reports no log-probabilities"
        of_engine += rollout.logprobs
        # The engine has none of tokens that a function of the user's inserted.
        written = rollout.written or [True] * len(rollout.response_ids)
        of_student.append(values[torch.tensor(written)])
    return LogprobDifference.of(torch.tensor(of_engine), torch.cat(of_student))


class LogprobCheck:
    """Compares the engine's log-probabilities of its rollouts with the student's.

    The whole student (layers past the deepest tap and the LM head included) runs forward once more,
    with the weights before the update. With ``rollout.max_staleness`` the engine's weights may be
    older, and the updates since are part of the difference.
    """

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller
        plan, context = distiller.plan, distiller.context
        self._shard = VocabularyShard.of(
            vocab_size=plan.layout.student.architecture.vocab_size,
            padded_vocab_size=plan.layout.student.padded_vocab_size,
            group=context.groups.tp,
        )
        # Padding rows and ids without a token; the engines never sample them.
        is_meaningless = torch.ones(plan.layout.student.padded_vocab_size, dtype=torch.bool)
        is_meaningless[list(plan.tokenizer.get_vocab().values())] = False
        columns = slice(self._shard.start, self._shard.start + self._shard.size)
        self.is_meaningless = is_meaningless[columns].to(context.device)

    def compare(
        self, rollouts: Sequence[Rollout], fixed: Sequence[Rollout], *, step: int
    ) -> dict[str, Any]:
        """Returns a step's metrics; warns on rank 0 if a mean difference is over the threshold.

        Every rank has to call, with the same rollouts; the metrics are the same on every rank.

        Args:
            rollouts: The step's.
            fixed: Responses to fixed prompts by the weights that the last sync sent; may be empty.
            step: The step.
        """
        started = time.perf_counter()
        compared = [*rollouts, *fixed]
        of_trainer = self._padded_logprobs(compared)
        lengths = [len(one.response_ids) for one in compared]
        by_rollout = of_trainer.cpu()[: sum(lengths)].split(lengths)
        found = _difference(rollouts, by_rollout[: len(rollouts)])
        reason = "Either it has other weights, or it computes otherwise"
        if any(rollout.weights_version != step for rollout in rollouts):
            reason = (
                "The rollouts are of older weights (rollout.max_staleness), and the updates "
                "since are part of the difference"
            )
        self._warn(found, f"step {step}: the rollout engine's log-probabilities", reason)
        metrics = {
            "rollout_logprob_diff_mean": found.diff_mean,
            "rollout_logprob_diff_max": found.diff_max,
            "rollout_kl": found.kl,
            "rollout_k3_kl": found.k3_kl,
        }
        if fixed:
            after_sync = _difference(fixed, by_rollout[len(rollouts) :])
            self._warn(
                after_sync,
                f"step {step}: the rollout engine's log-probabilities after fixed prompts",
                "They are of the weights that it was sent last: either it has others, or it "
                "computes otherwise",
            )
            metrics["weight_sync_logprob_diff_mean"] = after_sync.diff_mean
            metrics["weight_sync_logprob_diff_max"] = after_sync.diff_max
        return {**metrics, "seconds_logprob_check": time.perf_counter() - started}

    def _padded_logprobs(self, rollouts: Sequence[Rollout]) -> Tensor:
        """As `student_logprobs`, with the last rollout repeated until replicas can share them."""
        layout = self._distiller.plan.layout
        missing = -len(rollouts) % (layout.data_parallel_size * micro_batch_multiple(layout))
        return self.student_logprobs([*rollouts, *[rollouts[-1]] * missing])

    def _warn(self, found: LogprobDifference, what: str, reason: str) -> None:
        threshold = self._distiller.plan.config.rollout.logprob_warning_threshold
        # "not <=" and not ">", so that NaN warns too.
        if self._distiller.context.rank == 0 and not found.diff_mean <= threshold:
            logger.warning(
                "%s differ from the student's by %.3g nats a token on average, at most %.3g "
                "(rollout.logprob_warning_threshold = %g). %s",
                what,
                found.diff_mean,
                found.diff_max,
                threshold,
                reason,
            )

    def student_logprobs(self, rollouts: Sequence[Rollout]) -> Tensor:
        """The student's log-probability of every response token of the global batch.

        The distribution excludes ids without a token, as the engines' does. Every rank has to call,
        and gets [response tokens], fp32, in the order of the sequences.
        """
        distiller = self._distiller
        state, parallel = distiller.state, distiller.plan.config.parallel
        # With overlap_param_gather, only a forward pass of the wrapped chunks would wait for the
        # last update; this one runs the modules without the wrapper.
        state.gather_parameters()
        logprobs = ResponseLogprobs(
            self._head(),
            shard=self._shard,
            is_meaningless=self.is_meaningless,
            num_tokens=sum(len(rollout.response_ids) for rollout in rollouts),
            sequence_parallel=parallel.sequence_parallel,
            logit_form=LogitForm.of(distiller.plan.layout.student.architecture),
        )
        modules = state.modules

        def end(hidden: Tensor, micro_batch: MicroBatch, chunk: Any) -> Tensor:
            if distiller.context.pp_rank == distiller.context.pp_size - 1 and chunk is modules[-1]:
                logprobs.collect(hidden, micro_batch)
            return hidden

        with ExitStack() as stack:
            for one in distiller.teachers:
                stack.enter_context(one.taps.paused())
            stack.enter_context(whole_model(modules))
            run_schedule(
                modules,
                make_response_micro_batches(distiller.plan, distiller.context, rollouts),
                forward_only=True,
                begin=lambda micro_batch: micro_batch.input,
                end=end,
            )
        return logprobs.all()

    def _head(self) -> Tensor | None:
        """This rank's rows of the LM head, on the last stage; None on the others."""
        plan, pp = self._distiller.plan.layout.student, self._distiller.context.groups.pp
        chunks, last = self._distiller.state.modules, pp.size() - 1
        # A tied head that training does not use has no copy on the last stage: the first stage
        # sends its embedding over.
        if not plan.architecture.tied or plan.extent.uses_lm_head:
            return head_weight(chunks[-1]).data if pp.rank() == last else None
        if pp.rank() == 0:
            embedding = chunks[0].embedding.word_embeddings.weight.data
            if last == 0:
                return embedding
            dist.send(embedding, group=pp, group_dst=last)
        elif pp.rank() == last:
            received = torch.empty(
                plan.padded_vocab_size // self._shard.group.size(),
                plan.architecture.hidden_size,
                dtype=next(chunks[-1].parameters()).dtype,
                device=self._distiller.context.device,
            )
            dist.recv(received, group=pp, group_src=0)
            return received
        return None
