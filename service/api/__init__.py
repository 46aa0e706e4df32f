"""The HTTP API for programs: orders, events, the audit, the quarantine, operations, metrics, and the contract.

It imports service.ingest, service.event_log, service.http and service.database, and reads the projections.
Start with orders.py: every endpoint is declared beside its query model and its handler.
"""
