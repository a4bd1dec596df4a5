import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from checkpoint_tools.gguf_to_hf import main
from megatron_oprd.errors import UserError, run_entry_point
from megatron_oprd.weights.checksum import checksum
from megatron_oprd.weights.hf_files import HFCheckpoint
from tests.helpers.closeness import assert_close_relative

pytestmark = pytest.mark.long

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TOKENS = [*bytes_to_unicode().values(), "<|im_start|>", "<|im_end|>", "he", "Ġt"]
HEADS, KV_HEADS = 4, 2
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64,
        tie_word_embeddings=tied, rope_theta=5000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for module in model.modules():  # norms that are not all ones
        if "RMSNorm" in type(module).__name__:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: the rotary pairs (i, i + d/2) side by side."""
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, 2, half, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    extra: Callable[[GGUFWriter], Any] = lambda writer: None,
    left_out: str = "",
) -> dict[str, Tensor]:
    """Writes the model as llama.cpp does, its MLP in Q4_1; returns the values of its tensors."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
        writer.add_token_merges(["h e", "Ġ t"])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_chat_template(TEMPLATE)
    extra(writer)

    values = {}
    for name, weight in model.state_dict().items():
        if name == left_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values[name] = weight
        if ".q_proj" in name or ".k_proj" in name:
            weight = interleaved(weight, HEADS if ".q_proj" in name else KV_HEADS)
        array = weight.contiguous().numpy()
        if ".mlp." in name:
            kind = GGMLQuantizationType.Q4_1
            blocks = quantize(array, kind)
            values[name] = torch.from_numpy(dequantize(blocks, kind))
            assert not torch.equal(values[name], weight)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind)
        elif ".o_proj" in name:
            values[name] = weight.half().float()
            writer.add_tensor(gguf_name(name), array.astype(np.float16))
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("tied", [True, False])
def test_values_are_the_files(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied)
    values = write_gguf(tmp_path / "tiny.gguf", model)
    out = tmp_path / "out"

    assert main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(out)]) == 0

    checkpoint = HFCheckpoint(out)
    assert sorted(checkpoint.names()) == sorted(values)
    assert ("lm_head.weight" in checkpoint.names()) != tied
    for name, value in values.items():
        assert torch.equal(checkpoint.read(name), value), name
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]

    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(loaded) is LlamaForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model.load_state_dict(values, strict=False)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert_close_relative(loaded(tokens).logits, model(tokens).logits, 1e-5)
    assert GenerationConfig.from_pretrained(out).eos_token_id == 257


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True))
    main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out")])

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "he t"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [TOKENS[i] for i in ids] == ["<|im_start|>", "he", "Ġt", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(ids) == "<|im_start|>he t<|im_end|>"


def test_named_chat_templates_come_along(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_array("tokenizer.chat_templates", ["tool_use"])
        writer.add_string("tokenizer.chat_template.tool_use", "tools: {{ tools }}")

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True), extra=extra)
    assert main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == {"default": TEMPLATE, "tool_use": "tools: {{ tools }}"}


def test_dtype(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "tiny.gguf", tiny_llama(True))
    out = tmp_path / "out"
    main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(out), "--dtype", "bfloat16"])
    checkpoint = HFCheckpoint(out)
    assert checkpoint.config["dtype"] == "bfloat16"
    for name, value in values.items():
        assert torch.equal(checkpoint.read(name), value.bfloat16()), name


def test_dry_run_and_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = write_gguf(tmp_path / "tiny.gguf", tiny_llama(True))
    out = tmp_path / "out"
    arguments = ["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(out), "--dtype", "float16"]
    line = f"{out}: {len(values)} tensors, {sum(v.numel() * 2 for v in values.values())} bytes\n"

    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == f"would write {line}"
    assert not out.exists()
    assert main(arguments) == 0
    assert capsys.readouterr().out == line
    for extra in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="is not empty"):
            main([*arguments, *extra])
    (out / "leftover").write_text("x")
    assert main([*arguments, "--force"]) == 0
    assert not (out / "leftover").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["tool"], manifest["dtype"]) == ("gguf_to_hf", "float16")
    assert list(manifest["source"]) == [str(tmp_path / "tiny.gguf")]
    halves = {name: checksum(value.half()) for name, value in values.items()}
    assert manifest["checksums_xxh3_128"] == halves


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: list[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"out needs [\d,]+ bytes; the file system .* 1,000 bytes"):
        main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out"), *dry_run])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def rope_scaling(writer: GGUFWriter) -> None:
    writer.add_string("llama.rope.scaling.type", "yarn")


def rope_frequencies(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "rwkv6"}, r"transformers cannot read it: .*rwkv6 is not supported yet"),
        ({"tokenizer": False}, r"has no tokenizer.ggml.tokens"),
        ({"extra": rope_scaling}, r"rope\.scaling\.type = 'yarn'; .*has 'none'"),
        ({"extra": rope_frequencies}, r"takes \d+; .*outside the layers: .*rope_freqs.weight"),
        ({"left_out": "model.layers.1.mlp.up_proj.weight"}, r"holds \d+ values, but the llama"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_files_it_refuses(
    tmp_path: Path, change: dict[str, Any], message: str, dry_run: list[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True), **change)
    with pytest.raises(UserError, match=message):
        main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out"), *dry_run])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


# key -> value; each would be lost, or means a part of a model.
LOST: dict[str, Any] = {
    "llama.attention.sliding_window": 16,
    "llama.attention.key_length": 16,
    "llama.rope.scaling.attn_factor": 1.5,
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scale_linear": 4.0,
    "llama.logit_scale": 0.5,
    "llama.attention.scale": 0.2,
    "llama.attn_logit_softcapping": 50.0,
    "llama.attention.causal": False,
    "llama.use_parallel_residual": True,
    "llama.expert_count": 4,
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.foo": 1,
    "split.count": 3,
    "general.type": "adapter",
    "tokenizer.chat_template_of": "x",
    "tokenizer.ggml.pre": "no-such-tokenizer",
    "other.thing": 1,
}


@pytest.mark.parametrize("key", LOST)
def test_metadata_that_would_be_lost(tmp_path: Path, key: str) -> None:
    value = LOST[key]
    add = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}

    def extra(writer: GGUFWriter) -> None:
        for values in writer.kv_data:
            values.pop(key, None)
        getattr(writer, add[type(value)])(key, value)

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True), extra=extra)
    with pytest.raises(UserError, match=re.escape(key) if "split" not in key else "3 parts"):
        main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["llama.attention.layer_norm_rms_epsilon", "llama.context_length"])
def test_metadata_that_a_default_would_stand_in_for(tmp_path: Path, key: str) -> None:
    def extra(writer: GGUFWriter) -> None:
        for values in writer.kv_data:
            values.pop(key, None)

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True), extra=extra)
    with pytest.raises(UserError, match=f"has no {key}"):
        main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out"), "--dry-run"])


def test_what_lies_beside_the_file_is_not_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] != "Qwen2Tokenizer"


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.attention.head_count", 0), ("llama.attention.head_count", 3),
     ("tokenizer.ggml.model", "rwkv")],
)  # fmt: skip
def test_odd_files_are_one_line(tmp_path: Path, key: str, value: Any) -> None:
    def extra(writer: GGUFWriter) -> None:
        for values in writer.kv_data:
            values.pop(key, None)
        getattr(writer, "add_string" if isinstance(value, str) else "add_uint32")(key, value)

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True), extra=extra)
    with pytest.raises(UserError, match="transformers cannot read it") as raised:
        main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out"), "--dry-run"])
    assert "\n" not in str(raised.value)


def test_tensor_that_no_weight_takes(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def renamed(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_other.weight", np.ones((64, 32), np.float32))

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(True), left_out=name, extra=renamed)
    with pytest.raises(UserError, match=rf"could not place 1 tensors .* the first is {name}"):
        main(["--gguf", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x.gguf: it does not exist; give a .gguf file"),
        (b"", r"x.gguf is not a whole GGUF file \(0 bytes\)"),
        (b"not a model at all, only text", r"x.gguf is not a whole GGUF file \(29 bytes\)"),
        (b"GGUF\x03\x00\x00\x00", r"x.gguf is not a whole GGUF file \(8 bytes\)"),
    ],
)
def test_what_is_no_gguf_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    arguments = ["--gguf", str(path), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=message):
        main(arguments)
    with pytest.raises(SystemExit) as exit_info:
        run_entry_point(lambda: main(arguments))
    assert exit_info.value.code == 2
    assert "error: --gguf" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, "--dtype", "int3"])
    assert exit_info.value.code == 2


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(True))
    content = path.read_bytes()
    for length in (1000, len(content) // 2, len(content) - 4000):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"is not a whole GGUF file"):
            main(["--gguf", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"it is a folder"):
        main(["--gguf", str(tmp_path), "--out", str(tmp_path / "out")])
