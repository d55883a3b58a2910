"""Exercises that check themselves.

from llmopt_lab.grading import check, hint
check("paged_attention.slot_mapping", slot_mapping)     # "done, 2 points", or what is wrong
hint("paged_attention.slot_mapping", 1)                 # the first of its graduated hints
"""

__all__ = ["NotYet", "check", "hint"]


def __getattr__(name: str):
    # the nbval plugin is in this package, too, and must start without torch: a third of its time
    if name in __all__:
        from llmopt_lab.grading import checks

        return getattr(checks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
