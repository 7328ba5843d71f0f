"""LoRA: identity at the start, merge, dropout, and interchange with PEFT in both directions (METHOD 14.5, 14.11)."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bivec.engine.errors import CheckpointError, ConfigError
from bivec.engine.lora import PROJECTIONS, LoraConfig, LoraLinear, add_lora, load_adapter
from bivec.models import PackedBatch, load_pretrained

SEQUENCES = [[0, 5, 9, 300, 42], [0, 17], [0, *range(100, 140)]]  # the last one exceeds Mistral's window of 24
WEIGHTS = "adapter_model.safetensors"
families = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])


@pytest.fixture
def directory(tiny_dir, family):
    return tiny_dir(family)


@pytest.fixture
def model(tiny_llama_dir):
    return load_pretrained(tiny_llama_dir).model


def batch(sample_ids=None):
    return PackedBatch.from_sequences(SEQUENCES, sample_ids)


def fill(parameters, scale=0.05):
    """Random values in A and B, so that the adapter changes something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def peft_hidden(model) -> torch.Tensor:
    """The rows of transformers' padded forward, packed."""
    length = max(map(len, SEQUENCES))
    ids = torch.tensor([sequence + [1] * (length - len(sequence)) for sequence in SEQUENCES])
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in SEQUENCES])
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


def transformers_model(directory, auto_class="AutoModel"):
    import transformers

    # before transformers 5.21 "sdpa" leaves out the cap on Gemma 2's attention scores
    attention = {"attn_implementation": "eager"} if directory.name == "gemma2" else {}
    model = getattr(transformers, auto_class).from_pretrained(directory, dtype=torch.float32, **attention)
    model.config.is_causal = False
    return model


def test_identity_at_the_start(model):
    before = model(batch())
    adapter = add_lora(model, LoraConfig(), seed=3)
    assert torch.equal(model(batch()), before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 7 * 2 and all("lora_" in name for name in trainable)
    for name, parameter in adapter.named_parameters().items():
        assert parameter.dtype == torch.float32
        if "lora_A" in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.9 * bound < parameter.abs().max() <= bound


def test_initialisation_follows_the_seed(tiny_llama_dir):
    def first_matrix(seed):
        adapter = add_lora(load_pretrained(tiny_llama_dir).model, LoraConfig(), seed)
        return next(iter(adapter.named_parameters().values()))

    assert torch.equal(first_matrix(1), first_matrix(1))
    assert not torch.equal(first_matrix(1), first_matrix(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(tiny_llama_dir, dtype):
    model = load_pretrained(tiny_llama_dir, dtype=dtype).model
    config = LoraConfig(rank=4, alpha=12.0)
    base = {name: p.double() for name, p in model.named_parameters()}
    adapter = add_lora(model, config)
    fill(adapter.named_parameters().values())
    with_adapter = model(batch())
    matrices = {name: p.detach().double() for name, p in adapter.named_parameters().items()}
    adapter.merge()
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    merged = dict(model.named_parameters())
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        expected = base[name]
        if name.rpartition(".")[0].endswith(PROJECTIONS):
            stem = name.removesuffix(".weight")
            expected = expected + 3.0 * matrices[f"{stem}.lora_B.weight"] @ matrices[f"{stem}.lora_A.weight"]
            assert not torch.equal(weight.double(), base[name])
        # one rounding to the dtype of the base: half a unit in the last place; in fp32 also the error of B A itself
        unit = torch.finfo(dtype).eps
        assert ((weight.double() - expected).abs() <= 0.5 * unit * expected.abs() + 1e-6 * expected.abs().max()).all()
    if dtype == torch.float32:
        torch.testing.assert_close(model(batch()), with_adapter, rtol=1e-4, atol=1e-4)


@torch.no_grad()  # a graph, which the frozen weights no longer ask for, would take the model's other path
def test_remove(model):
    before = model(batch())
    adapter = add_lora(model, LoraConfig())
    fill(adapter.named_parameters().values())
    assert not torch.allclose(model(batch()), before, atol=1e-3)
    adapter.remove()
    assert torch.equal(model(batch()), before)


def test_dropout(model):
    adapter = add_lora(model, LoraConfig(dropout=0.3))
    fill(adapter.named_parameters().values())

    def run(seed, sample_ids=None):
        packed = batch(sample_ids)
        adapter.set_noise(seed, None if seed is None else packed.token_ids())
        return model(packed)

    clean, first = run(None), run(1)
    assert torch.equal(clean, run(None)) and torch.equal(first, run(1))
    assert not torch.allclose(first, clean, atol=1e-3)
    assert not torch.allclose(first, run(2), atol=1e-3)
    assert not torch.allclose(first, run(1, [7, 8, 9]), atol=1e-3)  # other samples, other bits
    # the bits belong to the sample, not to its place in the batch
    packed = PackedBatch.from_sequences(SEQUENCES[::-1], [2, 1, 0])
    adapter.set_noise(1, packed.token_ids())
    torch.testing.assert_close(model(packed)[-len(SEQUENCES[0]) :], first[: len(SEQUENCES[0])], rtol=1e-5, atol=1e-5)
    # two layers and two projections of one input draw different bits
    layers = list(adapter.layers.values())
    assert len({layer.site for layer in layers}) == len(layers) == 14


@families
def test_peft_reads_our_adapter(directory, tmp_path):
    from peft import PeftModel

    model = load_pretrained(directory).model
    adapter = add_lora(model, LoraConfig(rank=4, alpha=8.0))
    fill(adapter.named_parameters().values())
    adapter.save(tmp_path / "adapter", "tiny")
    names = set(load_file(tmp_path / "adapter" / WEIGHTS))
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in names and len(names) == 2 * 7 * 2
    theirs = PeftModel.from_pretrained(transformers_model(directory), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), peft_hidden(theirs), rtol=1e-4, atol=1e-4)
    again = load_pretrained(directory).model
    loaded = load_adapter(again, tmp_path / "adapter")
    assert loaded.config == LoraConfig(rank=4, alpha=8.0, targets=tuple(sorted(PROJECTIONS)))
    assert torch.equal(again(batch()), model(batch()))


@families
@pytest.mark.parametrize("level", ["trunk", "causal_lm"])
def test_we_read_an_adapter_of_peft(directory, tmp_path, level):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=list(PROJECTIONS))
    base = transformers_model(directory, "AutoModel" if level == "trunk" else "AutoModelForCausalLM")
    theirs = peft.get_peft_model(base, config).eval()
    fill(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path)
    extra = "model." if level == "causal_lm" else ""
    assert f"base_model.model.{extra}layers.0.mlp.up_proj.lora_B.weight" in load_file(tmp_path / WEIGHTS)

    model = load_pretrained(directory).model
    adapter = load_adapter(model, tmp_path)
    assert (adapter.config.rank, adapter.config.scaling, adapter.config.dropout) == (4, 3.0, 0.1)
    expected = peft_hidden(theirs.model.model if level == "causal_lm" else theirs)
    torch.testing.assert_close(model(batch()), expected, rtol=1e-4, atol=1e-4)
    adapter.merge()
    torch.testing.assert_close(model(batch()), expected, rtol=1e-4, atol=1e-4)


@families
def test_gradients_equal_those_of_peft(directory, tmp_path):
    from peft import PeftModel

    model = load_pretrained(directory).model
    adapter = add_lora(model, LoraConfig(rank=4, alpha=8.0))
    fill(adapter.named_parameters().values())
    adapter.save(tmp_path / "adapter", "tiny")
    theirs = PeftModel.from_pretrained(transformers_model(directory), tmp_path / "adapter", is_trainable=True).eval()
    direction = torch.randn(sum(map(len, SEQUENCES)), 64, generator=torch.Generator().manual_seed(0))
    (model(batch()) * direction).sum().backward()
    (peft_hidden(theirs) * direction).sum().backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ours = adapter.named_parameters()
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 2e-5, (name, float(error))


@pytest.fixture
def saved(model, tmp_path):
    adapter = add_lora(model, LoraConfig(rank=4))
    adapter.save(tmp_path / "good", "tiny")
    adapter.remove()
    return tmp_path / "good"


def edit_config(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


PREFIX = "base_model.model."
NAME = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), r"adapter_config\.json: no such file"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), r"adapter_config\.json: not a JSON file"),
    "a JSON list": (lambda d: (d / "adapter_config.json").write_text("[]"), "expected a JSON object, found list"),
    "other kind": (lambda d: edit_config(d, peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (lambda d: edit_config(d, use_dora=True), "use_dora=True is not supported"),
    "bias": (lambda d: edit_config(d, bias="all"), "bias='all' is not supported"),
    "rank pattern": (lambda d: edit_config(d, rank_pattern={"q_proj": 8}), "rank_pattern=.* is not supported"),
    "rank": (lambda d: edit_config(d, r=0), "rank of at least 1"),
    "regular expression": (lambda d: edit_config(d, target_modules=".*q_proj"), "target_modules='.*' are not usable"),
    "other architecture": (lambda d: edit_config(d, target_modules=["query_key_value"]), "named query_key_value"),
    "key twice": (lambda d: (d / "adapter_config.json").write_text('{"r": 4, "r": 8}'), "the key 'r' is there twice"),
    "nested": (lambda d: (d / "adapter_config.json").write_text("[" * 100_000), "nested too deep"),
    "a folder": (lambda d: replace_by_folder(d / "adapter_config.json"), r"adapter_config\.json: cannot be read"),
    "rank of true": (lambda d: edit_config(d, r=True), "r is 'True', expected a number"),
    "alpha of NaN": (lambda d: edit_config(d, lora_alpha=float("nan")), "lora_alpha is 'nan', expected a number"),
    "alpha too large": (lambda d: edit_config(d, lora_alpha=10**400), "lora_alpha is '1000.*expected a number"),
    "dropout": (lambda d: edit_config(d, lora_dropout="0.1"), "lora_dropout is '0.1', expected a number"),
    "base": (lambda d: edit_config(d, base_model_name_or_path=5), "base_model_name_or_path is '5', expected a string"),
    "integers": (
        lambda d: edit_tensors(d, lambda t: t.update({NAME: t[NAME].view(torch.int32)})),
        "is stored as torch.int32, expected floating point",
    ),
    "two names of one": (
        lambda d: edit_tensors(d, lambda t: t.update({NAME.removeprefix(PREFIX): t[NAME].clone()})),
        "and another tensor are both",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), rf"{WEIGHTS}: no such file \(adapters stored as \.bin"),
    "truncated": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-8]), "not a whole safetensors"),
    "empty": (lambda d: (d / WEIGHTS).write_bytes(b""), "not a whole safetensors"),
    "missing": (lambda d: edit_tensors(d, lambda t: t.pop(NAME)), r"1 matrices missing \(first: layers\.0\.self_attn"),
    "unexpected": (lambda d: edit_tensors(d, lambda t: t.update(x=torch.ones(1))), r"1 unexpected \(first: x\)"),
    "shape": (
        lambda d: edit_tensors(d, lambda t: t.update({NAME: torch.ones(4, 8)})),
        r"q_proj\.lora_A\.weight has shape \[4, 8\], expected \[4, 64\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_adapters(damage, model, saved, tmp_path):
    before = model(batch())
    change, message = DAMAGES[damage]
    shutil.copytree(saved, tmp_path / "bad")
    change(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(model, tmp_path / "bad")
    assert str(tmp_path / "bad") in str(error.value)
    assert torch.equal(model(batch()), before)
    load_adapter(model, saved)  # the refusal left the model clean


def test_wrong_use(model):
    with pytest.raises(ConfigError, match="named x_proj; there are down_proj, gate_proj"):
        add_lora(model, LoraConfig(targets=("q_proj", "x_proj")))
    add_lora(model, LoraConfig(targets=("q_proj",)))
    with pytest.raises(ConfigError, match="already carries"):
        add_lora(model, LoraConfig())
    with pytest.raises(ConfigError, match="rank of at least 1"):
        LoraConfig(rank=0)
    with pytest.raises(ConfigError, match="dropout in"):
        LoraConfig(dropout=1.0)
