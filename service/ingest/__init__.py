"""A report's path: from the webhook through the parser and the recorder to its event and its receipt.

It imports the domain, service.event_log, service.http and service.database; nothing here uses a view.
Start with webhook.py and follow one report: webhook, webhook_auth, parser, recorder, order_states.
"""
