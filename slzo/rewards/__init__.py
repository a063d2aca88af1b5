"""Reward functions, which score answers as texts, and the process that runs them.

``answer_batch`` (:mod:`slzo.evaluation.rewarding`) makes the functions' arguments from rows and answers. ``RewardRunner`` weighs
the functions and handles failures. It calls them through ``RewardProcess``, whose process runs ``serve``, or in this process.
"""
