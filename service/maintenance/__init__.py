"""Maintenance of the log and the views: replay, audit, backup, and the check of the whole installation.

It imports service.event_log, service.database and service.settings, but nothing of HTTP.
Start with replay.py: it rebuilds the views, for the command of that name and for the service at its start.
"""
