"""How `flash/nano` is made: tasks, tokenizer, training, evaluation.

Development code. It is not part of the installed package, which carries only the result
(`src/flash/catalog/nano/`).
"""
