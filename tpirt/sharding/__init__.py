"""Partition arithmetic, and the tables that define how each weight is split."""
