"""Our norms, gated MLPs and rotations on live models of transformers: parity, and that nothing else changes."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from bivec.engine.errors import ConfigError
from bivec.engine.integrations import transformers_layers
from bivec.engine.integrations.transformers import apply_kernels, register, remove_kernels
from bivec.models.families import FAMILIES

TOLERANCE = 1e-5

register()


def batch():
    ids = torch.randint(2, 1000, (2, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, inputs):
    model.zero_grad()
    states = model(**inputs, use_cache=False).last_hidden_state[inputs["attention_mask"].bool()]
    probe = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states * probe).sum().backward()
    return states.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def difference(ours, theirs):
    gradients = [float((ours[1][n] - g).abs().max() / g.abs().max().clamp(min=1)) for n, g in theirs[1].items()]
    return float((ours[0] - theirs[0]).abs().max()), max(gradients)


@pytest.fixture
def calls(monkeypatch):
    """How often each of our kernels is called by the layers."""
    seen = dict.fromkeys(["rms_norm", "swiglu", "geglu", "apply_rotary"], 0)

    def counted(name, kernel):
        def call(*args, **kwargs):
            seen[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in seen:
        monkeypatch.setattr(transformers_layers, name, counted(name, getattr(transformers_layers, name)))
    return seen


@pytest.mark.parametrize("attention", ["eager", "bivec"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients(tiny_dir, calls, family, attention, record_property):
    model = AutoModel.from_pretrained(tiny_dir(family), attn_implementation="eager").eval()
    theirs = run(model, batch())
    assert not any(calls.values())
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    facts = FAMILIES[family]
    norms = 2 * (facts.layer_norms + 2 * facts.qk_norm) + 1  # of two layers, and the last one

    applied = apply_kernels(model)
    assert (applied.rms_norm, applied.mlp, applied.rotary) == (norms, 2, 2)
    model.set_attn_implementation(attention)
    ours = run(model, batch())
    gated = {"swiglu" if "silu" in facts.activations else "geglu": 2}
    rotated = sum(getattr(model.config, "no_rope_layers", (1, 1)))  # SmolLM3's second layer has no positions
    assert calls == {"rms_norm": norms, "swiglu": 0, "geglu": 0, "apply_rotary": rotated} | gated
    states, gradients = difference(ours, theirs)
    record_property("states", states)
    record_property("gradients", gradients)
    assert states <= TOLERANCE
    assert gradients <= TOLERANCE
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes

    before = dict(calls)
    applied.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())
    model.set_attn_implementation("eager")
    assert difference(run(model, batch()), theirs) == (0.0, 0.0)
    assert calls == before


@pytest.mark.parametrize("norms", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(tiny_dir, calls, family, norms):
    """A bf16 model, with its norms in fp32 or not: the dtypes of all layers' outputs are transformers' own."""
    model = AutoModel.from_pretrained(tiny_dir(family), attn_implementation="eager", dtype=torch.bfloat16).eval()
    if norms == "fp32":
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.float()
    compare_half(model, calls, autocast=norms == "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(tiny_dir, calls, family):
    """The weights stay in fp32, and with them the norms."""
    compare_half(AutoModel.from_pretrained(tiny_dir(family), attn_implementation="eager").eval(), calls, autocast=True)


def compare_half(model, calls, *, autocast):
    exact = copy.deepcopy(model).float()
    kinds: list[list[tuple[str, torch.dtype]]] = [[], []]

    def states(one, kind):
        def note(module, inputs, output):
            # an activation of its own is part of our gated MLP
            if isinstance(output, torch.Tensor) and not any(x in type(module).__name__ for x in ("SiLU", "GELU")):
                kind.append((type(module).__name__, output.dtype))

        hooks = [module.register_forward_hook(note) for module in one.modules()]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = one(**batch()).last_hidden_state
        for hook in hooks:
            hook.remove()
        return hidden

    theirs = states(model, kinds[0])
    apply_kernels(model)
    ours = states(model, kinds[1])
    assert kinds[0] == kinds[1] and ours.dtype == theirs.dtype
    assert calls["rms_norm"] > 0 and calls["apply_rotary"] > 0
    with torch.no_grad():
        truth = exact(**batch()).last_hidden_state
    scale = truth.std()
    assert (ours - truth).std() / scale <= 1.2 * (theirs - truth).std() / scale + 1e-3  # no farther from the truth


def test_other_models_and_classes_are_left_alone(tiny_llama_dir, calls):
    module = transformers.models.llama.modeling_llama
    names = {name: getattr(module, name) for name in dir(module)}
    forwards = {name: value.forward for name, value in names.items() if hasattr(value, "forward")}
    model, other = (AutoModel.from_pretrained(tiny_llama_dir, attn_implementation="eager") for _ in range(2))
    apply_kernels(model)
    other(**batch())
    assert not any(calls.values())
    assert {name: getattr(module, name) for name in dir(module)} == names
    assert {name: names[name].forward for name in forwards} == forwards


def test_parts_repeats_and_removal(tiny_llama_dir, calls):
    model = AutoModel.from_pretrained(tiny_llama_dir, attn_implementation="eager")
    part = apply_kernels(model, mlp=False, rotary=False)
    assert (part.rms_norm, part.mlp, part.rotary) == (5, 0, 0)
    model(**batch())
    assert calls == {"rms_norm": 5, "swiglu": 0, "geglu": 0, "apply_rotary": 0}
    apply_kernels(model)
    whole = apply_kernels(model)
    assert (whole.rms_norm, whole.mlp, whole.rotary) == (5, 2, 2)
    remove_kernels(model)
    remove_kernels(model)
    model(**batch())
    assert calls["rms_norm"] == 5


def test_a_copy_runs_on_its_own_weights(tiny_llama_dir):
    model = AutoModel.from_pretrained(tiny_llama_dir, attn_implementation="eager").eval()
    apply_kernels(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert twin(**batch()).last_hidden_state.abs().max() > 0.1


def test_it_saves_and_loads_and_takes_adapters(tiny_llama_dir, tmp_path, calls):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation="eager")
    names = sorted(base.state_dict())
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "gate_proj"], init_lora_weights=False)).eval()
    theirs = model(**batch()).logits
    apply_kernels(model)
    assert (model(**batch()).logits - theirs).abs().max() <= TOLERANCE
    assert calls["swiglu"] == calls["apply_rotary"] == 2
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert sorted(again.state_dict()) == names
    assert (again(**batch()).logits - theirs).abs().max() <= TOLERANCE


def test_a_cache_still_works(tiny_dir):
    """Generation with a cache, the rotations at positions that do not start at 0."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir("qwen3"), attn_implementation="eager").eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    prompt = {name: value[:1, :9] for name, value in batch().items()}
    theirs = model.generate(**prompt, **options)
    apply_kernels(model)
    assert torch.equal(model.generate(**prompt, **options), theirs)


def test_unknown_models_are_refused():
    model = AutoModel.from_config(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(ConfigError, match=r"no layer of a known family in this BertModel; known are .* llama, mistral"):
        apply_kernels(model)


def test_other_activations_are_refused(tiny_llama_dir):
    model = AutoModel.from_pretrained(tiny_llama_dir, hidden_act="relu")
    with pytest.raises(ConfigError, match=r"layers.0.mlp has the activation ReLU.*mlp=False"):
        apply_kernels(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert apply_kernels(model, mlp=False).rms_norm == 5


def test_a_forward_of_its_own_is_refused(tiny_llama_dir):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = AutoModel.from_pretrained(tiny_llama_dir)
    add_hook_to_module(model.norm, ModelHook())
    with pytest.raises(ConfigError, match="norm has a forward of its own already"):
        apply_kernels(model)
    remove_kernels(model)
    assert "forward" in model.norm.__dict__


@pytest.mark.parametrize(("width", "dimension"), [(4, 1), (8, 2)], ids=["partial", "other layout"])
def test_other_rotations_are_refused(width, dimension):
    q, k, angles = torch.ones(1, 2, 3, 8), torch.ones(1, 1, 3, 8), torch.ones(1, 3, width)
    with pytest.raises(ConfigError, match=f"rotation of {width} of 8 dimensions, along dimension {dimension}"):
        transformers_layers._rotated(q, k, angles, angles, unsqueeze_dim=dimension)


def test_an_attention_that_rotates_elsewhere_is_refused(tiny_llama_dir, monkeypatch):
    """As some version of transformers may have it: nothing is changed by halves."""
    model = AutoModel.from_pretrained(tiny_llama_dir)

    def forward(self, hidden_states, **_):
        return self.o_proj(hidden_states), None

    monkeypatch.setattr(type(model.layers[0].self_attn), "forward", forward)
    with pytest.raises(ConfigError, match="this version of transformers does not call apply_rotary_pos_emb"):
        apply_kernels(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert apply_kernels(model, rotary=False).rms_norm == 5
