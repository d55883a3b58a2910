"""Exercises that check themselves.

from llmopt_lab.grading import check, hint
check("paged_attention.slot_mapping", slot_mapping)     # "done, 2 points", or what is wrong
hint("paged_attention.slot_mapping", 1)                 # the first of its graduated hints
"""

from llmopt_lab.grading.checks import NotYet, check, hint

__all__ = ["NotYet", "check", "hint"]
