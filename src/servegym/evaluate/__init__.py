"""Judging policies: metrics, paired comparisons, tables and reports."""
