"""The vLLM engine against transformers' models with the same weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_oprd.rollout.engine import Progress, RolloutEngineError, WrongWeightsError
from megatron_oprd.rollout.vllm.engine import VLLMEngine
from tests.helpers.closeness import assert_close_relative
from tests.helpers.engine_processes import engine_processes
from tests.helpers.tiny import EOS_ID, save_tiny_model, tiny_tokenizer
from tests.rollout.test_sampling import chi_square
from tests.vllm.engines import (
    Weights,
    change_on_the_way,
    check_greedy,
    check_partial_sync,
    check_same_as_hf,
    logits_of,
    others,
    prompt,
    sampling,
    start,
    tiny_llama,
)

# vLLM caches prefixes of 128 tokens on a CPU; the last two share one.
PREFIX = [5 + i * 7 % 90 for i in range(140)]
PROMPTS = [prompt(3, 7, 8, 9, 10), prompt(0, 20), prompt(8, *PREFIX, 30), prompt(5, *PREFIX, 31)]
MEANINGLESS = (11, 96)
DECODE = tiny_tokenizer().decode  # one character a token
FLAT = 2.0  # the highest temperature that vLLM takes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    save_tiny_model(folder, tiny_llama(tie_word_embeddings=True), seed=0)
    return folder


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    # A tied tiny model is sure that a token repeats; smaller logits are less so.
    weights["model.embed_tokens.weight"] *= 0.25
    return weights


@pytest.fixture(scope="module")
def one_engine(folder: Path) -> Iterator[VLLMEngine]:
    known = set(range(97)) - set(MEANINGLESS)
    engine = start(
        folder, known_ids=known, decode=DECODE, check_weights_interval=1, sync_bucket_mb=1
    )
    yield engine
    engine.close()


@pytest.fixture
def engine(one_engine: VLLMEngine, weights: Weights) -> VLLMEngine:
    one_engine.load_weights(weights.items(), version=1)
    return one_engine


def without_meaningless(weights: Weights) -> Weights:
    """Weights with which the ids that mean nothing are unlikely."""
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed["model.embed_tokens.weight"][list(MEANINGLESS)] = 0.0
    return changed


def test_no_weights(one_engine: VLLMEngine) -> None:
    """The first test of this file: no weights have come yet."""
    assert one_engine.needs_all_weights()
    with pytest.raises(RolloutEngineError, match=r"before load_weights\(\)"):
        one_engine.generate(PROMPTS, sampling())


def test_same_tokens_as_hf(engine: VLLMEngine, folder: Path, weights: Weights) -> None:
    known = set(range(97)) - set(MEANINGLESS)
    check_same_as_hf(engine, folder, weights, PROMPTS, known_ids=known)
    (silent,) = engine.generate(PROMPTS[:1], sampling(logprobs=False))
    assert silent.logprobs is None
    check_greedy(folder, weights, [silent], never=MEANINGLESS)


def test_new_weights(engine: VLLMEngine, folder: Path, weights: Weights) -> None:
    """Also behind a prefix that is in the cache with the old weights."""
    old = engine.generate(PROMPTS, sampling())
    for version, seed in ((2, 1), (3, 2)):
        changed = without_meaningless(others(weights, seed))
        engine.load_weights(changed.items(), version=version)
        new = engine.generate(PROMPTS, sampling())
        check_greedy(folder, changed, new, never=MEANINGLESS)
        assert {rollout.weights_version for rollout in new} == {version}
        assert [r.response_ids for r in new] != [r.response_ids for r in old]


def test_weights_that_stay(engine: VLLMEngine, folder: Path, weights: Weights) -> None:
    """Bit for bit, whichever layers of them, the embedding and its packed copy as well."""
    engine.generate(PROMPTS, sampling())
    for version, sent in enumerate(
        (
            ("model.embed_tokens.", "model.layers.0.", "model.layers.1."),
            ("model.layers.3.",),
            ("model.embed_tokens.", "model.norm.", "model.layers.2."),
            ("model.layers.0.",),
        ),
        start=2,
    ):
        new = without_meaningless(others(weights, seed=version))
        weights = check_partial_sync(
            engine, folder, weights, new, sent, PROMPTS, version=version, never=MEANINGLESS
        )


def test_one_row_of_a_tied_embedding(engine: VLLMEngine, folder: Path, weights: Weights) -> None:
    """A row of no prompt token only acts as a row of the LM head."""
    weights = without_meaningless(weights)
    engine.load_weights(weights.items())
    (before,) = engine.generate(PROMPTS[:1], sampling(max_new_tokens=1))
    row = 60
    assert row not in (*before.prompt_ids, *before.response_ids)
    head = weights["model.embed_tokens.weight"]
    head[row] = 2 * head[before.response_ids[0]]
    engine.load_weights(weights.items())
    (after,) = engine.generate(PROMPTS[:1], sampling(max_new_tokens=1))
    assert after.response_ids == (row,)
    check_greedy(folder, weights, [after], never=MEANINGLESS)


def test_seeds(engine: VLLMEngine) -> None:
    """A response depends on its prompt, sample and seed, not on what else is generated."""
    random = sampling(temperature=FLAT, samples_per_prompt=3)
    rollouts = engine.generate(PROMPTS, random)
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == [
        (p.index, sample) for p in PROMPTS for sample in range(3)
    ]
    assert len({r.response_ids for r in rollouts}) == len(rollouts)
    by_share = [engine.generate(PROMPTS[share::2], random) for share in (1, 0)]
    key: Callable[[Any], Any] = lambda r: (r.prompt_index, r.sample_index)  # noqa: E731
    again = sorted((r for share in by_share for r in share), key=key)
    assert [r.response_ids for r in again] == [r.response_ids for r in sorted(rollouts, key=key)]
    other = engine.generate(PROMPTS, sampling(temperature=FLAT, samples_per_prompt=3, seed=6))
    assert all(a.response_ids != b.response_ids for a, b in zip(other, rollouts, strict=True))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 0.9)])
def test_distribution(
    engine: VLLMEngine, folder: Path, weights: Weights, top_k: int, top_p: float
) -> None:
    params = sampling(
        temperature=FLAT,
        top_k=top_k,
        top_p=top_p,
        samples_per_prompt=2000,
        max_new_tokens=1,
    )
    rollouts = engine.generate(PROMPTS[:1], params)
    logits = logits_of(folder, weights, rollouts[0])[0]
    logits[list(MEANINGLESS)] = -torch.inf
    raw, size = logits.log_softmax(-1), float(logits[logits.isfinite()].abs().max())
    for rollout in rollouts:
        expected = raw[list(rollout.response_ids)]
        assert_close_relative(rollout.logprobs, expected, 1e-5, size=size)
    probabilities = (logits / FLAT).softmax(-1)
    if top_k:
        probabilities[probabilities < probabilities.topk(top_k).values[-1]] = 0.0
        probabilities /= probabilities.sum()
        values, order = probabilities.sort(descending=True)
        probabilities[order[values.cumsum(0) - values >= top_p]] = 0.0
        probabilities /= probabilities.sum()
    drawn = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=97)
    assert drawn[probabilities == 0].sum() == 0
    often = probabilities * 2000 >= 5  # the others count as one
    bins = [torch.cat([x[often], x[~often].sum()[None]]) for x in (drawn, probabilities)]
    freedom = int(often.sum())
    bound = freedom + 5 * (2 * freedom) ** 0.5
    if bins[1][-1] == 0:
        bins = [x[:-1] for x in bins]
    assert chi_square(bins[0], bins[1].tolist()) < bound


def test_responses_end(engine: VLLMEngine) -> None:
    rollouts = engine.generate(PROMPTS[:2], sampling(temperature=FLAT, samples_per_prompt=20))
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert rollout.finished == (rollout.response_ids[-1] == EOS_ID)
        assert EOS_ID not in rollout.response_ids[:-1]
        assert rollout.finished or len(rollout.response_ids) == 12


def test_how_full_it_was(engine: VLLMEngine) -> None:
    engine.take_use()
    assert engine.take_use() is None
    rollouts = engine.generate(PROMPTS[2:], sampling(samples_per_prompt=60, max_new_tokens=100))
    use = engine.take_use()
    assert use is not None
    (peak,), (seconds,) = use.kv_cache_peaks, use.busy_seconds
    assert 0 < peak <= 1
    assert 0 < seconds < 600
    assert use.preemptions == 0
    assert use.num_responses == len(rollouts) == 120
    assert 0 <= use.queued_seconds < 120 * 600
    tokens = sum(len(one.response_ids) for one in rollouts)
    assert engine.progress() == Progress(responses=120, tokens=tokens)


def test_stop_texts_and_ids(engine: VLLMEngine) -> None:
    """What ends a response belongs to it; without stop the same response goes on."""
    whole = engine.generate(PROMPTS, sampling(temperature=FLAT))
    texts = [DECODE(rollout.response_ids) for rollout in whole]
    stop = texts[0][2:4]
    assert stop not in texts[1]
    (stopped, other, *_) = engine.generate(PROMPTS, sampling(temperature=FLAT, stop=(stop,)))
    length = texts[0].index(stop) + 2
    assert stopped.response_ids == whole[0].response_ids[:length]
    # Rounding depends on the batch.
    assert_close_relative(stopped.logprobs, (whole[0].logprobs or ())[:length], 1e-5)
    assert stopped.finished
    assert other.response_ids == whole[1].response_ids
    token = whole[0].response_ids[3]
    by_id = engine.generate(PROMPTS[:1], sampling(temperature=FLAT, stop_token_ids=(token,)))[0]
    first = whole[0].response_ids.index(token) + 1
    assert by_id.response_ids == whole[0].response_ids[:first]
    assert by_id.finished


def test_check_finds_what_was_changed_on_the_way(
    engine: VLLMEngine, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    change_on_the_way(name, monkeypatch)
    with pytest.raises(WrongWeightsError, match=rf"in 1 of \d+ tensors, the first '{name}'"):
        engine.load_weights(weights.items())


def test_weights_that_do_not_come(engine: VLLMEngine, weights: Weights) -> None:
    """The error is the stream's, and the process that waits for the rest is ended.

    The last test of this file: the others' engine is gone.
    """
    missing = dict(list(weights.items())[:-1])
    with pytest.raises(ValueError, match="1 weights were not delivered"):
        engine.load_weights(missing.items())
    assert not engine_processes()
