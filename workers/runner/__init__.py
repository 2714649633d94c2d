"""Execution of step plans on one rank: runners on CPU and GPU, KV cache, step inputs and results, sampling, bring-up.

A rank decides nothing: the plan comes from the leader's scheduler (:mod:`workers.scheduler`).
"""
