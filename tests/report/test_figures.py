import numpy as np
import pytest
from matplotlib import rcParams
from PIL import Image

from mima.evaluation import AttackCurve
from mima.report import ATTACK_ROWS, GridColumn, attack_columns, image_grid, plot_curves

NAMES = {"r": "red", "g": "lime", "b": "blue", "y": "yellow", "c": "cyan", "m": "magenta"}


def flat(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def curve(scale, concept="cat", images=()):
    scores = scale * np.array([0.4, 0.6, 0.8])[:, None, None] * np.ones((3, 2, 2))
    return AttackCurve(
        concept=concept,
        method="lora",
        encoder="colour",
        steps=(0, 25, 50),
        prompts=("a cat", "a big cat"),
        seeds=(0, 1),
        scores=scores,
        images=images,
        references=((flat("black"),), (flat("grey"), flat("white"))),
        losses=(),
    )


def test_curves_name_what_they_show(tmp_path):
    pairs = [
        (curve(1.0, name), curve(scale, name)) for name, scale in (("cat", 0.75), ("<dog>", 1.0))
    ]
    settings = dict(rcParams)
    path = plot_curves(
        pairs,
        tmp_path / "curves.svg",
        labels=("erased", "immunized"),
        ceiling={"cat": 0.95},
        notes={"<dog>": "to be kept"},
    )
    text = path.read_text()
    for part in ("cat", "&lt;dog&gt;", "erased", "immunized", "before erasing", "to be kept"):
        assert f">{part}<" in text
    assert "mean SGR +0.25, at step 50 +0.25" in text
    assert "mean SGR +0.00, at step 50 +0.00" in text
    assert dict(rcParams) == settings


def test_curves_are_drawn_where_the_numbers_are(tmp_path):
    path = plot_curves([(curve(1.0), curve(0.5))], tmp_path / "curves.png")
    pixels = np.asarray(Image.open(path).convert("RGB"), int)

    def rows_of(colour):
        return np.nonzero((np.abs(pixels - colour) < 12).all(-1).sum(1) > 2)[0]

    original, immunized = rows_of((0xD5, 0x5E, 0x00)), rows_of((0x00, 0x72, 0xB2))
    # below the legend: original from 0.4 to 0.8, immunized from 0.2 to 0.4 of the axis
    legend = len(pixels) // 5
    original, immunized = original[original > legend], immunized[immunized > legend]
    assert original.min() < immunized.min()
    assert np.ptp(original) == pytest.approx(2 * np.ptp(immunized), rel=0.2)


def test_no_curves_are_refused(tmp_path):
    with pytest.raises(ValueError, match="attacks is empty"):
        plot_curves([], tmp_path / "curves.png")


def test_grid_puts_each_picture_in_its_row_and_column(tmp_path):
    colours = [["#ff0000", "#00ff00", "#0000ff"], ["#ffff00", "#00ffff", None]]
    columns = [
        GridColumn(
            heading=f"prompt {index}",
            group="one" if index < 2 else "two",
            images=[row[index] and flat(row[index], (4, 4)) for row in colours],
            scores=(0.5, None),
        )
        for index in range(3)
    ]
    path = image_grid(["first\nwith a note", "second"], columns, tmp_path / "grid.png", size=64)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    centres = {}
    for row in range(2):
        for column in range(3):
            if colours[row][column] is None:
                continue
            wanted = [int(colours[row][column][i : i + 2], 16) for i in (1, 3, 5)]
            ys, xs = np.nonzero((pixels == wanted).all(-1))
            # exactly the enlarged picture, a square without blurred edges
            assert len(ys) == 64 * 64
            assert np.ptp(ys) == np.ptp(xs) == 63
            centres[row, column] = (ys.mean(), xs.mean())
    assert centres[0, 0][0] == centres[0, 1][0] == centres[0, 2][0] < centres[1, 0][0]
    assert centres[0, 0][1] == centres[1, 0][1] < centres[0, 1][1] < centres[0, 2][1]
    # groups stand apart
    assert centres[0, 2][1] - centres[0, 1][1] > centres[0, 1][1] - centres[0, 0][1]


def test_small_pictures_are_enlarged_without_blur(tmp_path):
    checks = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).resize((2, 2), 0)
    path = image_grid(["row"], [GridColumn(heading="", images=[checks])], tmp_path / "a.png")
    grey = np.asarray(Image.open(path).convert("L"))
    # the lower left quarter is white, the upper left one black: 96×96 each
    black = np.argwhere(grey == 0)
    top, left = black.min(0)
    assert (grey[top : top + 96, left : left + 96] == 0).all()
    assert (grey[top + 96 : top + 192, left : left + 96] == 255).all()
    assert (grey[top + 96 : top + 192, left + 96 : left + 192] == 0).all()


def test_attack_columns_take_the_last_step(tmp_path):
    def images(*colours):
        return tuple(
            tuple((flat(NAMES.get(c, c)), flat(NAMES.get(c, c))) for c in step) for step in colours
        )

    erased = curve(1.0, images=images("rg", "gb", "br"))
    immunized = curve(0.5, images=images("yc", "cm", "my"))
    before = [[flat(NAMES["r"]), flat(NAMES["g"])], [flat(NAMES["b"]), flat(NAMES["c"])]]
    columns = attack_columns((erased, immunized), before, seed_index=1)
    assert [column.heading for column in columns] == ["a cat", "a big cat"]
    assert [column.group for column in columns] == ["cat", "cat"]
    assert columns[0].scores == pytest.approx((None, 0.8, 0.4, None))
    shown = [[image.getpixel((0, 0)) for image in column.images] for column in columns]
    expected = [["g", "b", "m", "black"], ["c", "r", "y", "grey"]]
    assert shown == [
        [flat(NAMES.get(c, c)).getpixel((0, 0)) for c in column] for column in expected
    ]
    assert len(attack_columns((erased, immunized), before, prompts=1)) == 1
    image_grid(ATTACK_ROWS, columns, tmp_path / "grid.png")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "1 rows and 0 columns"),
        ([GridColumn(heading="a", images=[])], "'a' has 0 images for 1 rows"),
        ([GridColumn(heading="a", images=[None], scores=(1, 2))], "'a' has 2 scores for 1 rows"),
    ],
)
def test_grid_refuses_what_does_not_fit(columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        image_grid(["row"], columns, tmp_path / "grid.png")
