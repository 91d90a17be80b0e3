"""The report of a run: `report.json`, one self-contained HTML page, and the summary on the terminal."""

from sparsefit.reporting.console import stage_progress, summary
from sparsefit.reporting.pages import render_html
from sparsefit.reporting.report import read_json, write_json

__all__ = ["read_json", "render_html", "stage_progress", "summary", "write_json"]
