"""MNTP in transformers' Trainer: what the collator makes, and the loss and its gradients against float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from bivec.engine.errors import ConfigError
from bivec.engine.integrations.transformers import MntpCollator, mntp_loss, register, use_mntp_loss
from bivec.engine.tokenizer import mask_token_id

TEXTS = [
    "The river runs past the mill.",
    "Bread",
    "",
    "In spring the boats come from the sea, loaded with salt, and old men sell what their sons have caught at night.",
    "It rains.",
]

register()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def features(tokenizer):
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]


def bidirectional(path, implementation="bivec"):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=implementation)
    model.config.is_causal = False
    return model


def plain_loss(model, batch, divisor=None):
    """METHOD 3.3 in float64, one text at a time: the state in front of every label, softmax, mean."""
    total, count = 0.0, 0
    if "position_ids" in batch:
        bounds = batch["cu_seq_lens_q"].tolist()
        rows = [(batch["input_ids"][0, start:end], batch["labels"][0, start:end]) for start, end in pairwise(bounds)]
    else:
        lengths = batch["attention_mask"].sum(1)
        rows = [(i[:n], y[:n]) for i, y, n in zip(batch["input_ids"], batch["labels"], lengths, strict=True)]
    for ids, labels in rows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        for place in range(1, len(ids)):
            if labels[place] != -100:
                total = total - logits[place - 1].log_softmax(0)[labels[place]]
                count += 1
    return total / (divisor or count), count


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("style", "probability"), [("bert", 0.2), ("all_mask", 0.8)])
@pytest.mark.parametrize("packed", [True, False])
def test_what_the_collator_makes(tokenizer, features, packed, style, probability):
    torch.manual_seed(0)
    collator = MntpCollator(tokenizer, probability, style, packed=packed)
    batches = [collator(features) for _ in range(60)]
    masked = candidates = same = 0
    for batch in batches:
        if packed:
            bounds = batch["cu_seq_lens_q"].tolist()
            assert batch["input_ids"].shape == batch["labels"].shape == (1, bounds[-1])
            assert batch["max_length_q"] == max(len(f["input_ids"]) for f in features)
            rows = [np.s_[0, a:b] for a, b in pairwise(bounds)]
            for row in rows:
                assert batch["position_ids"][row].tolist() == list(range(row[1].stop - row[1].start))
        else:
            rows = [np.s_[i, : int(n)] for i, n in enumerate(batch["attention_mask"].sum(1))]
            assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
            assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
        for row, feature in zip(rows, features, strict=True):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            original = torch.tensor(feature["input_ids"])
            assert len(ids) == len(original)
            assert int(ids[0]) == tokenizer.bos_token_id
            assert int(labels[0]) == -100
            chosen = labels != -100
            assert torch.equal(labels[chosen], original[chosen])
            assert torch.equal(ids[~chosen], original[~chosen])
            masked += int((ids[chosen] == mask_token_id(tokenizer)).sum())
            same += int((ids[chosen] == original[chosen]).sum())
            candidates += len(ids) - 1
    selected = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert selected / candidates == pytest.approx(probability, abs=0.05)
    assert masked / selected == pytest.approx(1.0 if style == "all_mask" else 0.8, abs=0.06)
    assert same / selected == pytest.approx(0.0 if style == "all_mask" else 0.1, abs=0.05)


def test_the_draws_follow_torchs_generator(tokenizer, features):
    collator = MntpCollator(tokenizer, 0.5)
    torch.manual_seed(3)
    first, second = collator(features), collator(features)
    torch.manual_seed(3)
    assert torch.equal(collator(features)["labels"], first["labels"])
    assert not torch.equal(first["labels"], second["labels"])


def test_special_tokens_of_the_features_count(tokenizer, features):
    for feature in features:
        feature["special_tokens_mask"] = [1] * len(feature["input_ids"])
    features[0]["special_tokens_mask"][2] = 0
    labels = MntpCollator(tokenizer, 1.0)(features)["labels"][0]
    assert (labels != -100).nonzero().tolist() == [[2]]


def test_a_text_without_special_tokens_has_no_label_in_front(tokenizer):
    """Its first token can be hidden, and no row is in front of it."""
    feature = {"input_ids": [50, 60, 70], "special_tokens_mask": [0, 0, 0]}
    batch = MntpCollator(tokenizer, 1.0, "all_mask")([feature, feature])
    assert batch["labels"].tolist() == [[-100, 60, 70, -100, 60, 70]]
    assert set(batch["input_ids"].flatten().tolist()) == {mask_token_id(tokenizer)}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_loss_and_gradients_against_float64(tiny_dir, tokenizer, features, family, packed, record_property):
    torch.manual_seed(1)
    batch = MntpCollator(tokenizer, 0.5, packed=packed)(features)
    model = bidirectional(tiny_dir(family))
    applied = use_mntp_loss(model)
    loss = model(**batch).loss
    loss.backward()
    ours = gradients(model)
    applied.remove()
    model = bidirectional(tiny_dir(family), "eager").double()
    expected, count = plain_loss(model, batch)
    assert count > 5
    expected.backward()
    distances = [abs(float(loss.detach()) - float(expected.detach()))]
    distances += [float((ours[n] - g).abs().max() / g.abs().max().clamp(min=1)) for n, g in gradients(model).items()]
    record_property("difference", max(distances))
    assert max(distances) <= 1e-5


def test_a_given_count_divides(tiny_llama_dir, tokenizer, features):
    batch = MntpCollator(tokenizer, 0.5)(features)
    model = bidirectional(tiny_llama_dir)
    use_mntp_loss(model)
    count = int((batch["labels"] != -100).sum())
    whole, half = model(**batch).loss, model(**batch, num_items_in_batch=torch.tensor(2 * count)).loss
    assert float(whole) == pytest.approx(2 * float(half), rel=1e-6)


def test_without_labels_the_model_is_as_before(tiny_llama_dir, features):
    model = bidirectional(tiny_llama_dir)
    ids = torch.tensor([features[0]["input_ids"]])
    before = model(input_ids=ids).logits
    applied = use_mntp_loss(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model(input_ids=ids, labels=ids).logits is None
    applied.remove()
    assert model(input_ids=ids, labels=ids).logits is not None


def test_no_label_no_loss(tiny_llama_dir):
    model = bidirectional(tiny_llama_dir)
    use_mntp_loss(model)
    loss = model(input_ids=torch.tensor([[0, 5, 6]]), labels=torch.tensor([[9, -100, -100]])).loss
    loss.backward()
    assert float(loss) == 0.0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_three_steps_of_the_trainer(tiny_llama_dir, tokenizer, tmp_path):
    """Every step of two accumulated batches: the loss that Trainer logs, against float64 on the same batches."""
    model = bidirectional(tiny_llama_dir)
    use_mntp_loss(model)
    seen, collator = [], MntpCollator(tokenizer, 0.5)

    def collate(features):
        seen.append(collator(features))
        return dict(seen[-1])

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS * 4]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3

    reference = bidirectional(tiny_llama_dir, "eager").double()
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-3)
    for step, loss in enumerate(logged):
        batches = seen[2 * step : 2 * step + 2]
        labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        expected = sum(plain_loss(reference, batch, divisor=labels)[0] for batch in batches)
        assert loss == pytest.approx(float(expected.detach()), abs=1e-4)  # Trainer rounds to four digits
        optimizer.zero_grad()
        # in transformers 5.2 accelerate divides by the accumulated steps once more, in 5.24 by 1
        (expected / trainer.accelerator.gradient_accumulation_steps).backward()
        optimizer.step()
    weights = dict(reference.named_parameters())
    start = dict(bidirectional(tiny_llama_dir).named_parameters())
    for name, weight in model.named_parameters():
        assert (weight - weights[name]).abs().max() <= 1e-6
    assert max(float((weights[name] - start[name]).abs().max()) for name in weights) > 1e-4
    assert trainer.evaluate(rows[:4])["eval_loss"] > 0


def test_a_peft_model_trains_its_adapters_alone(tiny_llama_dir, tokenizer, features):
    from peft import LoraConfig, get_peft_model

    batch = MntpCollator(tokenizer, 0.5)(features)
    model = get_peft_model(bidirectional(tiny_llama_dir), LoraConfig(target_modules=["q_proj", "down_proj"]))
    use_mntp_loss(model)
    loss = model(**batch).loss
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if "lora" in n
    }
    frozen = bidirectional(tiny_llama_dir)
    use_mntp_loss(frozen)
    assert float(loss) == pytest.approx(float(frozen(**batch).loss), abs=1e-5)


def test_what_it_cannot_do_is_refused(tiny_llama_dir, tokenizer, features):
    causal = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with pytest.raises(ConfigError, match=r"set model.config.is_causal = False first"):
        use_mntp_loss(causal)
    sdpa = bidirectional(tiny_llama_dir, "sdpa")
    use_mntp_loss(sdpa)
    with pytest.raises(ConfigError, match=r"'sdpa' would let the texts of a packed batch see each other"):
        sdpa(**MntpCollator(tokenizer)(features))
    assert sdpa(**MntpCollator(tokenizer, 0.5, packed=False)(features)).loss > 0
    with pytest.raises(ConfigError, match="no causal language model of a known family in this LlamaModel"):
        use_mntp_loss(causal.model)
    model = bidirectional(tiny_llama_dir)
    model.lm_head = torch.nn.Linear(64, 1000)
    with pytest.raises(ConfigError, match="leave lm_head out"):
        use_mntp_loss(model)
    model = bidirectional(tiny_llama_dir)
    use_mntp_loss(model)
    with pytest.raises(ConfigError, match="a forward of its own already"):
        use_mntp_loss(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir, pad_token=None)
    with pytest.raises(ConfigError, match="no pad token"):
        MntpCollator(tokenizer, packed=False)(features)


def test_the_loss_by_itself():
    """Rows against a plain cross-entropy, the head's gradient included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    labels = torch.tensor([[4, -100, 3, -100, 0], [-100, -100, 10, 2, -100]])
    loss = mntp_loss(hidden, weight, labels)
    ours = torch.autograd.grad(loss, [hidden, weight])
    rows = torch.stack([hidden[0, 1], hidden[0, 3], hidden[1, 1], hidden[1, 2]])
    expected = torch.nn.functional.cross_entropy(rows @ weight.T, torch.tensor([3, 0, 10, 2]))
    for got, want in zip([loss, *ours], [expected, *torch.autograd.grad(expected, [hidden, weight])], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
