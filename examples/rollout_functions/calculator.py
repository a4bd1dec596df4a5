"""A calculator for the student: it writes ``<<17+26>>``, and `` = 43`` is inserted.

torchrun -m megatron_oprd.train --config examples/rollout_functions/calculator.yaml

(`make demo` makes the models that the file names.) The inserted text is read by both models; the
student is trained on the tokens that it wrote itself, the questions to the calculator among them.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from megatron_oprd.rollout.engine import SamplingParams
from megatron_oprd.rollout.function import Generate, Response, ResponseRequest, Turn

MAX_CALLS = 4  # of the calculator, in a response
_QUESTION = re.compile(r"<<([^<>]*)>>[^<>]*\Z")
# No powers: small expressions would have enormous results.
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


@dataclass(kw_only=True)
class Draft:
    """A response that is not complete."""

    token_ids: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    num_calls: int = 0

    def write(self, turn: Turn) -> None:
        """Adds what the student wrote."""
        self.token_ids += turn.token_ids
        self.written += [True] * len(turn.token_ids)
        self.logprobs += turn.logprobs or ()
        self.finished = turn.finished

    def insert(self, token_ids: Sequence[int]) -> None:
        """Adds what the student did not write."""
        self.token_ids += token_ids
        self.written += [False] * len(token_ids)
        self.num_calls += 1


def roll_out(
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[ResponseRequest],
    sampling: SamplingParams,
) -> list[Response]:
    """Responses of a student with a calculator; see `RolloutFunction`."""
    until_question = replace(sampling, stop=(*sampling.stop, ">>"))
    drafts = {request: Draft() for request in requests}
    # All responses take their turns together, so that the engine has large batches.
    waiting = list(requests)
    while waiting:
        prefixes = [[*request.prompt_ids, *drafts[request].token_ids] for request in waiting]
        turns = generate(waiting, prefixes, until_question)
        asking = []
        for request, turn in zip(waiting, turns, strict=True):
            draft = drafts[request]
            draft.write(turn)
            if ">>" not in tokenizer.decode(turn.token_ids) or draft.num_calls == MAX_CALLS:
                continue
            # The question may begin in the prompt.
            text = tokenizer.decode([*request.prompt_ids, *draft.token_ids])
            if (question := _QUESTION.search(text)) is None:
                continue
            answer = tokenizer.encode(f" = {calculate(question[1])}\n", add_special_tokens=False)
            room = sampling.max_new_tokens - len(draft.token_ids)
            draft.insert(answer[:room])
            asking.append(request)
        waiting = asking
    return [
        Response(
            token_ids=draft.token_ids,
            written=draft.written,
            finished=draft.finished,
            logprobs=draft.logprobs if sampling.logprobs else None,
            metrics={"calculator_calls": draft.num_calls},
        )
        for draft in drafts.values()
    ]


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and parentheses; ``error`` for any other."""
    if len(expression) > 100:
        return "error"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError(f"{type(node).__name__} is not arithmetic")
