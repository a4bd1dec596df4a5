"""The published configurations of large models, built for every rank without any weight.

tests/models/configs has the files as published; Phi-4-mini-reasoning's is that of
Phi-4-mini-instruct, of which it is a fine-tuned version.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from megatron_oprd.config.schema import ParallelConfig, RunConfig
from megatron_oprd.errors import UserError
from megatron_oprd.models.architecture import Architecture
from megatron_oprd.models.families import mapping_table, read_architecture
from megatron_oprd.parallel.layout import ParallelLayout
from megatron_oprd.training.layout import make_layout
from megatron_oprd.weights.expert_parts import stored_shapes
from megatron_oprd.weights.hf_files import HFFolder
from megatron_oprd.weights.mapping import Index, Mapping, Shape
from tests.helpers.ranks import run_ranks

CONFIGS = Path(__file__).parent / "configs"
# Parameters as the models' pages state them; a tied head is not counted again.
PARAMETERS = {
    "DeepSeek-R1-0528-Qwen3-8B": 8_190_735_360,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    # Computed from the configuration by hand.
    "DeepSeek-V3": 671_026_419_200,
    "EXAONE-4.0-32B": 32_003_216_384,
    "GLM-4.5-Air": 106_852_251_264,
    # Computed from the configuration by hand, without the layer that predicts further tokens.
    "GLM-4.6": 352_797_829_024,
    "GLM-4-32B-0414": 32_566_081_536,
    "Kimi-K2-Instruct": 1_026_408_232_448,
    "Llama-3.1-70B-Instruct": 70_553_706_496,
    # This and the next two were computed from the configurations by hand.
    "MiniMax-M2": 228_689_764_864,
    # The decoders.
    "Ministral-3-8B-Base-2512": 8_489_553_920,
    "Mistral-Small-3.1-24B-Instruct-2503": 23_572_403_200,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "OLMo-2-0325-32B-Instruct": 32_234_279_936,
    "Olmo-3-32B-Think": 32_233_522_176,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-4-mini-reasoning": 3_836_021_760,
    "Qwen2-57B-A14B-Instruct": 57_408_658_944,
    "Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-Coder-30B-A3B-Instruct": 30_532_122_624,
    # Computed from the configuration by hand, without the layer that predicts further tokens.
    "Qwen3-Next-80B-A3B-Instruct": 79_674_391_296,
    # The decoders, computed from the configurations by hand.
    "Qwen3.5-27B": 26_895_998_464,
    "Qwen3.5-35B-A3B": 34_660_610_688,
    "Seed-OSS-36B-Instruct": 36_151_104_512,
    "SmolLM3-3B": 3_075_098_624,
    "granite-3.3-8b-instruct": 8_170_864_640,
    "gemma-2-27b-it": 27_227_128_320,
    "gemma-3-27b-it": 27_009_346_304,  # the decoder
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
}
WORLD_SIZE = 32
MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model on 32 ranks; expert-tensor parallelism is 1 where it is not named."""

    model: str
    layers: tuple[int, ...]
    tp: int = 8
    ep: int = 1
    etp: int | None = None


LAYOUTS = {
    # 12 query heads do not divide into 8 ranks; 2 key/value heads are fewer than 4 ranks.
    "deepseek_1.5b": Layout(model="DeepSeek-R1-Distill-Qwen-1.5B", layers=(7,) * 4, tp=4),
    # YaRN.
    "deepseek_8b": Layout(model="DeepSeek-R1-0528-Qwen3-8B", layers=(9,) * 4),
    # Latent attention; groups of experts.
    "deepseek_v3": Layout(model="DeepSeek-V3", layers=(16, 15, 15, 15), ep=8, etp=1),
    "exaone_32b": Layout(model="EXAONE-4.0-32B", layers=(16,) * 4),
    # The first layer has no experts.
    "glm_4.5_air": Layout(model="GLM-4.5-Air", layers=(11, 12, 12, 11), ep=8, etp=1),
    "glm_4.6": Layout(model="GLM-4.6", layers=(23,) * 4, ep=8, etp=1),
    # 2 key/value heads on 8 ranks.
    "glm4_32b": Layout(model="GLM-4-32B-0414", layers=(16, 15, 15, 15)),
    "gemma2_27b": Layout(model="gemma-2-27b-it", layers=(12, 12, 11, 11)),
    "gemma3_27b": Layout(model="gemma-3-27b-it", layers=(16, 16, 15, 15)),
    "gpt_oss_120b": Layout(model="gpt-oss-120b", layers=(9,) * 4, ep=8, etp=1),
    "gpt_oss_20b": Layout(model="gpt-oss-20b", layers=(6,) * 4, ep=8, etp=1),
    "granite_8b": Layout(model="granite-3.3-8b-instruct", layers=(10,) * 4),
    "kimi_k2": Layout(model="Kimi-K2-Instruct", layers=(16, 15, 15, 15), ep=8, etp=1),
    "llama_70b": Layout(model="Llama-3.1-70B-Instruct", layers=(20,) * 4),
    "minimax_m2": Layout(model="MiniMax-M2", layers=(16, 16, 15, 15), ep=8, etp=1),
    "ministral3_8b": Layout(model="Ministral-3-8B-Base-2512", layers=(9, 9, 8, 8)),
    "mistral_small_24b": Layout(model="Mistral-Small-3.1-24B-Instruct-2503", layers=(10,) * 4),
    "mistral_7b": Layout(model="Mistral-7B-v0.1", layers=(8,) * 4),
    "mixtral_8x7b": Layout(model="Mixtral-8x7B-Instruct-v0.1", layers=(8,) * 4, ep=8, etp=1),
    "olmo2_32b": Layout(model="OLMo-2-0325-32B-Instruct", layers=(16,) * 4),
    "olmo3_32b": Layout(model="Olmo-3-32B-Think", layers=(16,) * 4),
    "phi_3_mini": Layout(model="Phi-3-mini-4k-instruct", layers=(8,) * 4),
    "phi_4_mini": Layout(model="Phi-4-mini-reasoning", layers=(8,) * 4),
    # Uneven stages.
    "qwen3_1.7b": Layout(model="Qwen3-1.7B-Base", layers=(5, 9, 8, 6)),
    "qwen3_32b": Layout(model="Qwen3-32B", layers=(16,) * 4),
    "qwen3_4b": Layout(model="Qwen3-4B", layers=(9,) * 4),
    # 2 key/value heads on 8 ranks, with gates; linear attention of 16 key heads.
    "qwen3_next_80b": Layout(model="Qwen3-Next-80B-A3B-Instruct", layers=(12,) * 4, ep=8, etp=1),
    # Linear attention's projections apart; 4 key/value heads on 8 ranks.
    "qwen3.5_27b": Layout(model="Qwen3.5-27B", layers=(16,) * 4),
    "qwen3.5_35b_a3b": Layout(model="Qwen3.5-35B-A3B", layers=(10,) * 4, ep=8, etp=1),
    "seed_oss_36b": Layout(model="Seed-OSS-36B-Instruct", layers=(16,) * 4),
    "smollm3_3b": Layout(model="SmolLM3-3B", layers=(9,) * 4),
    # 28 query heads do not divide into 8 ranks.
    "qwen2_57b_a14b": Layout(model="Qwen2-57B-A14B-Instruct", layers=(7,) * 4, tp=4, ep=8, etp=1),
    "qwen3_coder_30b": Layout(model="Qwen3-Coder-30B-A3B-Instruct", layers=(12,) * 4, ep=8, etp=1),
    # 4 key/value heads on 8 ranks.
    "qwen3_30b_a3b_ep8": Layout(model="Qwen3-30B-A3B", layers=(12,) * 4, ep=8, etp=1),
    "qwen3_30b_a3b_ep4_etp2": Layout(model="Qwen3-30B-A3B", layers=(12,) * 4, ep=4, etp=2),
}


NIGHTLY = (
    "deepseek_8b",
    "deepseek_v3",
    "exaone_32b",
    "glm_4.6",
    "glm4_32b",
    "gemma2_27b",
    "gemma3_27b",
    "gpt_oss_120b",
    "gpt_oss_20b",
    "granite_8b",
    "kimi_k2",
    "minimax_m2",
    "ministral3_8b",
    "mistral_small_24b",
    "mistral_7b",
    "mixtral_8x7b",
    "olmo2_32b",
    "olmo3_32b",
    "phi_3_mini",
    "phi_4_mini",
    "qwen2_57b_a14b",
    "qwen3_32b",
    "qwen3_4b",
    "qwen3_coder_30b",
    "qwen3_next_80b",
    "qwen3.5_27b",
    "qwen3.5_35b_a3b",
    "seed_oss_36b",
    "smollm3_3b",
)


def folder(root: Path, model: str) -> Path:
    (root / model).mkdir(exist_ok=True)
    (root / model / "config.json").write_text((CONFIGS / f"{model}.json").read_text())
    return root / model


def padded(architecture: Architecture) -> int:
    return -(-architecture.vocab_size // MULTIPLE) * MULTIPLE


def read(root: Path, model: str) -> tuple[Architecture, list[Mapping]]:
    architecture = read_architecture(HFFolder(folder(root, model)))
    return architecture, mapping_table(architecture, padded_vocab_size=padded(architecture))


def transformers_config(root: Path, model: str) -> PretrainedConfig:
    """The configuration of transformers' class: Kimi K2's is a copy under another name."""
    config = json.loads((folder(root, model) / "config.json").read_text())
    if config["model_type"] == "kimi_k2":
        (root / model / "config.json").write_text(
            json.dumps(config | {"model_type": "deepseek_v3"})
        )
    return AutoConfig.from_pretrained(root / model).get_text_config()


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the ranks of the layouts that this run selected."""
    root = tmp_path_factory.mktemp("real")
    selected = {
        item.callspec.params.get("name")
        for item in request.session.items
        if isinstance(item, pytest.Function) and "built" in item.fixturenames
    }
    cases = []
    for name in LAYOUTS.keys() & selected:
        layout = LAYOUTS[name]
        architecture, _ = read(root, layout.model)
        parallel: dict[str, Any] = {
            "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": len(layout.layers),
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.etp,
        }
        cases.append(
            {
                "name": name,
                "folder": str(folder(root, layout.model)),
                "world_size": WORLD_SIZE,
                "parallel": parallel,
                "layers_per_stage": layout.layers,
                "padded_vocab_size": padded(architecture),
            }
        )
    run_ranks("real_models", cases, 1, root)
    return root


def stage_of(parameter: str, layers: Sequence[int]) -> int:
    """The stage that has a Megatron parameter."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", parameter)
    if layer is None:
        return 0 if parameter.startswith("embedding.") else len(layers) - 1
    ends = itertools.accumulate(layers)
    return next(stage for stage, end in enumerate(ends) if int(layer[1]) < end)


@pytest.mark.parametrize(
    "name",
    # The modules of the nightly ones are there in another size or family.
    [pytest.param(name, marks=[pytest.mark.slow] * (name in NIGHTLY)) for name in LAYOUTS],
)
def test_every_rank_has_the_parameters_of_the_table(built: Path, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    _, table = read(tmp_path, layout.model)
    assert set(Counter(mapping.megatron for mapping in table).values()) == {1}
    ranks = torch.load(built / f"{name}.pt")
    assert len(ranks) == WORLD_SIZE
    for rank in ranks:
        place = ParallelLayout(**rank["place"])
        expected = {
            mapping.megatron: mapping.local_shape(mapping.split_at(place)[1])
            for mapping in table
            if stage_of(mapping.megatron, layout.layers) == rank["stage"]
            and mapping.is_held_at(place)
        }
        assert rank["shapes"] == expected
    # Each part of each parameter is on some rank.
    places = [(rank["stage"], ParallelLayout(**rank["place"])) for rank in ranks]
    etp = layout.etp or layout.tp
    sizes = {"tensor_model_parallel_size": layout.tp, "expert_model_parallel_size": layout.ep}
    for _, place in places:
        assert vars(place).items() >= {**sizes, "expert_tensor_parallel_size": etp}.items()
    stages = range(len(layout.layers))
    assert {(stage, place.tp_rank) for stage, place in places} == set(
        itertools.product(stages, range(layout.tp))
    )
    assert {(stage, place.ep_rank, place.etp_rank) for stage, place in places} == set(
        itertools.product(stages, range(layout.ep), range(etp))
    )


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    architecture, _ = read(tmp_path, "DeepSeek-R1-Distill-Qwen-1.5B")
    config = RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4)
    )
    with pytest.raises(
        UserError, match=r"tensor_model_parallel_size = 8 does not divide the 12 attention heads"
    ):
        make_layout(config, student=architecture, teacher=architecture, world_size=WORLD_SIZE)


def is_tiled(shape: Shape, rectangles: Sequence[Index], times: int = 1) -> bool:
    """Whether the rectangles cover every element ``times``; each is cut in one dimension only."""
    cut = next(
        (
            dim
            for dim, size in enumerate(shape)
            if any(rectangle[dim] != slice(0, size) for rectangle in rectangles)
        ),
        0,
    )
    for dim, size in enumerate(shape):
        assert dim == cut or all(rectangle[dim] == slice(0, size) for rectangle in rectangles)
    count = torch.zeros(shape[cut], dtype=torch.int32)
    for rectangle in rectangles:
        assert 0 <= rectangle[cut].start <= rectangle[cut].stop <= shape[cut]
        count[rectangle[cut]] += 1
    return bool((count == times).all())


def check_pieces(mapping: Mapping, size: int) -> None:
    """Every element of both sides is in one piece of one of ``size`` ranks."""
    of_hf: dict[str, list[Index]] = {name: [] for name in mapping.hf}
    for rank in range(size):
        pieces = mapping.pieces(rank, size)
        assert is_tiled(mapping.local_shape(size), [piece.local_index for piece in pieces])
        for piece in pieces:
            if piece.hf is not None:
                of_hf[piece.hf].append(piece.hf_index)
    for name, shape in mapping.hf.items():
        assert is_tiled(shape, of_hf[name], size if mapping.is_replicated else 1), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_consumed_once(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    architecture, table = read(tmp_path, layout.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(tmp_path, layout.model))
    # As transformers writes them: experts are fused in its models, not in its checkpoints.
    tensors = revert_weight_conversion(model, model.state_dict())
    if architecture.tied:
        assert tensors.pop("lm_head.weight").shape == tensors["model.embed_tokens.weight"].shape
    shapes = stored_shapes(table)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(Counter(name for mapping in table for name in mapping.hf).values()) == {1}

    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    # Biases of routers are stored, but no parameters in transformers.
    stored = model.state_dict().keys()
    buffers = sum(one.numel() for name, one in model.named_buffers() if name in stored)
    assert count == model.num_parameters() + buffers == PARAMETERS[layout.model]

    # Mappings that differ in the number of the layer or expert only cut alike: one of them will do.
    kinds: dict[str, Mapping] = {}
    for mapping in table:
        kind = kinds.setdefault(re.sub(r"\.\d+\.", ".*.", mapping.megatron), mapping)
        assert list(mapping.hf.values()) == list(kind.hf.values())
        assert vars(mapping).keys() == vars(kind).keys()
    assert len(kinds) < 30
    for mapping in kinds.values():
        place = ParallelLayout(
            tensor_model_parallel_size=layout.tp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
        check_pieces(mapping, mapping.split_at(place)[1])
