"""What runs a view: it follows the log with it, rebuilds it, and knows how far it has come."""
