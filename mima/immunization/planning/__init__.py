"""What a run will train and need, said before any weight is loaded."""
