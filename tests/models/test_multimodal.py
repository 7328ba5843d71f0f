"""Gemma 3 with eyes: its text half is read out of the whole checkpoint."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bivec.models import PackedBatch, load_pretrained, save_pretrained

IDS = [5, 17, 93, 0, 41, 8, 8, 60]
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 3,
    "sliding_window_pattern": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"]),
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize("layout", ["released", "modules"])
def test_the_text_half_of_a_multimodal_gemma3(tmp_path, layout):
    """Under the names of the hub, which transformers writes, and of its modules; what we save is of text alone."""
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, image_token_index=90, mm_tokens_per_image=4
    )
    torch.manual_seed(1)
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if layout == "modules":
        save_file({name: x for name, x in reference.state_dict().items() if name != "lm_head.weight"}, file)
    prefixes = {name.split(".")[0] for name in load_file(file)}
    released = {"language_model", "vision_tower", "multi_modal_projector"}
    assert prefixes == (released if layout == "released" else {"model"})

    checkpoint = load_pretrained(tmp_path)
    trunk = reference.model.language_model
    assert {name for name, _ in checkpoint.model.named_parameters()} == {name for name, _ in trunk.named_parameters()}
    assert all(torch.equal(trunk.get_parameter(name), p) for name, p in checkpoint.model.named_parameters())
    assert checkpoint.lm_head_weight is checkpoint.model.embed_tokens.weight

    save_pretrained(checkpoint.model, tmp_path / "text", is_causal=True)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "text")
    assert type(theirs) is transformers.Gemma3TextModel
    with torch.no_grad():
        expected = reference.model(torch.tensor([IDS])).last_hidden_state[0]
        assert (checkpoint.model(PackedBatch.from_sequences([IDS]), causal=True) - expected).abs().max() <= 1e-4
        assert (theirs(torch.tensor([IDS])).last_hidden_state[0] - expected).abs().max() <= 1e-4
