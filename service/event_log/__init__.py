"""The event log: encoding, the append statement, and the two ways to follow the log.

It imports the domain, projections and service.database, but nothing of HTTP.
Start with store.py, whose ``append`` is the one statement that records events.
"""
