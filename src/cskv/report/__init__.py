"""Result files to one page: tables, figures, and where every figure comes from."""

from cskv.report.page import Report, write_report
from cskv.report.sources import Sources, gather

__all__ = ["Report", "Sources", "gather", "write_report"]
