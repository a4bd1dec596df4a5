"""Measures FP8 teachers; rank 0 writes the report."""

from pathlib import Path
from typing import Any

from examples.fp8_report.fidelity import measure_fidelity, write_report
from megatron_oprd.config.schema import ModelConfig, ParallelConfig, TeacherConfig
from megatron_oprd.parallel.context import parallel_run


def run(case: dict[str, Any], directory: Path) -> None:
    """Runs one case: {name, folder, prompts, recipes, tp, params_dtype, max_new_tokens}."""
    parallel = ParallelConfig(tensor_model_parallel_size=case["tp"])
    with parallel_run(parallel, seed=0) as context:
        report = measure_fidelity(
            Path(case["folder"]),
            [Path(case["prompts"])],
            [TeacherConfig(precision="fp8", fp8_recipe=recipe) for recipe in case["recipes"]],
            model=ModelConfig(params_dtype=case["params_dtype"]),
            parallel=parallel,
            context=context,
            max_new_tokens=case["max_new_tokens"],
            max_prompt_tokens=64,
            max_tokens=case["max_tokens"],
        )
        if context.rank == 0:
            write_report(report, directory / f"{case['name']}.json")
