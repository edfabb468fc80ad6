"""Bi-level optimisation: unrolled lower levels, hypergradients, the two-pass outer step."""
