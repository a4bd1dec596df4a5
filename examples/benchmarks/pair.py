"""A random student and teacher of one shape, and the run that distils all layers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from synthetic import save_random_model
from transformers import Qwen2Config

from megatron_oprd.config.load import load_config
from megatron_oprd.config.schema import RunConfig
from megatron_oprd.data.batching import MicroBatch
from megatron_oprd.rollout.engine import Rollout
from megatron_oprd.training.step import Distiller

NUM_SEQUENCES = 4


def make_run(
    folder: Path,
    *,
    layers: int,
    hidden_size: int,
    vocab_size: int,
    tokens: int,
    params_dtype: str = "fp32",
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Writes both models to a folder, unless they are there, and returns the run's configuration.

    The models have the proportions of Qwen2.5-1.5B (d = 1536): 12 query heads, 2 key/value heads,
    a feed-forward width of 5.83 d, a tied head. A micro-batch is one sequence of ``tokens``.
    """
    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=round(hidden_size * 8960 / 1536),
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    for seed, name in enumerate(("student", "teacher")):
        if not (folder / name).exists():
            save_random_model(folder / name, config, dtype=torch.bfloat16, seed=seed)
    (folder / "prompts.jsonl").write_text('{"prompt": "?"}\n')
    (folder / "run.yaml").write_text(
        f"""
output_dir: {folder / "run"}
model:
  student: {folder / "student"}
  teacher: {folder / "teacher"}
  params_dtype: {params_dtype}
data: {{prompts: [{folder / "prompts.jsonl"}], max_prompt_tokens: 1}}
rollout: {{max_new_tokens: {tokens - 1}}}
batch: {{max_tokens: {tokens}}}
"""
    )
    return load_config(folder / "run.yaml", list(overrides))


def micro_batches(distiller: Distiller, tokens: int) -> list[MicroBatch]:
    """The micro-batches of `NUM_SEQUENCES` responses of ``tokens - 1`` tokens."""
    sequences = [[2 + (7 * i + j) % 256 for j in range(tokens)] for i in range(NUM_SEQUENCES)]
    rollouts = [
        Rollout(
            prompt_index=number,
            sample_index=0,
            prompt_ids=tuple(sequence[:1]),
            response_ids=tuple(sequence[1:]),
            finished=False,
        )
        for number, sequence in enumerate(sequences)
    ]
    (group,) = distiller.micro_batches(rollouts).groups
    return group


class Switch:
    """Takes the taps off a student, and puts them back."""

    def __init__(self, distiller: Distiller) -> None:
        self._places = []
        for module in distiller.state.modules:
            self._places += [
                (layer.__dict__, {"tap": layer.tap}) for layer in module.decoder.layers
            ]
            hooks = module.decoder.final_layernorm._forward_hooks
            self._places.append((hooks, dict(hooks)))

    def turn(self, *, on: bool) -> None:
        """Taps are on or off from here on."""
        for holder, content in self._places:
            if on:
                holder.update(content)
            else:
                for name in content:
                    holder.pop(name, None)  # a layer's tap is then the class's: none
