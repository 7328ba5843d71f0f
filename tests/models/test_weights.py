"""Checkpoints in and out, against transformers."""

import errno
import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bivec.models import CheckpointError, ConfigError, Llama, PackedBatch, load_pretrained, save_pretrained, weights
from bivec.models.families import FAMILIES, MODEL_CLASSES

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])  # defaults are outside of the vocabulary
FIELDS = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, **TOKENS},
    "qwen3": {"head_dim": 16, **TOKENS},
    "smollm3": {"no_rope_layers": [0, 1], **TOKENS},
    "gemma": {"head_dim": 16, **TOKENS},
    "gemma2": {"head_dim": 16, "sliding_window": 3, "attn_logit_softcapping": 5.0, **TOKENS},
    "gemma3_text": {"head_dim": 16, "sliding_window": 3, "sliding_window_pattern": 2, **TOKENS},
}
OTHERS = {"head_dim": 16, **TOKENS}  # of a family that is not there
IDS = [5, 17, 93, 0, 41, 8, 8, 60]


def hf_model(family="llama", *, causal_lm=True, **settings):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FIELDS.get(family, OTHERS), **settings})
    auto = transformers.AutoModelForCausalLM if causal_lm else transformers.AutoModel
    return auto.from_config(config).eval()


def assert_same_trunk(model, reference):
    """``reference``: a transformers trunk."""
    theirs = dict(reference.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(theirs)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name].to(parameter.dtype)), name


@pytest.fixture
def saved(tmp_path):
    """A CausalLM directory of transformers, and the model."""
    model = hf_model()
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


@pytest.mark.parametrize("family", MODEL_CLASSES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_loads_what_transformers_saves(tmp_path, family, tied, shard_size):
    reference = hf_model(family, tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    checkpoint = load_pretrained(tmp_path)
    assert type(checkpoint.model) is MODEL_CLASSES[family] and checkpoint.tokenizer_path == tmp_path
    assert_same_trunk(checkpoint.model, reference.model)
    assert torch.equal(checkpoint.lm_head_weight, reference.lm_head.weight)
    assert (checkpoint.lm_head_weight is checkpoint.model.embed_tokens.weight) == tied
    assert not checkpoint.model.training
    with torch.no_grad():
        ours = checkpoint.model(PackedBatch.from_sequences([IDS]), causal=True) @ checkpoint.lm_head_weight.T
        softcap = checkpoint.config.final_logit_softcapping
        ours = ours if softcap is None else softcap * (ours / softcap).tanh()
        theirs = reference(torch.tensor([IDS])).logits[0]
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_loads_a_trunk_without_head(tmp_path, tied):
    reference = hf_model(causal_lm=False, tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    checkpoint = load_pretrained(tmp_path)
    assert_same_trunk(checkpoint.model, reference)
    assert (
        (checkpoint.lm_head_weight is checkpoint.model.embed_tokens.weight)
        if tied
        else (checkpoint.lm_head_weight is None)
    )


def test_biases(tmp_path):
    reference = hf_model(attention_bias=True, mlp_bias=True)
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    reference.save_pretrained(tmp_path)
    assert_same_trunk(load_pretrained(tmp_path).model, reference.model)


def test_dtypes(tmp_path):
    hf_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).model.norm.weight.dtype == torch.float32  # a CPU
    assert load_pretrained(tmp_path, device="meta").model.norm.weight.dtype == torch.bfloat16  # the checkpoint's
    for asked in ("bfloat16", torch.bfloat16):
        checkpoint = load_pretrained(tmp_path, dtype=asked)
        assert {p.dtype for p in checkpoint.model.parameters()} == {torch.bfloat16}
        assert checkpoint.lm_head_weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype int8: no floating-point dtype"):
        load_pretrained(tmp_path, dtype="int8")


def test_loaded_weights_do_not_follow_the_file(saved):
    folder, reference = saved
    checkpoint = load_pretrained(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:  # in place: a mapped file would change under the model
        size = file.stat().st_size
        stream.seek(size // 2)
        stream.write(b"\xff" * (size // 2))
    assert_same_trunk(checkpoint.model, reference.model)


def rewrite(folder, change):
    """Applies ``change`` to the tensors of a directory."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing: layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}), r"unexpected.*q_norm"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"norm\.weight has shape \[31\].*\[32\]"),
        (lambda t: t.update({"lm_head.weight": torch.ones(95, 32)}), r"lm_head\.weight has shape \[95, 32\]"),
        (lambda t: t.update({"norm.weight": torch.ones(32)}), r"norm\.weight is also in"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), r"norm\.weight is stored as I8"),
    ],
)
def test_wrong_tensors_are_named(saved, change, message):
    folder, _ = saved
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(folder)
    assert "model.safetensors" in str(caught.value)


def test_inverse_frequencies_of_early_checkpoints_are_ignored(saved):
    folder, reference = saved
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_same_trunk(load_pretrained(folder).model, reference.model)


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, -1])
def test_truncated_safetensors(saved, keep):
    folder, _ = saved
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
        load_pretrained(folder)


def test_missing_shard_and_damaged_index(tmp_path):
    hf_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_pretrained(tmp_path)
    shard.write_bytes(content)
    load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map"')
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "a\0b", "", 5, ["a"]])
def test_shards_lie_in_the_folder(tmp_path, name):
    hf_model().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"index\.json: not a safetensors index"):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize(("layers", "error"), [(10_001, ConfigError), (10_000, CheckpointError), (2**31, ConfigError)])
def test_a_damaged_number_of_layers_makes_no_endless_model(tmp_path, layers, error):
    hf_model().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_hidden_layers": layers}))
    with pytest.raises(error, match=str(layers)):
        load_pretrained(tmp_path)


def test_pickles_are_refused(saved):
    folder, reference = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_pretrained(folder)
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles.*convert them"):
        load_pretrained(folder)


def test_a_tied_config_with_another_head_is_refused(saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_pretrained(folder)


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        load_pretrained(tmp_path / "absent")
    (tmp_path / "weights.pt").touch()
    with pytest.raises(CheckpointError, match="give the directory"):
        load_pretrained(tmp_path / "weights.pt")
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"some/model: .*offline.*local directory"):
        load_pretrained("some/model")


def test_hub_download_asks_for_no_second_copy_and_no_pickle(saved, monkeypatch):
    folder, reference = saved
    hub = pytest.importorskip("huggingface_hub")
    files = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    others = ["consolidated.safetensors", "pytorch_model.bin", "modeling_custom.py", "consolidated.00.pth"]

    def download(name, *, allow_patterns):
        assert name == "some/model"
        assert list(hub.utils.filter_repo_objects(files + others, allow_patterns=allow_patterns)) == files
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert_same_trunk(load_pretrained("some/model").model, reference.model)


@pytest.mark.parametrize("family", MODEL_CLASSES)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_auto_model_loads_what_we_save(tmp_path, family, shard_bytes):
    hf_model(family).save_pretrained(tmp_path / "hf")
    ours = load_pretrained(tmp_path / "hf").model
    save_pretrained(ours, tmp_path / "merged", is_causal=False, max_shard_bytes=shard_bytes)
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.config.is_causal is False and theirs.dtype == torch.float32
    assert type(theirs).__name__ == FAMILIES[family].trunk
    assert_same_trunk(ours, theirs)
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).last_hidden_state[0]
        assert (ours(PackedBatch.from_sequences([IDS])) - expected).abs().max() <= 1e-4
    again = load_pretrained(tmp_path / "merged")
    assert again.config.is_causal is False
    assert again.lm_head_weight is (again.model.embed_tokens.weight if again.config.tie_word_embeddings else None)
    assert_same_trunk(again.model, theirs)


@pytest.mark.parametrize("family", MODEL_CLASSES)
@pytest.mark.parametrize("tied", [False, True])
def test_saving_with_the_head_gives_a_causal_lm(tmp_path, tied, family):
    reference = hf_model(family, tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path / "hf")
    checkpoint = load_pretrained(tmp_path / "hf", dtype="bfloat16")
    save_pretrained(checkpoint.model, tmp_path / "lm", is_causal=True, lm_head_weight=checkpoint.lm_head_weight)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.config.tie_word_embeddings == tied and theirs.dtype == torch.bfloat16
    assert type(theirs).__name__ == FAMILIES[family].causal_lm
    assert ("lm_head.weight" in load_file(tmp_path / "lm" / "model.safetensors")) != tied
    assert torch.equal(theirs.lm_head.weight, checkpoint.lm_head_weight)
    assert_same_trunk(checkpoint.model, theirs.model)


def test_saving_again_keeps_other_files_and_drops_stale_shards(saved):
    folder, _ = saved
    checkpoint = load_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    save_pretrained(checkpoint.model, folder, is_causal=False, max_shard_bytes=20_000)
    assert not (folder / "model.safetensors").exists()
    assert_same_trunk(load_pretrained(folder).model, checkpoint.model)
    save_pretrained(checkpoint.model, folder, is_causal=False)
    assert sorted(file.name for file in folder.glob("*.safetensors*")) == ["model.safetensors"]
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("kind", ["system", "safetensors"])
def test_full_disk_leaves_what_was_there(saved, monkeypatch, existed, kind):
    folder, reference = saved
    model = load_pretrained(folder).model
    target = folder if existed else folder.parent / "new"

    def half_written(tensors, file, metadata):
        file.write_bytes(b"half")
        if kind == "system":
            raise OSError(errno.ENOSPC, "No space left on device")
        # the text of safetensors 0.8 on a full tmpfs
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", half_written)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_pretrained(model, target, is_causal=False)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert_same_trunk(load_pretrained(folder).model, reference.model)


def test_a_disk_that_is_too_full_is_seen_before_anything_is_written(saved, monkeypatch):
    folder, reference = saved
    model = load_pretrained(folder).model
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(weights, "save_file", None)  # not reached
    with pytest.raises(CheckpointError, match=r"too full; the model takes .* GB and 0\.00 GB are free"):
        save_pretrained(model, folder, is_causal=False)
    assert_same_trunk(load_pretrained(folder).model, reference.model)


def test_saving_over_a_file_is_refused(saved, tmp_path):
    (tmp_path / "out").write_text("text")
    with pytest.raises(CheckpointError, match="out is a file"):
        save_pretrained(load_pretrained(saved[0]).model, tmp_path / "out", is_causal=False)
    assert (tmp_path / "out").read_text() == "text"


def test_an_unmerged_adapter_is_refused(saved, tmp_path):
    model = load_pretrained(saved[0]).model
    model.layers[0].mlp.up_proj.lora_a = nn.Parameter(torch.zeros(2, 32))
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_a.*merge"):
        save_pretrained(model, tmp_path / "out", is_causal=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_weights_and_one_shard(tmp_path):
    sizes = {**SIZES, "vocab_size": 32768, "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 1024}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(tmp_path, max_shard_size="34MB")
    shards = [file.stat().st_size for file in tmp_path.glob("model-*.safetensors")]
    assert len(shards) >= 3
    script = textwrap.dedent("""
        import sys
        from bivec.models import load_pretrained
        def kilobytes(field):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
        open("/proc/self/clear_refs", "w").write("5")  # restarts the high-water mark
        before = kilobytes("VmRSS")
        checkpoint = load_pretrained(sys.argv[1])
        print((kilobytes("VmHWM") - before) * 1024)
    """)
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, slack = int(run.stdout), 16 * 2**20
    assert peak <= sum(shards) + max(shards) + slack
    assert sum(shards) + max(shards) + slack < 1.8 * sum(shards)  # the bound would catch a second copy of the weights


def test_nothing_is_imported_from_transformers():
    heavy = {"transformers", "datasets", "huggingface_hub", "gguf"}
    script = f"import sys, bivec.models; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_model_classes_cover_the_configurations():
    assert list(MODEL_CLASSES) == list(FAMILIES)
    assert all(issubclass(model_class, Llama) for model_class in MODEL_CLASSES.values())
