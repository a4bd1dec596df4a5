"""Rollouts of the user's own: a function that makes responses with the run's engine.

``rollout.function`` names a `RolloutFunction`. It may ask the engine for several continuations of a
response and insert text of its own between them: results of a tool, an environment's answers. The
student is trained on what it wrote itself.
"""

import importlib
import logging
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.errors import UserError
from megatron_oprd.rollout.engine import Rollout, RolloutEngine, RolloutEngineError, SamplingParams
from megatron_oprd.rollout.sampling import samples_of

logger = logging.getLogger(__name__)


class RolloutFunctionError(UserError):
    """The function failed, or returned something else than it should; the run cannot go on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseRequest:
    """One response that a function has to make; only the object itself is equal to it."""

    prompt_index: int  # in the data set
    sample_index: int  # from 0, among the prompt's ``rollout.samples_per_prompt`` responses
    prompt_ids: tuple[int, ...]  # chat template applied
    columns: Mapping[str, Any]  # of the prompt's row, the columns of ``rollout.function_columns``


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the student wrote after a sequence."""

    # With the stop token, or the tokens of the stop text. Empty if the response is full already.
    token_ids: tuple[int, ...]
    finished: bool  # False: cut, by ``max_new_tokens`` or because the response is full
    logprobs: tuple[float, ...] | None  # of each token, raw; None if not asked for


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response that a function made: the tokens after the prompt."""

    # At most ``rollout.max_new_tokens``, inserted tokens included.
    token_ids: Sequence[int]
    # Of each token, whether the student wrote it; at least one. Other tokens are read by both
    # models and not supervised.
    written: Sequence[bool]
    finished: bool  # False: cut
    # `Turn.logprobs` of the written tokens; needed if ``SamplingParams.logprobs``.
    logprobs: Sequence[float] | None = None
    # Numbers for metrics.jsonl, where their mean over the step's responses is logged.
    metrics: Mapping[str, float] = field(default_factory=dict)


class Generate(Protocol):
    """Asks the run's engine, with the student's current weights."""

    def __call__(
        self,
        requests: Sequence[ResponseRequest],
        prefixes: Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
    ) -> list[Turn]:
        """Samples one continuation for each prefix; all together, so give many at once.

        The n-th continuation for a request has the same noise in every layout: the noise depends on
        the run's seed, step, prompt, sample and n alone.

        Args:
            requests: The response that each continuation is for.
            prefixes: Token ids of each sequence that is continued, the prompt included.
            sampling: The step's parameters with changes (``dataclasses.replace``), such as ``stop``
                or ``max_new_tokens``; None: unchanged. ``seed``, ``samples_per_prompt`` and
                ``logprobs`` are always the step's.

        Returns:
            One turn for each prefix, in order. A continuation is cut where prefix and continuation
            are ``rollout.max_new_tokens`` longer than the request's prompt.
        """


class RolloutFunction(Protocol):
    """Makes responses; ``rollout.function`` names one as ``package.module:name``."""

    def __call__(
        self,
        generate: Generate,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[ResponseRequest],
        sampling: SamplingParams,
    ) -> Sequence[Response]:
        """Makes one response for each request, in order.

        It is called on each rank that owns an engine, with that engine's share of a step, which
        depends on the number of engines. A response must therefore depend on its own request alone.
        If the engine fails, the call is repeated.

        Args:
            generate: Asks the engine for continuations, any number of times.
            tokenizer: The student's.
            requests: The responses to make.
            sampling: The step's parameters.
        """


@dataclass(frozen=True, kw_only=True)
class UserFunction:
    """A `RolloutFunction` with its name in errors; its responses are checked."""

    name: str  # the value of ``rollout.function``
    function: RolloutFunction
    tokenizer: PreTrainedTokenizerBase  # the student's

    @classmethod
    def load(cls, name: str, tokenizer: PreTrainedTokenizerBase) -> "UserFunction":
        """Imports the function; raises a UserError if it cannot be."""
        module, _, attribute = name.partition(":")
        try:
            function = operator.attrgetter(attribute)(importlib.import_module(module))
        # The user's module can raise anything.
        except Exception as error:
            raise UserError(
                f"rollout.function = {name} cannot be imported ({type(error).__name__}: {error}); "
                "name a module that Python finds from the folder where the run is started or "
                "from PYTHONPATH, and a function in it"
            ) from error
        if not callable(function):
            raise UserError(
                f"rollout.function = {name} is a {type(function).__name__}, which cannot be "
                "called; name a function"
            )
        return cls(name=name, function=function, tokenizer=tokenizer)

    def generate(
        self, engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Rollout]:
        """What `RolloutEngine.generate` returns, made by the function.

        Raises:
            UserError: The function fails, or returns something else than it should.
            RolloutEngineError: The engine fails.
        """
        if not prompts:
            return []
        places = {
            ResponseRequest(
                prompt_index=prompt.index,
                sample_index=sample,
                prompt_ids=prompt.token_ids,
                columns=dict(prompt.columns),
            ): (prompt, sample)
            for prompt in prompts
            for sample in samples_of(prompt, sampling)
        }
        requests = list(places)
        turns = _Turns(self, engine, places, sampling)
        try:
            responses = self.function(turns, self.tokenizer, requests, sampling)
        except (UserError, RolloutEngineError):
            raise
        except Exception as error:
            logger.exception("rollout.function = %s failed", self.name)
            raise self.error(f"failed with {type(error).__name__}: {error}") from error
        if not isinstance(responses, Sequence) or len(responses) != len(requests):
            found = f"{len(responses)} entries" if isinstance(responses, Sequence) else ""
            raise self.error(
                f"returned {found or 'a ' + type(responses).__name__} for {len(requests)} "
                "requests; return a list with one Response for each request, in order"
            )
        if turns.version is None:
            raise self.error(
                "did not call generate(), so that the responses are not the student's; call it"
            )
        return [
            self._rollout(request, response, sampling, version=turns.version)
            for request, response in zip(requests, responses, strict=True)
        ]

    def error(self, text: str) -> UserError:
        """A mistake of the function."""
        return UserError(f"rollout.function = {self.name} {text}")

    def check_ids(self, token_ids: Sequence[int], what: str) -> tuple[int, ...]:
        """The token ids as integers; raises a UserError if one is not a token."""
        highest = self._highest_id
        try:
            found = tuple(operator.index(token) for token in token_ids)
        except TypeError as error:
            raise self.error(f"gave {what} that are no integers ({error})") from error
        if wrong := [token for token in found if not 0 <= token <= highest]:
            raise self.error(
                f"gave {what} with the token {wrong[0]}; the tokenizer has tokens from 0 to "
                f"{highest}"
            )
        return found

    @cached_property
    def _highest_id(self) -> int:
        return max(self.tokenizer.get_vocab().values())

    def _rollout(
        self,
        request: ResponseRequest,
        response: Response,
        sampling: SamplingParams,
        *,
        version: int,
    ) -> Rollout:
        of = f"for prompt {request.prompt_index}, sample {request.sample_index}"
        if not isinstance(response, Response):
            raise self.error(
                f"returned a {type(response).__name__} {of}; return a "
                "megatron_oprd.rollout.function.Response"
            )
        token_ids = self.check_ids(response.token_ids, f"token_ids {of}")
        if len(token_ids) > sampling.max_new_tokens:
            raise self.error(
                f"returned {len(token_ids)} tokens {of}, more than rollout.max_new_tokens = "
                f"{sampling.max_new_tokens}, which counts inserted tokens too; cut the response, "
                "or give a larger number"
            )
        if len(response.written) != len(token_ids):
            raise self.error(
                f"returned {len(token_ids)} token_ids and {len(response.written)} entries of "
                f"written {of}; return as many"
            )
        written = tuple(bool(one) for one in response.written)
        if not any(written):
            raise self.error(
                f"returned a response in which the student wrote nothing, {of}, so that there is "
                "nothing to train on; at least one entry of written has to be true"
            )
        logprobs = None
        if sampling.logprobs:
            found = response.logprobs
            if found is None or len(found) != sum(written):
                raise self.error(
                    f"returned {'no' if found is None else len(found)} logprobs {of}, but "
                    "rollout.logprob_check_interval needs one of each token that the student wrote "
                    f"({sum(written)}); return those of generate(), or leave "
                    "rollout.logprob_check_interval out"
                )
            logprobs = tuple(float(one) for one in found)
        return Rollout(
            prompt_index=request.prompt_index,
            sample_index=request.sample_index,
            prompt_ids=request.prompt_ids,
            response_ids=token_ids,
            finished=bool(response.finished),
            # As a plain response has it, so that the two are equal.
            written=None if all(written) else written,
            weights_version=version,
            logprobs=logprobs,
            metrics=self._metrics(response.metrics, of),
        )

    def _metrics(self, metrics: Mapping[str, float], of: str) -> tuple[tuple[str, float], ...]:
        for name, value in metrics.items():
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if not is_number or not isinstance(name, str):
                raise self.error(
                    f"returned metrics with {name!r}: {value!r} {of}; names have to be texts, "
                    "values finite numbers"
                )
        return tuple((name, float(value)) for name, value in metrics.items())


class _Turns:
    """The `Generate` of one call of a function."""

    def __init__(
        self,
        of: UserFunction,
        engine: RolloutEngine,
        places: Mapping[ResponseRequest, tuple[Prompt, int]],  # prompt and sample of each request
        sampling: SamplingParams,
    ) -> None:
        self._of = of
        self._engine = engine
        self._places = places
        self._sampling = sampling
        self._done: Counter[ResponseRequest] = Counter()  # turns
        self.version: int | None = None  # of the oldest weights so far

    def __call__(
        self,
        requests: Sequence[ResponseRequest],
        prefixes: Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
    ) -> list[Turn]:
        """See `Generate`."""
        if len(requests) != len(prefixes):
            raise self._of.error(
                f"called generate() with {len(requests)} requests and {len(prefixes)} prefixes; "
                "give as many"
            )
        of_step = self._sampling
        sampling = replace(
            sampling or of_step,
            seed=of_step.seed,
            samples_per_prompt=of_step.samples_per_prompt,
            logprobs=of_step.logprobs,
        )
        nothing = Turn(token_ids=(), finished=False, logprobs=() if sampling.logprobs else None)
        turns = [nothing] * len(requests)
        asked: dict[int, Prompt] = {}
        for number, (request, prefix) in enumerate(zip(requests, prefixes, strict=True)):
            if request not in self._places:
                raise self._of.error(
                    "called generate() with a request that is not one of this call's; give those "
                    "that it was called with"
                )
            prompt, sample = self._places[request]
            token_ids = self._of.check_ids(prefix, "a prefix")
            if not token_ids:
                raise self._of.error("called generate() with an empty prefix; give the prompt")
            room = len(request.prompt_ids) + of_step.max_new_tokens - len(token_ids)
            if room > 0:
                asked[number] = replace(
                    prompt,
                    token_ids=token_ids,
                    samples=(sample,),
                    turn=self._done[request],
                    max_new_tokens=room,
                )
            self._done[request] += 1
        if asked:
            found = self._engine.generate(list(asked.values()), sampling)
            for number, rollout in zip(asked, found, strict=True):
                turns[number] = Turn(
                    token_ids=rollout.response_ids,
                    finished=rollout.finished,
                    logprobs=rollout.logprobs,
                )
            versions = [rollout.weights_version for rollout in found]
            self.version = min(versions if self.version is None else [self.version, *versions])
        return turns
