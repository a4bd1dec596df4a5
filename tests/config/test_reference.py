from megatron_oprd.reference import FILE, reference


def test_the_committed_file_is_current() -> None:
    command = "python -m megatron_oprd.reference"
    assert FILE.read_text() == reference(), f"run {command} and commit docs/{FILE.name}"
