"""The command line of the recipes: flags, --set, --smoke, and how two recipes are compared."""

import dataclasses

import pytest

from bivec.engine.errors import ConfigError, RunError
from bivec.engine.optim import OptimConfig
from bivec.engine.recipe import MntpStage, Recipe, SimcseStage, as_dict, differences, with_horizon
from bivec.engine.recipe_arguments import parse_arguments
from bivec.models import DecoderConfig

SHAPE = DecoderConfig(
    model_type="llama",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
RECIPE = Recipe("name", "owner/model", "m.txt", "s.txt", "dev.csv", "test.csv", shape=SHAPE, bos_token="<s>")


def parse(*arguments):
    return parse_arguments(RECIPE, "a recipe", list(arguments))


def test_no_flags_change_nothing():
    recipe, options = parse()
    assert recipe == RECIPE
    assert (str(options.output_dir), options.resume, options.dry_run) == ("runs/name", False, False)
    assert options.device is None and options.backend is None


def test_flags_reach_their_fields():
    words = "--model m --mntp-data a --simcse-data b --mntp-column c --simcse-column d --sts-dev e --sts-test f "
    words += "--seed 7 --dtype bfloat16 --full-eval --output-dir o --resume --dry-run --device cpu --backend torch"
    recipe, options = parse(*words.split())
    given = (recipe.model, recipe.mntp_data, recipe.simcse_data, recipe.mntp_column, recipe.simcse_column)
    assert given == ("m", "a", "b", "c", "d")
    assert (recipe.sts_dev, recipe.sts_test, recipe.seed, recipe.dtype) == ("e", "f", 7, "bfloat16")
    assert recipe.eval_pairs is None
    assert (str(options.output_dir), options.resume, options.dry_run) == ("o", True, True)
    assert (options.device, options.backend) == ("cpu", "torch")


def test_what_belongs_to_the_default_model_goes_with_it():
    assert parse("--seed", "1")[0].shape == SHAPE and parse()[0].bos_token == "<s>"
    other, _ = parse("--model", "another/model")
    assert other.shape is None and other.bos_token is None
    assert parse("--model", "another/model", "--set", "bos_token=<b>")[0].bos_token == "<b>"


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("bi", ("bi",)),
        ("mntp", ("bi", "mntp")),
        ("simcse, bi", ("bi", "simcse")),
        ("simcse,mntp,bi", ("bi", "mntp", "simcse")),
    ],
)
def test_stages(text, stages):
    assert parse("--stages", text)[0].stages == stages


@pytest.mark.parametrize(("text", "named"), [("bi,mlm", "mlm"), ("", "none given"), ("MNTP", "MNTP")])
def test_unknown_stages(text, named):
    with pytest.raises(RunError, match=rf"--stages .*{named}.*bi, mntp, simcse"):
        parse("--stages", text)


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("mntp.optim.steps=500", lambda r: r.mntp.optim.steps, 500),
        ("simcse.optim.learning_rate=1e-3", lambda r: r.simcse.optim.learning_rate, 1e-3),
        ("simcse.batch_size=64", lambda r: r.simcse.batch_size, 64),
        ("mntp.micro_batch_tokens=none", lambda r: r.mntp.micro_batch_tokens, None),
        ("mntp.decay_epochs=None", lambda r: r.mntp.decay_epochs, None),
        ("mntp.optim.horizon=900", lambda r: r.mntp.optim.horizon, 900),
        ("mntp.bos_in_every_block=true", lambda r: r.mntp.bos_in_every_block, True),
        ("pool_bos=True", lambda r: r.pool_bos, True),
        ("mntp.mask_style=all_mask", lambda r: r.mntp.mask_style, "all_mask"),
        ("mntp.optim.betas=0.9,0.95", lambda r: r.mntp.optim.betas, (0.9, 0.95)),
        ("simcse.lora.targets=q_proj, v_proj", lambda r: r.simcse.lora.targets, ("q_proj", "v_proj")),
        ("simcse.lora.rank=8", lambda r: r.simcse.lora.rank, 8),
        ("data_limit=10", lambda r: r.data_limit, 10),
        ("bos_token=a=b", lambda r: r.bos_token, "a=b"),
    ],
)
def test_set(assignment, read, value):
    recipe, _ = parse("--set", assignment)
    assert read(recipe) == value and read(recipe) != read(RECIPE)
    assert len(differences(as_dict(RECIPE), as_dict(recipe))) == 1


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("mntp.steps=5", r"mntp\.steps: no such hyper-parameter; here are .*batch_size"),
        ("nothing=5", r"nothing: no such hyper-parameter"),
        ("mntp.optim.steps.x=5", r"steps has no parts"),
        ("mntp.optim=5", r"mntp\.optim: give one of its parts: learning_rate"),
        ("mntp.optim.steps", r"expected KEY=VALUE"),
        ("mntp.optim.steps=many", r"mntp\.optim\.steps=many: expected int"),
        ("mntp.optim.steps=0", r"mntp\.optim\.steps=0: .*must be positive"),
        ("mntp.optim.learning_rate=nan", r"learning_rate"),
        ("mntp.optim.betas=0.9", r"betas=0\.9: expected tuple\[float, float\]"),
        ("mntp.optim.betas=0.9,1.5", r"betas in \[0, 1\)"),
        ("mntp.bos_in_every_block=yes", r"expected bool"),
        ("mntp.mask_probability=1.5", r"mask_probability is 1\.5, expected above 0 and at most 1"),
        ("mntp.mask_probability=0", r"mask_probability is 0\.0"),
        ("mntp.mask_style=roberta", r"mask_style is 'roberta', expected one of bert, all_mask"),
        ("mntp.mask_token=underscore", r"mask_token is 'underscore', expected one of blank, eos, mask"),
        ("mntp.batch_size=0", r"batch_size is 0, expected at least 1"),
        ("mntp.sequence_length=1", r"sequence_length is 1, expected at least 2"),
        ("mntp.micro_batch_tokens=0", r"micro_batch_tokens is 0"),
        ("mntp.decay_epochs=0", r"decay_epochs is 0"),
        ("mntp.save_every=-1", r"save_every is -1"),
        ("mntp.lora.rank=0", r"rank of at least 1"),
        ("mntp.lora.targets=q_proj,qkv", r"lora\.targets names qkv, expected some of q_proj"),
        ("simcse.batch_size=1", r"batch_size is 1, expected at least 2"),
        ("simcse.attention_dropout=1", r"attention_dropout in \[0, 1\)"),
        ("simcse.scale=0", r"scale above 0"),
        ("eval_pairs=1", r"eval_pairs is 1, expected at least 2"),
        ("data_limit=0", r"data_limit is 0"),
        ("model=x", r"flag of its own, --model"),
        ("stages=mntp", r"flag of its own, --stages"),
        ("mntp_data=x", r"flag of its own, --mntp-data"),
        ("shape.num_layers=x", r"shape\.num_layers=x: expected int"),
    ],
)
def test_set_names_what_is_wrong(assignment, message):
    with pytest.raises(RunError, match=message) as error:
        parse("--set", assignment)
    assert str(error.value).startswith(f"--set {assignment.partition('=')[0]}")


def test_set_of_what_has_no_text():
    """The shape of another model than the recipe's is not known here, and cannot be given."""
    with pytest.raises(RunError, match=r"--set shape: a DecoderConfig \| None cannot be given on the command line"):
        parse("--model", "another/model", "--set", "shape=x")
    assert parse("--model", "another/model", "--set", "shape=none")[0].shape is None


@pytest.mark.parametrize("arguments", [["--seed", "abc"], ["--backend", "cuda"], ["--unknown"], ["--seed"]])
def test_argparse_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_smoke_is_short_and_set_has_the_last_word():
    recipe, _ = parse("--smoke", "--set", "mntp.optim.steps=4")
    assert recipe.mntp.optim.steps == 4 and recipe.simcse.optim.steps == 3
    assert recipe.mntp.sequence_length == 32 and recipe.data_limit == 200 and recipe.eval_pairs == 16
    assert recipe.mntp.optim.learning_rate == RECIPE.mntp.optim.learning_rate  # nothing else
    assert recipe.mntp.mask_probability == RECIPE.mntp.mask_probability


def test_differences():
    old = as_dict(RECIPE)
    assert differences(old, as_dict(RECIPE)) == []
    changed = dataclasses.replace(
        RECIPE,
        seed=1,
        mntp=dataclasses.replace(RECIPE.mntp, optim=OptimConfig(1e-3, 1000)),
        simcse=dataclasses.replace(RECIPE.simcse, scale=50.0),
    )
    assert differences(old, as_dict(changed)) == [
        "mntp.optim.learning_rate (was 5e-05, now 0.001)",
        "seed (was 42, now 1)",
        "simcse.scale (was 20.0, now 50.0)",
    ]
    del old["pool_bos"]  # written by a version that did not have it
    assert differences(old, as_dict(RECIPE)) == ["pool_bos (was None, now False)"]


def test_the_horizon():
    optim = OptimConfig(1e-3, 100)
    assert with_horizon(optim, None, 1000, 10).horizon is None
    assert with_horizon(optim, 3, 1001, 10).horizon == 303  # the last, smaller batch counts as a step
    assert with_horizon(optim, 1, 50, 10).horizon == 100  # never before the stop
    given = OptimConfig(1e-3, 100, horizon=400)
    assert with_horizon(given, 3, 1000, 10) == given


@pytest.mark.parametrize("stage", [MntpStage, SimcseStage])
def test_stages_are_checked_in_python_too(stage):
    with pytest.raises(ConfigError, match="batch_size is -2"):
        stage(batch_size=-2)
