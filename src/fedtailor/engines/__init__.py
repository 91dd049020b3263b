"""Engines hold the conversation: they take letters, let the clients work, and give back what arrived."""
