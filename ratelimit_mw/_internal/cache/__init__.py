"""Answers that a process gives without asking the backend: remembered refusals, units taken ahead."""
