"""Measurements: what a run costs, where the time goes, and under which conditions that was so."""
