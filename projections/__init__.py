"""The views: tables that are computed from the log, and can be rebuilt from it at any time.

It imports the domain, asyncpg and structlog; the service passes connections and a decoded log. Start with
current_status.py, a whole view in one file, then engine.py, which keeps every view at the log's head.
"""
