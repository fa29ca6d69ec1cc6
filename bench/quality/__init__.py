"""Does SLA2 learn? A small video diffusion transformer, with full and with sparse attention.

`run.py` is the command; docs/quality.md says what is done and shows the results.
"""
