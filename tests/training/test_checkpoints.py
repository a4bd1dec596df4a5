"""A checkpoint of any layout goes on in any other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oprd.models.open_checkpoint import open_checkpoint
from megatron_oprd.training.checkpoints import read_manifest, whole_checkpoints
from megatron_oprd.weights.expert_parts import Stacked, has_parts
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.closeness import assert_close_relative
from tests.helpers.pairs import LINEAR_UPDATES, save_pair
from tests.helpers.ranks import run_ranks
from tests.helpers.selection import cases, selected

TP2_SP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
TP4_SP = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2", "batch.micro_batch_size=2"]
PLAIN_OPTIMIZER = ["optimizer.use_distributed_optimizer=false"]
# Layers past the deepest tap have no optimizer states.
SHALLOW = ["taps.layers=[0,2]"]
# All layers and the LM head train; a tied head has a copy on the last stage.
OUTPUT = ["output_loss.kind=reverse_kl"]
EP2 = ["parallel.expert_model_parallel_size=2"]
BF16 = ["model.params_dtype=bf16"]
THREES = ["rollout.prompts_per_step=12", "rollout.samples_per_prompt=1"]
PROJECTOR = ["bridge.trainable=mlp", "bridge.hidden_size=20", "bridge.lr_mult=3"]
ETP1 = ["parallel.expert_tensor_parallel_size=1"]

# name: (ranks, overrides); each saves after one step and goes on for another.
SAVERS = {
    "one": (1, []),
    "one_plain_optimizer": (1, PLAIN_OPTIMIZER),
    "tp2_sp": (2, TP2_SP),
    "vpp2": (2, VPP2),
    "dp2": (2, []),
    "dp2_pp2": (4, PP2),
    "shallow": (1, SHALLOW),
    "shallow_pp2": (2, [*PP2, *SHALLOW]),
    "output_one": (1, OUTPUT),
    "output_tp2_sp_pp2": (4, [*TP2_SP, *PP2, *OUTPUT]),
    "output_tied_one": (1, OUTPUT),
    "output_tied_vpp2": (2, [*VPP2, *OUTPUT]),
    "output_tied_dp2_pp2": (4, [*PP2, *OUTPUT]),
    "moe_one": (1, []),
    "moe_ep2": (2, EP2),
    "moe_ep2_plain_optimizer": (2, [*EP2, *PLAIN_OPTIMIZER]),
    "moe_tp2_sp": (2, TP2_SP),
    "moe_ep2_vpp2": (4, [*EP2, *VPP2]),
    "moe_dp2_ep2": (4, EP2),
    "sinks_one": (1, []),
    "sinks_tp2_sp": (2, [*TP2_SP, *ETP1]),
    "latent_one": (1, []),
    "latent_tp2_sp": (2, [*TP2_SP, *ETP1]),
    "linear_one": (1, []),
    "linear_tp2_sp": (2, TP2_SP),
    "linear_ep2_vpp2": (4, [*EP2, *VPP2]),
    "projector_one": (1, PROJECTOR),
    "projector_tp2_sp": (2, [*TP2_SP, *PROJECTOR]),
    "projector_dp2": (2, PROJECTOR),
    # Widths that are no multiples of 64, so that buckets are padded; B has several of them.
    "odd_tied_one": (1, OUTPUT),
    "odd_tied_pp2": (2, [*PP2, *OUTPUT]),
    "odd_tied_dp3_B": (3, OUTPUT),
    "odd_tied_dp2_pp2_B": (4, [*PP2, *OUTPUT]),
    "odd_one": (1, []),
    "odd_tp2_sp_B": (2, TP2_SP),
    "odd_dp3_B": (3, []),
    "odd_dp2_vpp2_B": (4, VPP2),
    "odd_bf16_one": (1, BF16),
    "odd_bf16_dp3_B": (3, BF16),
}
# name: (ranks, overrides, whose checkpoint)
LOADERS = {
    "one_from_one": (1, [], "one"),
    "one_from_plain": (1, PLAIN_OPTIMIZER, "one_plain_optimizer"),
    "dp2_from_plain": (2, [], "one_plain_optimizer"),
    "plain_pp2_from_dp2": (2, [*PP2, *PLAIN_OPTIMIZER], "dp2"),
    "one_from_tp2_sp": (1, [], "tp2_sp"),
    "one_from_vpp2": (1, [], "vpp2"),
    "one_from_dp2_pp2": (1, [], "dp2_pp2"),
    "tp2_sp_from_vpp2": (2, TP2_SP, "vpp2"),
    "vpp2_from_one": (2, VPP2, "one"),
    "vpp2_from_vpp2": (2, VPP2, "vpp2"),
    "dp2_from_one": (2, [], "one"),
    "dp2_from_dp2": (2, [], "dp2"),
    "dp2_tp2_from_one": (4, TP2_SP, "one"),
    "tp2_pp2_from_dp2": (4, [*TP2_SP, *PP2], "dp2"),
    "other_padding_from_one": (1, ["model.make_vocab_size_divisible_by=50"], "one"),
    "shallow_from_shallow_pp2": (1, SHALLOW, "shallow_pp2"),
    "output_one_from_tp2_sp_pp2": (1, OUTPUT, "output_tp2_sp_pp2"),
    "output_tied_one_from_vpp2": (1, OUTPUT, "output_tied_vpp2"),
    "output_tied_pp2_from_one": (2, [*PP2, *OUTPUT], "output_tied_one"),
    "output_tied_tp2_from_dp2_pp2": (2, [*TP2_SP, *OUTPUT], "output_tied_dp2_pp2"),
    "moe_one_from_ep2": (1, [], "moe_ep2"),
    "moe_ep2_from_ep2": (2, EP2, "moe_ep2"),
    "moe_ep2_from_one": (2, EP2, "moe_one"),
    "moe_ep2_from_plain": (2, [*EP2, *PLAIN_OPTIMIZER], "moe_ep2_plain_optimizer"),
    "moe_tp2_sp_etp1_from_ep2_vpp2": (2, [*TP2_SP, *ETP1], "moe_ep2_vpp2"),
    "moe_tp2_sp_ep2_from_dp2_ep2": (4, [*TP2_SP, *EP2], "moe_dp2_ep2"),
    "moe_ep2_pp2_from_tp2_sp": (4, [*EP2, *PP2], "moe_tp2_sp"),
    "sinks_one_from_tp2_sp": (1, [], "sinks_tp2_sp"),
    "latent_pp2_from_tp2_sp": (2, PP2, "latent_tp2_sp"),
    "linear_pp2_from_tp2_sp": (2, PP2, "linear_tp2_sp"),
    # More ranks than the two key heads of the layer with attention.
    "linear_tp4_sp_from_ep2_vpp2": (4, TP4_SP, "linear_ep2_vpp2"),
    "projector_one_from_tp2_sp": (1, PROJECTOR, "projector_tp2_sp"),
    "projector_pp2_from_dp2": (2, [*PP2, *PROJECTOR], "projector_dp2"),
    "projector_tp2_sp_from_dp2": (2, [*TP2_SP, *PROJECTOR], "projector_dp2"),
    "odd_tied_dp2_from_pp2": (2, OUTPUT, "odd_tied_pp2"),
    "odd_tied_dp2_B_from_pp2": (2, OUTPUT, "odd_tied_pp2"),
    "odd_tied_one_from_dp3_B": (1, OUTPUT, "odd_tied_dp3_B"),
    "odd_tied_pp2_from_dp3_B": (2, [*PP2, *OUTPUT], "odd_tied_dp3_B"),
    "odd_tied_dp3_B_from_dp2_pp2_B": (3, OUTPUT, "odd_tied_dp2_pp2_B"),
    "odd_tied_dp3_from_one": (3, OUTPUT, "odd_tied_one"),
    "odd_tied_tp2_pp2_B_from_dp3_B": (4, [*TP2_SP, *PP2, *OUTPUT], "odd_tied_dp3_B"),
    "odd_tied_dp4_B_from_pp2": (4, OUTPUT, "odd_tied_pp2"),
    "odd_dp2_B_from_tp2_sp_B": (2, [], "odd_tp2_sp_B"),
    "odd_dp3_B_from_tp2_sp_B": (3, [], "odd_tp2_sp_B"),
    "odd_one_from_dp2_vpp2_B": (1, [], "odd_dp2_vpp2_B"),
    "odd_dp3_from_dp3_B": (3, [], "odd_dp3_B"),
    "odd_tp2_sp_B_from_dp3_B": (2, TP2_SP, "odd_dp3_B"),
    "odd_dp2_vpp2_from_dp3_B": (4, VPP2, "odd_dp3_B"),
    "odd_bf16_dp2_B_from_dp3_B": (2, BF16, "odd_bf16_dp3_B"),
    "odd_bf16_plain_from_dp3_B": (1, [*BF16, *PLAIN_OPTIMIZER], "odd_bf16_dp3_B"),
    "odd_bf16_tp2_sp_B_from_dp3_B": (2, [*TP2_SP, *BF16], "odd_bf16_dp3_B"),
}
# Cases that resemble others; `make test-nightly` runs them.
NIGHTLY = {
    *("dp2_pp2", "one_from_dp2_pp2", "odd_dp3_B"),
    *("dp2_from_plain", "one_from_vpp2", "vpp2_from_one", "dp2_from_one", "dp2_tp2_from_one"),
    *("output_tied_vpp2", "output_tied_one_from_vpp2"),
    *("moe_tp2_sp", "moe_one_from_ep2", "moe_ep2_from_one", "moe_ep2_pp2_from_tp2_sp"),
    *("projector_tp2_sp_from_dp2", "sinks_one", "sinks_tp2_sp", "sinks_one_from_tp2_sp"),
    *("latent_one", "latent_tp2_sp", "latent_pp2_from_tp2_sp"),
    *("linear_one", "linear_ep2_vpp2", "linear_tp4_sp_from_ep2_vpp2"),
    *("linear_tp2_sp", "linear_pp2_from_tp2_sp"),
    *("odd_tied_dp2_from_pp2", "odd_tied_one_from_dp3_B", "odd_tied_pp2_from_dp3_B"),
    *("odd_tied_dp3_from_one", "odd_tied_dp4_B_from_pp2"),
    *("plain_pp2_from_dp2", "output_tied_pp2_from_one"),
    *(
        "moe_dp2_ep2",
        "moe_tp2_sp_ep2_from_dp2_ep2",
        "moe_ep2_plain_optimizer",
        "moe_ep2_from_plain",
    ),
    *("odd_tied_pp2", "odd_tied_dp2_B_from_pp2", "odd_tied_tp2_pp2_B_from_dp3_B"),
    *("odd_dp2_vpp2_B", "odd_dp2_vpp2_from_dp3_B"),
    *("odd_dp2_B_from_tp2_sp_B", "odd_one_from_dp2_vpp2_B", "odd_dp3_from_dp3_B"),
    *(
        "one_plain_optimizer",
        "one_from_plain",
        "vpp2_from_vpp2",
        "dp2_from_dp2",
        "moe_ep2_from_ep2",
    ),
    *("projector_tp2_sp", "projector_one_from_tp2_sp", "output_one", "odd_tied_dp3_B"),
    *("output_tp2_sp_pp2", "output_one_from_tp2_sp_pp2", "odd_tp2_sp_B", "odd_dp3_B_from_tp2_sp_B"),
    *("odd_tp2_sp_B_from_dp3_B", "odd_bf16_plain_from_dp3_B", "odd_bf16_tp2_sp_B_from_dp3_B"),
}
REFERENCE = {"shallow_from_shallow_pp2": "shallow", "shallow_pp2": "shallow", "shallow": "shallow"}
KINDS = (
    *("moe", "sinks", "latent", "linear", "output", "output_tied"),
    *("odd", "odd_tied", "odd_bf16", "projector"),
)
for kind in KINDS:
    of_kind = [name for name in (*SAVERS, *LOADERS) if name.startswith(f"{kind}_")]
    REFERENCE |= dict.fromkeys(of_kind, f"{kind}_one")


def needed(request: pytest.FixtureRequest) -> set[str]:
    """The cases that the selected tests look at, those they load from and compare with."""
    found = {"one"} | selected(request)
    found |= {LOADERS[name][2] for name in found if name in LOADERS}
    return found | {REFERENCE.get(name, "one") for name in found}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = needed(request)
    root = tmp_path_factory.mktemp("checkpoints")
    dense = str(save_pair(root / "pair", "qwen3"))
    moe = str(save_pair(root / "moe_pair", "qwen3_moe"))
    sinks = str(save_pair(root / "sinks_pair", "gpt_oss"))
    latent = str(save_pair(root / "latent_pair", "deepseek_v3"))
    # The epsilon is that of the test of layouts, which says why.
    linear = str(save_pair(root / "linear_pair", "qwen3_next", rms_norm_eps=0.01))
    tied = str(save_pair(root / "tied_pair", "llama", tied=True))
    sizes: dict[str, Any] = {"hidden_size": 40, "intermediate_size": 72, "head_dim": 12}
    odd = str(save_pair(root / "odd_pair", "qwen3", **sizes))
    odd_tied = str(save_pair(root / "odd_tied_pair", "qwen3", tied=True, **sizes))
    pairs = {
        "odd_tied_": odd_tied,
        "odd_": odd,
        "moe_": moe,
        "sinks_": sinks,
        "latent_": latent,
        "linear_": linear,
        "output_tied_": tied,
        "": dense,
    }

    def case(name: str, overrides: list[str], load: str | None, steps: int) -> dict[str, Any]:
        return {
            "name": name,
            "pair": next(pair for start, pair in pairs.items() if name.startswith(start)),
            "overrides": [*LINEAR_UPDATES, *overrides, *(THREES if name.startswith("odd") else [])],
            "load": load,
            "steps": steps,
            "bucket_size": 3000 if "_B" in name.split("_from_")[0] else None,
            "count": 12 if name.startswith("odd") else 8,
        }

    for ranks in (1, 2, 3, 4):
        savers = [case(n, o, None, 2) for n, (r, o) in SAVERS.items() if r == ranks and n in wanted]
        run_ranks("checkpoint", savers, ranks, root)
    for ranks in (1, 2, 3, 4):
        loaders = [
            case(n, o, s, 1) for n, (r, o, s) in LOADERS.items() if r == ranks and n in wanted
        ]
        run_ranks("checkpoint", loaders, ranks, root)
    return root


@pytest.mark.parametrize("name", cases([*SAVERS, *LOADERS], nightly=NIGHTLY))
def test_goes_on_as_if_never_stopped(results: Path, name: str) -> None:
    found = torch.load(results / f"{name}.pt")
    expected = torch.load(results / f"{REFERENCE.get(name, 'one')}.pt")
    assert found["lr"] == expected["lr"]
    if "bf16" in name:
        return  # a layout's rounding moves bf16 gradients by more than a step's share
    for key, tensor in expected["weights"].items():
        assert_close_relative(found["weights"][key], tensor, 1e-5, what=key)


@pytest.mark.parametrize("name", cases(LOADERS, nightly=NIGHTLY))
def test_states_are_those_that_were_saved(results: Path, name: str) -> None:
    """Main parameters and both moments, element by element: a layout only moves them."""
    found = torch.load(results / f"{name}.pt")["loaded"]
    expected = torch.load(results / f"{LOADERS[name][2]}.pt")["saved"]
    for state, tensors in expected.items():
        assert found[state].keys() == tensors.keys()
        assert any(tensor.any() for tensor in tensors.values()), state
        for key, tensor in tensors.items():
            assert torch.equal(found[state][key], tensor), (state, key)


@pytest.mark.parametrize(
    ("loader", "saver"),
    [
        ("one_from_one", "one"),
        ("one_from_plain", "one_plain_optimizer"),
        ("vpp2_from_vpp2", "vpp2"),
        ("dp2_from_dp2", "dp2"),
        ("moe_ep2_from_ep2", "moe_ep2"),
        ("moe_ep2_from_plain", "moe_ep2_plain_optimizer"),
    ],
)
def test_same_layout_is_bitwise(results: Path, loader: str, saver: str) -> None:
    found = torch.load(results / f"{loader}.pt")["weights"]
    for key, tensor in torch.load(results / f"{saver}.pt")["weights"].items():
        assert torch.equal(found[key], tensor), key


def test_second_step_changes_weights(results: Path) -> None:
    """Otherwise the comparisons above would compare the checkpoint with itself."""
    before = HFCheckpoint(results / "pair" / "student")
    after = torch.load(results / "one.pt")["weights"]
    assert not torch.equal(after["model.norm.weight"], before.read("model.norm.weight"))


@pytest.mark.parametrize("name", cases(SAVERS, nightly=NIGHTLY))
def test_a_checkpoint_is_read_as_the_students_weights(results: Path, name: str) -> None:
    """Without a process group, from beside the optimizer's states."""
    opened = open_checkpoint(results / name)
    opened.check_tensors()
    expected = torch.load(results / f"{name}_saved.pt")
    source = Stacked(opened.source) if has_parts(opened.table) else opened.source
    assert source.names() == list(expected)
    for tensor, values in expected.items():
        assert torch.equal(source.read(tensor), values), tensor


def test_checkpoint_carries_hugging_face_files(results: Path) -> None:
    (checkpoint,) = whole_checkpoints(results / "vpp2")
    manifest = read_manifest(checkpoint)
    assert manifest["step"] == 1
    assert manifest["format"] == "torch_dist"
    assert manifest["student"]["family"] == "Qwen3ForCausalLM"
    assert manifest["layout"]["virtual_pipeline_model_parallel_size"] == 2
    source = results / "pair" / "student"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (checkpoint / "hf" / name).read_bytes() == (source / name).read_bytes()
