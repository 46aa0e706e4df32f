"""Subscriptions: order events are sent to the shop's own endpoints, in order for each order, at least once.

A subscription is a projection whose output is HTTP: ``delivery`` follows the log for one of them, and
``dispatcher`` shares them out among the processes. It may import the packages below ``service.api``. Start with
``subscription``, then read ``delivery``.
"""
