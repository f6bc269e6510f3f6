"""What every room speaks: units, selections, contexts, cards, errors; the operations of grafts; and five folders.

`grafts/` changes and how they go on and off. `compact/` training of chosen numbers. `taps/` what units hold while a
model runs. `prompts/` places in a text. `numerics/` what knows nothing of models. The operations stay at the root,
because the names of their modules stand in files.
"""
