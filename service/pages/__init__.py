"""The web pages show orders, their timelines and the quarantine to people, in Indonesian and in English.

They may import ``service.api``, ``service.ingest``, ``service.event_log``, ``service.http``,
``service.database``, ``service.settings``, ``projections`` and ``domain``. Start reading at ``handlers.Pages``,
which has a method for each page.
"""
