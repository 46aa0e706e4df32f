"""PostgreSQL: connections, the schema and its migrations, API keys, and the embedded server.

It imports projections, for their views and errors, and service.settings; nothing here uses HTTP or the log.
Start with connections.py, then schema.py, which applies schema.sql and splits it into the views' sections.
"""
