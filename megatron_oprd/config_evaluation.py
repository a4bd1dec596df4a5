"""The settings of the evaluation during a run."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation on benchmarks during the run, as `megatron_oprd.evaluate` does it by itself.

    Attributes:
        interval: Steps between evaluations; there is one more at the end. None evaluates never.
        data: Parquet or JSONL files with the columns ``prompt`` and ``reward_model.ground_truth``.
        limit: Problems that are taken of each file, its first ones; None takes all.
        instruction: Text that is put behind each problem; None leaves problems as they are.
        n: Responses for each problem.
        max_new_tokens: A response is cut after this many tokens.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Nucleus; 1.0 is off.
    """

    interval: int | None = None
    data: list[str] = field(default_factory=list)
    limit: int | None = None
    instruction: str | None = None
    n: int = 16
    max_new_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 0.95
