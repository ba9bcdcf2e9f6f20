"""Scores for responses: answer comparison, reward rules, and the killable processes that run them.

Import from the modules: ``answers`` (extraction, equality), ``rules`` (``RULES``, ``load_rule``), ``service``
(``RewardService``). Nothing here imports torch.
"""
