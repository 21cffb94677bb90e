"""What quantizing costs on text: a quantized model against its source, token by token.

routing.py   experts that are noted, and experts that are followed
swap.py      a model with some layers of another
compare.py   models beside a base, in step: one value a scored token
figures.py   those values as figures
measure.py   the report, a dict for JSON
tables.py    the report as text and Markdown
page.py      the report as one HTML page
card.py      a model card, with these figures or with those of the weights alone
"""
