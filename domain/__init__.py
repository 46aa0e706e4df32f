"""The rules: the status vocabulary, the transition table, and the decision on each report.

It uses the standard library and the aggregate classes of eventsourcing, but neither a clock nor I/O.
Start with order.py, whose ``decide`` judges each report and whose ``evolve`` applies each event.
"""
