import json
from pathlib import Path
from typing import Any

import pytest

from megatron_oprd.config.load import load_config
from megatron_oprd.errors import UserError
from megatron_oprd.training.describe import describe
from megatron_oprd.training.plan import RunPlan, make_plan
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.data.test_benchmarks import row, write
from tests.helpers.bridges import save_random_bridge
from tests.helpers.pairs import config_of, save_pair
from tests.helpers.tiny import copy_with_config, tiny_tokenizer

TP2, TP3 = (f"parallel.tensor_model_parallel_size={tp}" for tp in (2, 3))
PP2, PP5 = (f"parallel.pipeline_model_parallel_size={pp}" for pp in (2, 5))
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 4 layers and a teacher of 7, 4 heads over 2 key/value heads, 256 positions."""
    return save_pair(tmp_path_factory.mktemp("plan") / "pair", "llama", teacher_layers=7)


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a plan reads no weight")

    monkeypatch.setattr(HFCheckpoint, "read_slice", refuse)


def plan(pair: Path, *overrides: str, world_size: int = 1) -> RunPlan:
    return make_plan(config_of(pair, list(overrides)), world_size=world_size)


def changed(pair: Path, tmp_path: Path, which: str, **fields: Any) -> str:
    """The override that puts a changed copy of a model in its place."""
    return f"model.{which}={copy_with_config(pair / which, tmp_path / which, **fields)}"


def test_what_a_plan_holds(pair: Path) -> None:
    found = plan(pair, PP2, "model.make_vocab_size_divisible_by=50", world_size=4)
    assert found.layout.data_parallel_size == 2
    assert [(p.student, p.teacher) for p in found.layout.pairs] == [(0, 0), (1, 2), (2, 4), (3, 6)]
    assert found.layout.student.extent.layers_per_stage == (2, 2)
    assert found.layout.teacher.extent.layers_per_stage == (4, 3)
    assert (found.layout.student.padded_vocab_size, found.layout.teacher.padded_vocab_size) == (
        100,
        100,
    )
    assert found.layout.student.extent.lm_head
    assert not found.layout.teacher.extent.lm_head
    assert found.layout.num_running_layers == 4
    assert found.layout.max_sequence_length == 64 + 12


@pytest.mark.parametrize(
    ("overrides", "running", "student_norm_trains", "teacher_norm"),
    [
        ([], 4, True, True),
        (["taps.last_layer=pre_norm"], 4, False, False),
        (["taps.layers=even"], 3, False, False),
        # The student's last layer is matched with a layer in the middle of the teacher.
        (["taps.layers=last", "taps.layer_map=[3]"], 4, True, False),
        (["taps.layers=[1]", "taps.layer_map=[6]"], 2, False, True),
    ],
)
def test_final_norms(
    pair: Path, overrides: list[str], running: int, student_norm_trains: bool, teacher_norm: bool
) -> None:
    found = plan(pair, *overrides)
    assert found.layout.num_running_layers == running
    assert found.layout.trains_final_norm == student_norm_trains
    assert found.layout.teacher.extent.final_norm == teacher_norm
    assert found.layout.student.extent.final_norm, "it is exported, run or not"
    assert (
        sum(found.layout.teacher.extent.layers_per_stage)
        == max(p.teacher for p in found.layout.pairs) + 1
    )


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ([TP2], 3, r"3 processes .*tensor_model_parallel_size = 2 x .* = 1; .* multiple of 2"),
        ([TP2, PP2], 2, r"2 processes .* start a multiple of 4"),
        ([TP3], 3, r"tensor_model_parallel_size = 3 .* 4 attention heads of model\.student"),
        ([PP5], 5, r"pipeline_model_parallel_size .* 5 pipeline stages.* 4 layers"),
        (
            [PP2, "parallel.num_layers_per_stage=[1,2]"],
            2,
            r"num_layers_per_stage = \[1, 2\] has 3 .* 4",
        ),
        (
            ["rollout.prompts_per_step=3", "rollout.samples_per_prompt=1"],
            2,
            r"prompts_per_step = 3 x rollout\.samples_per_prompt = 1 gives 3 .* multiple of 2",
        ),
        (
            ["rollout.prompts_per_step=1", "rollout.samples_per_prompt=1"],
            2,
            r"gives 1 sequences .* 2 data-parallel replicas need a multiple of 2",
        ),
        (
            [PP2, VPP2, "rollout.prompts_per_step=3"],
            4,
            r"gives 6 .* 2 data-parallel replicas of 2 interleaved stages need a multiple of 4",
        ),
        (
            [PP2, "taps.layers=[0,1]", "parallel.num_layers_per_stage=[2,2]"],
            2,
            r"pipeline rank 1 would have nothing to train: .* student layer 1, .* layer is 2",
        ),
        (["taps.layers=[0,4]"], 1, r"taps\.layers has 4; the student's layers are 0 to 3"),
        (["taps.layer_map=[0,1,2]"], 1, r"taps\.layer_map has 3 teacher layers"),
        (["taps.layer_map=[0,1,2,7]"], 1, r"taps\.layer_map has 7; the teacher's .* 0 to 6"),
        (
            [PP2, "taps.layer_map=[6,4,2,0]"],
            2,
            r"taps\.layer_map: student layer 3 .* teacher layer 0, but student layer 0 .* layer 6",
        ),
        (
            ["data.max_prompt_tokens=250", "rollout.max_new_tokens=7"],
            1,
            r"data\.max_prompt_tokens = 250 and rollout\.max_new_tokens = 7 .* 257 tokens, .*"
            r"model\.student .* 256 \(max_position_embeddings\)",
        ),
        (["data.prompts=[none.jsonl]"], 1, r"data\.prompts: none\.jsonl does not exist"),
        (["data.prompt_key=question"], 1, r"data\.prompt_key is 'question'.*'prompt'"),
        (["model.student=nowhere"], 1, r"nowhere: it does not exist"),
    ],
)
def test_refusals(pair: Path, overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        plan(pair, *overrides, world_size=world_size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([TP2], 2),
        ([TP2, PP2], 8),
        ([PP2, VPP2, "rollout.prompts_per_step=2"], 4),
        ([PP2, "taps.layers=[0,1]"], 2),
        (["taps.layer_map=[6,4,2,0]"], 1),
        (["data.max_prompt_tokens=250", "rollout.max_new_tokens=6"], 1),
    ],
)
def test_allowed_at_the_edge(pair: Path, overrides: list[str], world_size: int) -> None:
    plan(pair, *overrides, world_size=world_size)


@pytest.fixture(scope="module")
def moe_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and teacher with 8 experts of width 24 in each layer."""
    return save_pair(tmp_path_factory.mktemp("plan") / "moe_pair", "qwen3_moe")


EP2, EP3 = (f"parallel.expert_model_parallel_size={ep}" for ep in (2, 3))
ETP1, ETP16 = (f"parallel.expert_tensor_parallel_size={etp}" for etp in (1, 16))
SP = "parallel.sequence_parallel=true"


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ([EP2], 3, r"3 processes .* share the experts, of .*expert_tensor_parallel_size = 1 x"),
        ([TP2, SP, PP2, EP2], 4, r"4 processes .* = 2 x .* = 2 x .* = 2; start a multiple of 8"),
        (
            [EP3],
            3,
            r"expert_model_parallel_size = 3 does not divide the 8 experts of model\.student",
        ),
        ([ETP16], 16, r"expert_tensor_parallel_size = 16 .* 24 feed-forward width of each expert"),
        (
            [TP2],
            2,
            r"parallel\.sequence_parallel = true, because model\.student has a mixture of experts",
        ),
    ],
)
def test_refusals_of_experts(
    moe_pair: Path, overrides: list[str], world_size: int, message: str
) -> None:
    overrides = [*overrides, "rollout.prompts_per_step=48"]
    with pytest.raises(UserError, match=message) as error:
        plan(moe_pair, *overrides, world_size=world_size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", [EP2, ETP1])
def test_experts_of_dense_models(pair: Path, override: str) -> None:
    name = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"{name} = \d, but neither .* mixture of experts"):
        plan(pair, override, world_size=2)


def test_layouts_of_experts_that_are_allowed(pair: Path, moe_pair: Path) -> None:
    assert plan(moe_pair, TP2, SP, EP2, ETP1, world_size=2).layout.data_parallel_size == 1
    assert plan(moe_pair, EP2, world_size=4).layout.data_parallel_size == 4
    # The dense width, 64, has nothing to do with experts.
    assert plan(moe_pair, ETP1, EP2, world_size=2).layout.teacher.architecture.moe is not None
    # One of the two models is enough, and the teacher needs no sequence parallelism.
    teacher = f"model.teacher={moe_pair / 'teacher'}"
    assert plan(pair, teacher, TP2, EP2, ETP1, world_size=2).layout.student.architecture.moe is None


def test_unequal_width_names_the_bridge(pair: Path, tmp_path: Path) -> None:
    wide = changed(pair, tmp_path, "teacher", hidden_size=64)
    with pytest.raises(UserError, match=r"student is 32 wide .*model\.teacher 64, .*OPRD-Bridge"):
        plan(pair, wide)


L2 = "loss.normalize=l2"


def test_a_bridge_allows_unequal_width(pair: Path, tmp_path: Path) -> None:
    wider = save_pair(tmp_path / "pair", "llama", teacher_fields={"hidden_size": 48})
    save_random_bridge(tmp_path / "bridge", wider, rank=6)
    bridge = f"bridge.path={tmp_path / 'bridge'}"
    with pytest.raises(UserError, match=r"student is 32 wide .*model\.teacher 48"):
        plan(wider)
    assert plan(wider, bridge, L2).layout.bridge_rank == 6
    with pytest.raises(UserError, match=r"as teacher, of num_layers = 4; .* has 7"):
        plan(pair, bridge, L2)
    with pytest.raises(UserError, match=r"bridge\.rank = 7 .* 2 and 6"):
        plan(wider, bridge, L2, "bridge.rank=7")


def test_a_projector_that_trains_allows_unequal_width(pair: Path, tmp_path: Path) -> None:
    wider = save_pair(tmp_path / "pair", "llama", teacher_fields={"hidden_size": 48})
    found = plan(wider, "bridge.trainable=linear")
    assert found.layout.target_bytes_per_row == 4 * 48 * 4
    # (32 + 1) x 48 for each layer.
    assert describe(found).endswith("projectors that train: linear, 4 of 1584 parameters")
    extra = f"extra_teachers=[{{model: {wider / 'teacher'}}}]"
    with pytest.raises(UserError, match=r"extra_teachers\[0\], .*student is 32 wide"):
        plan(pair, "bridge.trainable=linear", extra)


def test_what_a_plan_with_a_bridge_holds(pair: Path, tmp_path: Path) -> None:
    """Four layers; both of a stage keep r fp32 numbers of a position."""
    save_random_bridge(tmp_path / "bridge", pair, rank=6)
    bridge = f"bridge.path={tmp_path / 'bridge'}"
    found = plan(pair, bridge, L2, PP2, world_size=2)
    assert found.teachers[0].bridge is not None
    assert found.layout.bridge_rank == 6
    assert [(p.student, p.teacher) for p in found.layout.pairs_of_rank(1)] == [(2, 4), (3, 6)]
    assert found.layout.target_bytes_per_row == 2 * 6 * 4
    assert plan(pair, bridge, L2, "bridge.rank=4").layout.target_bytes_per_row == 4 * 4 * 4
    assert plan(pair).layout.target_bytes_per_row == 4 * 32 * 4
    assert describe(found).endswith(f"bridge {tmp_path / 'bridge'}: 6 numbers of each state")


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_both_models_are_checked(pair: Path, tmp_path: Path, which: str) -> None:
    """What does not fit is found in either model, and the message says in which."""
    narrow = changed(pair, tmp_path / "ffn", which, intermediate_size=63)
    with pytest.raises(UserError, match=rf"= 2 .* 63 feed-forward width of model\.{which}"):
        plan(pair, narrow, TP2, world_size=2)
    short = changed(pair, tmp_path / "short", which, max_position_embeddings=64)
    with pytest.raises(UserError, match=rf"76 tokens, .*model\.{which} .* 64"):
        plan(pair, short)
    shallow = changed(pair, tmp_path / "shallow", which, num_hidden_layers=3)
    with pytest.raises(UserError, match=rf"shallow/{which} .*left over: model\.layers\.3\."):
        plan(pair, shallow)
    refused = changed(pair, tmp_path / "act", which, hidden_act="gelu")
    with pytest.raises(UserError, match=rf"act/{which}/config\.json .*hidden_act = 'gelu'"):
        plan(pair, refused)


def test_different_tokenizers(pair: Path, tmp_path: Path) -> None:
    other = changed(pair, tmp_path, "teacher")
    tiny_tokenizer(90).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"tokenizers .* differ: token id 90"):
        plan(pair, other)


def test_description(pair: Path, tmp_path: Path) -> None:
    found = plan(pair, PP2, VPP2, "taps.layers=[0,1,2]", "optimizer.lr=3.0e-6", world_size=4)
    configuration, layer_map, stages = describe(found).split("\n\n# ")
    heading, _, text = configuration.partition("\n")
    assert heading == "# configuration"
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(tmp_path / "again.yaml") == found.config
    assert layer_map.splitlines() == [
        "layer map, 0-based: student layer -> teacher layer (3 of 4 student layers)",
        "0 -> 0, 1 -> 2, 2 -> 4",
    ]
    assert stages.splitlines() == [
        "pipeline stages (2 data-parallel replicas)",
        "rank 0, chunk 0: student layer 0; teacher layer 0",
        "rank 1, chunk 0: student layer 1; teacher layers 1-2",
        "rank 0, chunk 1: student layer 2; teacher layers 3-4",
        "rank 1, chunk 1: student layer 3; teacher no layers",
        "student: 1 layers past the deepest tap and the LM head are frozen and not run; "
        "teacher: 2 layers and the LM head are not built",
    ]


def test_description_of_the_check_of_logprobs(pair: Path) -> None:
    found = describe(plan(pair, "rollout.logprob_check_interval=7"))
    assert found.endswith(
        "every 7 steps the whole student, LM head included, runs forward once more, to compare its "
        "log-probabilities with the rollout engine's"
    )


def test_description_without_a_pipeline(pair: Path) -> None:
    stages = describe(plan(pair)).split("\n\n# ")[2].splitlines()
    assert stages[1] == "rank 0: student layers 0-3; teacher layers 0-6"
    assert stages[2].startswith("student: 0 layers past the deepest tap")
    assert stages[2].endswith("teacher: 0 layers and the LM head are not built")


def test_embedding_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", "llama", teacher_vocab_size=90)
    with pytest.raises(UserError, match=r"model\.teacher has an embedding of 90 rows.* 97"):
        plan(pair)


def test_export_folder_that_cannot_be_replaced(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"student.* is not empty"):
        plan(pair, f"output_dir={tmp_path}")


def test_pipeline_rank_that_trains_nothing(pair: Path) -> None:
    shallow = ["taps.layers=[0,1]", "parallel.num_layers_per_stage=[2,2]"]
    with pytest.raises(
        UserError, match=r"pipeline rank 1 would have nothing to train.*taps\.layers"
    ):
        plan(pair, PP2, *shallow, world_size=2)


def test_output_dir_below_a_file(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir = .*file/run .*file is not a folder"):
        plan(pair, f"output_dir={tmp_path / 'file' / 'run'}")


def test_student_without_end_of_sequence(pair: Path, tmp_path: Path) -> None:
    student = changed(pair, tmp_path, "student")
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        file = tmp_path / "student" / name
        settings = json.loads(file.read_text())
        settings.pop("eos_token_id", None)
        settings.pop("eos_token", None)
        file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="end-of-sequence"):
        plan(pair, student)


def test_benchmarks_are_read_and_checked_before_the_run(pair: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "sums.jsonl", [row("1+1", "2"), row("2+2", "4")])
    overrides = ["evaluation.interval=1", f"evaluation.data=[{file}]"]
    (benchmark,) = plan(pair, *overrides, "evaluation.max_new_tokens=9").benchmarks
    assert [problem.answer for problem in benchmark.problems] == ["2", "4"]
    assert plan(pair).benchmarks == []
    message = r"evaluation\.max_new_tokens = 300 .* sums .*256 tokens"
    with pytest.raises(UserError, match=message):
        plan(pair, *overrides, "evaluation.max_new_tokens=300")
    with pytest.raises(UserError, match=r"evaluation\.data: .*none\.jsonl does not exist"):
        plan(pair, "evaluation.interval=1", f"evaluation.data=[{tmp_path}/none.jsonl]")


def test_the_description_has_each_models_division_of_experts(tmp_path: Path) -> None:
    moe = save_pair(tmp_path / "moe", "qwen3_moe")
    found = describe(plan(moe, "teacher.expert_model_parallel_size=4", world_size=4))
    assert "student: 8 experts a layer, 8 of them on each of 1 ranks, each over 1 ranks" in found
    assert "teacher: 8 experts a layer, 2 of them on each of 4 ranks, each over 1 ranks" in found
