"""The study: how immune each method makes concepts, against whom, for how long, at what price.

    python -m benchmarks.immunity cells --cut full
    python -m benchmarks.immunity run CELL -o DIR
    python -m benchmarks.immunity all -o DIR --cut small
    python -m benchmarks.immunity status -o DIR --cut small
    python -m benchmarks.immunity keep -o DIR --cut small
    python -m benchmarks.immunity report -o DIR --cut breadth [--docs docs/results.md]

A cell is one immunized model and every attack on it. Each command may be stopped and given again.
`keep` copies the figures of finished cells into `records/`, which belongs to the checkout: such a
cell is reported from there, and not run again, while its settings are today's.
"""
