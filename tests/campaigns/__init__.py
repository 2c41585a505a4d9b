"""Campaigns: a server in real processes under random traffic, bad input, overload and sudden death.

`python -m tests.campaigns --help` lists them. Each has an oracle that knows nothing of the engine's inside, a short
form that CI runs on every change (tests/test_campaigns.py, which also plants faults and sees each campaign go red),
and a long form whose figures are kept in nbs/data/40c_trust.json.
"""
