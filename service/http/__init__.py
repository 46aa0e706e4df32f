"""HTTP at the edge: the server, request bodies, API keys, declared endpoints, pages of lists, and problems.

It imports service.database for API keys and errors, and service.settings, but neither orders nor the log.
Start with endpoints.py, whose declarations define the routes and the OpenAPI document.
"""
