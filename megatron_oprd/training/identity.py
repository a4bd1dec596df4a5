"""Identifies a run across resumes: its name, first day, schedule, and the data it reads.

A setting names a file. The file can be moved, which changes nothing, or rewritten in place, which
changes the run. So checkpoints keep digests of the contents.
"""

import dataclasses
import datetime
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import xxhash

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.data.tokenizers import tokenizer_files
from megatron_oprd.training.plan import RunPlan
from megatron_oprd.weights.checksum import sampled_checksum
from megatron_oprd.weights.source import WeightSource


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The data that a run keeps from its first start to its last resume."""

    name: str  # random; also in its checkpoints and its exported student
    day: str  # of its first start, ISO 8601; for chat templates that print a date
    lr_decay_iters: int  # length of its learning-rate schedule, in steps
    contents: dict[str, str]  # digests by description, see `contents_of`

    @classmethod
    def new(cls, plan: RunPlan) -> Self:
        """A new identity, without contents."""
        return cls(
            name=uuid.uuid4().hex,
            day=datetime.date.today().isoformat(),
            lr_decay_iters=plan.config.decay_iters,
            contents={},
        )

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Self:
        """The identity of the run that wrote a checkpoint's manifest."""
        return cls(**manifest["run"])

    def as_json(self) -> dict[str, Any]:
        """The ``run`` entry of a manifest, for `of_manifest`."""
        return dataclasses.asdict(self)

    @property
    def date(self) -> datetime.date:
        """The day of the first start."""
        return datetime.date.fromisoformat(self.day)


def contents_of(plan: RunPlan, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Digests of the data that a run reads; the keys are for error messages.

    Weight files are digested by size and samples of their bytes, because reading all takes too
    long.
    """
    contents = {
        "the prompts (data.prompts, rendered and tokenized)": _digest(_prompt_bytes(prompts)),
        **_of_model("model.student", plan.student_checkpoint),
    }
    for number, teacher in enumerate(plan.teachers):
        setting, bridge = "model.teacher", "bridge.path"
        # The first teacher and its bridge have settings of their own, the others are in a list.
        if number:
            setting, bridge = (f"extra_teachers[{number - 1}].{x}" for x in ("model", "bridge"))
        contents |= _of_model(setting, teacher.checkpoint)
        if (path := teacher.layout.config.bridge.path) is not None:
            contents[f"the bridge ({bridge})"] = _files_digest(_files_below(Path(path)))
    return contents


def _of_model(setting: str, checkpoint: WeightSource) -> dict[str, str]:
    return {
        f"the tokenizer or its chat template ({setting})": _digest(
            content
            for file in tokenizer_files(checkpoint.hf_folder)
            for content in (file.name.encode(), file.read_bytes())
        ),
        # config.json is compared field by field, as the architecture.
        f"the weights ({setting})": _files_digest(
            file for file in checkpoint.files() if file.suffix != ".json"
        ),
    }


def _prompt_bytes(prompts: Sequence[Prompt]) -> Iterable[bytes]:
    for prompt in prompts:
        # Columns only where there are any, so that older checkpoints keep their digest.
        parts = (prompt.index, prompt.token_ids, prompt.teacher_ids)
        yield repr((*parts, prompt.columns) if prompt.columns else parts).encode()


def _files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _files_digest(files: Iterable[Path]) -> str:
    return _digest(
        content
        for file in sorted(files)
        for content in (file.name.encode(), sampled_checksum(file).encode())
    )


def _digest(parts: Iterable[bytes]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        # The length too, or parts that are split differently would have the same digest.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
