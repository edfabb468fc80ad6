"""Immunization: the algorithm, its two levels, its settings and its results."""
