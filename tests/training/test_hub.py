from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from megatron_oprd.config.schema import DataConfig, ExportConfig, ModelConfig, RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.training.hub import check_hub, push_to_hub

EXPORT = ExportConfig(push_to_hub=True, hub_model_id="user/student")


class Hub:
    """In place of HfApi."""

    calls: list[tuple[str, Any]]
    refuses = False

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append((name, options))
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.refuses:
            raise OSError("no space left in this account\nmore")
        self.calls.append((repo_id, folder_path))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    class OfTest(Hub):
        calls: list[tuple[str, Any]] = []  # noqa: RUF012

    monkeypatch.setattr(huggingface_hub, "HfApi", OfTest)
    return OfTest


def test_the_folder_is_uploaded(hub: type[Hub], tmp_path: Path) -> None:
    push_to_hub(tmp_path, EXPORT)
    assert hub.calls == [
        ("user/student", {"private": True, "exist_ok": True}),
        ("user/student", tmp_path),
    ]


def test_a_refused_upload_says_where_the_student_is(hub: type[Hub], tmp_path: Path) -> None:
    hub.refuses = True
    with pytest.raises(UserError) as error:
        push_to_hub(tmp_path, EXPORT)
    assert "no space left in this account; the student is whole in" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_is_needed_only_for_an_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    config = RunConfig(
        output_dir="run",
        model=ModelConfig(student="s", teacher="t"),
        data=DataConfig(prompts=["p.jsonl"]),
    )
    check_hub(config)
    config.export = EXPORT
    with pytest.raises(UserError, match="HF_TOKEN"):
        check_hub(config)
