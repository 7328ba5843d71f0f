"""What is read out of run directories."""

import json

import pytest

from bivec.engine.run_files import RUN_FILE, base_model


def made_of(directory, model):
    directory.mkdir(exist_ok=True)
    (directory / RUN_FILE).write_text(json.dumps({"recipe": {"model": str(model)}}))
    return directory


def test_the_base_of_a_chain_of_runs(tmp_path):
    first = made_of(tmp_path / "first", "owner/decoder")
    third = made_of(tmp_path / "third", made_of(tmp_path / "second", first))
    assert base_model(str(third)) == base_model(str(first)) == base_model("owner/decoder") == "owner/decoder"
    made_of(first, tmp_path / "folder")  # a decoder's folder, which is no run
    assert base_model(str(third)) == str(tmp_path / "folder")


def test_runs_that_were_made_of_each_other_have_no_base(tmp_path, monkeypatch):
    """A directory may be used again; the search ends all the same, also where one is written in two ways."""
    monkeypatch.chdir(tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    made_of(made_of(one, other), "./other/../other/")
    made_of(other, "one")
    assert base_model(str(one)) == "one" and base_model("one") == "one"
    assert base_model(str(made_of(tmp_path / "third", one))) == "one"
    made_of(one, one)
    assert base_model("one") == str(one)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert base_model(str(tmp_path / "loop")) == str(tmp_path / "loop")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": null}', '{"recipe": {}}', "\x00"])
def test_a_run_file_of_another_kind_says_nothing(content, tmp_path):
    (tmp_path / RUN_FILE).write_text(content)
    assert base_model(str(tmp_path)) == str(tmp_path)
