"""Figures, pages and tables that show what immunization did."""

from mima.report.figures import curve_sheet, house_style, picture_sheet
from mima.report.page import write_report

__all__ = ["curve_sheet", "house_style", "picture_sheet", "write_report"]
