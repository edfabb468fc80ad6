"""Benchmarks of the operators.

`pytest benchmarks/ --benchmark-json=results.json`, then `python -m benchmarks.report results.json`.
"""
