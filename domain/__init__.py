"""The rules: the status vocabulary, the transition table, and the decision that one report brings about.

It imports the standard library and the aggregate classes of eventsourcing, and has no clock and no I/O.
Start with order.py, whose ``decide`` judges each report and whose ``evolve`` applies each event.
"""
