"""Two or more models into one: a merge that a seed fixes and that anybody can repeat.

configuration.py   mergekit's YAML, and what goes beyond it, checked
arithmetic.py      the rule: every operation, its rounding and its order
masks.py           which elements a random draw keeps
plan.py            what each tensor of the output is made from
merge.py           the command's work: a directory of floats, or INT8 and INT4
verify.py          a merge against its provenance and its sources
"""
