"""The web page: what is known of orders and of the service, drawn for people."""
