"""The views: tables that projections keep from the log, and that can be rebuilt from it at any time.

It imports the domain, asyncpg and structlog; the service hands it connections and a decoded log. Start with
current_status.py, a whole view in one file, then engine.py, which keeps every view at the log's head.
"""
