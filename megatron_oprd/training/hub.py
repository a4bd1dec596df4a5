"""Uploads an exported student to the Hugging Face Hub."""

from pathlib import Path

import huggingface_hub

from megatron_oprd.config.schema import ExportConfig, RunConfig
from megatron_oprd.errors import UserError, say
from megatron_oprd.heartbeat import heartbeat


def check_hub(config: RunConfig) -> None:
    """Refuses an upload without a token, before the run starts.

    Raises:
        UserError: There is none.
    """
    if config.export.push_to_hub and huggingface_hub.get_token() is None:
        raise UserError(
            "export.push_to_hub is true, but there is no token of the Hugging Face Hub on this "
            "machine; run `hf auth login` or set HF_TOKEN"
        )


def push_to_hub(folder: Path, export: ExportConfig) -> None:
    """Uploads a folder to the repository ``export.hub_model_id``, which is made if it is missing.

    Raises:
        UserError: The Hub refuses it, or cannot be reached; the folder stays as it is.
    """
    assert export.hub_model_id is not None
    hub = huggingface_hub.HfApi()
    try:
        with heartbeat(f"uploading {folder}"):
            repository = hub.create_repo(
                export.hub_model_id, private=export.hub_private_repo, exist_ok=True
            )
            hub.upload_folder(
                repo_id=repository.repo_id,
                folder_path=folder,
                commit_message="A student distilled with megatron_oprd",
            )
    # Whatever the client raises without a network, the student is exported.
    except Exception as error:
        raise UserError(
            f"export.hub_model_id = {export.hub_model_id} cannot be uploaded to: "
            f"{str(error).splitlines()[0]}; the student is whole in {folder}, from where "
            f"`hf upload {export.hub_model_id} {folder}` uploads it"
        ) from error
    say(f"the student is also in {repository.repo_id} of the Hugging Face Hub")
