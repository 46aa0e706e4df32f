"""A simulated Komerce, and the registration of a webhook with the real one.

It may import ``service.ingest``, ``service.http``, ``service.database``, ``service.event_log``,
``service.settings`` and ``domain``.
Start reading at ``lifecycles.py`` (what is sent), then ``simulator.py`` (how) and ``account.py`` (the result).
"""
