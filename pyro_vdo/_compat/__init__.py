"""The only place that knows private names of Pyro and torch, and what differs between their versions."""
