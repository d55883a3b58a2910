"""One player for every chapter: a chapter turns its trace into frames, the player shows them.

    from llmopt_lab.widgets.player import Player, compare
    from llmopt_lab.widgets.predict import Predict
    from llmopt_lab.widgets.complete import Complete

Nothing is re-exported here: `panels` and `draw` work on machines that have no notebook.
"""
