"""What is wrong with a candidate: traces of other programs, error budgets, re-runs, known mistakes."""
