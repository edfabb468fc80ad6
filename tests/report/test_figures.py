import numpy as np
import pytest
from PIL import Image

from mima.concepts.pictures import PictureError
from mima.report import curve_sheet, picture_sheet
from mima.report.figures import ORIGINAL, RUN_COLOURS, Line, save_figure


def line(values, label="original", colour=ORIGINAL):
    steps = tuple(range(0, 25 * len(values), 25))
    return Line(label=label, steps=steps, values=values, low=values, high=values, colour=colour)


def pixels_of(figure, path):
    save_figure(figure, path)
    with Image.open(path.with_name(f"{path.name}.png")) as image:
        return np.asarray(image.convert("RGB"), int)


def near(pixels, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - wanted) < 12).all(-1)


def test_curves_are_drawn_where_the_numbers_are(tmp_path):
    lines = [line((0.4, 0.6, 0.8)), line((0.2, 0.3, 0.4), "immunized", RUN_COLOURS[0])]
    figure = curve_sheet([("a cat", lines)], quantity="similarity")
    pixels = pixels_of(figure, tmp_path / "curves")[160:]
    original, immunized = (
        np.nonzero(near(pixels, c).sum(1) > 2)[0] for c in (ORIGINAL, RUN_COLOURS[0])
    )
    assert original.min() < immunized.min()
    assert np.ptp(original) == pytest.approx(2 * np.ptp(immunized), rel=0.25)
    text = (tmp_path / "curves.svg").read_text()
    for part in ("a cat", "original", "immunized", "adaptation step"):
        assert f">{part}<" in text


def test_curves_that_coincide_are_both_visible(tmp_path):
    lines = [line((0.4, 0.6, 0.8)), line((0.4, 0.6, 0.8), "immunized", RUN_COLOURS[0])]
    pixels = pixels_of(curve_sheet([("cat", lines)], quantity="s"), tmp_path / "curves")[160:]
    counts = [near(pixels, colour).sum() for colour in (ORIGINAL, RUN_COLOURS[0])]
    assert min(counts) > 500


def test_pictures_are_in_their_row_and_column(tmp_path):
    colours = [["#ff0000", "#00ff00"], ["#0000ff", "#ffff00"]]
    columns = []
    for x in range(2):
        files = []
        for y in range(2):
            file = tmp_path / f"{x}{y}.png"
            Image.new("RGB", (4, 4), colours[y][x]).save(file)
            files.append(file)
        columns.append((f"column {x}", files))
    columns.append(("empty", [None, None]))
    pixels = pixels_of(picture_sheet(["first", "second"], columns), tmp_path / "grid")
    centres = {}
    for y, row in enumerate(colours):
        for x, colour in enumerate(row):
            ys, xs = np.nonzero(near(pixels, colour))
            centres[y, x] = ys.mean(), xs.mean()
    assert centres[0, 0][0] == pytest.approx(centres[0, 1][0], abs=1)
    assert centres[0, 0][0] < centres[1, 0][0]
    assert centres[0, 0][1] == pytest.approx(centres[1, 0][1], abs=1)
    assert centres[0, 0][1] < centres[0, 1][1]


def test_empty_sheets_are_refused():
    with pytest.raises(ValueError, match="panels is empty"):
        curve_sheet([], quantity="s")
    with pytest.raises(ValueError, match="1 rows and columns of"):
        picture_sheet(["row"], [("a", [])])


def test_postscript_is_no_picture_of_a_results_folder(tmp_path):
    file = tmp_path / "0.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(PictureError, match=r"0\.png: not a picture"):
        picture_sheet(["row"], [("a", [file])])
