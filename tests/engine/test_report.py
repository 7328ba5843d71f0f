"""The result as a table and as a figure."""

import pytest

from bivec.engine.errors import CheckpointError
from bivec.engine.report import StageResult, draw_results, results_table, similarity_table

RESULTS = [
    StageResult("uni", "mean", 47.06, 33.0),
    StageResult("uni weighted-mean", "weighted_mean", -3.04, 1.25),
    StageResult("bi", "mean", 10.849),
    StageResult("bi+mntp", "mean", 70.0, 60.0),
]
CURVES = {"mntp": [(1, 5.0), (2, 4.5), (3, 4.1)], "simcse": [(1, 0.3)]}


def test_the_table():
    assert results_table(RESULTS, {"dev": 500, "test": 490}).splitlines() == [
        "| stage | pooling | STS-B dev (500 pairs) | STS-B test (490 pairs) |",
        "|---|---|---|---|",
        "| uni | mean | 47.1 | 33.0 |",
        "| uni weighted-mean | weighted_mean | -3.0 | 1.2 |",
        "| bi | mean | 10.8 |  |",
        "| bi+mntp | mean | 70.0 | 60.0 |",
    ]


def test_the_content_of_results_json():
    assert RESULTS[2].to_dict() == {
        "stage": "bi",
        "pooling": "mean",
        "sts_dev_spearman": 10.849,
        "sts_test_spearman": None,
    }


def test_similarities_stand_under_their_numbers():
    table = similarity_table(["One.", "Another one."], [[1.0, 0.25], [0.25, 1.0]])
    header, *rows = table.splitlines()
    assert rows == ["[1] One.          1.00  0.25", "[2] Another one.  0.25  1.00"]
    assert [header.index("[1]"), header.index("[2]")] == [rows[0].index("1.00"), rows[0].index("0.25")]


@pytest.mark.parametrize("curves", [{}, {"mntp": CURVES["mntp"]}, CURVES], ids=["none", "one", "two"])
def test_the_figure(curves, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "results.png"
    draw_results(path, "a run", RESULTS, curves)
    image = imread(path)
    assert image.shape[1] > 600 and image[..., :3].std() > 0.02  # not blank
    assert [file.name for file in tmp_path.iterdir()] == ["results.png"]


def test_a_figure_wider_by_each_curve(tmp_path):
    from matplotlib.image import imread

    widths = []
    for count in range(3):
        path = tmp_path / f"{count}.png"
        draw_results(path, "a run", RESULTS, dict(list(CURVES.items())[:count]))
        widths.append(imread(path).shape[1])
    assert widths == sorted(set(widths))


def test_a_full_disk_keeps_the_old_figure(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "results.png"
    path.write_bytes(b"old")

    def full(self, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(CheckpointError, match=r"results\.png: the disk is full"):
        draw_results(path, "a run", RESULTS, CURVES)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
