import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Phi3Config,
    PreTrainedModel,
)

from megatron_oprd.data.prompts import Prompt
from megatron_oprd.rollout.engine import Rollout, SamplingParams
from megatron_oprd.rollout.hf import HFEngine
from megatron_oprd.rollout.sampling import StopTexts, stopped_length
from tests.helpers.closeness import assert_close_relative
from tests.helpers.tiny import EOS_ID, PAD_ID, save_tiny_model, tiny_config
from tests.rollout.test_sampling import chi_square

pytestmark = pytest.mark.long

CPU = torch.device("cpu")
COMMON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": PAD_ID}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": tiny_config("llama"),
    "llama3-rope": tiny_config("llama", rope_parameters=LLAMA3_ROPE),
    "qwen2": tiny_config("qwen2"),
    "qwen3": tiny_config("qwen3"),
    "qwen3-tied": tiny_config("qwen3", tie_word_embeddings=True),
    "qwen3-moe": tiny_config("qwen3_moe"),
    "minimax-m2": tiny_config("minimax_m2"),
    "mixtral": tiny_config("mixtral"),
    "deepseek-v3": tiny_config("deepseek_v3"),
    "qwen3-next": tiny_config("qwen3_next"),
    "qwen3.5": tiny_config("qwen3_5_text"),
    "qwen3.5-moe": tiny_config("qwen3_5_moe_text"),
    "glm4-moe": tiny_config("glm4_moe"),
    "phi3": Phi3Config(**COMMON, intermediate_size=64, num_attention_heads=4, eos_token_id=EOS_ID),
}  # fmt: skip
IN_BF16 = ("llama", "qwen3-moe")  # the others nightly
PROMPTS = [
    Prompt(index=index, token_ids=ids)
    for index, ids in [(3, (7, 8, 9, 10, 11, 12)), (0, (20,)), (8, (5, 30, 31)), (5, (40, 41, 5))]
]


def build(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> HFEngine:
    arguments: dict[str, Any] = {
        "eos_token_ids": [EOS_ID],
        "pad_token_id": PAD_ID,
        "known_ids": range(10**4),
        "max_batch_size": None,
    }
    return HFEngine(folder, dtype=dtype, device=CPU, **(arguments | options))


def engine_with_weights(
    folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> HFEngine:
    engine = build(folder, dtype, **options)
    engine.load_weights(load_file(folder / "model.safetensors").items())
    return engine


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def sampling(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 12, "seed": 5} | fields))


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 12 tokens: responses end after few of them."""
    folder = tmp_path_factory.mktemp("small")
    save_tiny_model(folder, tiny_config("qwen3", vocab_size=12, num_hidden_layers=2), seed=1)
    return folder


SMALL_PROMPTS = [
    Prompt(index=index, token_ids=ids)
    for index, ids in [(4, (7, 8, 9, 10)), (2, (3,)), (9, (5, 6, 11)), (1, (6, 6, 7, 8, 3))]
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CONFIGS),
        *(
            pytest.param(name, torch.bfloat16, marks=[pytest.mark.slow] * (name not in IN_BF16))
            for name in CONFIGS
        ),
    ],
)
def test_logits_and_greedy_tokens_equal_from_pretrained(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    save_tiny_model(tmp_path, CONFIGS[name], seed=0)
    engine, model = engine_with_weights(tmp_path, dtype), reference(tmp_path, dtype)
    tokens = torch.tensor([[5, 9, 33, 96, 12, 40]])
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 2**-5
        assert_close_relative(engine.model(tokens).logits, model(tokens).logits, tolerance)
    if dtype != torch.float32:
        return
    rollouts = engine.generate(PROMPTS, sampling(temperature=0))
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert rollout.response_ids == tuple(expected.tolist())
        assert rollout.prompt_ids == prompt.token_ids
        assert rollout.prompt_index == prompt.index
    assert len({rollout.response_ids for rollout in rollouts}) > 1


def test_new_weights_replace_the_old_ones(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("second", 1)):
        save_tiny_model(tmp_path / name, tiny_config("qwen3"), seed=seed)
    greedy = sampling(temperature=0)
    engine = engine_with_weights(tmp_path / "first")
    first = engine.generate(PROMPTS, greedy)
    engine.load_weights(load_file(tmp_path / "second" / "model.safetensors").items())
    second = engine.generate(PROMPTS, greedy)
    assert first != second == engine_with_weights(tmp_path / "second").generate(PROMPTS, greedy)


def test_the_folders_generation_settings_have_no_influence(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_config("llama"), seed=0)
    runs = [sampling(temperature=0), sampling()]
    expected = [engine_with_weights(tmp_path).generate(PROMPTS, run) for run in runs]
    generation = {
        "do_sample": True, "temperature": 0.1, "top_k": 2, "top_p": 0.2, "max_length": 8,
        "repetition_penalty": 9.0, "min_new_tokens": 11, "num_beams": 3, "bad_words_ids": [[5]],
        "suppress_tokens": [7, 8, 9], "eos_token_id": [20, 21, 22], "use_cache": False,
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"repetition_penalty": 9.0, "max_length": 8, "use_cache": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [engine_with_weights(tmp_path).generate(PROMPTS, run) for run in runs] == expected


def by_key(rollouts: Sequence[Rollout]) -> dict[tuple[int, int], Rollout]:
    keyed = {(r.prompt_index, r.sample_index): r for r in rollouts}
    assert len(keyed) == len(rollouts)
    return keyed


def test_rollouts_do_not_depend_on_the_batch(small_vocabulary: Path) -> None:
    engine = engine_with_weights(small_vocabulary)
    params = sampling(samples_per_prompt=3, temperature=0.9, top_p=0.95)
    rollouts = engine.generate(SMALL_PROMPTS, params)
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [
        (p.index, sample) for p in SMALL_PROMPTS for sample in range(3)
    ]
    expected = by_key(rollouts)
    assert len({r.response_ids for r in rollouts}) > 9
    for max_batch_size in (1, 5, 100):
        other = engine_with_weights(small_vocabulary, max_batch_size=max_batch_size)
        assert other.generate(SMALL_PROMPTS, params) == rollouts
        assert by_key(other.generate(SMALL_PROMPTS[::-1], params)) == expected
    halves = [engine.generate(part, params) for part in (SMALL_PROMPTS[:1], SMALL_PROMPTS[1:])]
    assert halves[0] + halves[1] == rollouts
    assert engine.generate(SMALL_PROMPTS, replace(params, seed=6)) != rollouts
    assert engine.generate([], params) == []


def test_responses_end_with_the_first_eos(small_vocabulary: Path) -> None:
    eos = {EOS_ID, 7}
    engine = engine_with_weights(small_vocabulary, eos_token_ids=sorted(eos), pad_token_id=EOS_ID)
    rollouts = engine.generate(SMALL_PROMPTS, sampling(samples_per_prompt=16))
    assert {r.finished for r in rollouts} == {True, False}
    assert {r.response_ids[-1] for r in rollouts if r.finished} == eos
    for rollout in rollouts:
        assert not eos & set(rollout.response_ids[:-1])
        assert rollout.finished == (rollout.response_ids[-1] in eos)
        assert len(rollout.response_ids) <= 12
        assert rollout.finished or len(rollout.response_ids) == 12
    longer = engine.generate(SMALL_PROMPTS, sampling(samples_per_prompt=16, max_new_tokens=20))
    for short, long in zip(rollouts, longer, strict=True):
        assert long.response_ids[: len(short.response_ids)] == short.response_ids
        assert not short.finished or long == short


def test_without_eos_tokens_nothing_ends_a_response(small_vocabulary: Path) -> None:
    # config.json has an eos_token_id, which must not count
    engine = engine_with_weights(small_vocabulary, eos_token_ids=[])
    rollouts = engine.generate(SMALL_PROMPTS, sampling(samples_per_prompt=16))
    assert {(len(r.response_ids), r.finished) for r in rollouts} == {(12, False)}
    after_eos = [
        r.response_ids[r.response_ids.index(EOS_ID) + 1 :]
        for r in rollouts
        if EOS_ID in r.response_ids
    ]
    assert len(after_eos) > 9
    assert len({token for tokens in after_eos for token in tokens}) > 6


def test_generation_caches_and_stops_when_every_response_has_ended(small_vocabulary: Path) -> None:
    engine = engine_with_weights(small_vocabulary)
    widths: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rollouts = engine.generate(SMALL_PROMPTS, sampling(max_new_tokens=200))
    longest = max(len(rollout.response_ids) for rollout in rollouts)
    assert all(rollout.finished for rollout in rollouts)
    assert longest < 200
    assert widths == [5] + [1] * (longest - 1)


def test_first_tokens_follow_the_models_distribution(small_vocabulary: Path) -> None:
    engine, number = engine_with_weights(small_vocabulary), 3000
    prompt = SMALL_PROMPTS[0]
    rollouts = engine.generate(
        [prompt], sampling(temperature=1.3, samples_per_prompt=number, max_new_tokens=1)
    )
    with torch.no_grad():
        logits = reference(small_vocabulary)(torch.tensor([prompt.token_ids])).logits[0, -1]
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=12)
    probabilities = (logits.double() / 1.3).softmax(-1).tolist()
    assert min(probabilities) * number > 5
    # 31.3 is the 99.9% quantile for 11 degrees of freedom
    assert chi_square(counts, probabilities) < 31.3


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_ids_the_tokenizer_lacks_are_never_sampled(
    small_vocabulary: Path, temperature: float
) -> None:
    """Rows that only pad the embedding have no meaning, and the teacher may have fewer of them."""
    one_step = sampling(temperature=temperature, max_new_tokens=8, samples_per_prompt=20)

    def ids(known_ids: set[int]) -> set[int]:
        engine = engine_with_weights(small_vocabulary, known_ids=known_ids, eos_token_ids=[])
        rollouts = engine.generate(SMALL_PROMPTS, one_step)
        return {token for rollout in rollouts for token in rollout.response_ids}

    everything = set(range(12))
    forbidden = {max(ids(everything)), min(ids(everything))}
    assert ids(everything - forbidden)
    assert not ids(everything - forbidden) & forbidden


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
        {"temperature": 2.0, "stop": ("g",)},
    ],
)
def test_logprobs_are_those_of_the_raw_logits(
    small_vocabulary: Path, settings: dict[str, Any]
) -> None:
    """In fp64, over the ids that mean something, whatever the responses are sampled with."""
    known = [token for token in range(12) if token != 8]
    engine = engine_with_weights(small_vocabulary, known_ids=known, decode=letters)
    asked = sampling(samples_per_prompt=4, logprobs=True, **settings)
    rollouts = engine.generate(SMALL_PROMPTS, asked)
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 1
    others = engine.generate(SMALL_PROMPTS, replace(asked, logprobs=False))
    assert others == rollouts
    assert others[0].logprobs is None
    model = reference(small_vocabulary).double()
    for rollout in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])).logits[0]
        logits[:, 8] = -torch.inf
        logprobs = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(rollout.response_ids)[:, None]).squeeze(1)
        assert_close_relative(rollout.logprobs, expected, 1e-5, size=float(logits.abs().max()))


def test_generate_before_load_weights(small_vocabulary: Path) -> None:
    with pytest.raises(RuntimeError, match="before load_weights"):
        build(small_vocabulary).generate(SMALL_PROMPTS, sampling())


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    save_tiny_model(folder, CONFIGS["qwen3-tied"], seed=0)
    return folder


def test_tied_weights_may_come_under_both_names(tied: Path) -> None:
    weights = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in weights
    embeddings = weights["model.embed_tokens.weight"]
    expected = engine_with_weights(tied).generate(PROMPTS, sampling())

    engine = build(tied)
    engine.load_weights((weights | {"lm_head.weight": embeddings.clone()}).items())
    assert engine.generate(PROMPTS, sampling()) == expected

    engine = build(tied)
    del weights["model.embed_tokens.weight"]
    engine.load_weights((weights | {"lm_head.weight": embeddings}).items())
    assert engine.generate(PROMPTS, sampling()) == expected


def test_weights_that_stay(tied: Path) -> None:
    """The same responses as with all weights anew; whatever else does not come is missed."""
    weights = load_file(tied / "model.safetensors")
    changed = {n: 1.5 * t for n, t in weights.items() if ".layers.0." in n}
    stay = weights.keys() - changed.keys()
    engine = build(tied)
    assert engine.needs_all_weights()
    engine.load_weights(weights.items(), version=1)
    before = engine.generate(PROMPTS, sampling())
    assert not engine.needs_all_weights()
    engine.load_weights(changed.items(), version=2, left_out=stay)
    fresh = build(tied)
    fresh.load_weights((weights | changed).items(), version=2)
    assert engine.generate(PROMPTS, sampling()) == fresh.generate(PROMPTS, sampling())
    assert engine.generate(PROMPTS, sampling()) != before
    with pytest.raises(ValueError, match=r"1 weights were not delivered, the first 'model\.norm\."):
        engine.load_weights(changed.items(), left_out=stay - {"model.norm.weight"})
    assert engine.needs_all_weights()


def broken_streams(weights: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], str]]:
    name = "model.layers.1.self_attn.k_norm.weight"
    yield {k: v for k, v in weights.items() if k != name}, rf"1 weights .* '{name}'"
    yield weights | {"model.extra": torch.ones(1)}, "has no weight 'model.extra'"
    yield weights | {name: torch.ones(15)}, rf"{name}: .* \(16,\), got \(15,\)"
    yield weights | {name: torch.ones(1)}, rf"{name}: .* \(16,\), got \(1,\)"
    other = weights["model.embed_tokens.weight"] + 1
    yield weights | {"lm_head.weight": other}, "are one weight, but got two values"


def test_a_stream_that_does_not_fit(tied: Path) -> None:
    weights = load_file(tied / "model.safetensors")
    engine = build(tied)
    for stream, error in broken_streams(weights):
        engine.load_weights(weights.items())
        with pytest.raises(ValueError, match=error):
            engine.load_weights(stream.items())
        with pytest.raises(RuntimeError, match="no weights yet"):
            engine.generate(PROMPTS, sampling())
    with pytest.raises(ValueError, match=r"model\.norm\.weight came twice"):
        build(tied).load_weights([*weights.items(), ("model.norm.weight", torch.ones(32))])


def test_every_expert_has_to_come(tmp_path: Path) -> None:
    """transformers has all experts of a layer in two tensors; the stream brings them apart."""
    save_tiny_model(tmp_path, CONFIGS["qwen3-moe"], seed=0)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    left_out = {n: tensor for n, tensor in weights.items() if n != name}
    with pytest.raises(ValueError, match=rf"1 weights were not delivered, the first '{name}'"):
        build(tmp_path).load_weights(left_out.items())
    with pytest.raises(ValueError, match=rf"{name}: .* \(24, 32\), got \(32, 24\)"):
        build(tmp_path).load_weights((left_out | {name: weights[name].t()}).items())


def letters(ids: Sequence[int]) -> str:
    return "".join("abcdefghijkl"[token] for token in ids)


def test_stop_texts_end_a_response_with_the_token_that_completes_one(
    small_vocabulary: Path,
) -> None:
    """The same response as without them, up to the first place where one of the texts is whole."""
    free = sampling(samples_per_prompt=8, max_new_tokens=24)
    for eos, pad in (([], PAD_ID), ([EOS_ID], EOS_ID)):
        engine = engine_with_weights(
            small_vocabulary, eos_token_ids=eos, pad_token_id=pad, decode=letters
        )
        longer = engine.generate(SMALL_PROMPTS, free)
        texts = [letters(rollout.response_ids) for rollout in longer]
        pairs = [text[i : i + 2] for text in texts for i in range(len(text) - 1)]
        stop = (max(set(pairs), key=pairs.count), "gk")
        lengths = set()
        for long, short in zip(
            longer, engine.generate(SMALL_PROMPTS, replace(free, stop=stop)), strict=True
        ):
            text = letters(long.response_ids)
            ends = [text.index(s) + len(s) for s in stop if s in text]
            assert short.response_ids == long.response_ids[: min(ends, default=24)]
            assert short.finished == (bool(ends) or long.finished)
            lengths.add(len(short.response_ids))
        assert len(lengths) > 5


def test_a_stop_text_of_many_bytes() -> None:
    """Each token is a byte, so that the text is three times as many tokens as characters."""
    text = "\u7b54\u6848\u306f\u4ee5\u4e0a\u3067\u3059\u3002\u7d42\u308f\u308a\u307e\u3059"
    response = [*b"so ", *text.encode(), *b" and more"]

    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    whole = len("so ") + len(text.encode())
    assert stopped_length(response, [text], decode) == whole
    stop = StopTexts([text], decode, prompt_width=1, num_rows=1)
    for length in range(1, len(response) + 1):
        ended = stop(torch.tensor([[0, *response[:length]]]), None)
        assert ended.tolist() == [length >= whole]
    assert stop.lengths == [whole]


def test_a_stop_text_does_not_begin_in_the_prompt_and_leaves_no_response_empty(
    small_vocabulary: Path,
) -> None:
    engine = engine_with_weights(small_vocabulary, eos_token_ids=[], decode=letters)
    for seed in range(100):
        (free,) = engine.generate(SMALL_PROMPTS[:1], sampling(seed=seed))
        first = letters(free.response_ids[:1])
        across = letters(SMALL_PROMPTS[0].token_ids[-1:]) + first
        if across not in letters(free.response_ids):
            break
    (at_once,) = engine.generate(SMALL_PROMPTS[:1], sampling(seed=seed, stop=(first,)))
    assert (at_once.response_ids, at_once.finished) == (free.response_ids[:1], True)
    assert across not in letters(free.response_ids)
    assert engine.generate(SMALL_PROMPTS[:1], sampling(seed=seed, stop=(across,))) == [free]


def test_an_end_token_at_once_is_a_response_of_one_token(small_vocabulary: Path) -> None:
    (free,) = engine_with_weights(small_vocabulary, eos_token_ids=[]).generate(
        SMALL_PROMPTS[:1], sampling()
    )
    first = free.response_ids[0]
    engine = engine_with_weights(small_vocabulary, eos_token_ids=[first])
    (rollout,) = engine.generate(SMALL_PROMPTS[:1], sampling())
    assert (rollout.response_ids, rollout.finished) == ((first,), True)


def test_stop_token_ids_are_end_tokens_of_one_call(small_vocabulary: Path) -> None:
    params = sampling(samples_per_prompt=16)
    engine = engine_with_weights(small_vocabulary)
    expected = engine_with_weights(small_vocabulary, eos_token_ids=[EOS_ID, 7])
    stopped = engine.generate(SMALL_PROMPTS, replace(params, stop_token_ids=(7,)))
    assert stopped == expected.generate(SMALL_PROMPTS, params)
    assert stopped != engine.generate(SMALL_PROMPTS, params)
