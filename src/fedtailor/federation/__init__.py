"""Owners on machines of their own: a server, members that dial out to it, one port, mutual TLS, messages and nothing else."""
