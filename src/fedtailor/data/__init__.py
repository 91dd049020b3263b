"""Data that stays with its owners: where it comes from, who holds which rows, how it is encoded."""
