"""The HTTP routes: native, of old clients, of operators, and those that only watch."""
