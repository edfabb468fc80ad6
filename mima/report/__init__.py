"""Figures and pages that show what immunization did."""

from mima.report.figures import (
    ATTACK_ROWS,
    GridColumn,
    attack_columns,
    house_style,
    image_grid,
    plot_curves,
)
from mima.report.page import write_report

__all__ = [
    "ATTACK_ROWS",
    "GridColumn",
    "attack_columns",
    "house_style",
    "image_grid",
    "plot_curves",
    "write_report",
]
