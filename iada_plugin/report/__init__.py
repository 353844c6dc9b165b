"""What Meta-IADA did to the samples, as pictures, tables and a page."""

from .report import Report

__all__ = ["Report"]
